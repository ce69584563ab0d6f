"""SongUNet and DhariwalUNet against numbers of NVIDIA's classes (NVlabs/edm, training/networks.py)."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from edm_files import SMALL_ADM, edm_network, edm_shapes, edm_tensors, formula, imported, write_edm

import checkpoint
from guidance import GuidanceModel
from networks.edm_unet import DhariwalUNet, ResBlock, SongUNet
from unified_model import UnifiedModel

DEEP = dict(img_resolution=16, channel_mult=[1, 2, 2], num_blocks=2, attn_resolutions=[16, 4], label_dim=0)
KINDS = {
    "DDPM++": (SongUNet, {}),
    "DDPM++ deep": (SongUNet, DEEP),
    "ADM": (DhariwalUNet, {}),
    "ADM without classes": (DhariwalUNet, {"label_dim": 0}),
}
SIGMAS = (0.05, 1.0, 80.0)
PINNED = {  # at each of SIGMAS: the deviation of what the network adds to c_skip x; D at three places
    "DDPM++": [
        (0.0330828, -0.131151, -0.640982, -0.679221),
        (0.300520, -0.610263, -0.387670, -0.283542),
        (0.336740, -0.621192, -0.124812, 0.0835754),
    ],
    "DDPM++ deep": [
        (0.0337569, -0.0256461, -0.592274, -0.731766),
        (0.302351, 0.213939, 0.0413159, -0.726099),
        (0.340997, 0.317927, 0.331023, -0.430862),
    ],
    "ADM": [
        (0.0240200, -0.0630506, -0.618258, -0.720738),
        (0.214194, -0.0446955, -0.125874, -0.695051),
        (0.240181, 0.00235558, 0.184061, -0.403739),
    ],
    "ADM without classes": [
        (0.0241450, -0.0640800, -0.624028, -0.709713),
        (0.215278, -0.0567124, -0.191875, -0.573752),
        (0.241489, -0.0401133, 0.0923220, -0.279689),
    ],
}


@pytest.mark.parametrize("what", PINNED)
def test_imported_networks_compute_what_nvidias_do(tmp_path, what):
    """Weights by a formula, through NVIDIA's pickle and through a state_dict; without classes labels do not matter."""
    kind, changes = KINDS[what]
    source = write_edm(tmp_path / "a.pkl", kind, **changes)
    torch.save({f"model.{name}": tensor for name, tensor in edm_tensors(kind, **changes).items()}, tmp_path / "b.pth")
    for file, dropout in ((source, 0.11), (tmp_path / "b.pth", kind().config["dropout"])):
        net = checkpoint.load_network(imported(file, tmp_path))
        assert not net.training and net.config == {**edm_network(kind, **changes).config, "dropout": dropout}
        side, labels = net.config["img_resolution"], torch.tensor([5, 2])
        x = formula("x", (2, 3, side, side))
        for sigma, (deviation, *places) in zip(SIGMAS, PINNED[what], strict=True):
            noisy = x * (0.25 + sigma**2) ** 0.5
            denoised = net(noisy, sigma, labels)
            assert denoised.flatten()[[10, 200, 380]].tolist() == pytest.approx(places, abs=3e-5)
            of_network = denoised - 0.25 / (0.25 + sigma**2) * noisy
            assert of_network.std().item() == pytest.approx(deviation, rel=1e-4)
            if not net.label_dim:
                assert torch.equal(net(noisy, sigma), denoised)


FFHQ = dict(img_resolution=64, channel_mult=[1, 2, 2, 2], label_dim=0)
PUBLISHED = [  # network, the number of tensors in its file, the digest of their names and shapes, parameters
    (SongUNet, {}, 427, "140c43aec6cad6fbc76f388875d1c824517bce47b30e5c9bee7eb06259950a6d", 55_735_299),
    (SongUNet, FFHQ, 553, "e1ac23f20c6f1a5bddc4a3d285a39f8d9d4792baa567024bdc0a1f049ef14a07", 61_805_571),
    (DhariwalUNet, {}, 553, "a678ef235436739cac9b4df1a7d57ac3ea3c1df3dc1c685b42a11416e63014ef", 295_899_267),
]


@pytest.mark.parametrize("kind, changes, number, digest, parameters", PUBLISHED)
def test_published_networks(kind, changes, number, digest, parameters):
    """Names and shapes of all tensors in NVIDIA's files; the defaults are those of CIFAR-10 VP and of ImageNet-64."""
    with torch.device("meta"):
        net = kind(**changes)
    shapes = edm_shapes(net)
    augment = shapes.get("map_augment.weight", [0, 0])
    assert sum(p.numel() for p in net.parameters()) + augment[0] * augment[1] == parameters and len(shapes) == number
    listed = "\n".join(sorted(f"{name} {shape}" for name, shape in shapes.items()))
    assert hashlib.sha256(listed.encode()).hexdigest() == digest
    if kind is DhariwalUNet:
        assert net.feature_channels == {64: 192, 32: 384, 16: 576, 8: 768}
        assert [net.encoder[f"8x8_block{index}"].num_heads for index in range(3)] == [12] * 3
    eps = {module.eps for module in net.modules() if isinstance(module, torch.nn.GroupNorm)}
    assert eps == {1e-5 if kind is DhariwalUNet else 1e-6}  # too small to show above


@pytest.mark.parametrize(
    "kind, changes, found",
    [
        (SongUNet, dict(channel_mult=[2], attn_resolutions=[]), {}),
        (SongUNet, dict(label_dim=3, model_channels=24, img_channels=1), {}),
        (SongUNet, dict(channel_mult=[1, 2, 1], num_blocks=2, attn_resolutions=[8, 2]), {}),
        (DhariwalUNet, dict(channel_mult=[1, 3, 2], num_blocks=2, img_channels=1), {}),
        (DhariwalUNet, dict(model_channels=32, attn_resolutions=[16, 8]), {"attn_resolutions": [8]}),  # 32: no head
    ],
)
def test_architecture_is_told_by_the_tensors(tmp_path, kind, changes, found):
    """Other depths, widths, classes, colours and attention than the published ones."""
    torch.save(edm_tensors(kind, **changes), tmp_path / "a.pth")
    state = checkpoint.load(imported(tmp_path / "a.pth", tmp_path))
    assert state["model_config"] == {**edm_network(kind, **changes).config, **found}


@pytest.mark.parametrize("kind", [SongUNet, DhariwalUNet])
def test_call_signature_and_distillation(kind):
    """Labels and sigma in all forms, features, the config; both turns with GAN heads; refusals of the constructor."""
    torch.manual_seed(0)
    net = kind(**SMALL_ADM | {"label_dim": 4}).eval()
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
    with pytest.raises(ValueError, match="halved"):
        kind(img_resolution=10, channel_mult=(1, 1, 1))


def test_attention_hands_over_contiguous_vectors(monkeypatch):
    """In channels last too: fused kernels want the numbers of a vector side by side."""
    strides, attend = [], F.scaled_dot_product_attention

    def attention(*qkv):
        strides.extend(x.stride(-1) for x in qkv)
        return attend(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    torch.manual_seed(0)
    block, x, emb = ResBlock(16, 16, 8, 0.0, adm=False, attention=True), torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    expected = block(x, emb)
    channels_last = block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), emb)
    torch.testing.assert_close(channels_last, expected)
    assert strides == [1] * 6
