"""Samplers: plain functions of a denoiser `net(x, sigma, class_labels)`, standard normal noise and labels."""

import math
from itertools import pairwise

import torch

from model import get_sigmas_flow, get_sigmas_karras, known_range


def few_step_sampler(net, noise, labels, sigmas, generator=None, fresh_noise=None):
    """Images of a distilled generator, in one forward pass per noise level of `sigmas` (DMD2 section 4.5).

    x = D(sigma_0 z; sigma_0), then for each further level x = D(x + sigma e; sigma) with fresh noise e.
    noise: standard normal z `[B, C, H, W]`; labels: `[B]`; sigmas: the levels that it was trained at, descending;
    generator: the random generator that draws e (default: torch's own); fresh_noise: e itself instead, a list of `[B,
    C, H, W]`, one per further level. Returns `[B, C, H, W]`, which may slightly exceed [-1, 1]. Gradients flow.
    """
    x = noise * sigmas[0]
    for index, sigma in enumerate(sigmas):
        if index and fresh_noise is not None:
            x = x + sigma * fresh_noise[index - 1].to(x.device)
        elif index:
            x = x + sigma * torch.randn(x.shape, generator=generator, device=(generator or x).device).to(x.device)
        x = net(x, noise.new_full(noise.shape[:1], sigma), labels)  # torch.export would take len(noise) as constant
    return x


def student_sampler(net, noise, labels, sigmas):
    """`few_step_sampler`, but each image depends only on its own noise and label, not on its batch.

    The fresh noise of an image comes from a random stream whose seed is the bits of its `noise`.
    """
    if len(sigmas) == 1:
        return few_step_sampler(net, noise, labels, sigmas)
    bits = noise.flatten(1)[:, :2].float().cpu().view(torch.int32).tolist()  # of the first two numbers of each image
    streams = [random_stream(*pair) for pair in bits]
    fresh_noise = [torch.stack([torch.randn(noise.shape[1:], generator=each) for each in streams]) for _ in sigmas[1:]]
    return few_step_sampler(net, noise, labels, sigmas, fresh_noise=fresh_noise)


def one_step_sampler(net, noise, labels, conditioning_sigma):
    """Images in one forward pass, G(z) = D(sigma z; sigma) at sigma = `conditioning_sigma` (DMD2 section 3)."""
    return few_step_sampler(net, noise, labels, [conditioning_sigma])


@torch.no_grad()
def heun_sampler(net, noise, labels, num_steps=18, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's deterministic sampler (algorithm 1): Heun's method along dx/dsigma = (x - D(x; sigma)) / sigma.

    noise: standard normal `[B, C, H, W]`; labels: `[B]`. Returns `[B, C, H, W]` after 2 * num_steps - 1 evaluations.
    The noise levels stay within `net.sigma_min` and `net.sigma_max` if the network has these bounds.
    """
    sigmas = [*get_sigmas_karras(num_steps, *known_range(net, sigma_min, sigma_max), rho).tolist(), 0.0]
    x = noise * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - net(x, noise.new_full((len(x),), sigma), labels)) / sigma
        x_next = x + (sigma_next - sigma) * d  # Euler step
        if sigma_next > 0:  # second-order correction
            d_next = (x_next - net(x_next, noise.new_full((len(x),), sigma_next), labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
    return x


@torch.no_grad()
def euler_sampler(net, noise, labels, num_steps=18, sigma_max=80.0):
    """Euler's method in even steps of flow matching's time t, from `sigma_max` to 0. Shapes as for `heun_sampler`.

    A step mixes the predicted image and the predicted noise anew, in t as in sigma: it is DDIM's step too. There are
    `num_steps` evaluations. A network that has a `shift` shifts the levels (`get_sigmas_flow`).
    """
    _, sigma_max = known_range(net, 0.0, sigma_max)
    sigmas = get_sigmas_flow(num_steps + 1, 0.0, sigma_max, getattr(net, "shift", 1.0)).tolist()
    x = noise * sigmas[0]
    for sigma, sigma_next in pairwise(sigmas):
        denoised = net(x, noise.new_full((len(x),), sigma), labels)
        x = denoised + sigma_next / sigma * (x - denoised)
    return x


def guided(net, guide, scale):
    """The denoiser D_guide + scale (D - D_guide), for samplers: `net` guided away from `guide`, a weaker one.

    An earlier checkpoint of `net` as the guide gives autoguidance (arXiv 2406.02507), a network without classes
    classifier-free guidance (arXiv 2207.12598). scale: 1 is `net` alone. It evaluates both networks.
    """

    def denoise(x, sigma, labels):
        return guide(x, sigma, labels).lerp(net(x, sigma, labels), scale)

    denoise.sigma_min, denoise.sigma_max = known_range(guide, *known_range(net, 0.0, math.inf))
    denoise.shift = getattr(net, "shift", 1.0)
    return denoise


def random_stream(seed, index):
    """Random generator number `index` of `seed`. torch's CPU generator takes 32 bits of seed."""
    return torch.Generator().manual_seed((seed * 1000003 + index) % 2**32)


def class_noise(classes, num_samples, shape, seed):
    """Standard normal noise `[len(classes) * num_samples, *shape]` and its labels, class after class, on the CPU.

    An image's noise depends only on `seed`, its class and its index in the class, so subsets and longer runs agree.
    Without classes the labels are 0, which the network ignores.
    """
    classes = list(classes) or [0]
    size = num_samples * math.prod(shape)
    # torch draws normal numbers in blocks of 16. Only whole blocks do not depend on how many numbers follow.
    draws = [torch.randn(math.ceil(size / 16) * 16, generator=random_stream(seed, label))[:size] for label in classes]
    noise = torch.cat(draws).reshape(-1, *shape)
    return noise, torch.tensor(classes).repeat_interleave(num_samples)


def grid_noise(label_dim, shape, seed):
    """`class_noise` for a sample grid of 8 columns: a row for each of the first ten classes; 8 rows without classes."""
    return class_noise(range(min(label_dim, 10)), 8 if label_dim else 64, shape, seed)
