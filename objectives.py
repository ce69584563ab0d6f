"""The objectives by which guidance moves a generator: pure functions of tensors; a new objective is a function here.

images: generated, x, `[B, C, H, W]`. pred_real, pred_fake: what teacher and `fake_unet` make of the same noised images,
D_r(x + sigma n) and D_f(x + sigma n), `[B, C, H, W]`. Losses are scalars; their gradient reaches `images`.
"""

import torch
import torch.nn.functional as F


def normaliser(images, pred_real):
    """DMD eq. 8: w = mean_{C,H,W} |x - D_r| of each image, at least 1e-5, `[B, 1, 1, 1]`, without gradient.

    Divided by it, the difference of two denoisers is of one size at every noise level.
    """
    return (images - pred_real).detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)


def dmd_gradient(images, pred_real, pred_fake, scale=None):
    """The DMD2 gradient, `[B, C, H, W]`: scale (D_f - D_r) / w. `scale`: weights of the images, `[B]`; default 1.

    DMD2 eq. 1: the difference of the two scores, in terms of denoised images, s = (D(x_t) - x_t) / sigma^2, with DMD's weight.
    Entries that are not finite are 0.
    """
    grad = (pred_fake - pred_real) / normaliser(images, pred_real)
    if scale is not None:
        grad = grad * scale.reshape(-1, 1, 1, 1)
    return torch.where(grad.isfinite(), grad, 0.0).detach()


def dmd_loss(images, pred_real, pred_fake, scale=None):
    """0.5 mean((x - stopgrad(x - g))^2) with g the `dmd_gradient`: its gradient with respect to x is g / (number of elements)."""
    grad = dmd_gradient(images, pred_real, pred_fake, scale)
    return 0.5 * F.mse_loss(images, (images - grad).detach())
