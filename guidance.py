"""GuidanceModel: the two denoisers whose difference tells the generator where to move (DMD, arXiv 2311.18828; DMD2, 2405.14867)."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from model import denoising_loss, get_sigmas_karras, group_norm
from parallel import own_rows, world_size


class GuidanceModel(nn.Module):
    """The frozen teacher `real_unet` and the trainable `fake_unet`, and the losses that they give.

    real_unet:                 any module called as `net(x, sigma, labels)` -> denoised image; frozen, always in eval mode
    num_train_timesteps:       number of noise levels in `karras_sigmas` (ascending: index 0 is the least noise)
    sigma_min, sigma_max, rho: the noise schedule (EDM eq. 5)
    sigma_data:                standard deviation of the data, in the weight of `fake_unet`'s loss
    min_step_percent, max_step_percent: the share of `karras_sigmas` that the distribution-matching loss draws from
    gan_classifier:            adds a head on `fake_unet`'s bottleneck that tells real from generated images (DMD2 section 4.3);
                               `real_unet` must then have `bottleneck_channels` and take `return_bottleneck`, as SimpleUNet does
    diffusion_gan:             the head sees noised images, as in the paper; else clean ones
    diffusion_gan_max_timestep: its noise levels are the first so many of `karras_sigmas`
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
        gan_classifier=False,
        diffusion_gan=True,
        diffusion_gan_max_timestep=1000,
    ):
        super().__init__()
        self.real_unet = real_unet.requires_grad_(False).eval()
        self.fake_unet = copy.deepcopy(real_unet).requires_grad_(True)
        self.sigma_data = sigma_data
        self.num_train_timesteps = num_train_timesteps
        self.max_step = min(round(max_step_percent * num_train_timesteps), num_train_timesteps - 1)
        self.min_step = min(round(min_step_percent * num_train_timesteps), self.max_step)
        karras_sigmas = get_sigmas_karras(num_train_timesteps, sigma_min, sigma_max, rho).flip(0)
        self.register_buffer("karras_sigmas", karras_sigmas.contiguous(), persistent=False)

        self.gan_classifier = gan_classifier
        self.diffusion_gan = diffusion_gan
        self.diffusion_gan_max_timestep = min(diffusion_gan_max_timestep, num_train_timesteps)
        if gan_classifier:
            channels = real_unet.bottleneck_channels
            self.cls_pred_branch = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                group_norm(channels),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(channels, 1),
            )

    def train(self, mode=True):
        super().train(mode)
        self.real_unet.eval()
        return self

    def add_noise(self, images, sigma, noise, first=0, last=None):
        """`images` `[B, C, H, W]` plus `sigma` `[B]` times standard normal `noise`, and that `sigma`.

        Where they are None they are drawn for all processes' batches, `sigma` uniformly over `karras_sigmas[first : last + 1]`.
        """
        global_batch = len(images) * world_size()
        if sigma is None:
            end = self.num_train_timesteps if last is None else last + 1
            sigma = self.karras_sigmas[own_rows(torch.randint(first, end, (global_batch,), device=images.device))]
        if noise is None:
            noise = own_rows(torch.randn(global_batch, *images.shape[1:], device=images.device))
        return images + sigma.reshape(-1, 1, 1, 1) * noise, sigma

    def compute_distribution_matching_loss(self, images, labels, sigma=None, noise=None):
        """The loss whose gradient with respect to `images` is the difference of the two scores (DMD2 eq. 1).

        images: generated, `[B, C, H, W]`; labels: `[B]`. `sigma` `[B]` and standard normal `noise` `[B, C, H, W]` are drawn
        unless given. Returns (`loss_dm` in a dict, what was computed on the way, detached, in a dict).
        """
        with torch.no_grad():
            noisy, sigma = self.add_noise(images, sigma, noise, self.min_step, self.max_step)
            pred_real = self.real_unet(noisy, sigma, labels)
            pred_fake = self.fake_unet(noisy, sigma, labels)

            # DMD2 eq. 1, the DMD2 gradient: the score difference in terms of denoised images, s = (D(x_t) - x_t) / sigma^2,
            # with the weight of DMD eq. 8, which makes its size alike at every noise level.
            weight = (images - pred_real).abs().mean(dim=(1, 2, 3), keepdim=True)
            grad = (pred_fake - pred_real) / weight
            grad = torch.where(grad.isfinite(), grad, 0.0)

        # A squared error whose gradient with respect to `images` is `grad` / (number of elements).
        loss_dm = 0.5 * F.mse_loss(images, (images - grad).detach())
        log_dict = {
            "dmtrain_noisy": noisy,
            "dmtrain_pred_real": pred_real,
            "dmtrain_pred_fake": pred_fake,
            "dmtrain_gradient_norm": grad.flatten(1).norm(dim=1).mean(),
        }
        return {"loss_dm": loss_dm}, log_dict

    def compute_loss_fake(self, images, labels, sigma=None, noise=None):
        """`fake_unet`'s denoising loss on generated images (DMD eq. 6): it learns the generator's distribution.

        Shapes as in `compute_distribution_matching_loss`; no gradient reaches the generator. Returns (`loss_fake_mean` in a dict,
        and in a dict, where the GAN head can use them, the `bottleneck` features of the same pass).
        """
        images = images.detach()
        noisy, sigma = self.add_noise(images, sigma, noise)
        log_dict = {}
        if self.gan_classifier and self.diffusion_gan and self.diffusion_gan_max_timestep == self.num_train_timesteps:
            # The head wants the same images at the same noise levels: one pass serves both losses.
            pred_fake, log_dict["bottleneck"] = self.fake_unet(noisy, sigma, labels, return_bottleneck="both")
        else:
            pred_fake = self.fake_unet(noisy, sigma, labels)
        return {"loss_fake_mean": denoising_loss(pred_fake, images, sigma, self.sigma_data)}, log_dict

    def compute_cls_logits(self, images, labels):
        """The head's logits `[B]`, positive for "real", of `images` at random noise levels (the least, without `diffusion_gan`)."""
        if self.diffusion_gan:
            images, sigma = self.add_noise(images, None, None, 0, self.diffusion_gan_max_timestep - 1)
        else:
            sigma = self.karras_sigmas[:1].expand(len(images))
        return self.cls_pred_branch(self.fake_unet(images, sigma, labels, return_bottleneck=True)).squeeze(1).float()

    def compute_generator_clean_cls_loss(self, fake, labels):
        """The generator's non-saturating GAN loss, mean of softplus(-logit) (DMD2 eq. 4).

        fake: generated `[B, C, H, W]`; labels: `[B]`. The gradient reaches `fake` and stops at the guidance model's parameters.
        Returns (`gen_cls_loss` in a dict, an empty dict).
        """
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        logits = self.compute_cls_logits(fake, labels)
        for parameter in trainable:
            parameter.requires_grad_(True)
        return {"gen_cls_loss": F.softplus(-logits).mean()}, {}

    def compute_guidance_clean_cls_loss(self, real, real_labels, fake, fake_labels, fake_bottleneck=None):
        """The head's loss, mean of softplus(logit of fake) + softplus(-logit of real) (DMD2 eq. 4).

        real, fake: `[B, C, H, W]`; labels: `[B]`; no gradient reaches the generator. `fake_bottleneck`: the features of the fake
        images, where `compute_loss_fake` has them. Returns (`guidance_cls_loss` in a dict, mean logits in a dict).
        """
        real_logits = self.compute_cls_logits(real, real_labels)
        if fake_bottleneck is None:
            fake_logits = self.compute_cls_logits(fake.detach(), fake_labels)
        else:
            fake_logits = self.cls_pred_branch(fake_bottleneck).squeeze(1).float()
        loss = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
        return {"guidance_cls_loss": loss}, {"real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}
