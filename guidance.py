"""GuidanceModel: the two denoisers whose difference trains the generator (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867)."""

import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from discriminator import Discriminator, discriminator_gan_loss, generator_gan_loss
from model import denoising_loss, get_sigmas_karras, known_range
from objectives import NUM_BINS, dmd_gradient, dmd_loss, fake_lag, normalised_f_divergence_weight, sid_loss
from support.config import UserError


class GuidanceModel(nn.Module):
    """The frozen teacher `real_unet`, the trainable `fake_unet`, the noise added to their inputs, and the losses.

    real_unet:                 any module called as `net(x, sigma, labels)` -> denoised image; frozen, always in eval mode
    num_train_timesteps:       number of noise levels in `karras_sigmas` (ascending: index 0 is the least noise)
    sigma_min, sigma_max, rho: the noise schedule (EDM eq. 5), limited to the noise levels of `real_unet`
    sigma_data:                standard deviation of the data, in the weight of `fake_unet`'s loss
    min_step_percent, max_step_percent: the range of `karras_sigmas`, as shares, that the distribution-matching loss draws from
    objective:                 dmd or sid (`objectives.py`); sid_alpha: alpha of sid
    f_divergence:              key of `F_DIVERGENCES` that sets the weights of images in dmd; all but rkl need `gan_classifier`
    fake_loss_weighting:       weighting of `fake_unet`'s loss over noise levels: edm, as for a teacher, or none: squared error
    gan_classifier:            adds heads that classify images as real or generated from feature maps (DMD2 section 4.3);
                               `real_unet` must then be a `Denoiser`
    gan_features:              features of `fake_unet`'s encoder ("fake"), which the heads' loss then trains too, or of the
                               teacher's ("teacher")
    gan_resolutions:           resolutions of the feature maps, one head per resolution; default: the coarsest alone
    gan_channels_per_group:    least width of the groups in the heads' norms
    diffusion_gan:             the heads see noised images, as in the paper; else clean ones
    diffusion_gan_max_timestep: number of levels, from the lowest of `karras_sigmas`, that the heads' noise is drawn from
    randint, randn:            functions that draw noise levels and noise, called like torch's, with a size and a `device`
    total:                     sums a tensor over all processes

    Raises UserError, a ValueError, for `gan_resolutions` that the encoder does not have, and for a schedule whose noise levels
    `real_unet` does not know.
    """

    def __init__(
        self,
        real_unet,
        *,
        num_train_timesteps=1000,
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=0.5,
        rho=7.0,
        min_step_percent=0.02,
        max_step_percent=0.98,
        objective="dmd",
        sid_alpha=1.0,
        f_divergence="rkl",
        fake_loss_weighting="edm",
        gan_classifier=False,
        gan_features="fake",
        gan_resolutions=None,
        gan_channels_per_group=16,
        diffusion_gan=True,
        diffusion_gan_max_timestep=1000,
        randint=torch.randint,
        randn=torch.randn,
        total=lambda tensor: tensor,
    ):
        super().__init__()
        self.real_unet = real_unet.requires_grad_(False).eval()
        self.fake_unet = copy.deepcopy(real_unet).requires_grad_(True)
        self.sigma_data = sigma_data
        self.num_train_timesteps = num_train_timesteps
        self.max_step = min(round(max_step_percent * num_train_timesteps), num_train_timesteps - 1)
        self.min_step = min(round(min_step_percent * num_train_timesteps), self.max_step)
        low, high = known_range(real_unet, sigma_min, sigma_max)
        if low >= high:
            raise UserError(f"--sigma_min {sigma_min} --sigma_max {sigma_max}: the teacher knows none of these noise levels")
        karras_sigmas = get_sigmas_karras(num_train_timesteps, low, high, rho).flip(0)
        self.register_buffer("karras_sigmas", karras_sigmas.contiguous(), persistent=False)
        self.randint, self.randn, self.total = randint, randn, total
        self.objective, self.sid_alpha, self.f_divergence = objective, sid_alpha, f_divergence
        self.fake_loss_weighting = fake_loss_weighting

        self.gan_classifier = gan_classifier
        self.diffusion_gan = diffusion_gan
        self.diffusion_gan_max_timestep = min(diffusion_gan_max_timestep, num_train_timesteps)
        if gan_classifier:
            self.gan_features = gan_features
            self.gan_resolutions = gan_resolutions or [min(real_unet.feature_channels)]
            if missing := set(self.gan_resolutions) - real_unet.feature_channels.keys():
                known = ", ".join(map(str, real_unet.feature_channels))
                raise UserError(f"--gan_resolutions {min(missing)}: the teacher's encoder has {known}")
            channels = [real_unet.feature_channels[side] for side in self.gan_resolutions]
            self.cls_pred_branch = Discriminator(channels, gan_channels_per_group)

    def train(self, mode=True):
        super().train(mode)
        self.real_unet.eval()
        return self

    def add_noise(self, images, sigma=None, noise=None, first=0, last=None):
        """Returns (`images` `[B, C, H, W]` plus `sigma` `[B]` times standard normal `noise`, `sigma`).

        `sigma` and `noise` are drawn if they are None, `sigma` uniformly over `karras_sigmas[first : last + 1]`.
        """
        if sigma is None:
            end = self.num_train_timesteps if last is None else last + 1
            sigma = self.karras_sigmas[self.randint(first, end, (len(images),), device=images.device)]
        if noise is None:
            noise = self.randn(images.shape, device=images.device)
        return images + sigma.reshape(-1, 1, 1, 1) * noise, sigma

    def compute_distribution_matching_loss(self, images, labels, sigma=None, noise=None):
        """The loss that moves generated images towards the teacher's distribution: the `objective`, of `objectives.py`.

        images: generated, `[B, C, H, W]`; labels: `[B]`. `sigma` `[B]` and standard normal `noise` `[B, C, H, W]` are drawn
        unless given. Only `images` get a gradient. Returns two dicts: `loss_dm`, and the intermediate results, detached.
        """
        if self.objective == "sid":  # the gradient also flows through the inputs of the two denoisers
            noisy, sigma = self.add_noise(images, sigma, noise, self.min_step, self.max_step)
            with self.frozen():
                pred_real, pred_fake = self.real_unet(noisy, sigma, labels), self.fake_unet(noisy, sigma, labels)
            loss = sid_loss(images, pred_real, pred_fake, self.sid_alpha)
        elif self.objective == "dmd":  # DMD2 eq. 1
            with torch.no_grad():
                noisy, sigma = self.add_noise(images, sigma, noise, self.min_step, self.max_step)
                pred_real, pred_fake = self.real_unet(noisy, sigma, labels), self.fake_unet(noisy, sigma, labels)
                scale = None if self.f_divergence == "rkl" else self.compute_f_divergence_weight(noisy, sigma, labels)
            loss = dmd_loss(images, pred_real, pred_fake, scale)
        else:
            raise ValueError(f"objective must be dmd or sid, not {self.objective!r}")
        log_dict = {"dmtrain_noisy": noisy, "dmtrain_pred_real": pred_real, "dmtrain_pred_fake": pred_fake}
        with torch.no_grad():
            log_dict["dmtrain_gradient_norm"] = dmd_gradient(images, pred_real, pred_fake).flatten(1).norm(dim=1).mean()
            log_dict["fake_lag"] = fake_lag(images, pred_real, pred_fake, self.total)
        return {"loss_dm": loss}, {name: value.detach() for name, value in log_dict.items()}

    def compute_f_divergence_weight(self, noisy, sigma, labels):
        """The weights `[B]` of noised images from the heads' mean logit, normalised in ten bins of the schedule's noise levels."""
        logits = self.cls_pred_branch(self.gan_network.encode(noisy, sigma, labels, self.gan_resolutions)).mean(1)
        index = torch.searchsorted(self.karras_sigmas, sigma.to(self.karras_sigmas.dtype)).clamp(max=self.num_train_timesteps - 1)
        return normalised_f_divergence_weight(logits, self.f_divergence, index * NUM_BINS // self.num_train_timesteps, self.total)

    @property
    def gan_network(self):
        return self.real_unet if self.gan_features == "teacher" else self.fake_unet

    @contextmanager
    def frozen(self):
        """A context in which the guidance model's parameters get no gradient, but gradients flow through its networks."""
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

        Shapes as in `compute_distribution_matching_loss`; no gradient reaches the generator. Returns two dicts: `loss_fake_mean`,
        and the `features` of the same pass if the GAN heads can use them.
        """
        images = images.detach()
        noisy, sigma = self.add_noise(images, sigma, noise)
        log_dict = {}
        all_levels = self.diffusion_gan and self.diffusion_gan_max_timestep == self.num_train_timesteps
        if self.gan_classifier and self.gan_features == "fake" and all_levels:
            # The heads need the same images at the same noise levels: one pass serves both losses.
            pred_fake, log_dict["features"] = self.fake_unet(noisy, sigma, labels, features=self.gan_resolutions)
        else:
            pred_fake = self.fake_unet(noisy, sigma, labels)
        if self.fake_loss_weighting == "edm":
            loss = denoising_loss(pred_fake, images, sigma, self.sigma_data)
        else:
            loss = F.mse_loss(pred_fake, images)
        return {"loss_fake_mean": loss}, log_dict

    def compute_cls_logits(self, images, labels):
        """The heads' logits `[B, heads]`, positive for "real", of `images` at random noise levels, or of clean `images`."""
        if self.diffusion_gan:
            images, sigma = self.add_noise(images, last=self.diffusion_gan_max_timestep - 1)
        else:
            sigma = self.karras_sigmas[:1].expand(len(images))
        return self.cls_pred_branch(self.gan_network.encode(images, sigma, labels, self.gan_resolutions))

    def compute_generator_clean_cls_loss(self, fake, labels):
        """The generator's GAN loss (DMD2 eq. 4; `discriminator.py`).

        fake: generated `[B, C, H, W]`; labels: `[B]`. `fake` gets a gradient, the guidance model's parameters do not. Returns two
        dicts: `gen_cls_loss`, and an empty one.
        """
        with self.frozen():
            loss = generator_gan_loss(self.compute_cls_logits(fake, labels))
        return {"gen_cls_loss": loss}, {}

    def compute_guidance_clean_cls_loss(self, real, real_labels, fake, fake_labels, fake_features=None):
        """The heads' GAN loss (DMD2 eq. 4; `discriminator.py`).

        real, fake: `[B, C, H, W]`; labels: `[B]`; no gradient reaches the generator. `fake_features`: the feature maps of the fake
        images, if `compute_loss_fake` returned them. Returns two dicts: `guidance_cls_loss`, and mean logits.
        """
        real_logits = self.compute_cls_logits(real, real_labels)
        if fake_features is None:
            fake_logits = self.compute_cls_logits(fake.detach(), fake_labels)
        else:
            fake_logits = self.cls_pred_branch(fake_features)
        loss = discriminator_gan_loss(real_logits, fake_logits)
        return {"guidance_cls_loss": loss}, {"real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}
