"""DhariwalUNet against numbers that NVIDIA's class gave (NVlabs/edm, training/networks.py) for weights by a formula."""

import hashlib
import math
import zlib

import pytest
import torch
from edm_files import assert_import_refused, edm_network, imported, write_pickle

import checkpoint
from importers.edm import edm_name
from networks.dhariwal_unet import DhariwalUNet
from networks.unet import lowpass

SMALL = dict(img_resolution=16, model_channels=64, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))


def formula(name, shape):
    """Numbers that depend on a tensor's name alone, of a size that keeps activations near 1."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    waves = (index**2 * 0.6180339887 + zlib.crc32(name.encode()) % 1000).cos().reshape(shape) * 2**0.5
    if len(shape) == 1:
        return (0.1 * waves + ("norm" in name and name.endswith("weight"))).float()
    return waves.float() if "." not in name else (waves / math.prod(shape[1:]) ** 0.5).float()


def adm_tensors(**changes):
    """The formula's weights for a small network, by EDM's names; with the constant filters that its files hold."""
    with torch.device("meta"):
        net = DhariwalUNet(**{**SMALL, **changes})
    tensors = {edm_name(name, net.config): tensor.shape for name, tensor in net.state_dict().items()}
    tensors = {name: formula(name, shape) for name, shape in tensors.items()}
    for side in (net.config["img_resolution"] >> level for level in range(1, len(net.config["channel_mult"]))):
        for block in (f"enc.{side}x{side}_down", f"dec.{2 * side}x{2 * side}_up"):
            tensors |= {f"{block}.{layer}.resample_filter": lowpass([1, 1]) for layer in ("conv0", "skip")}
    return tensors


def write_adm(path, **changes):
    source = "# licensed under a Creative Commons\n# Attribution-NonCommercial-ShareAlike 4.0 International License."
    return write_pickle(path, {"ema": edm_network(adm_tensors(**changes), unet="DhariwalUNet", source=source)})


PINNED = {  # classes -> sigma -> deviation of D, and of D - c_skip x; D at three places; all by NVIDIA's class
    7: {
        0.05: (0.498831, 0.0240200, [-0.636150, 0.444003, 0.419711]),
        1.0: (0.310004, 0.214194, [0.168874, 0.412546, 0.0401873]),
        80.0: (0.240209, 0.240181, [0.531560, 0.248774, -0.165404]),
    },
    0: {
        0.05: (0.499243, 0.0241450, [-0.649692, 0.457012, 0.413774]),
        1.0: (0.313399, 0.215278, [0.0170738, 0.547770, 0.00308125]),
        80.0: (0.241573, 0.241489, [0.358042, 0.414934, -0.191454]),
    },
}


@pytest.mark.parametrize("classes", PINNED)
def test_imported_network_computes_what_nvidias_does(tmp_path, classes):
    """The network's file is imported, and its outputs at three noise levels are pinned, with and without classes."""
    net = checkpoint.load_network(imported(write_adm(tmp_path / "a.pkl", label_dim=classes), tmp_path))
    x, labels = formula("x", (2, 3, 16, 16)), torch.tensor([5, 2]) if classes else None
    for sigma, (deviation, of_network, places) in PINNED[classes].items():
        noisy = x * (0.25 + sigma**2) ** 0.5
        denoised = net(noisy, sigma, labels)
        assert denoised.flatten()[[100, 700, 1200]].tolist() == pytest.approx(places, abs=3e-5)
        assert denoised.std().item() == pytest.approx(deviation, rel=1e-4)
        assert (denoised - 0.25 / (0.25 + sigma**2) * noisy).std().item() == pytest.approx(of_network, rel=1e-4)


def test_default_is_the_published_imagenet_network():
    """295.9 M parameters; the names and shapes of all 541 tensors are those of NVIDIA's class, by their digest."""
    with torch.device("meta"):
        net = DhariwalUNet()
    tensors = sorted(f"{edm_name(name, net.config)} {list(tensor.shape)}" for name, tensor in net.state_dict().items())
    assert sum(p.numel() for p in net.parameters()) == 295_899_267 and len(tensors) == 541
    digest = "bb76adc17a660269dfa30f0d6111f3ae1220776e675784f45d453f99c44806f5"
    assert hashlib.sha256("\n".join(tensors).encode()).hexdigest() == digest
    assert net.feature_channels == {64: 192, 32: 384, 16: 576, 8: 768}
    assert [block.attention.num_heads for block in net.encoder[3][1:]] == [12] * 3
    assert {module.eps for module in net.modules() if isinstance(module, torch.nn.GroupNorm)} == {
        1e-5
    }  # too small to show above


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_architecture_is_told_by_the_tensors(tmp_path, suffix):
    """Another depth, width, number of channels; a level without heads; dropout, which no tensor shows; the licence."""
    changes = dict(
        channel_mult=(1, 3, 2),
        model_channels=32,
        num_blocks=2,
        attn_resolutions=(16, 8, 4),
        img_channels=1,
        label_dim=0,
    )
    source = write_adm(tmp_path / "a.pkl", **changes)
    if suffix == ".pth":
        source = tmp_path / "a.pth"
        torch.save({f"model.{name}": tensor for name, tensor in adm_tensors(**changes).items()}, source)
    state = checkpoint.load(imported(source, tmp_path))
    known = {"network": "DhariwalUNet", "img_resolution": 16, "channel_mult_emb": 4, "sigma_data": 0.5}
    expected = {
        **known,
        **changes,
        "channel_mult": [1, 3, 2],
        "attn_resolutions": [8, 4],
        "dropout": 0.11,
    }  # 32 channels: no head
    assert state["model_config"] == {**expected, "dropout": 0.11 if suffix == ".pkl" else 0.1}
    assert state["config"]["licence"] == ("CC BY-NC-SA 4.0" if suffix == ".pkl" else None)


def test_other_tensors_are_refused(tmp_path):
    tensors = adm_tensors()
    filter_name = "enc.8x8_down.skip.resample_filter"
    for changes, message in (
        ({"u": torch.ones(3)}, "tensor 'u' does not belong to DhariwalUNet (1 such)"),
        ({"out_norm.bias": torch.ones(3)}, "tensor out_norm.bias has shape [3], not [64]"),
        ({filter_name: torch.ones(1, 1, 4, 4) / 16}, f"tensor {filter_name} is not the low-pass of [1, 1]"),
        ({"enc.8x8_aux_skip.weight": torch.ones(1)}, "with layers aux_skip; only those of DDPM++ and NCSN++"),
        ({"dec.16x16_aux_up.resample_filter": torch.ones(1)}, "with layers aux_up; only those of DDPM++ and NCSN++"),
    ):
        torch.save({**tensors, **changes}, tmp_path / "a.pth")
        assert_import_refused(tmp_path / "a.pth", tmp_path, message)
