"""The GAN of DMD2 (section 4.3): heads that tell real from generated images by a network's features; the losses."""

import torch
import torch.nn.functional as F
from torch import nn

from model import group_norm


def gan_head(channels, resolution):
    """A head from a feature map `[B, channels, resolution, resolution]` to a logit `[B, 1]`, positive for "real".

    As in DMD2's code: convolutions of stride 2 until the map is at most 4x4, one over all of it, and a linear layer.
    """
    layers = []
    while resolution > 4:
        layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), group_norm(channels), nn.SiLU()]
        resolution //= 2
    layers += [nn.Conv2d(channels, channels, resolution), group_norm(channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 1))


class Discriminator(nn.Module):
    """One head per feature map: from a list of `[B, channels, h, w]` to logits `[B, number of heads]`, float32.

    feature_channels: a dict from resolutions to the width of the feature map there; resolutions: those to use
    """

    def __init__(self, feature_channels, resolutions):
        super().__init__()
        self.heads = nn.ModuleList(gan_head(feature_channels[resolution], resolution) for resolution in resolutions)

    def forward(self, features):
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1).float()


def generator_gan_loss(fake_logits):
    """DMD2 eq. 4 for the generator, non-saturating: mean softplus(-logit) of generated images, logits `[B, ...]`."""
    return F.softplus(-fake_logits).mean()


def discriminator_gan_loss(real_logits, fake_logits):
    """DMD2 eq. 4 for the heads: mean softplus(logit) of generated plus mean softplus(-logit) of real images."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
