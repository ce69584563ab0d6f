import pytest
import torch
import torch.nn.functional as F
from edm_files import DDPMPP, FULL, NCSNPP, TINY, edm_denoise, edm_shapes, edm_tensors, imported, write_edm

import checkpoint
from guidance import GuidanceModel
from importers.edm import architecture, convert, edm_name
from networks.song_unet import Attention, SongUNet
from sampling import heun_sampler
from support.config import UserError
from unified_model import UnifiedModel


@pytest.mark.parametrize("form", [DDPMPP, NCSNPP], ids=["ddpmpp", "ncsnpp"])
def test_imported_network_computes_what_edms_does(tmp_path, form):
    """Against the functional copy above, to 1e-5, from the least to the most noise and for every class; pickle and state_dict."""
    tensors = edm_tensors(**form)
    source = write_edm(tmp_path / "a.pkl", **form)
    torch.save({f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "b.pth")
    x, labels = torch.randn(10, 3, 8, 8), torch.arange(10)
    for file, dropout in ((source, 0.11), (tmp_path / "b.pth", 0.13)):
        net = checkpoint.load_network(imported(file, tmp_path))
        assert not net.training and net.config["dropout"] == dropout
        for sigma in (0.002, 0.05, 1.0, 80.0):
            noisy = x * (0.5**2 + sigma**2) ** 0.5
            expected = edm_denoise(tensors, noisy, sigma, labels)
            torch.testing.assert_close(net(noisy, sigma, labels), expected, rtol=0, atol=1e-5)
            assert (expected - noisy * 0.25 / (0.25 + sigma**2)).std() > 0.3 * min(sigma, 0.5)  # the network has its say


@pytest.mark.parametrize(
    "changes",
    [
        dict(mult=(2,), attention=()),
        dict(mult=(1, 2, 1), blocks=2, attention=(8, 2), **NCSNPP),
        dict(classes=3, width=24, colours=1, augment=0),
        dict(resolution=16, mult=(1, 1, 1), attention=(16, 8)),
    ],
)
def test_architecture_is_told_by_the_tensors(changes):
    """Other depths, widths, classes, colours and attention than the published ones."""
    tensors = edm_tensors(**{**DDPMPP, **changes})
    net = SongUNet(**architecture(tensors)).eval()
    net.load_state_dict(convert(tensors, net)[0])
    shape = {**TINY, "colours": 3, **changes}
    x = torch.randn(2, shape["colours"], shape["resolution"], shape["resolution"])
    labels = torch.tensor([0, shape["classes"] - 1])
    torch.testing.assert_close(net(x, 1.0, labels), edm_denoise(tensors, x, 1.0, labels), rtol=0, atol=1e-5)


def test_default_is_the_published_cifar10_network():
    """Every name and shape of the file, 55.7 M parameters with the layer left out; and the same of NCSN++."""
    ncsnpp = dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])
    for form, arguments, millions in ((DDPMPP, {}, 55.735), (NCSNPP, ncsnpp, 56.401)):
        with torch.device("meta"):
            net = SongUNet(**arguments)
            published = {name: torch.empty(shape) for name, shape in edm_shapes(**FULL, **form).items()}
        assert architecture(published) | {"network": "SongUNet", "dropout": 0.13, "sigma_data": 0.5} == net.config
        ours = {edm_name(name, net.config): tensor.shape for name, tensor in net.state_dict().items()}
        theirs = {name: tensor.shape for name, tensor in published.items() if not name.endswith("resample_filter")}
        left_out = theirs.pop("map_augment.weight")
        assert ours == theirs and len(ours) == len(net.state_dict())
        assert round((sum(p.numel() for p in net.parameters()) + left_out.numel()) / 1e6, 3) == millions
        assert net.feature_channels == {32: 256, 16: 256, 8: 256} and net.norm_out.num_groups == 32


def test_call_signature_is_simple_unets(tmp_path):
    """One-hot equals index, a scalar sigma equals a vector, images do not see each other; features; rebuilt from its config."""
    net = checkpoint.load_network(imported(write_edm(tmp_path / "a.pkl", **NCSNPP), tmp_path))
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([1, 2, 9])
    out = net(x, torch.full((3,), 2.0), labels)
    torch.testing.assert_close(net(x, 2.0, F.one_hot(labels, 10)), out)
    torch.testing.assert_close(net(x[1:2], torch.tensor(2.0), labels[1:2]), out[1:2], rtol=0, atol=1e-5)
    both, maps = net(x, 2.0, labels, features=[4, 8])
    assert [feature.shape for feature in maps] == [(3, net.feature_channels[side], side, side) for side in (4, 8)]
    torch.testing.assert_close(both, out)
    torch.testing.assert_close(net.encode(x, 2.0, labels, [4, 8]), maps)
    config = dict(net.config)
    assert config.pop("network") == "SongUNet" and SongUNet(**config).config == net.config
    with pytest.raises(ValueError, match="halved"):
        SongUNet(img_resolution=10, channel_mult=(1, 1, 1))


def test_distils_as_any_teacher(tmp_path):
    """Both turns with the GAN head, on the imported network; its samples by Heun's method are finite."""
    torch.manual_seed(0)
    net = checkpoint.load_network(imported(write_edm(tmp_path / "a.pkl"), tmp_path))
    model = UnifiedModel(GuidanceModel(net, gan_classifier=True)).eval()
    noise, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    losses, _, images = model.generator_turn(noise, labels)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.feedforward_model.parameters())
    assert all(p.grad is None for p in model.guidance_model.parameters())
    losses, _ = model.guidance_turn(images, labels, noise, labels)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.guidance_model.fake_unet.parameters())
    assert heun_sampler(net, noise, labels, num_steps=3).isfinite().all()


def test_unknown_network_class_is_refused(tmp_path):
    state = torch.load(imported(write_edm(tmp_path / "a.pkl"), tmp_path), weights_only=True)
    for config in ({"network": "Transformer"}, {**state["model_config"], "depth": 3}, 7):
        with pytest.raises(UserError, match="does not hold a SimpleUNet or SongUNet"):
            checkpoint.network({**state, "model_config": config}, "x.pt")


def test_attention_hands_over_contiguous_vectors(monkeypatch):
    """In channels last too: fused kernels want the numbers of a vector side by side."""
    strides, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv: (strides.extend(x.stride(-1) for x in qkv), attend(*qkv))[1]
    )
    torch.manual_seed(0)
    layer, x = Attention(16), torch.randn(2, 16, 4, 4)
    expected = layer(x)
    channels_last = Attention(16).to(memory_format=torch.channels_last)
    channels_last.load_state_dict(layer.state_dict())
    torch.testing.assert_close(channels_last(x.to(memory_format=torch.channels_last)), expected)
    assert strides == [1] * 6


@pytest.mark.parametrize("form", [DDPMPP, NCSNPP], ids=["ddpmpp", "ncsnpp"])
def test_without_classes(tmp_path, form):
    """EDM's `-uncond-` networks, with four resolutions as those of FFHQ and AFHQ have: labels are not needed, and not looked at."""
    changes = {**form, "classes": 0, "resolution": 16, "mult": (1, 2, 2, 2), "attention": (8,)}
    tensors = edm_tensors(**changes)
    path = imported(write_edm(tmp_path / "a.pkl", **changes), tmp_path)
    net, x = checkpoint.load_network(path), torch.randn(2, 3, 16, 16)
    assert net.label_dim == 0 and net.config["channel_mult"] == [1, 2, 2, 2] and checkpoint.load(path)["class_names"] == []
    expected = edm_denoise(tensors, x, 0.7, None)
    torch.testing.assert_close(net(x, 0.7), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(net(x, 0.7, torch.tensor([3, 1])), expected, rtol=0, atol=1e-5)


def test_default_of_ffhq_is_the_published_network():
    """EDM's 64x64 networks without classes, at full size: names and shapes of every tensor, as train.py's options give them."""
    for form, millions in ((DDPMPP, 61.8), (NCSNPP, 62.8)):
        with torch.device("meta"):
            shapes = edm_shapes(**{**FULL, "classes": 0, "resolution": 64, "mult": (1, 2, 2, 2)}, **form)
            net = SongUNet(**architecture({name: torch.empty(shape) for name, shape in shapes.items()}))
        ours = {edm_name(name, net.config): tensor.shape for name, tensor in net.state_dict().items()}
        assert ours == {name: shape for name, shape in shapes.items() if "resample_filter" not in name and "augment" not in name}
        assert net.config["attn_resolutions"] == [16] and round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions
