"""The objectives that train a generator with guidance: pure functions of tensors. A new objective is a new function here.

images: generated, x, `[B, C, H, W]`. pred_real, pred_fake: predictions of the teacher and of `fake_unet` for the same noised
images, D_r(x + sigma n) and D_f(x + sigma n), `[B, C, H, W]`. Losses are scalars; their gradient reaches `images`.
"""

import torch
import torch.nn.functional as F


def normaliser(images, pred_real):
    """DMD eq. 8: w = mean_{C,H,W} |x - D_r| of each image, at least 1e-5, `[B, 1, 1, 1]`, without gradient.

    Division by it gives the difference of two denoisers the same scale at every noise level.
    """
    return (images - pred_real).detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-5)


def dmd_gradient(images, pred_real, pred_fake, scale=None):
    """The DMD2 gradient, `[B, C, H, W]`: scale (D_f - D_r) / w. `scale`: weights of the images, `[B]`; default 1.

    DMD2 eq. 1 with DMD's weight: the difference of the two scores s = (D(x_t) - x_t) / sigma^2, in terms of denoised images.
    Entries that are not finite are set to 0.
    """
    grad = (pred_fake - pred_real) / normaliser(images, pred_real)
    if scale is not None:
        grad = grad * scale.reshape(-1, 1, 1, 1)
    return torch.where(grad.isfinite(), grad, 0.0).detach()


def dmd_loss(images, pred_real, pred_fake, scale=None):
    """0.5 mean((x - stopgrad(x - g))^2) with g the `dmd_gradient`: its gradient with respect to x is g / (number of elements)."""
    grad = dmd_gradient(images, pred_real, pred_fake, scale)
    return 0.5 * F.mse_loss(images, (images - grad).detach())


def fake_lag(images, pred_real, pred_fake, total=lambda tensor: tensor):
    """How far `fake_unet` lags behind the generator, as a share of the DMD2 gradient: a scalar, 0 if it has kept up.

    The error of an exact D_f is orthogonal to every function of x_t, and so to g, the `dmd_gradient`. If it is not,
    D_f - lag (D_f - D_r) denoises these images better, with lag = -<(x - D_f) / w, g> / <g, g>. Above 0, the generator has
    already moved part of the way along g; at 1, all of it. Below 0, g is too short. `total` sums a tensor over all processes.
    """
    grad = dmd_gradient(images, pred_real, pred_fake)
    error = (images - pred_fake) / normaliser(images, pred_real)
    taken_back, size = total(torch.stack([-(error * grad).sum(), grad.square().sum()]))
    return taken_back / size.clamp(min=1e-12)  # g is 0 before the first update


# ---- f-divergences ----------------------------------------------------------------------------------------------------------

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


def density_ratio(logits):
    """r `[B]` from a discriminator's logits `[B]`, positive for "real": exp(logit), in [0.1, 20], without gradient."""
    return logits.detach().float().clamp(-10, 10).exp().clamp(0.1, 20)


def f_divergence_weight(logits, kind):
    """The weights h(r) of the images, `[B]`, that turn `dmd_loss` from the reverse KL divergence into the divergence `kind`."""
    return F_DIVERGENCES[kind](density_ratio(logits))


def normalised_f_divergence_weight(logits, kind, bins, total=lambda tensor: tensor):
    """`f_divergence_weight` with r divided by its mean over the images of the same bin, and the weight by its mean over all, `[B]`.

    bins: of noise levels, int64 `[B]` from 0. This removes a factor by which a discriminator is off in a whole bin. `total` sums
    a tensor over all processes.
    """
    ratio, ones = density_ratio(logits), torch.ones_like(logits, dtype=torch.float32)
    zeros = ratio.new_zeros(NUM_BINS)
    means = total(zeros.index_add(0, bins, ratio)) / total(zeros.index_add(0, bins, ones)).clamp(min=1)
    weight = F_DIVERGENCES[kind](ratio / means[bins])
    return weight / (total(weight.sum()) / total(ones.sum()))


# ---- score identity distillation --------------------------------------------------------------------------------------------


def sid_loss(images, pred_real, pred_fake, alpha=1.0):
    """SiD (arXiv 2404.04057, eq. 23): mean((D_r - D_f) ((D_r - x) - alpha (D_r - D_f)) / w), w without gradient.

    Unlike in `dmd_loss`, the gradient flows through `images`, and through both predictions to their inputs, the noised images.
    With alpha = 0.5 and an exact D_f this is half the squared distance of the two scores, in terms of images; alpha near 1
    corrects for an inexact D_f.
    """
    difference = pred_real - pred_fake
    return (difference * ((pred_real - images) - alpha * difference) / normaliser(images, pred_real)).mean()
