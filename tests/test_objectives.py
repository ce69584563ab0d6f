import pytest
import torch

from objectives import F_DIVERGENCES, NUM_BINS, dmd_loss, f_divergence_weight, sid_loss


def tensors():
    torch.manual_seed(0)
    images, pred_real, pred_fake = torch.randn(3, 4, 3, 5, 5, dtype=torch.float64)
    return images.requires_grad_(), pred_real, pred_fake


def gradient(x, *predictions):
    """The gradient of `dmd_loss` with respect to `x`, times the number of elements."""
    x = x.detach().requires_grad_()
    dmd_loss(x, *predictions).backward()
    return x.grad * x.numel()


def test_dmd_loss_and_its_gradient_are_those_on_paper():
    """g = (D_f - D_r) / mean|x - D_r| per image; the loss is half the mean of g^2, its gradient g / size."""
    x, real, fake = tensors()
    g = torch.stack([(fake[i] - real[i]) / (x[i].detach() - real[i]).abs().mean() for i in range(4)])
    torch.testing.assert_close(dmd_loss(x, real, fake), 0.5 * g.square().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(x, real, fake), g, rtol=1e-9, atol=1e-15)
    scale = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(gradient(x, real, fake, scale), scale[:, None, None, None] * g, rtol=1e-9, atol=1e-15)


def test_dmd_of_an_image_that_the_teacher_would_not_change():
    """w is at least 1e-5, so that the gradient stays finite; what is not finite all the same is 0."""
    x, _, _ = tensors()
    real, fake = x.detach().clone(), x.detach() + 1e-3
    fake[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    grad = gradient(x, real, fake)
    torch.testing.assert_close(grad[1:], torch.full_like(grad[1:], 100.0))
    assert torch.equal(grad[0, 0, 0, :3], torch.zeros(3, dtype=torch.float64)) and grad.isfinite().all()


# ---- f-divergences --------------------------------------------------------------------------------------------------

DIVERGENCES = {  # f of D_f = E_q[f(p / q)]
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (1 + r) * (1 + r).log(),
    "softened_rkl": lambda r: (1 + r) * (1 + r).log() - (1 + r) * r.log(),
    "hellinger": lambda r: -4 * r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: 0.5 / r,
}


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_weights_are_r_squared_times_the_second_derivative(kind):
    logits = torch.linspace(-2, 2.9, 9, dtype=torch.float64)
    r = logits.exp().requires_grad_()
    (slope,) = torch.autograd.grad(DIVERGENCES[kind](r).sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    weight = f_divergence_weight(logits, kind).double()
    torch.testing.assert_close(weight, r.detach() ** 2 * curvature, rtol=1e-5, atol=0)


def test_ratios_are_bounded():
    logits = torch.tensor([-50.0, -3.0, 3.5, 50.0], requires_grad=True)
    weight = f_divergence_weight(logits, "kl")
    torch.testing.assert_close(weight, torch.tensor([0.1, 0.1, 20.0, 20.0]))
    assert not weight.requires_grad


def test_normalising_takes_each_bins_offset_away():
    """A discriminator that is off by a factor in each bin gives the weights of one that is not; their mean is 1."""
    logits, bins = torch.randn(400, generator=torch.Generator().manual_seed(0)) / 2, torch.arange(400) % 4
    off = logits + torch.tensor([0.0, 0.3, -0.5, 0.6])[bins]
    weights = [f_divergence_weight(x, "kl", bins) for x in (logits, off)]
    torch.testing.assert_close(*weights)
    ratio = logits.exp()
    expected = ratio / torch.stack([ratio[bins == k].mean() for k in range(4)])[bins]
    torch.testing.assert_close(weights[0], expected / expected.mean())
    assert f_divergence_weight(logits, "rkl", bins).eq(1).all()


# ---- SiD ------------------------------------------------------------------------------------------------------------


def gaussian(mean, std):
    return lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


def test_sid_loss_is_the_one_on_paper():
    x, real, fake = tensors()
    expected = 0
    for x_i, r, f in zip(x, real, fake, strict=True):
        expected += ((r - f) * ((r - x_i) - 1.2 * (r - f))).mean() / (x_i - r).abs().mean() / 4
    torch.testing.assert_close(sid_loss(x, real, fake, 1.2), expected)


def test_the_gradient_of_sid_runs_through_the_inputs_of_both_denoisers():
    """Against finite differences, with the normaliser held."""
    torch.manual_seed(0)
    (x, noise), sigma = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64), 0.7
    real, fake = gaussian(0.5, 0.4), gaussian(-0.3, 0.8)
    w = (x - real(x + sigma * noise, sigma)).abs().mean()

    def by_hand(x):
        noisy = x + sigma * noise
        d = real(noisy, sigma) - fake(noisy, sigma)
        return (d * ((real(noisy, sigma) - x) - 1.1 * d)).mean() / w

    point = x.clone().requires_grad_()
    noisy = point + sigma * noise
    sid_loss(point, real(noisy, sigma), fake(noisy, sigma), 1.1).backward()
    for index, step in enumerate(1e-5 * torch.eye(4, dtype=torch.float64).reshape(4, *x.shape)):
        slope = (by_hand(x + step) - by_hand(x - step)) / 2e-5
        assert point.grad.flatten()[index].item() == pytest.approx(slope.item(), rel=1e-6)


# ---- where they lead ------------------------------------------------------------------------------------------------

REAL = (0.5, 0.3)


def distil(objective, lag=0.0, steps=1500, kind=None, seed=0):
    """A Gaussian generator of four pixels, from (-0.5, 0.8), moved by `objective`: its (mean, deviation) per step.

    The fake denoiser is the exact one of a Gaussian that follows the generator: by `lag` it keeps of what it was.
    """
    torch.manual_seed(seed)
    mean, log_std = torch.tensor(-0.5, requires_grad=True), torch.tensor(0.8).log().requires_grad_()
    optimizer = torch.optim.Adam([mean, log_std], lr=0.02)
    believed, way = torch.tensor([-0.5, 0.8]), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        std = log_std.exp()
        believed = lag * believed + (1 - lag) * torch.stack([mean, std]).detach()
        x = mean + std * torch.randn(256, 1, 2, 2)
        sigma = torch.empty(256, 1, 1, 1).uniform_(-2, 1.5).exp()
        noisy = x + sigma * torch.randn_like(x)
        real, fake = gaussian(*REAL)(noisy, sigma), gaussian(*believed)(noisy, sigma)
        if objective == "sid":
            loss = sid_loss(x, real, fake)
        else:
            p, q = (torch.distributions.Normal(m, (s**2 + sigma**2).sqrt()) for m, s in (REAL, believed))
            logits = (p.log_prob(noisy) - q.log_prob(noisy)).detach().sum((1, 2, 3))
            order = sigma.flatten().argsort().argsort()  # bins as in training, of equal numbers of images
            weight = kind and f_divergence_weight(logits, kind, order * NUM_BINS // len(order))
            loss = dmd_loss(x, real.detach(), fake.detach(), weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        way.append((mean.item(), log_std.exp().item()))
    return way


@pytest.mark.parametrize("objective, kind", [("dmd", kind) for kind in F_DIVERGENCES] + [("sid", None)])
def test_every_objective_leads_to_the_teachers_mean_and_deviation(objective, kind):
    mean, std = distil(objective, kind=kind)[-1]
    assert abs(mean - REAL[0]) < 0.03 and abs(std - REAL[1]) < 0.03, (mean, std)


@pytest.mark.parametrize("objective", ["dmd", "sid"])
def test_a_fake_denoiser_that_lags_behind_costs_spread_on_the_way(objective):
    """Both overshoot the mean, and for long what is generated varies much less than real data do."""
    least, least_lagging = (min(std for _, std in distil(objective, lag)) for lag in (0.0, 0.98))
    assert least > 0.9 * REAL[1] and least_lagging < 0.65 * REAL[1]
    assert max(mean for mean, _ in distil(objective, 0.98)) > 1.5 * REAL[0]
