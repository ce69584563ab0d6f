"""Networks that predict a velocity, as D(x; sigma); and what tells that one is misread."""

import re

import pytest
import torch
from conftest import ROOT, GaussianDenoiser, tiny_unet

from guidance import relative_errors
from networks.velocity import VelocityDenoiser
from unified_model import UnifiedModel

LABELS = torch.tensor([3, 1])


def velocity_of(net, data_at, time_scale):
    """An EDM network as a velocity network, v = dx_t/dt, where data are at time 0 or 1."""

    def velocity(x_t, t, labels):
        t = t.reshape(-1, 1, 1, 1) / time_scale
        t = t if data_at == 0 else 1 - t  # of x_t = (1 - t) x0 + t n
        denoised = net(x_t / (1 - t), (t / (1 - t)).flatten(), labels)
        from_data_to_noise = (x_t - denoised) / t
        return from_data_to_noise if data_at == 0 else -from_data_to_noise

    return velocity


@pytest.mark.parametrize("data_at, time_scale", [(0, 1.0), (0, 1000.0), (1, 1.0)])
def test_a_velocity_network_is_the_same_denoiser(data_at, time_scale):
    """At one noise level for all images, and at one for each."""
    edm = tiny_unet()
    torch.nn.init.normal_(edm.conv_out.weight, std=0.1)
    net = VelocityDenoiser(velocity_of(edm, data_at, time_scale), data_at, time_scale)
    x, noise = torch.randn(2, 2, 1, 8, 8)
    for sigma in (0.01, 1.0, torch.tensor([0.3, 80.0])):
        noisy = x + torch.as_tensor(sigma).reshape(-1, 1, 1, 1) * noise
        torch.testing.assert_close(net(noisy, sigma, LABELS), edm(noisy, sigma, LABELS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("data_at, shown", [(0, False), (1, True)])
def test_a_velocity_of_the_wrong_direction_shows(data_at, shown):
    """Read the right way, the exact denoiser of N(0.2, 0.5^2) is better than a trivial answer at every level."""
    images = 0.2 + 0.5 * torch.randn(64, 1, 8, 8)
    net = VelocityDenoiser(velocity_of(GaussianDenoiser(0.2, 0.5), 0, 1.0), data_at)
    errors = relative_errors(net, images, torch.zeros(64, dtype=torch.int64))
    assert list(errors) == [0.1, 0.3, 1.0] and (max(errors.values()) > 1) == shown
    assert relative_errors(net, images[:1].expand(2, -1, -1, -1), LABELS[:2])[1.0] < torch.inf  # without variance
    if not shown:  # the least error is s^2 sigma^2 / (s^2 + sigma^2)
        expected = [0.25 * sigma**2 / (0.25 + sigma**2) / min(sigma**2, 0.25) for sigma in errors]
        assert list(errors.values()) == pytest.approx(expected, rel=0.1)


class Velocity(torch.nn.Module):
    """D(x; sigma) = c_skip x, which is right for images of N(0, 0.5^2), as a velocity from noise to data."""

    def __init__(self):
        super().__init__()
        self.net = tiny_unet()
        self.net.conv_out.requires_grad_(False).weight.zero_()
        self.net.conv_out.bias.zero_()

    def forward(self, x_t, t, class_labels):
        return velocity_of(self.net, 1, 1.0)(x_t, t, class_labels)


def test_the_pages_example_distils_a_velocity_network():
    """docs/teachers.md's lines, up to the generator's gradient."""
    (example,) = [part for part in re.findall(r"```python\n(.*?)```", (ROOT / "docs/teachers.md").read_text(), re.S)]
    names = dict(velocity=Velocity(), real_images=0.5 * torch.randn(16, 1, 8, 8), labels=torch.arange(16) % 10)
    exec(example, names)
    model = names["model"]
    assert isinstance(model, UnifiedModel) and names["loss_dict"]["loss_dm"].isfinite()
    assert any(parameter.grad is not None for parameter in model.feedforward_model.parameters())
    assert all(error < 1 for error in names["errors"].values())
