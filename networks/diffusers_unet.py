"""DiffusersUNet: a `UNet2DModel` of diffusers, with the noise schedule that it was trained on, as a `Denoiser`.

In its training an image x0 was noised to a_t x0 + s_t n at numbered levels t. Divided by a_t, that is x0 + sigma n with
sigma = s_t / a_t. Of a DDPM (arXiv 2006.11239) a_t^2 + s_t^2 = 1, of flow matching a_t + s_t = 1 and s_t = t / 1000.
Images and `sigma`: see `model.py`.
"""

import torch

from model import Denoiser, keep_precision, resolutions
from support.script import UserError

BLOCKS = [f"{kind}Block2D" for kind in ("Down", "AttnDown", "ResnetDownsample", "Up", "AttnUp", "ResnetUpsample")]
MOST_LEVELS, MOST_BLOCKS, MOST_PIXELS = 100_000, 64, 1024  # of the schedule; at each resolution; along a side


def noise_levels(num_train_timesteps, **schedule):
    """sigma of every level t, float64 `[num_train_timesteps]`, ascending; the arguments are those of DDPMScheduler.

    Raises UserError for too many levels, or if these do not rise; NotImplementedError for an unknown schedule.
    """
    from diffusers import DDPMScheduler

    if not 2 <= num_train_timesteps <= MOST_LEVELS:
        raise UserError(f"num_train_timesteps {num_train_timesteps}: 2 to {MOST_LEVELS} are supported")
    with torch.device("cpu"):  # also while a network is built on `meta`
        a_squared = (1 - DDPMScheduler(num_train_timesteps, **schedule).betas.double()).cumprod(0)
    sigmas = ((1 - a_squared) / a_squared).sqrt()
    rise = (sigmas.diff(prepend=sigmas.new_zeros(1)) > 0).all() and sigmas.isfinite().all()
    if sigmas.shape != (num_train_timesteps,) or not rise:
        raise UserError("the scheduler's noise levels do not rise step by step from above 0 to below infinity")
    return sigmas


class DiffusersUNet(Denoiser):
    """D(x; sigma) by a `UNet2DModel`: with epsilon prediction x - sigma eps(x / sqrt(1 + sigma^2), t(sigma)).

    A DDPM's t(sigma) is interpolated on the model's own levels, linearly in ln(sigma); `sigma_min` and `sigma_max`
    bound them. Of flow matching t / num_train_timesteps is sigma / (1 + sigma).

    img_resolution:  side of the square images
    img_channels:    1 or 3
    label_dim:       number of classes; 0: unconditional
    unet:            UNet2DModel's other arguments
    prediction:      epsilon, v_prediction (arXiv 2202.00512), sample or flow
    schedule:        the arguments of `noise_levels`; with flow `num_train_timesteps` and `shift`, of `euler_sampler`

    The key `network` in `net.config` names this class in a checkpoint; it is not an argument.
    Raises UserError if diffusers is not installed, or for an unsupported UNet2DModel or noise levels.
    """

    def __init__(self, img_resolution, img_channels, label_dim, unet, prediction, schedule):
        super().__init__(locals() | {"network": "DiffusersUNet"})
        try:
            from diffusers import UNet2DModel
        except ImportError:
            raise UserError("this network needs a package that is not installed: pip install diffusers") from None
        if unet.get("class_embed_type") or unet.get("time_embedding_type", "positional") != "positional":
            raise UserError("its time embedding is not positional, or it has a class_embed_type: not supported")
        for name in [*unet["down_block_types"], *unet["up_block_types"]]:
            if name.removeprefix("UNetRes") not in BLOCKS:
                raise UserError(f"blocks of type {name!r:.60}; supported are {', '.join(BLOCKS)}")
        if not 1 <= img_resolution <= MOST_PIXELS or not 1 <= unet.get("layers_per_block", 2) <= MOST_BLOCKS:
            limits = f"sides of at most {MOST_PIXELS} pixels and 1 to {MOST_BLOCKS} blocks are supported"
            raise UserError(f"{img_resolution} pixels, layers_per_block {unet.get('layers_per_block', 2)}: {limits}")

        if prediction == "flow":
            self.num_train_timesteps, self.shift = schedule["num_train_timesteps"], schedule["shift"]
            self.sigma_min = 1 / (self.num_train_timesteps - 1)  # t = 1 / num_train_timesteps
        else:
            log_sigmas = noise_levels(**schedule).log()
            self.sigma_min, self.sigma_max = log_sigmas[0].exp().item(), log_sigmas[-1].exp().item()
            self.register_buffer("log_sigmas", log_sigmas.float(), persistent=False)
        sides = resolutions(img_resolution, unet["block_out_channels"])
        self.feature_channels = dict(zip(sides, unet["block_out_channels"], strict=True))
        shape = dict(sample_size=img_resolution, in_channels=img_channels, out_channels=img_channels)
        self.unet = UNet2DModel(num_class_embeds=label_dim or None, **shape, **unet)

    def timestep(self, sigma):
        """The t of noise level `sigma`, of any shape, in the network's training; fractional between two levels."""
        if self.prediction == "flow":
            return self.num_train_timesteps * sigma / (1 + sigma)
        log_sigma = sigma.clamp(self.sigma_min, self.sigma_max).log()
        below = (log_sigma[..., None] >= self.log_sigmas[1:-1]).sum(-1)
        low, high = self.log_sigmas[below], self.log_sigmas[below + 1]
        return (below + (log_sigma - low) / (high - low)).clamp(0, len(self.log_sigmas) - 1)

    def factors(self, sigma):
        return *super().factors(sigma)[:3], self.timestep(sigma)

    # UNet2DModel.forward in two halves, so that the encoder's features need no decoder.

    def run_encoder(self, x, c_noise, class_labels):
        unet = self.unet
        emb = unet.time_embedding(unet.time_proj(c_noise.flatten()))
        if class_labels is not None:
            emb = emb + class_labels @ unet.class_embedding.weight
        h = unet.conv_in(2 * x - 1 if unet.config.center_input_sample else x)
        skips = [h]
        for block in unet.down_blocks:
            h, outputs = block(hidden_states=h, temb=emb)
            skips.extend(outputs)
        return {skip.shape[-1]: skip for skip in skips}, (h, skips, emb)

    def run_decoder(self, h, skips, emb):
        unet = self.unet
        if unet.mid_block is not None:
            h = unet.mid_block(h, emb)
        for block in unet.up_blocks:
            taken = len(block.resnets)
            h = block(h, tuple(skips[-taken:]), emb)
            del skips[-taken:]
        with keep_precision(h):  # in float32: the prediction is multiplied by sigma, and its rounding error too
            return unet.conv_out(unet.conv_act(unet.conv_norm_out(h.float())))
