from itertools import pairwise

import torch
from conftest import GaussianDenoiser

from sampling import class_noise, few_step_sampler, grid_noise, guided, heun_sampler, student_sampler


def test_heun_reaches_the_data_and_its_error_falls_like_the_square_of_the_step():
    """For N(0, s^2) the exact flow is linear: noise z at sigma_max ends at s 80 z / sqrt(s^2 + 80^2).

    Halving the step quarters the error; the last Euler step (algorithm 1) is too exact to show at 1e-4.
    """
    z = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    exact = 0.5 * 80 * z / (0.5**2 + 80**2) ** 0.5
    net, labels, errors = GaussianDenoiser(0.0, 0.5), torch.zeros(1, dtype=torch.long), []
    for steps in (20, 40, 80):
        out = heun_sampler(net, z, labels, steps, sigma_min=1e-4)
        errors.append((out - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert 3.3 < coarse / fine < 4.7, errors


def test_guidance_moves_the_data_away_from_the_guides():
    """For N(0, s^2) guided by N(0, g^2), the flow is linear: the factors of both networks to the powers S and 1 - S."""
    z, labels = torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)
    factor = {std: std / (std**2 + 80**2) ** 0.5 for std in (0.5, 0.7)}
    net, guide = GaussianDenoiser(0.0, 0.5), GaussianDenoiser(0.0, 0.7)
    for scale in (1.0, 1.5, 2.0):
        out = heun_sampler(guided(net, guide, scale), z, labels, 200, sigma_min=1e-4)
        torch.testing.assert_close(out, 80 * z * factor[0.5] ** scale * factor[0.7] ** (1 - scale), rtol=1e-3, atol=0)
    # It stays where both networks know the noise.
    net.sigma_min, net.sigma_max, net.shift, guide.sigma_min, guide.sigma_max = 0.01, 80.0, 3.0, 0.002, 50.0
    both = guided(net, guide, 1.5)
    assert (both.sigma_min, both.sigma_max, both.shift) == (0.01, 50.0, 3.0)


def test_heun_counts_its_evaluations():
    """And passes the labels on."""
    calls = []

    def net(x, sigma, labels):
        calls.append(labels.tolist())
        return 0.5 * x

    heun_sampler(net, torch.randn(2, 1, 4, 4), torch.tensor([3, 1]), num_steps=18)
    assert calls == [[3, 1]] * 35


def test_few_steps_noise_their_own_images_again():
    """x = D(80 z; 80), then D(x + sigma e; sigma) at each further level, with e of the random generator."""
    calls = []

    def net(x, sigma, labels):
        calls.append((x.clone(), sigma.clone()))
        return x / 2 + labels.reshape(-1, 1, 1, 1)

    z, labels = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    images = few_step_sampler(net, z, labels, [80.0, 24.0, 5.0], torch.Generator().manual_seed(7))
    random, offset = torch.Generator().manual_seed(7), labels.reshape(-1, 1, 1, 1)
    x = 40 * z + offset
    for sigma in (24.0, 5.0):
        x = (x + sigma * torch.randn(z.shape, generator=random)) / 2 + offset
    torch.testing.assert_close(images, x)
    assert [sigma.tolist() for _, sigma in calls] == [[80.0] * 2, [24.0] * 2, [5.0] * 2]


def test_a_students_images_depend_on_their_own_noise_alone():
    """Other images in the batch change nothing; fresh noise is standard normal, new at each level and image."""
    seen = []

    def net(x, sigma, labels):
        seen.append(x)
        return torch.zeros_like(x)

    z, labels, sigmas = torch.randn(500, 1, 4, 4), torch.zeros(500, dtype=torch.long), [3.0, 2.0, 1.0]
    student_sampler(net, z, labels, sigmas)
    first, second, third = seen[0] / 3, seen[1] / 2, seen[2]
    assert torch.equal(seen[0], 3 * z)
    for e in (second, third):
        assert abs(e.mean()) < 0.05 and abs(e.std() - 1) < 0.05
    for a, b in ((first, second), (second, third), (second[1:], second[:-1])):
        assert abs((a * b).mean()) < 0.05
    seen.clear()
    student_sampler(net, z[7:9], labels[7:9], sigmas)
    assert torch.equal(seen[1] / 2, second[7:9]) and torch.equal(seen[2], third[7:9])


def test_heun_keeps_within_the_networks_noise_levels():
    class Bounded(GaussianDenoiser):
        sigma_min, sigma_max = 0.02, 40.0

        def forward(self, x, sigma, labels):
            asked.append(float(sigma[0]))
            return super().forward(x, sigma, labels)

    asked = []
    heun_sampler(Bounded(0.0, 0.5), torch.randn(1, 1, 2, 2), None, num_steps=5)
    assert max(asked) == 40.0 and abs(min(asked) - 0.02) < 1e-6


def test_class_noise_depends_on_seed_class_and_place_alone():
    noise, labels = class_noise([3, 5], 4, (1, 8, 8), seed=1)
    assert labels.tolist() == [3] * 4 + [5] * 4
    torch.testing.assert_close(class_noise([5], 9, (1, 8, 8), seed=1)[0][:4], noise[4:])
    odd = [class_noise([0], count, (1, 10, 10), seed=0)[0] for count in (1, 2, 5)]  # torch draws in blocks of 16
    assert torch.equal(odd[0], odd[1][:1]) and torch.equal(odd[1], odd[2][:2])
    assert not torch.equal(noise[:4], noise[4:])
    assert not torch.equal(class_noise([3], 4, (1, 8, 8), seed=2)[0], noise[:4])
    without, labels = class_noise([], 4, (1, 8, 8), seed=1)
    assert labels.tolist() == [0] * 4 and torch.equal(without, class_noise([0], 4, (1, 8, 8), seed=1)[0])


def test_a_grid_has_a_row_a_class_and_eight_without_classes():
    noise, labels = grid_noise(3, (1, 2, 2), seed=4)
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert torch.equal(noise, class_noise(range(3), 8, (1, 2, 2), seed=4)[0])
    assert grid_noise(1000, (1, 2, 2), seed=4)[1].unique().tolist() == list(range(10))
    noise, labels = grid_noise(0, (1, 2, 2), seed=4)
    assert noise.shape == (64, 1, 2, 2) and len(noise.unique(dim=0)) == 64 and labels.tolist() == [0] * 64
