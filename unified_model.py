"""UnifiedModel: the generator and its guidance, with the two turns of a DMD2 iteration.

Their cost in forward passes of one network, where a backward pass counts as two: A generator turn costs 5 passes, 3 for the
generator and 1 each for teacher and `fake_unet` (with SiD 2 each, as the gradient flows through both). A guidance turn costs 3,
and 1 more to generate its images if the generator is not trained in that iteration. With one generator update in r iterations,
an iteration costs 4 + 4 / r passes on average: 4.4 at r = 10. With k guidance updates on the same images it costs
1 + 3 k + 4 / r. A student of N steps needs (N - 1) / 2 more passes per batch of images, on average.
"""

import copy

import torch
from torch import nn

from sampling import few_step_sampler


class UnifiedModel(nn.Module):
    """`feedforward_model`, the generator, starts as a copy of the teacher; `guidance_model` is a `GuidanceModel`.

    conditioning_sigma: the noise level at which a one-step generator is called
    student_sigmas:     the levels, descending, of a generator of several steps; default: `conditioning_sigma` alone
    """

    def __init__(self, guidance_model, conditioning_sigma=80.0, student_sigmas=None):
        super().__init__()
        self.guidance_model = guidance_model
        self.feedforward_model = copy.deepcopy(guidance_model.real_unet).requires_grad_(True)
        self.student_sigmas = list(student_sigmas or [conditioning_sigma])

    def generate(self, noise, labels):
        """From standard normal noise `[B, C, H, W]` and labels `[B]` to images `[B, C, H, W]`, in one forward pass per level."""
        return few_step_sampler(self.feedforward_model, noise, labels, self.student_sigmas)

    def generate_at(self, noise, labels, level=0):
        """The generator's images at `student_sigmas[level]`, `[B, C, H, W]`, by backward simulation (DMD2 section 4.5).

        The generator makes its own input, from standard normal `noise` through the levels above, without gradient. So its inputs
        in training are those of sampling.
        """
        sigma, x = self.student_sigmas[level], self.student_sigmas[0] * noise
        if level:
            *fresh, last = [self.guidance_model.randn(noise.shape, device=noise.device) for _ in range(level)]
            with torch.no_grad():
                x = few_step_sampler(self.feedforward_model, noise, labels, self.student_sigmas[:level], fresh_noise=fresh)
            x = x + sigma * last
        return self.feedforward_model(x, noise.new_full((len(noise),), sigma), labels)

    def generator_turn(self, noise, labels, level=0):
        """The generator's losses on fresh images: distribution matching, and `gen_cls_loss` if the guidance has GAN heads.

        noise: standard normal `[B, C, H, W]`; labels: `[B]`; level: index of the student's level to train. Returns (dict of losses,
        dict of intermediate results, the images, detached). The guidance turn of the same iteration trains on these images, so
        that nothing is generated twice.
        """
        images = self.generate_at(noise, labels, level)
        loss_dict, log_dict = self.guidance_model.compute_distribution_matching_loss(images, labels)
        if self.guidance_model.gan_classifier:
            loss_dict |= self.guidance_model.compute_generator_clean_cls_loss(images, labels)[0]
        return loss_dict, log_dict, images.detach()

    def guidance_turn(self, images, labels, real_images=None, real_labels=None):
        """The guidance model's losses on generated `images`, and with GAN heads also on `real_images`, both `[B, C, H, W]`.

        Returns two dicts: losses, and the heads' mean logits. The generator gets no gradient.
        """
        loss_dict, computed = self.guidance_model.compute_loss_fake(images, labels)
        log_dict = {}
        if self.guidance_model.gan_classifier:
            cls_loss_dict, log_dict = self.guidance_model.compute_guidance_clean_cls_loss(
                real_images, real_labels, images, labels, computed.get("features")
            )
            loss_dict |= cls_loss_dict
        return loss_dict, log_dict
