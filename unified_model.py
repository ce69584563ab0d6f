"""UnifiedModel: the generator and its guidance, with the two turns of a DMD2 iteration.

Their cost in forward passes of one network, where a backward pass counts as two, if all networks have one size: A
generator turn costs 5 passes, 3 for the generator and 1 each for teacher and `fake_unet` (with SiD 2 each, as the
gradient flows through both). A guidance turn costs 3, and 1 more to generate its images if the generator is not trained
in that iteration. With one generator update in r iterations, an iteration costs 4 + 4 / r passes on average: 4.4 at
r = 10. A student of N steps needs (N - 1) / 2 more passes per batch of images, on average.
"""

import copy

import torch
from torch import nn

from sampling import few_step_sampler


class UnifiedModel(nn.Module):
    """`feedforward_model`, the generator, and `guidance_model`, a `GuidanceModel`.

    conditioning_sigma: the noise level at which a one-step generator is called
    student_sigmas:     the levels, descending, of a generator of several steps; default: `conditioning_sigma` alone
    generator:          called as `net(x, sigma, labels)` and trained in place; default: a copy of the teacher

    A generator of several steps has a `fake_unet` per step, in `fake_unets`: one for all would learn the mixture of
    their images, and the images of each step could drift.
    """

    def __init__(self, guidance_model, conditioning_sigma=80.0, student_sigmas=None, generator=None):
        super().__init__()
        self.guidance_model = guidance_model
        generator = copy.deepcopy(guidance_model.real_unet) if generator is None else generator
        self.feedforward_model = generator.requires_grad_(True)
        self.student_sigmas = list(student_sigmas or [conditioning_sigma])
        if self.student_sigmas != sorted(set(self.student_sigmas), reverse=True):
            listed = " ".join(map(str, self.student_sigmas))
            raise ValueError(f"student_sigmas {listed}: must descend, starting with the most noise")
        fake_unet = guidance_model.fake_unet
        self.fake_unets = nn.ModuleList([fake_unet, *(copy.deepcopy(fake_unet) for _ in self.student_sigmas[1:])])

    def generate(self, noise, labels):
        """From standard normal noise `[B, C, H, W]` and labels `[B]` to images `[B, C, H, W]`, in one pass per step."""
        return few_step_sampler(self.feedforward_model, noise, labels, self.student_sigmas)

    def generate_at(self, noise, labels, student_step=0):
        """The images of one step of the generator, `[B, C, H, W]`, by backward simulation (DMD2 section 4.5).

        The generator makes its own input, from standard normal `noise` through the steps before, without gradient. So
        its inputs in training are those of sampling.
        """
        sigma, x = self.student_sigmas[student_step], self.student_sigmas[0] * noise
        if student_step:
            with torch.no_grad():
                x = few_step_sampler(self.feedforward_model, noise, labels, self.student_sigmas[:student_step])
            x = x + sigma * torch.randn_like(x)
        return self.feedforward_model(x, noise.new_full((len(noise),), sigma), labels)

    def generator_turn(self, noise, labels, student_step=0):
        """The generator's losses on fresh images: distribution matching, and `gen_cls_loss` if there are GAN heads.

        noise: standard normal `[B, C, H, W]`; labels: `[B]`; student_step: index of the generator's step to train.
        Returns (dict of losses, dict of noised and denoised images, the images, detached). The guidance turn of the
        same iteration trains on these images, so that nothing is generated twice.
        """
        self.guidance_model.fake_unet = self.fake_unets[student_step]  # this step's, for the methods below
        images = self.generate_at(noise, labels, student_step)
        loss_dict, log_dict = self.guidance_model.compute_distribution_matching_loss(images, labels)
        if self.guidance_model.gan_classifier:
            loss_dict |= self.guidance_model.compute_generator_clean_cls_loss(images, labels)
        return loss_dict, log_dict, images.detach()

    def guidance_turn(self, images, labels, real_images=None, real_labels=None, student_step=0):
        """The guidance model's losses on `images` of one step of the generator, with GAN heads also on `real_images`.

        Both are `[B, C, H, W]`, labels `[B]`. Returns two dicts: losses (none reaches the generator), mean logits.
        """
        guidance = self.guidance_model
        guidance.fake_unet = self.fake_unets[student_step]
        loss_dict, by_products = guidance.compute_loss_fake(images, labels)
        if not guidance.gan_classifier:
            return loss_dict, {}
        features = by_products.get("features")
        gan_loss, logits = guidance.compute_guidance_clean_cls_loss(real_images, real_labels, images, labels, features)
        return loss_dict | gan_loss, logits
