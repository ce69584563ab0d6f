"""SongUNet: the network of EDM's CIFAR-10 teachers (Karras et al. 2022, arXiv 2206.00364, appendix F), for imported weights.

They are DDPM++ and NCSN++ of Song et al. 2021 (arXiv 2011.13456) with EDM's preconditioning. Images and `sigma`: see `model.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Denoiser, GroupNorm, resolutions

SKIP_SCALE = math.sqrt(0.5)  # the sum of two branches keeps the variance of one


def group_norm(channels):
    return GroupNorm(min(32, channels // 4), channels, eps=1e-6)


def lowpass(resample_filter):
    """The filter in two dimensions, `[1, 1, k, k]`, with sum 1: the outer product of its `k` taps with themselves."""
    taps = torch.tensor(resample_filter, dtype=torch.float32)
    return torch.outer(taps, taps)[None, None] / taps.sum() ** 2


def downsample(x, kernel, padding=None):
    """`[B, C, H, W]` at half the resolution, through the low-pass `kernel` `[1, 1, k, k]`; k even."""
    channels, k = x.shape[1], kernel.shape[-1]
    padding = (k - 1) // 2 if padding is None else padding
    return F.conv2d(x, kernel.to(x.dtype).expand(channels, -1, -1, -1), stride=2, padding=padding, groups=channels)


def upsample(x, kernel):
    """`[B, C, H, W]` at twice the resolution: zeros between the pixels, then the low-pass `kernel` `[1, 1, k, k]`; k even."""
    channels, k = x.shape[1], kernel.shape[-1]
    weight = 4 * kernel.to(x.dtype).expand(channels, -1, -1, -1)  # three of four pixels are zeros
    return F.conv_transpose2d(x, weight, stride=2, padding=(k - 1) // 2, groups=channels)


class Attention(nn.Module):
    """Residual self-attention over the pixels; the query, key and value of a head are interleaved in the channels of `qkv`."""

    def __init__(self, channels, num_heads=1, skip_scale=SKIP_SCALE, norm=group_norm):
        super().__init__()
        self.num_heads, self.skip_scale = num_heads, skip_scale
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, self.num_heads, C // self.num_heads, 3, H * W)
        q, k, v = qkv.transpose(2, -1).contiguous().unbind(3)  # each [B, heads, H*W, C/heads]
        out = F.scaled_dot_product_attention(q, k, v)  # its softmax is float32 in every precision
        return self.skip_scale * (x + self.proj(out.transpose(-1, -2).reshape(B, C, H, W)))


class ResBlock(nn.Module):
    """Residual block; noise level and class are added before the second norm. `resample`: `downsample` or `upsample`, or None."""

    def __init__(self, in_channels, out_channels, emb_channels, dropout, attention=False, resample=None, kernel=None):
        super().__init__()
        self.resample = resample
        self.register_buffer("kernel", kernel, persistent=False)
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels or resample else nn.Identity()
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x, emb):
        h = F.silu(self.norm0(x))
        if self.resample:
            x, h = self.resample(x, self.kernel), self.resample(h, self.kernel)
        h = self.conv0(h) + self.affine(emb)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        return self.attention(SKIP_SCALE * (self.skip(x) + h))


class SongUNet(Denoiser):
    """DDPM++ and NCSN++. Arguments have EDM's names; the defaults are the CIFAR-10 teacher.

    img_resolution:     side of the square images, a multiple of 2^(len(channel_mult) - 1)
    img_channels:       1 or 3
    label_dim:          number of classes; 0: unconditional
    model_channels:     base width
    channel_mult:       width of each resolution, from the finest, in units of `model_channels`
    channel_mult_emb:   width of the embedding of noise level and class, in the same units
    num_blocks:         residual blocks at each resolution on the way down; one more on the way up
    attn_resolutions:   resolutions with self-attention: in all blocks on the way down, in the last on the way up
    dropout:            probability, inside the residual blocks
    sigma_data:         standard deviation of the data
    embedding_type:     of the noise level: positional (DDPM++) or fourier (NCSN++)
    channel_mult_noise: its width, in units of `model_channels`: 1 (DDPM++) or 2 (NCSN++)
    encoder_type:       standard (DDPM++), or residual (NCSN++): the downsampled noisy image also enters at each resolution
    resample_filter:    taps of the low-pass filter for down- and upsampling: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++)

    EDM's layer for augmentation labels is left out: it has no bias, and its input is zero in sampling and distillation. The key
    `network` in `net.config` names this class in a checkpoint; it is not an argument. Initial weights are torch's, not EDM's.
    Raises ValueError if `img_resolution` cannot be halved often enough or a width does not fit its norm.
    """

    def __init__(
        self,
        img_resolution=32,
        img_channels=3,
        label_dim=10,
        model_channels=128,
        channel_mult=(2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.13,
        sigma_data=0.5,
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        resample_filter=(1, 1),
    ):
        sides = resolutions(img_resolution, channel_mult)
        super().__init__(
            network="SongUNet",
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
            embedding_type=embedding_type,
            channel_mult_noise=channel_mult_noise,
            encoder_type=encoder_type,
            resample_filter=resample_filter,
        )

        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        half = noise_channels // 2
        if embedding_type == "positional":  # 1 to 1/10000 radian per unit of ln(sigma)/4
            self.radians = 1.0
            self.register_buffer("freqs", (1 / 10000) ** (torch.arange(half) / (half - 1)), persistent=False)
        else:  # random, in periods per unit; saved with the weights
            self.radians = 2 * math.pi
            self.register_buffer("freqs", 16 * torch.randn(half))
        self.embed_class = nn.Linear(label_dim, noise_channels) if label_dim else None
        self.embed_hidden = nn.Linear(noise_channels, emb_channels)
        self.embed_out = nn.Linear(emb_channels, emb_channels)
        self.register_buffer("kernel", lowpass(resample_filter), persistent=False)

        def block(in_channels, out_channels, attention=False, resample=None):
            return ResBlock(in_channels, out_channels, emb_channels, dropout, attention, resample, resample and self.kernel)

        width = model_channels
        self.conv_in = nn.Conv2d(img_channels, width, 3, padding=1)
        self.encoder, self.image_down, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skip_widths = [width]
        image_width = img_channels
        for level, (resolution, mult) in enumerate(zip(sides, channel_mult, strict=True)):
            blocks = nn.ModuleList()
            if level:
                blocks.append(block(width, width, resample=downsample))
                skip_widths.append(width)
            if level and encoder_type == "residual":  # the low-pass after this convolution removes the padding
                self.image_down.append(nn.Conv2d(image_width, width, 3, padding=len(resample_filter) // 2))
                image_width = width
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
            for index in range(num_blocks + 1):
                attention = index == num_blocks and resolution in attn_resolutions
                blocks.append(block(width + skip_widths.pop(), model_channels * mult, attention))
                width = model_channels * mult
            self.decoder.append(blocks)

        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, img_channels, 3, padding=1)

    def run_encoder(self, x, c_noise, class_labels, features):
        angle = c_noise * (self.freqs * self.radians)
        emb = torch.cat([angle.sin(), angle.cos()], dim=1)
        if self.embed_class:
            emb = emb + self.embed_class(class_labels * math.sqrt(self.label_dim))  # of unit mean square
        emb = F.silu(self.embed_hidden(emb))
        emb = F.silu(self.embed_out(emb))

        image = x  # not made channels last: convolutions take the memory layout of the weights
        h = self.conv_in(image)
        skips, maps = [h], {}
        for level, blocks in enumerate(self.encoder):
            for index, block in enumerate(blocks):
                h = block(h, emb)
                if self.image_down and level and index == 0:
                    h = image = SKIP_SCALE * (h + downsample(self.image_down[level - 1](image), self.kernel, padding=0))
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
