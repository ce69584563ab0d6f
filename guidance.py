"""GuidanceModel: the two denoisers whose difference trains the generator (DMD, arXiv 2311.18828; DMD2, 2405.14867)."""

import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from discriminator import Discriminator, gan_head
from model import denoising_loss, get_sigmas_flow, get_sigmas_karras, known_range
from objectives import F_DIVERGENCES, NUM_BINS, dmd_loss, f_divergence_weight, sid_loss


class GuidanceModel(nn.Module):
    """The frozen teacher `real_unet`, the trainable `fake_unet`, the noise added to their inputs, and the losses.

    real_unet:                 any module called as `net(x, sigma, labels)` -> denoised image; frozen, in eval mode
    fake_unet:                 another module called in this way, trained in place; default: a copy of `real_unet`
    num_train_timesteps:       number of noise levels in `sigmas` (ascending: index 0 is the least noise)
    schedule:                  karras (EDM eq. 5), of shape `rho`, or flow: even in flow matching's time, with `shift`
    sigma_min, sigma_max:      its bounds, limited to the noise levels of both networks
    sigma_data, prediction:    of `fake_unet`, in the weight of its loss (`model.denoising_loss`)
    min_step_percent, max_step_percent: the range of `sigmas`, as shares, for the distribution-matching loss
    objective:                 dmd or sid (`objectives.py`); sid_alpha: alpha of sid
    f_divergence:              key of `F_DIVERGENCES`: what dmd minimises; all but rkl need `gan_classifier`
    gan_classifier:            adds heads that tell noised real images from noised generated ones by feature maps (DMD2
                               section 4.3); the network of `gan_features` must then be a `Denoiser`
    gan_features:              of `fake_unet`'s encoder ("fake"), which then learns from both losses, or "teacher"
    gan_resolutions:           resolutions of the feature maps, one head per resolution; default: the coarsest alone

    Raises ValueError for arguments that do not fit together or to the networks.
    """

    def __init__(
        self,
        real_unet,
        *,
        fake_unet=None,
        num_train_timesteps=1000,
        schedule="karras",
        sigma_min=0.002,
        sigma_max=80.0,
        rho=7.0,
        shift=1.0,
        sigma_data=0.5,
        prediction="edm",
        min_step_percent=0.02,
        max_step_percent=0.98,
        objective="dmd",
        sid_alpha=1.0,
        f_divergence="rkl",
        gan_classifier=False,
        gan_features="fake",
        gan_resolutions=None,
    ):
        super().__init__()
        if min_step_percent >= max_step_percent:
            raise ValueError(f"min_step_percent {min_step_percent} must be below max_step_percent {max_step_percent}")
        self.real_unet = real_unet.requires_grad_(False).eval()
        self.fake_unet = (copy.deepcopy(real_unet) if fake_unet is None else fake_unet).requires_grad_(True)
        self.sigma_data, self.prediction = sigma_data, prediction
        self.max_step = min(round(max_step_percent * num_train_timesteps), num_train_timesteps - 1)
        self.min_step = min(round(min_step_percent * num_train_timesteps), self.max_step)
        low, high = known_range(self.fake_unet, *known_range(real_unet, sigma_min, sigma_max))
        if low >= high:
            raise ValueError(f"sigma_min {sigma_min}, sigma_max {sigma_max}: the networks know no noise level between")
        if schedule not in ("karras", "flow"):
            raise ValueError(f"schedule must be karras or flow, not {schedule!r}")
        if schedule == "flow":
            sigmas = get_sigmas_flow(num_train_timesteps, low, high, shift)
        else:
            sigmas = get_sigmas_karras(num_train_timesteps, low, high, rho)
        self.register_buffer("sigmas", sigmas.flip(0), persistent=False)
        if objective not in ("dmd", "sid"):
            raise ValueError(f"objective must be dmd or sid, not {objective!r}")
        self.objective, self.sid_alpha = objective, sid_alpha

        self.gan_classifier, self.gan_features = gan_classifier, gan_features
        if gan_classifier:
            channels = getattr(self.gan_network, "feature_channels", None)
            if not channels:
                raise ValueError(f"gan_features {gan_features}: this network has no feature maps")
            self.gan_resolutions = gan_resolutions or [min(channels)]
            if missing := set(self.gan_resolutions) - channels.keys():
                raise ValueError(f"gan_resolutions {min(missing)}: the encoder has {', '.join(map(str, channels))}")
            self.cls_pred_branch = Discriminator(gan_head(channels[side], side) for side in self.gan_resolutions)

        self.f_divergence = f_divergence
        if f_divergence not in F_DIVERGENCES:
            raise ValueError(f"f_divergence must be one of {', '.join(F_DIVERGENCES)}, not {f_divergence!r}")
        if f_divergence != "rkl" and not (objective == "dmd" and gan_classifier):
            raise ValueError(f"f_divergence {f_divergence} needs objective dmd and gan_classifier")

    def train(self, mode=True):
        super().train(mode)
        self.real_unet.eval()
        return self

    def add_noise(self, images, sigma=None, noise=None, first=0, end=None):
        """Returns (`images` `[B, C, H, W]` plus `sigma` `[B]` times standard normal `noise`, `sigma`).

        `sigma` and `noise` are drawn if they are None, `sigma` uniformly over `sigmas[first:end]`.
        """
        if sigma is None:
            sigma = self.sigmas[torch.randint(first, end or len(self.sigmas), (len(images),), device=images.device)]
        if noise is None:
            noise = torch.randn_like(images)
        return images + sigma.reshape(-1, 1, 1, 1) * noise, sigma

    def compute_distribution_matching_loss(self, images, labels, sigma=None, noise=None):
        """The loss that moves generated images towards the teacher's distribution: the objective, of `objectives.py`.

        images: generated, `[B, C, H, W]`; labels: `[B]`. `sigma` `[B]` and standard normal `noise` are drawn if they
        are None, `sigma` from `sigmas[min_step : max_step + 1]`. Returns two dicts: `loss_dm`,
        whose gradient reaches only the generator, and the noised and denoised images, detached.
        """
        sid = self.objective == "sid"
        with self.frozen() if sid else torch.no_grad():  # SiD's gradient flows through both denoisers to the images
            noisy, sigma = self.add_noise(images, sigma, noise, self.min_step, self.max_step + 1)
            pred_real, pred_fake = self.real_unet(noisy, sigma, labels), self.fake_unet(noisy, sigma, labels)
            scale = None if self.f_divergence == "rkl" else self.compute_f_divergence_weight(noisy, sigma, labels)
        if sid:  # SiD eq. 23
            loss = sid_loss(images, pred_real, pred_fake, self.sid_alpha)
        else:  # DMD2 eq. 1
            loss = dmd_loss(images, pred_real, pred_fake, scale)
        seen = {"dmtrain_noisy": noisy, "dmtrain_pred_real": pred_real, "dmtrain_pred_fake": pred_fake}
        return {"loss_dm": loss}, {name: value.detach() for name, value in seen.items()}

    def compute_f_divergence_weight(self, noisy, sigma, labels):
        """The weights `[B]` of noised images from the heads' mean logit, normalised in ten bins of the schedule."""
        logits = self.cls_pred_branch(self.gan_network.encode(noisy, sigma, labels, self.gan_resolutions)).mean(1)
        index = torch.searchsorted(self.sigmas, sigma).clamp(max=len(self.sigmas) - 1)
        return f_divergence_weight(logits, self.f_divergence, index * NUM_BINS // len(self.sigmas))

    @property
    def gan_network(self):
        return self.real_unet if self.gan_features == "teacher" else self.fake_unet

    @contextmanager
    def frozen(self):
        """A context in which these parameters get no gradient, while gradients flow through the networks."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def compute_loss_fake(self, images, labels, sigma=None, noise=None):
        """`fake_unet`'s denoising loss on generated images (DMD eq. 6): it learns the generator's distribution.

        Shapes as in `compute_distribution_matching_loss`; no gradient reaches the generator. Returns two dicts:
        `loss_fake_mean`, and the feature maps of the same pass, as `features`, if they can serve the GAN's heads too.
        """
        images = images.detach()
        noisy, sigma = self.add_noise(images, sigma, noise)
        if self.gan_classifier and self.gan_features == "fake":
            pred_fake, features = self.fake_unet(noisy, sigma, labels, features=self.gan_resolutions)
            by_products = {"features": features}
        else:
            pred_fake, by_products = self.fake_unet(noisy, sigma, labels), {}
        loss = denoising_loss(pred_fake, images, sigma, self.sigma_data, self.prediction)
        return {"loss_fake_mean": loss}, by_products

    def compute_cls_logits(self, images, labels):
        """The heads' logits `[B, heads]`, positive for "real", of `images` noised at random levels."""
        noisy, sigma = self.add_noise(images)
        return self.cls_pred_branch(self.gan_network.encode(noisy, sigma, labels, self.gan_resolutions))

    def compute_generator_clean_cls_loss(self, fake, labels):
        """The generator's GAN loss (DMD2 eq. 4, non-saturating), as a dict: `gen_cls_loss`.

        fake: generated `[B, C, H, W]`; labels: `[B]`. `fake` gets a gradient, the guidance model's parameters do not.
        """
        with self.frozen():
            return {"gen_cls_loss": F.softplus(-self.compute_cls_logits(fake, labels)).mean()}

    def compute_guidance_clean_cls_loss(self, real, real_labels, fake, fake_labels, fake_features=None):
        """The heads' GAN loss (DMD2 eq. 4).

        real, fake: `[B, C, H, W]`; labels: `[B]`; no gradient reaches the generator. `fake_features`: the feature maps
        of noised fake images from `compute_loss_fake`, if any. Returns two dicts: `guidance_cls_loss`; mean logits.
        """
        real_logits = self.compute_cls_logits(real, real_labels)
        if fake_features is None:
            fake_logits = self.compute_cls_logits(fake.detach(), fake_labels)
        else:
            fake_logits = self.cls_pred_branch(fake_features)
        loss = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
        return {"guidance_cls_loss": loss}, {"real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}


@torch.no_grad()
def relative_errors(net, images, labels, sigmas=(0.1, 0.3, 1.0), generator=None):
    """How well `net` denoises real images `[B, C, H, W]`: a dict from noise levels to relative errors, right below 1.

    They are relative to the better of two trivial answers, the noisy image and the mean image. A network is worse if it
    knows other images, or if its output or its time is misread. generator: of the noise, on the CPU.
    """
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    errors = {}
    for sigma in sigmas:
        denoised = net(images + sigma * noise, images.new_full((len(images),), sigma), labels)
        variance = images.var(0).mean().item() or float("inf")  # equal images have no useful mean
        trivial = min((sigma * noise).square().mean().item(), variance)
        errors[sigma] = (denoised - images).square().mean().item() / trivial
    return errors
