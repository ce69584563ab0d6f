"""The GAN of DMD2 (section 4.3): a head that tells real from generated images by a network's features, and the two losses."""

import torch.nn.functional as F
from torch import nn

from model import group_norm


def gan_head(channels):
    """Feature map `[B, channels, h, w]` to logit `[B, 1]`, positive for "real"."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        group_norm(channels),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 1),
    )


def generator_gan_loss(fake_logits):
    """DMD2 eq. 4 for the generator, non-saturating: mean of softplus(-logit) over generated images, logits `[B]`."""
    return F.softplus(-fake_logits).mean()


def discriminator_gan_loss(real_logits, fake_logits):
    """DMD2 eq. 4 for the head: mean softplus(logit) of generated images plus mean softplus(-logit) of real ones, logits `[B]`."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
