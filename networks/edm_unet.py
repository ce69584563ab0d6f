"""SongUNet (DDPM++) and DhariwalUNet (ADM): the networks of EDM's published teachers, for imported weights.

EDM: Karras et al. 2022, arXiv 2206.00364; its networks are in appendix F. Images and `sigma`: see `model.py`.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model import Denoiser, GroupNorm, resolutions, upsample

downsample = partial(F.avg_pool2d, kernel_size=2)


def group_norm(channels, adm):
    return GroupNorm(min(32, channels // 4), channels, eps=1e-5 if adm else 1e-6)


class ResBlock(nn.Module):
    """Residual block, then self-attention over the pixels. `resample`: `downsample` or `upsample`, or None.

    Noise level and class are added before the second norm. In ADM they are a scale and a shift after it (FiLM), and
    attention has one head per 64 channels, so that there is none below 64.
    """

    def __init__(self, in_channels, out_channels, emb_channels, dropout, adm, attention=False, resample=None):
        super().__init__()
        self.adm, self.resample = adm, resample
        self.scale = 1.0 if adm else math.sqrt(0.5)  # in DDPM++ the sum of two branches keeps the variance of one
        self.num_heads = attention * (out_channels // 64 if adm else 1)
        self.norm0 = group_norm(in_channels, adm)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, (1 + adm) * out_channels)
        self.norm1 = group_norm(out_channels, adm)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        project = in_channels != out_channels or (resample and not adm)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if project else nn.Identity()
        if self.num_heads:
            self.norm2 = group_norm(out_channels, adm)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb):
        h = F.silu(self.norm0(x))
        if self.resample:
            x, h = self.resample(x), self.resample(h)
        h, emb = self.conv0(h), self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1 + scale)
        else:
            h = self.norm1(h + emb)
        x = self.scale * (self.skip(x) + self.conv1(self.dropout(F.silu(h))))
        return self.scale * (x + self.attend(x)) if self.num_heads else x

    def attend(self, x):
        B, C, H, W = x.shape
        # query, key and value of a head interleave in the channels
        qkv = self.qkv(self.norm2(x)).reshape(B, self.num_heads, C // self.num_heads, 3, H * W)
        q, k, v = qkv.transpose(2, -1).contiguous().unbind(3)  # each [B, heads, H*W, C/heads]
        out = F.scaled_dot_product_attention(q, k, v)  # its softmax is float32 in every precision
        return self.proj(out.transpose(-1, -2).reshape(B, C, H, W))


class UNet(Denoiser):
    """What the two share. Blocks have EDM's names, the defaults are the CIFAR-10 teacher.

    The arguments are those of `model.SimpleUNet` without `prediction`, but there is one residual block more at each
    resolution on the way up.

    A network sets `adm` and defines embed(c_noise, class_labels) -> `[B, emb_channels]`. The key `network` in
    `net.config` names its class. Initial weights are torch's, not EDM's. EDM's label dropout, for classifier-free
    guidance, is left out. Raises ValueError if `img_resolution` cannot be halved, or a width fits no norm or heads.
    """

    adm = False

    def __init__(
        self,
        img_resolution=32,
        img_channels=3,
        label_dim=10,
        model_channels=128,
        channel_mult=(2, 2, 2),
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.13,
        sigma_data=0.5,
    ):
        super().__init__(locals() | {"network": type(self).__name__})
        adm, half, emb_channels = self.adm, model_channels // 2, 4 * model_channels
        # from 1 to 1/10000 radian per unit of ln(sigma)/4; in ADM to nearly that
        ramp = torch.arange(half) / (half if adm else half - 1)
        self.register_buffer("freqs", (1 / 10000) ** ramp, persistent=False)
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        label_channels = emb_channels if adm else model_channels
        self.map_label = nn.Linear(label_dim, label_channels, bias=not adm) if label_dim else None

        block = partial(ResBlock, emb_channels=emb_channels, dropout=dropout, adm=adm)
        widths = [model_channels * mult for mult in channel_mult]
        fine_to_coarse = list(zip(resolutions(img_resolution, channel_mult), widths, strict=True))

        width = widths[0] if adm else model_channels
        self.conv_in = nn.Conv2d(img_channels, width, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        skip_widths = [width]
        for side, out_width in fine_to_coarse:
            if side != img_resolution:
                self.encoder[f"{side}x{side}_down"] = block(width, width, resample=downsample)
                skip_widths.append(width)
            for index in range(num_blocks):
                attention = side in attn_resolutions
                self.encoder[f"{side}x{side}_block{index}"] = block(width, out_width, attention=attention)
                width = out_width
                skip_widths.append(width)
            self.feature_channels[side] = width

        self.middle = nn.ModuleList([block(width, width, attention=True), block(width, width)])

        for side, out_width in fine_to_coarse[::-1]:
            if side != fine_to_coarse[-1][0]:
                self.decoder[f"{side}x{side}_up"] = block(width, width, resample=upsample)
            for index in range(num_blocks + 1):
                attention = side in attn_resolutions and (adm or index == num_blocks)
                in_width = width + skip_widths.pop()
                self.decoder[f"{side}x{side}_block{index}"] = block(in_width, out_width, attention=attention)
                width = out_width

        self.norm_out = group_norm(width, adm)
        self.conv_out = nn.Conv2d(width, img_channels, 3, padding=1)

    def run_encoder(self, x, c_noise, class_labels):
        emb = self.embed(c_noise, class_labels)
        skips = [self.conv_in(x)]  # convolutions take the memory layout of the weights
        for block in self.encoder.values():
            skips.append(block(skips[-1], emb))
        return {skip.shape[-1]: skip for skip in skips}, (skips[-1], skips, emb)

    def run_decoder(self, h, skips, emb):
        for block in self.middle:
            h = block(h, emb)
        for block in self.decoder.values():
            h = block(h if block.resample else torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))


class SongUNet(UNet):
    """DDPM++ of Song et al. 2021 (arXiv 2011.13456), in EDM's files "vp".

    EDM's layer for augmentation labels is left out: it has no bias, and its input is zero in sampling and distillation.
    """

    def embed(self, c_noise, class_labels):
        angle = c_noise * self.freqs
        emb = torch.cat([angle.sin(), angle.cos()], dim=1)
        if self.map_label:
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))  # of unit mean square
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUNet(UNet):
    """ADM of Dhariwal and Nichol 2021 (arXiv 2105.05233). The defaults are EDM's ImageNet-64 teacher."""

    adm = True

    def __init__(self, **changes):
        defaults = dict(img_resolution=64, label_dim=1000, model_channels=192, channel_mult=(1, 2, 3, 4))
        defaults |= dict(num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1)
        super().__init__(**defaults | changes)

    def embed(self, c_noise, class_labels):
        angle = c_noise * self.freqs
        emb = self.map_layer1(F.silu(self.map_layer0(torch.cat([angle.cos(), angle.sin()], dim=1))))
        if self.map_label:
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)
