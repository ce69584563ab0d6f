"""The noise schedules, the denoising loss, and the networks: the base class `Denoiser`, and `SimpleUNet`.

Noise is EDM's (Karras et al. 2022, arXiv 2206.00364) whatever a network predicts: images are float32 `[B, C, H, W]` in
[-1, 1]; `sigma` is the standard deviation of the noise in x = x0 + sigma * n.
"""

import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def get_sigmas_karras(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """`n` noise levels, float32 `[n]`, descending from `sigma_max` to `sigma_min` (EDM eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    max_inv_rho, min_inv_rho = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return ((max_inv_rho + ramp * (min_inv_rho - max_inv_rho)) ** rho).float()


def get_sigmas_flow(n, sigma_min=0.002, sigma_max=80.0, shift=1.0):
    """`n` noise levels, float32 `[n]`, descending from `sigma_max` to `sigma_min`, even in the time of flow matching.

    That is t = sigma / (1 + sigma). A `shift` above 1 moves levels to more noise (SD3, arXiv 2403.03206, eq. 23):
    t' = shift t / (1 + (shift - 1) t), which is sigma' = shift sigma.
    """
    t = torch.linspace(sigma_max / (shift + sigma_max), sigma_min / (shift + sigma_min), n, dtype=torch.float64)
    return (shift * t / (1 - t)).float()


def known_range(net, sigma_min, sigma_max):
    """(least, most) noise level: `sigma_min` and `sigma_max`, limited to the bounds of `net` if it has any."""
    return max(sigma_min, getattr(net, "sigma_min", 0.0)), min(sigma_max, getattr(net, "sigma_max", math.inf))


PREDICTIONS = ("edm", "flow", "epsilon", "v_prediction", "sample")


def preconditioning(sigma, sigma_data=0.5, prediction="edm"):
    """(c_skip, c_out, c_in, c_noise) of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), each of `sigma`'s shape.

    prediction: what the network F predicts, one of `PREDICTIONS`. With edm, inputs and targets have unit variance at
    every noise level, for data of standard deviation `sigma_data` (EDM eq. 7 and table 1).
    """
    c_noise = sigma.clamp(min=1e-20).log() / 4  # the clamp keeps sigma = 0 finite; there the output is the input
    if prediction == "edm":
        total = (sigma**2 + sigma_data**2).sqrt()
        return sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total, c_noise
    if prediction == "flow":  # x_t = (1 - t) x0 + t n with t = sigma / (1 + sigma); F = v = n - x0: x0 = x_t - t v
        return 1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma), c_noise
    # DDPM's networks see a x0 + s n, with a^2 + s^2 = 1 and sigma = s / a. They predict n, a n - s x0, or x0.
    a, one = (1 + sigma**2).rsqrt(), torch.ones_like(sigma)
    factors = {"epsilon": (one, -sigma), "v_prediction": (a**2, -sigma * a), "sample": (0 * one, one)}
    if prediction not in factors:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, not {prediction!r}")
    return *factors[prediction], a, c_noise


def denoising_loss(denoised, images, sigma, sigma_data=0.5, prediction="edm"):
    """The mean squared error of what the network predicts, (D(x; sigma) - x0)^2 / c_out^2, at all noise levels alike.

    For edm that is EDM's loss (eq. 2), with the weight sigma^-2 + sigma_data^-2; for flow it is |v_pred - v|^2.
    `denoised`, `images`: `[B, C, H, W]`; `sigma`: `[B]`. Trains the teacher, and `fake_unet` on the generator's images.
    """
    _, c_out, _, _ = preconditioning(sigma, sigma_data, prediction)
    return ((denoised - images) ** 2 * c_out.reshape(-1, 1, 1, 1) ** -2).mean()


def resolutions(img_resolution, channel_mult):
    """The side of the images at each level of a UNet, half of the one before. Raises ValueError if it cannot be."""
    halvings = len(channel_mult) - 1
    if img_resolution % 2**halvings:
        raise ValueError(f"img_resolution {img_resolution} cannot be halved {halvings} times, as channel_mult requires")
    return [img_resolution >> level for level in range(halvings + 1)]


class Denoiser(nn.Module):
    """D(x; sigma, class): predicts the clean image (EDM eq. 7). The base class of every network.

    It applies the preconditioning and accepts noise levels and labels in all their forms. A network passes its
    constructor's `locals()` to `super().__init__`, fills `feature_channels` (a dict from each resolution of its encoder
    to the number of channels there), and defines

    run_encoder(x, c_noise, class_labels) -> (maps, hidden). x: scaled images `[B, C, H, W]`; c_noise: ln(sigma) / 4,
        `[B, 1]`; class_labels: one-hot float `[B, label_dim]`, or None without classes. maps: a dict from each
        resolution to the encoder's last feature map there; hidden: a tuple of whatever the decoder needs
    run_decoder(*hidden) -> F_x, `[B, C, H, W]`

    `net.config` holds the constructor's arguments, for a checkpoint: `SimpleUNet(**net.config)` is the same network.
    """

    sigma_min, sigma_max = 0.0, math.inf  # bounds of the noise levels at which it may be called

    def __init__(self, config):
        super().__init__()
        config = {name: value for name, value in config.items() if name not in ("self", "__class__")}
        self.config = {name: list(it) if isinstance(it, (list, tuple)) else it for name, it in config.items()}
        self.label_dim, self.sigma_data = config["label_dim"], config.get("sigma_data")
        self.prediction = config.get("prediction", "edm")
        preconditioning(torch.ones(1), self.sigma_data, self.prediction)  # raises an error for an unknown one
        self.feature_channels = {}

    def forward(self, x, sigma, class_labels=None, features=None, decode=True):
        """The denoised image D(x; sigma), `[B, C, H, W]`.

        x: noisy images `[B, C, H, W]`; sigma: `[B]` or a scalar; class_labels: int64 `[B]`, or one-hot `[B,
        label_dim]`; ignored if `label_dim` is 0. features: resolutions, such as [8, 4]. With them it returns (denoised
        image, list of the encoder's last feature map `[B, channels, r, r]` at each), and without `decode` the list
        alone. Raises ValueError for a resolution that the encoder does not have.
        """
        if unknown := set(features or []) - self.feature_channels.keys():
            raise ValueError(f"no feature map at {min(unknown)}; the encoder has {list(self.feature_channels)}")
        if self.label_dim and class_labels is None:
            raise ValueError(f"class_labels are missing: the network has {self.label_dim} classes")
        if self.label_dim and class_labels.dim() == 1:
            class_labels = F.one_hot(class_labels, self.label_dim)
        class_labels = class_labels.float() if self.label_dim else None
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1).expand(x.shape[0])
        c_skip, c_out, c_in, c_noise = self.factors(sigma[:, None, None, None])
        maps, hidden = self.run_encoder(c_in * x, c_noise.flatten(1), class_labels)
        maps = [maps[resolution] for resolution in features or []]
        if not decode:
            return maps
        F_x = self.run_decoder(*hidden)
        denoised = c_skip * x + c_out * F_x  # EDM eq. 7
        return denoised if features is None else (denoised, maps)

    def encode(self, x, sigma, class_labels=None, features=()):
        """Only the feature maps that `forward` returns, without the cost of the decoder."""
        return self(x, sigma, class_labels, features, decode=False)

    def factors(self, sigma):
        """(c_skip, c_out, c_in, c_noise) at `sigma`. A network with a time of its own overrides the last."""
        return preconditioning(sigma, self.sigma_data, self.prediction)


def keep_precision(x):
    """A context in which operators compute in the precision of `x`.

    CUDA's autocast would cast bfloat16 to float32 in norms and upsampling, where it brings no gain, and so double the
    memory that is kept for the backward pass.
    """
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if autocast else nullcontext()


def upsample(x):
    """`[B, C, H, W]` at twice the resolution: each pixel doubled along both sides."""
    with keep_precision(x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class GroupNorm(nn.GroupNorm):
    """Under autocast its input and output are bfloat16 on every device, and its statistics float32."""

    def forward(self, x):
        with keep_precision(x):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def group_norm(channels):
    """A group norm of at most 32 groups, each of 16 channels or more: with fewer a CPU is slow, above all in bf16."""
    return GroupNorm(math.gcd(max(1, channels // 16), 32, channels), channels, eps=1e-6)


def zero_init(layer):
    """`layer` with zeros for parameters. A residual block that ends in it starts as the identity: stable training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Attention(nn.Module):
    """Residual self-attention over the pixels, with 64 or somewhat more channels per head."""

    def __init__(self, channels):
        super().__init__()
        self.num_heads = max(heads for heads in range(1, max(1, channels // 64) + 1) if channels % heads == 0)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).reshape(B, 3, self.num_heads, C // self.num_heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [B, heads, H*W, C/heads]
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2))  # channels last, no copy


class ResBlock(nn.Module):
    """Residual block; noise level and class enter as a scale and a shift of the second norm (FiLM)."""

    def __init__(self, in_channels, out_channels, attention, emb_channels, dropout):
        super().__init__()
        self.norm0 = group_norm(in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(emb_channels, 2 * out_channels)
        self.norm1 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(h), 1 + scale))
        return self.attention(self.skip(x) + self.conv1(self.dropout(h)))


class SimpleUNet(Denoiser):
    """A small UNet of residual blocks and self-attention. Arguments have EDM's names.

    img_resolution:     side of the square images, a multiple of 2^(len(channel_mult) - 1)
    img_channels:       1 or 3
    label_dim:          number of classes; 0: unconditional
    model_channels:     base width, a multiple of 8
    channel_mult:       width of each resolution, from the finest, in units of `model_channels`
    num_blocks:         residual blocks at each resolution, on the way down and again on the way up
    attn_resolutions:   resolutions with self-attention; those that do not occur are ignored
    dropout:            probability, inside the residual blocks
    sigma_data:         standard deviation of the data
    prediction:         what it predicts inside: edm (EDM's mixture of image and noise) or flow (the velocity)

    The default is a DDPM-sized network for CIFAR-10.
    Raises ValueError if `img_resolution` cannot be halved often enough or `model_channels` is not a multiple of 8.
    """

    def __init__(
        self,
        img_resolution=32,
        img_channels=3,
        label_dim=10,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        num_blocks=2,
        attn_resolutions=(16,),
        dropout=0.1,
        sigma_data=0.5,
        prediction="edm",
    ):
        super().__init__(locals())
        widths = [model_channels * mult for mult in channel_mult]
        levels = list(zip(resolutions(img_resolution, channel_mult), widths, strict=True))
        if model_channels % 8:
            raise ValueError(f"model_channels must be a multiple of 8, not {model_channels}")

        emb_channels = 4 * model_channels
        # ln(sigma)/4 spans [-1.6, 1.1]: the frequencies go from 0.5, slow over that range, to 16 radians per unit.
        self.register_buffer("freqs", torch.logspace(-1, 4, model_channels // 2, base=2), persistent=False)
        self.embed_noise = nn.Linear(model_channels, emb_channels)
        self.embed_class = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None
        self.embed_out = nn.Linear(emb_channels, emb_channels)

        block = partial(ResBlock, emb_channels=emb_channels, dropout=dropout)
        width = widths[0]
        self.conv_in = nn.Conv2d(img_channels, width, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        skip_widths = []
        for resolution, out_width in levels:
            self.encoder.append(nn.ModuleList())
            for _ in range(num_blocks):
                self.encoder[-1].append(block(width, out_width, resolution in attn_resolutions))
                width = out_width
                skip_widths.append(width)
            self.feature_channels[resolution] = width

        self.middle = nn.ModuleList([block(width, width, resolution in attn_resolutions), block(width, width, False)])

        for resolution, out_width in levels[::-1]:
            self.decoder.append(nn.ModuleList())
            for _ in range(num_blocks):
                self.decoder[-1].append(block(width + skip_widths.pop(), out_width, resolution in attn_resolutions))
                width = out_width

        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, img_channels, 3, padding=1))

    def run_encoder(self, x, c_noise, class_labels):
        angle = c_noise * self.freqs
        emb = self.embed_noise(torch.cat([angle.cos(), angle.sin()], dim=1))
        if self.embed_class:
            emb = emb + self.embed_class(class_labels)
        emb = F.silu(self.embed_out(F.silu(emb)))

        h = self.conv_in(x)  # convolutions take the memory layout of the weights
        skips = []
        for level, blocks in enumerate(self.encoder):
            if level:
                h = F.avg_pool2d(h, 2)
            for block in blocks:
                h = block(h, emb)
                skips.append(h)
        return {skip.shape[-1]: skip for skip in skips}, (h, skips, emb)

    def run_decoder(self, h, skips, emb):
        for block in self.middle:
            h = block(h, emb)
        for level, blocks in enumerate(self.decoder):
            if level:
                h = upsample(h)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))
