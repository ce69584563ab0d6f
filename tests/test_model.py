import pytest
import torch
from conftest import tiny_unet

from model import PREDICTIONS, Attention, SimpleUNet, denoising_loss, get_sigmas_karras, group_norm, preconditioning


def test_karras_sigmas_follow_edm_equation_5():
    n, low, high, rho = 7, 0.01, 50.0, 5.0
    expected = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    sigmas = get_sigmas_karras(n, low, high, rho)
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas, torch.tensor(expected), rtol=1e-6, atol=0)


def test_preconditioning_keeps_unit_variance_at_every_sigma():
    """Input c_in (x0 + sigma n) and target (x0 - c_skip x) / c_out have variance 1 for data of sigma_data^2."""
    sigma, sigma_data = torch.logspace(-3, 2, 40), 0.7
    c_skip, c_out, c_in, c_noise = preconditioning(sigma, sigma_data)
    torch.testing.assert_close(c_in**2 * (sigma_data**2 + sigma**2), torch.ones(40))
    target_variance = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target_variance, torch.ones(40), rtol=1e-4, atol=0)
    torch.testing.assert_close(c_noise, sigma.log() / 4)


def in_its_own_coordinates(prediction, x0, noise, sigma):
    """(what a network of this kind sees, what it predicts), by the definitions of its literature."""
    if prediction == "flow":  # Lipman et al. 2022, with data at t = 0
        t = sigma / (1 + sigma)
        return (1 - t) * x0 + t * noise, noise - x0
    a, s = (1 / (1 + sigma**2)).sqrt(), (sigma**2 / (1 + sigma**2)).sqrt()  # DDPM's, a^2 + s^2 = 1
    return a * x0 + s * noise, {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS[1:])
def test_every_parametrisation_is_the_same_denoiser(prediction):
    """On N(m, s^2) the best answer of each, E[target | x], gives D = (s^2 x + sigma^2 m) / (s^2 + sigma^2)."""
    m, s, sigma = 0.3, 0.4, torch.logspace(-2, 3, 30, dtype=torch.float64)
    x = m + (s**2 + sigma**2).sqrt() * torch.randn(30, dtype=torch.float64)
    best = (s**2 * x + sigma**2 * m) / (s**2 + sigma**2)
    seen, answer = in_its_own_coordinates(prediction, best, (x - best) / sigma, sigma)  # all targets are linear
    c_skip, c_out, c_in, _ = preconditioning(sigma, prediction=prediction)
    torch.testing.assert_close(c_in * x, seen, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(c_skip * x + c_out * answer, best, rtol=0, atol=1e-9)
    # The loss is the plain squared error of what the network predicts.
    images, noise, error = torch.randn(3, 30, 1, 1, 1, dtype=torch.float64)
    noisy = images + sigma.reshape(-1, 1, 1, 1) * noise
    target = in_its_own_coordinates(prediction, images, noise, sigma.reshape(-1, 1, 1, 1))[1]
    denoised = (c_skip * noisy.flatten() + c_out * (target + error).flatten()).reshape(noisy.shape)
    loss = denoising_loss(denoised, images, sigma, prediction=prediction)
    torch.testing.assert_close(loss, (error**2).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("prediction", ["edm", "flow"])
def test_pure_noise_is_no_overflow(prediction):
    """At the largest sigma that an option accepts, t = 0.999999."""
    net = tiny_unet(prediction=prediction)
    torch.nn.init.normal_(net.conv_out.weight)
    out = net(1e6 * torch.randn(2, 1, 8, 8), 1e6, torch.tensor([0, 1]))
    assert out.isfinite().all() and out.abs().max() < 1e3


@pytest.mark.parametrize("sigma", [0.0, 1e-6])
def test_output_is_input_without_noise(sigma):
    net, x = tiny_unet(), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(net(x, sigma, torch.tensor([0, 1])), x, rtol=0, atol=1e-5)


def test_output_is_preconditioned_network():
    """A network that puts out zeros returns c_skip x; one that puts out ones adds c_out."""
    net, x, sigma = tiny_unet(), torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 20.0])
    c_skip, c_out, _, _ = (factor.reshape(-1, 1, 1, 1) for factor in preconditioning(sigma, 0.5))
    torch.nn.init.zeros_(net.conv_out.weight)
    for value in (0.0, 1.0):
        torch.nn.init.constant_(net.conv_out.bias, value)
        torch.testing.assert_close(net(x, sigma, torch.tensor([0, 1, 2])), c_skip * x + value * c_out)


def test_labels_sigma_and_batch():
    """One-hot equals index; a scalar sigma equals a vector; images do not see each other; label and sigma matter."""
    net, x, labels = tiny_unet(), torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 9])
    out = net(x, torch.full((3,), 2.0), labels)
    torch.testing.assert_close(net(x, 2.0, torch.nn.functional.one_hot(labels, 10).float()), out)
    torch.testing.assert_close(net(x[1:2], torch.tensor(2.0), labels[1:2]), out[1:2])
    assert not torch.allclose(net(x, 2.0, labels - 1), out, atol=1e-5)
    assert not torch.allclose(net(x, 0.5, labels), out, atol=1e-5)


@pytest.mark.parametrize("width", [8, 104, 112, 192])
def test_any_width_can_attend(width):
    net = tiny_unet(model_channels=width, channel_mult=(1,), attn_resolutions=[8])
    assert net(torch.randn(1, 1, 8, 8), 1.0, torch.tensor([0])).isfinite().all()


def test_attention_is_softmax_attention_a_head():
    """Each head of 64 channels: the values weighted by softmax(q k / 8); the heads side by side, projected."""
    torch.manual_seed(0)
    layer, x = Attention(128), torch.randn(2, 128, 3, 5).to(memory_format=torch.channels_last)
    torch.nn.init.normal_(layer.proj.weight, std=0.1)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).chunk(3, dim=1)
    heads = [slice(0, 64), slice(64, 128)]
    weights = [torch.einsum("bci,bcj->bij", q[:, head], k[:, head]).div(8).softmax(-1) for head in heads]
    mixed = [torch.einsum("bij,bcj->bci", w, v[:, head]) for w, head in zip(weights, heads, strict=True)]
    mixed = torch.cat(mixed, dim=1)
    torch.testing.assert_close(layer(x), x + layer.proj(mixed.reshape(x.shape)), rtol=1e-4, atol=1e-5)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("resolution, channels", [(8, 1), (16, 3), (28, 1), (64, 3)])
def test_resolutions_config_and_features(resolution, channels):
    net = tiny_unet(img_resolution=resolution, img_channels=channels, attn_resolutions=[resolution // 2])
    x, sigma, labels = torch.randn(2, channels, resolution, resolution), torch.ones(2), torch.tensor([3, 4])
    rebuilt = SimpleUNet(**net.config).eval()
    rebuilt.load_state_dict(net.state_dict())
    out = net(x, sigma, labels)
    torch.testing.assert_close(rebuilt(x, sigma, labels), out)
    sides = [resolution // 2, resolution]
    both, maps = net(x, sigma, labels, features=sides)
    assert torch.equal(both, out)
    assert [feature.shape for feature in maps] == [(2, net.feature_channels[side], side, side) for side in sides]
    assert all(torch.equal(a, b) for a, b in zip(net.encode(x, sigma, labels, sides), maps, strict=True))
    with pytest.raises(ValueError, match=rf"at 5; the encoder has \[{resolution}, {resolution // 2}\]"):
        net.encode(x, sigma, labels, [5])


def test_feature_maps_are_the_encoders_last():
    """Behind the last block of each resolution, before it is halved; behind the coarsest come the middle blocks."""
    net, x, labels = tiny_unet(channel_mult=(1, 2, 3), num_blocks=2), torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    outputs = {}
    for level, blocks in enumerate(net.encoder):
        blocks[-1].register_forward_hook(lambda module, inputs, output, side=8 >> level: outputs.update({side: output}))
    net.middle[0].register_forward_hook(lambda *a: outputs.update(middle=True))
    maps = net.encode(x, 1.0, labels, [2, 4, 8])
    assert "middle" not in outputs and net.feature_channels == {8: 8, 4: 16, 2: 24}
    for side, feature in zip([2, 4, 8], maps, strict=True):
        assert torch.equal(feature, outputs[side])


def test_a_network_without_classes_takes_no_labels():
    net, x = tiny_unet(label_dim=0), torch.randn(2, 1, 8, 8)
    out = net(x, 1.0)
    assert torch.equal(net(x, 1.0, torch.tensor([0, 1])), out) and SimpleUNet(**net.config).config == net.config
    assert not any("embed_class" in name for name in net.state_dict())
    with pytest.raises(ValueError, match="class_labels are missing: the network has 10 classes"):
        tiny_unet()(x, 1.0)


def test_groups_of_the_norms():
    """Of 16 channels or somewhat more; narrower only with too few channels; never more than 32 groups."""
    assert [group_norm(channels).num_groups for channels in (8, 16, 32, 64, 128, 1024)] == [1, 1, 2, 4, 8, 32]
    for channels in range(8, 1100, 8):
        assert channels // group_norm(channels).num_groups >= min(16, channels)


def test_default_network_is_ddpm_sized():
    net = SimpleUNet()
    assert 25e6 < sum(p.numel() for p in net.parameters()) < 40e6
    assert net.config["img_resolution"] == 32 and net.config["img_channels"] == 3 and net.config["label_dim"] == 10
