"""What the networks of EDM's published teachers share (Karras et al. 2022, arXiv 2206.00364, appendix F).

Two UNets, `SongUNet` and `DhariwalUNet`, of one kind of residual block. Images and `sigma`: see `model.py`.
"""

import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from model import Denoiser, GroupNorm, keep_precision, resolutions

SKIP_SCALE = math.sqrt(0.5)  # the sum of two branches keeps the variance of one
MOST_BLOCKS = 64  # at each resolution; the published networks have 3 or 4


def group_norm(channels, eps):
    return GroupNorm(min(32, channels // 4), channels, eps=eps)


def lowpass(resample_filter):
    """The filter in two dimensions, `[1, 1, k, k]`, with sum 1: the outer product of its `k` taps with themselves."""
    taps = torch.tensor(resample_filter, dtype=torch.float32)
    return torch.outer(taps, taps)[None, None] / taps.sum() ** 2


def downsample(x, kernel=None, padding=None):
    """`[B, C, H, W]` at half the resolution: means of 2x2 pixels, or the low-pass `kernel` `[1, 1, k, k]`; k even."""
    if kernel is None:
        return F.avg_pool2d(x, 2)
    channels, k = x.shape[1], kernel.shape[-1]
    padding = (k - 1) // 2 if padding is None else padding
    return F.conv2d(x, kernel.to(x.dtype).expand(channels, -1, -1, -1), stride=2, padding=padding, groups=channels)


def upsample(x, kernel=None):
    """`[B, C, H, W]` at twice the resolution: pixels doubled, or zeros between them, then the low-pass `kernel`."""
    if kernel is None:
        with keep_precision(x):
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
    channels, k = x.shape[1], kernel.shape[-1]
    weight = 4 * kernel.to(x.dtype).expand(channels, -1, -1, -1)  # three of four pixels are zeros
    return F.conv_transpose2d(x, weight, stride=2, padding=(k - 1) // 2, groups=channels)


class Attention(nn.Module):
    """Residual self-attention over the pixels; query, key and value of a head interleave in the channels of `qkv`."""

    def __init__(self, channels, num_heads=1, adm=False):
        super().__init__()
        self.num_heads, self.scale = num_heads, 1.0 if adm else SKIP_SCALE
        self.norm = group_norm(channels, eps=1e-5 if adm else 1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, self.num_heads, C // self.num_heads, 3, H * W)
        q, k, v = qkv.transpose(2, -1).contiguous().unbind(3)  # each [B, heads, H*W, C/heads]
        out = F.scaled_dot_product_attention(q, k, v)  # its softmax is float32 in every precision
        return self.scale * (x + self.proj(out.transpose(-1, -2).reshape(B, C, H, W)))


class ResBlock(nn.Module):
    """Residual block. `resample`: `downsample` or `upsample`, through `kernel` if there is one, or None.

    Noise level and class are added before the second norm. In ADM they are a scale and a shift after it (FiLM), and
    attention has one head per 64 channels, so that there is none below 64.
    """

    def __init__(
        self, in_channels, out_channels, emb_channels, dropout, adm, attention=False, resample=None, kernel=None
    ):
        super().__init__()
        self.adm, self.resample = adm, resample
        self.register_buffer("kernel", kernel, persistent=False)
        norm = partial(group_norm, eps=1e-5 if adm else 1e-6)
        self.norm0 = norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(emb_channels, (1 + adm) * out_channels)
        self.norm1 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        project = in_channels != out_channels or kernel is not None
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if project else nn.Identity()
        num_heads = attention * (out_channels // 64 if adm else 1)
        self.attention = Attention(out_channels, num_heads, adm) if num_heads else nn.Identity()

    def forward(self, x, emb):
        h = F.silu(self.norm0(x))
        if self.resample:
            x, h = self.resample(x, self.kernel), self.resample(h, self.kernel)
        h, emb = self.conv0(h), self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1 + scale)
        else:
            h = self.norm1(h + emb)
        x = self.skip(x) + self.conv1(self.dropout(F.silu(h)))
        return self.attention(x if self.adm else SKIP_SCALE * x)


class UNet(Denoiser):
    """The base of EDM's two UNets. Arguments have EDM's names:

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

    A network hands its arguments to this constructor, makes the layers of its embedding, calls `build`, and defines
    embed(c_noise, class_labels) -> `[B, emb_channels]`. The key `network` in `net.config` names its class.
    Initial weights are torch's, not EDM's. Raises ValueError if `img_resolution` cannot be halved often enough, a width
    does not fit its norm or its heads, or there are too many blocks.
    """

    def __init__(self, **config):
        super().__init__(network=type(self).__name__, **config)
        if config["num_blocks"] > MOST_BLOCKS:
            raise ValueError(f"num_blocks {config['num_blocks']}: at most {MOST_BLOCKS} are supported")

    def build(self, adm=False, kernel=None, image_padding=None):
        """Makes all layers but the embedding's.

        kernel:        the low-pass of down- and upsampling, or None
        image_padding: of the convolutions by which the noisy image enters at each resolution (NCSN++), or None
        """
        config = SimpleNamespace(**self.config)
        emb_channels = config.model_channels * config.channel_mult_emb
        block = partial(ResBlock, emb_channels=emb_channels, dropout=config.dropout, adm=adm)
        widths = [config.model_channels * mult for mult in config.channel_mult]
        sides = resolutions(config.img_resolution, config.channel_mult)
        coarse_to_fine = list(zip(sides, widths, strict=True))[::-1]

        width = widths[0] if adm else config.model_channels
        self.conv_in = nn.Conv2d(config.img_channels, width, 3, padding=1)
        self.encoder, self.image_down, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skip_widths, image_width = [width], config.img_channels
        for resolution, out_width in coarse_to_fine[::-1]:
            blocks = nn.ModuleList()
            if resolution != sides[0]:
                blocks.append(block(width, width, resample=downsample, kernel=kernel))
                skip_widths.append(width)
                if image_padding is not None:
                    self.image_down.append(nn.Conv2d(image_width, width, 3, padding=image_padding))
                    image_width = width
            for _ in range(config.num_blocks):
                blocks.append(block(width, out_width, attention=resolution in config.attn_resolutions))
                width = out_width
                skip_widths.append(width)
            self.encoder.append(blocks)
            self.feature_channels[resolution] = width

        self.middle = nn.ModuleList([block(width, width, attention=True), block(width, width)])

        for resolution, out_width in coarse_to_fine:
            blocks = nn.ModuleList()
            if resolution != sides[-1]:
                blocks.append(block(width, width, resample=upsample, kernel=kernel))
            for index in range(config.num_blocks + 1):
                attention = resolution in config.attn_resolutions and (adm or index == config.num_blocks)
                blocks.append(block(width + skip_widths.pop(), out_width, attention=attention))
                width = out_width
            self.decoder.append(blocks)

        self.norm_out = group_norm(width, eps=1e-5 if adm else 1e-6)
        self.conv_out = nn.Conv2d(width, config.img_channels, 3, padding=1)

    def run_encoder(self, x, c_noise, class_labels, features):
        emb = self.embed(c_noise, class_labels)
        image = x  # not made channels last: convolutions take the memory layout of the weights
        h = self.conv_in(image)
        skips, maps = [h], {}
        for level, blocks in enumerate(self.encoder):
            for index, block in enumerate(blocks):
                h = block(h, emb)
                if self.image_down and level and index == 0:  # the low-pass removes the padding of the convolution
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
