"""The GAN of DMD2 (section 4.3): heads that tell real from generated images by a network's features."""

import torch
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
    """Heads, one per feature map: from a list of `[B, channels, h, w]` to logits `[B, number of heads]`, float32."""

    def __init__(self, heads):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features):
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1).float()
