"""The objectives that train a generator with guidance: pure functions of tensors. A new objective is a new function.

images: generated, x, `[B, C, H, W]`. pred_real, pred_fake: predictions of the teacher and of `fake_unet` for the same
noised images, D_r(x + sigma n) and D_f(x + sigma n), `[B, C, H, W]`. Losses are scalars, differentiable in `images`.
"""

import torch
import torch.nn.functional as F


def normaliser(images, pred_real):
    """DMD eq. 8: w = mean_{C,H,W} |x - D_r| of each image, at least 1e-5, `[B, 1, 1, 1]`, without gradient.

    Division by it gives the difference of two denoisers the same scale at every noise level.
    """
    return (images - pred_real).detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)


def dmd_loss(images, pred_real, pred_fake, scale=None):
    """0.5 mean((x - stopgrad(x - g))^2): its gradient with respect to x is the DMD2 gradient g / (number of elements).

    scale: weights of the images, `[B]`; default 1. Entries of g that are not finite are set to 0.
    """
    # DMD2 eq. 1 with DMD's weight: the difference of the scores (D(x_t) - x_t) / sigma^2, in terms of denoised images
    grad = (pred_fake - pred_real) / normaliser(images, pred_real)
    if scale is not None:
        grad = grad * scale.reshape(-1, 1, 1, 1)
    grad = torch.where(grad.isfinite(), grad, 0.0)
    return 0.5 * F.mse_loss(images, (images - grad).detach())


# ---- f-divergences --------------------------------------------------------------------------------------------------

NUM_BINS = 10  # of noise levels
F_DIVERGENCES = {  # h(r) = r^2 f''(r) of r = p_real / p_generated (f-distill, arXiv 2502.15681, table 1)
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}


def f_divergence_weight(logits, kind, bins=None):
    """The weights h(r) of the images, `[B]`, that turn `dmd_loss` from the reverse KL into the divergence `kind`.

    logits: of a discriminator, `[B]`, positive for "real"; r = exp(logit), in [0.1, 20], without gradient.
    bins: of noise levels, int64 `[B]`, from 0 to NUM_BINS - 1. With them r is divided by its mean over the images of
    its bin, and the weight by its mean over all. This removes a factor by which a discriminator is off in a whole bin.
    """
    ratio = logits.detach().float().clamp(-10, 10).exp().clamp(0.1, 20)
    if bins is None:
        return F_DIVERGENCES[kind](ratio)
    sums, counts = (ratio.new_zeros(NUM_BINS).index_add(0, bins, of) for of in (ratio, torch.ones_like(ratio)))
    weight = F_DIVERGENCES[kind](ratio * counts[bins] / sums[bins])
    return weight / weight.mean()


# ---- score identity distillation ------------------------------------------------------------------------------------


def sid_loss(images, pred_real, pred_fake, alpha=1.0):
    """SiD (arXiv 2404.04057, eq. 23): mean((D_r - D_f) ((D_r - x) - alpha (D_r - D_f)) / w), w without gradient.

    Unlike in `dmd_loss`, the gradient flows through `images`, and through both predictions to their inputs, the noised
    images. With alpha = 0.5 and an exact D_f this is half the squared distance of the two scores, in terms of images;
    alpha near 1 corrects for an inexact D_f.
    """
    difference = pred_real - pred_fake
    return (difference * ((pred_real - images) - alpha * difference) / normaliser(images, pred_real)).mean()
