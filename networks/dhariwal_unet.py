"""DhariwalUNet: the network of EDM's ImageNet-64 teacher (Karras et al. 2022, arXiv 2206.00364, appendix F), for imported weights.

It is the ADM of Dhariwal and Nichol 2021 (arXiv 2105.05233) with EDM's preconditioning. Images and `sigma`: see `model.py`.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import Denoiser, GroupNorm, keep_precision, resolutions
from networks.song_unet import Attention


def group_norm(channels):
    return GroupNorm(min(32, channels // 4), channels, eps=1e-5)


def upsample(x):
    with keep_precision(x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


downsample = partial(F.avg_pool2d, kernel_size=2)


class ResBlock(nn.Module):
    """Residual block; noise level and class enter as a scale and a shift of the second norm (FiLM).

    resample: `downsample` or `upsample`, or None. Attention has one head per 64 channels, so there is none below 64.
    """

    def __init__(self, in_channels, out_channels, emb_channels, dropout, attention=False, resample=None):
        super().__init__()
        num_heads = out_channels // 64 if attention else 0
        self.resample = resample
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, 2 * out_channels)
        self.norm1 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(out_channels, num_heads, 1.0, group_norm) if num_heads else nn.Identity()

    def forward(self, x, emb):
        h = F.silu(self.norm0(x))
        if self.resample:
            x, h = self.resample(x), self.resample(h)
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(self.conv0(h)), 1 + scale))
        return self.attention(self.skip(x) + self.conv1(self.dropout(h)))


class DhariwalUNet(Denoiser):
    """ADM. Arguments have EDM's names; the defaults are the ImageNet-64 teacher.

    img_resolution:     side of the square images, a multiple of 2^(len(channel_mult) - 1)
    img_channels:       1 or 3
    label_dim:          number of classes; 0: unconditional
    model_channels:     base width
    channel_mult:       width of each resolution, from the finest, in units of `model_channels`
    channel_mult_emb:   width of the embedding of noise level and class, in the same units
    num_blocks:         residual blocks at each resolution on the way down; one more on the way up
    attn_resolutions:   resolutions with self-attention
    dropout:            probability, inside the residual blocks
    sigma_data:         standard deviation of the data

    EDM's label dropout, for classifier-free guidance, is left out. The key `network` in `net.config` names this class in a
    checkpoint; it is not an argument. Initial weights are torch's, not EDM's.
    Raises ValueError if `img_resolution` cannot be halved often enough or a width does not fit its norm or its heads.
    """

    def __init__(
        self,
        img_resolution=64,
        img_channels=3,
        label_dim=1000,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4,
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.1,
        sigma_data=0.5,
    ):
        sides = resolutions(img_resolution, channel_mult)
        super().__init__(
            network="DhariwalUNet",
            img_resolution=img_resolution,
            img_channels=img_channels,
            label_dim=label_dim,
            model_channels=model_channels,
            channel_mult=channel_mult,
            channel_mult_emb=channel_mult_emb,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            sigma_data=sigma_data,
        )

        emb_channels = model_channels * channel_mult_emb
        half = model_channels // 2  # from 1 to nearly 1/10000 radian per unit of ln(sigma)/4
        self.register_buffer("freqs", (1 / 10000) ** (torch.arange(half) / half), persistent=False)
        self.embed_hidden = nn.Linear(model_channels, emb_channels)
        self.embed_out = nn.Linear(emb_channels, emb_channels)
        self.embed_class = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None

        def block(in_channels, out_channels, attention=False, resample=None):
            return ResBlock(in_channels, out_channels, emb_channels, dropout, attention, resample)

        width = model_channels * channel_mult[0]
        self.conv_in = nn.Conv2d(img_channels, width, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        skip_widths = [width]
        for level, (resolution, mult) in enumerate(zip(sides, channel_mult, strict=True)):
            blocks = nn.ModuleList()
            if level:
                blocks.append(block(width, width, resample=downsample))
                skip_widths.append(width)
            for _ in range(num_blocks):
                blocks.append(block(width, model_channels * mult, resolution in attn_resolutions))
                width = model_channels * mult
                skip_widths.append(width)
            self.encoder.append(blocks)
            self.feature_channels[resolution] = width

        self.middle = nn.ModuleList([block(width, width, attention=True), block(width, width)])

        for resolution, mult in zip(reversed(sides), reversed(channel_mult), strict=True):
            blocks = nn.ModuleList()
            if resolution != sides[-1]:
                blocks.append(block(width, width, resample=upsample))
            for _ in range(num_blocks + 1):
                blocks.append(block(width + skip_widths.pop(), model_channels * mult, resolution in attn_resolutions))
                width = model_channels * mult
            self.decoder.append(blocks)

        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, img_channels, 3, padding=1)

    def run_encoder(self, x, c_noise, class_labels, features):
        angle = c_noise * self.freqs
        emb = self.embed_out(F.silu(self.embed_hidden(torch.cat([angle.cos(), angle.sin()], dim=1))))
        if self.embed_class:
            emb = emb + self.embed_class(class_labels)
        emb = F.silu(emb)

        h = self.conv_in(x)
        skips, maps = [h], {}
        for blocks in self.encoder:
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
            if h.shape[-1] in features:
                maps[h.shape[-1]] = h
        return maps, (h, skips, emb)

    def run_decoder(self, h, skips, emb):
        for block in self.middle:
            h = block(h, emb)
        for blocks in self.decoder:
            for block in blocks:
                h = block(h if block.resample else torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))
