import pytest
import torch
import torch.nn.functional as F
from edm_files import DDPMPP, FULL, NCSNPP, TINY, edm_denoise, edm_shapes, edm_tensors, imported, write_edm

import checkpoint
from guidance import GuidanceModel
from importers.edm import architecture, convert, edm_name
from networks.dhariwal_unet import DhariwalUNet
from networks.song_unet import SongUNet
from networks.unet import Attention
from support.script import UserError
from unified_model import UnifiedModel


@pytest.mark.parametrize("form", [DDPMPP, NCSNPP], ids=["ddpmpp", "ncsnpp"])
def test_imported_network_computes_what_edms_does(tmp_path, form):
    """Against the functional copy, to 1e-5, from the least to the most noise, for every class; two kinds of files."""
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
            assert (expected - noisy * 0.25 / (0.25 + sigma**2)).std() > 0.3 * min(
                sigma, 0.5
            )  # the network has its say


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


@pytest.mark.parametrize(
    "form, millions", [(DDPMPP, (55.735, 61.8)), (NCSNPP, (56.401, 62.8))], ids=["ddpmpp", "ncsnpp"]
)
def test_published_networks(form, millions):
    """Every name and shape of the files for CIFAR-10, the default, and of those without classes at 64x64."""
    ncsnpp = dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])
    for changes, size in (({}, millions[0]), (dict(classes=0, resolution=64, mult=(1, 2, 2, 2)), millions[1])):
        with torch.device("meta"):
            shapes = edm_shapes(**{**FULL, **changes}, **form)
            net = SongUNet(**architecture({name: torch.empty(shape) for name, shape in shapes.items()}))
            default = SongUNet(**(ncsnpp if form is NCSNPP else {}))
        ours = {edm_name(name, net.config): tensor.shape for name, tensor in net.state_dict().items()}
        theirs = {name: shape for name, shape in shapes.items() if not name.endswith("resample_filter")}
        left_out = theirs.pop("map_augment.weight")
        assert ours == theirs and len(ours) == len(net.state_dict()) and net.norm_out.num_groups == 32
        count = sum(p.numel() for p in net.parameters()) + (0 if changes else left_out[0] * left_out[1])
        assert count / 1e6 == pytest.approx(size, abs=0.05 if changes else 5e-4)
        assert changes or (net.config == default.config and net.feature_channels == {32: 256, 16: 256, 8: 256})


NCSN = dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=(1, 3, 3, 1))
SHAPE = dict(
    img_resolution=16, label_dim=4, model_channels=64, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,)
)


@pytest.mark.parametrize(
    "kind, form", [(SongUNet, {}), (SongUNet, NCSN), (DhariwalUNet, {})], ids=["ddpmpp", "ncsnpp", "adm"]
)
def test_call_signature_and_distillation(kind, form):
    """Labels and sigma in all forms, features, the config; both turns with GAN heads; refusals of the constructor."""
    torch.manual_seed(0)
    net = kind(**SHAPE, **form).eval()
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([3, 0])
    out, maps = net(x, 2.0, labels, features=[8, 16])
    torch.testing.assert_close(net(x, torch.full((2,), 2.0), F.one_hot(labels, 4)), out)
    torch.testing.assert_close(net(x[1:], torch.tensor(2.0), labels[1:]), out[1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(net.encode(x, 2.0, labels, [8, 16]), maps)
    assert [feature.shape[1:] for feature in maps] == [(128, 8, 8), (64, 16, 16)]
    config = dict(net.config)
    assert config.pop("network") == kind.__name__ and kind(**config).config == net.config
    model = UnifiedModel(GuidanceModel(net, gan_classifier=True, gan_resolutions=[8, 16])).eval()
    losses, _, images = model.generator_turn(x, labels)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.feedforward_model.parameters())
    assert all(p.grad is None for p in model.guidance_model.parameters())
    losses, _ = model.guidance_turn(images, labels, x, labels)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.guidance_model.fake_unet.parameters())
    for wrong, message in (
        (dict(img_resolution=10, channel_mult=(1, 1, 1)), "halved"),
        (dict(num_blocks=65), "at most 64"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**wrong)


def test_unknown_network_class_is_refused(tmp_path):
    state = torch.load(imported(write_edm(tmp_path / "a.pkl"), tmp_path), weights_only=True)
    for config in ({"network": "Transformer"}, {**state["model_config"], "depth": 3}):
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
    """EDM's `-uncond-` networks, with four resolutions as those of FFHQ: labels are not needed, nor looked at."""
    changes = {**form, "classes": 0, "resolution": 16, "mult": (1, 2, 2, 2), "attention": (8,)}
    tensors = edm_tensors(**changes)
    path = imported(write_edm(tmp_path / "a.pkl", **changes), tmp_path)
    net, x = checkpoint.load_network(path), torch.randn(2, 3, 16, 16)
    assert (
        net.label_dim == 0 and net.config["channel_mult"] == [1, 2, 2, 2] and checkpoint.load(path)["class_names"] == []
    )
    expected = edm_denoise(tensors, x, 0.7, None)
    torch.testing.assert_close(net(x, 0.7), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(net(x, 0.7, torch.tensor([3, 1])), expected, rtol=0, atol=1e-5)
