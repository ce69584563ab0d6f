"""toy.py: the exact teacher against integrals and derivatives, the measures on planted failures, the command."""

import math

import pytest
import torch
from conftest import assert_refused, flags, refuses, run_script, succeed
from PIL import Image

import toy
from evaluation.points import kl_divergence, measure_modes

every_target = pytest.mark.parametrize("name", ["ring", "unequal", "grid"])


def exact(name):
    means, weights, std = toy.mixture(name)
    return toy.ExactTeacher(means.double(), weights.double(), std)


@every_target
@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.0])
def test_the_teacher_is_the_posterior_mean(name, sigma):
    """E[x0 | x] = sum of x0 p(x0) N(x; x0, sigma^2) over a grid of x0, divided by the sum without x0; the density p."""
    teacher, x = exact(name), torch.tensor([[0.9, 0.2], [-0.3, 0.1], [0.0, -1.1]], dtype=torch.float64)
    axis = torch.linspace(-1.8, 1.8, 301, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)
    prior = (-(torch.cdist(x0, teacher.means) ** 2) / (2 * teacher.std**2)).exp() @ teacher.weights
    torch.testing.assert_close(teacher.log_density(x0).exp(), prior / prior.sum() / (axis[1] - axis[0]) ** 2)
    weight = prior * (-(torch.cdist(x, x0) ** 2) / (2 * sigma**2)).exp()
    denoised = teacher(x.reshape(3, 2, 1, 1), torch.full((3,), sigma, dtype=torch.float64))
    assert denoised.shape == (3, 2, 1, 1)
    torch.testing.assert_close(denoised.flatten(1), weight @ x0 / weight.sum(1, keepdim=True), rtol=0, atol=1e-6)


@every_target
def test_the_density_is_that_of_the_samples(name):
    torch.manual_seed(0)
    teacher = toy.ExactTeacher(*toy.mixture(name))
    points = teacher.sample(5000).flatten(1)
    found = measure_modes(points, teacher)
    assert found["modes found"] == len(teacher.means) and found["total variation"] < 0.05
    assert found["share inside"] == pytest.approx(1 - math.exp(-4.5), abs=0.005)
    assert found["spread in a mode"] == pytest.approx(1, abs=0.02)
    assert abs(kl_divergence(points, teacher)) < 0.08


def test_planted_failures_are_measured():
    torch.manual_seed(0)
    ring = toy.ExactTeacher(*toy.mixture("ring"))

    def found(means, weights, std=0.1):
        points = toy.ExactTeacher(means, torch.tensor(weights), std).sample(5000).flatten(1)
        return measure_modes(points, ring), kl_divergence(points, ring)

    modes, kl = found(ring.means[:7], [1 / 7] * 7)  # a mode is missing
    assert modes["modes found"] == 7 and modes["total variation"] == pytest.approx(1 / 8, abs=0.02)
    assert kl == pytest.approx(math.log(8 / 7), abs=0.06)
    modes, kl = found(ring.means[:1], [1.0])  # all in one mode
    assert modes["modes found"] == 1 and modes["total variation"] == pytest.approx(7 / 8, abs=0.02)
    assert kl == pytest.approx(math.log(8), abs=0.06)
    weights = [0.24, 0.01, *[0.125] * 6]  # all there, of unequal size
    modes, kl = found(ring.means, weights)
    assert modes["modes found"] == 7 and modes["total variation"] == pytest.approx(0.115, abs=0.02)
    assert kl == pytest.approx(sum(w * math.log(8 * w) for w in weights), abs=0.06)
    assert found(ring.means, [1 / 8] * 8, std=0.05)[0]["spread in a mode"] == pytest.approx(0.5 / 0.974, abs=0.02)
    modes, _ = found(1.4 * ring.means, [1 / 8] * 8)  # beside the modes
    assert modes["modes found"] == 0 and modes["share inside"] < 0.2 and modes["total variation"] < 0.05


@pytest.mark.parametrize("mean, std", [(0.3, 0.9), (0.5, 1.5), (0.0, 0.5), (1.0, 0.7)])
def test_the_divergence_of_two_gaussians(mean, std):
    """In 2D, KL(N(m, s^2) | N(0, 1)) = s^2 - 1 - ln s^2 + |m|^2 / 2."""
    torch.manual_seed(0)
    target = toy.ExactTeacher(torch.zeros(1, 2), torch.ones(1), 1.0)
    found = kl_divergence(torch.tensor([mean, 0.0]) + std * torch.randn(5000, 2), target)
    assert found == pytest.approx(std**2 - 1 - 2 * math.log(std) + mean**2 / 2, abs=0.06)


def test_the_command_writes_its_pictures(tmp_path):
    options = dict(target="grid", start="collapsed", gan_classifier=True, f_divergence="kl", dfake_gen_update_ratio=2)
    out = succeed("toy.py", step_number=5, batch_size=32, output_dir=tmp_path, **options)
    animation = Image.open(tmp_path / "toy.gif")
    assert animation.n_frames == 6 and animation.size == Image.open(tmp_path / "toy.png").size
    (row,) = [line for line in out.splitlines() if line.startswith("modes found")]
    generator, teacher, target = row.split()[2:]
    assert int(generator) < 25 and teacher == target == "25"


@pytest.mark.parametrize("start, modes", [("target", 8), ("collapsed", 1)])
def test_the_networks_first_learn_the_start(tmp_path, monkeypatch, start, modes):
    seen = []
    monkeypatch.setattr(toy, "learn_to_denoise", lambda net, target, size: seen.append(len(target.means)))
    toy.main(flags(start=start, step_number=1, batch_size=8, output_dir=tmp_path))
    assert seen == [modes]


def test_mistakes_are_told_in_one_line(tmp_path):
    assert_refused(run_script("toy.py", f_divergence="kl", output_dir=tmp_path), "f_divergence kl needs objective")
    refuses("--target must be one of ring, unequal, grid, not 'rings' (did you mean ring?)", "toy.py", target="rings")
