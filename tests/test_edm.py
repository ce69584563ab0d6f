import functools
import io
import zipfile
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import succeed
from edm_files import (
    DDPMPP,
    assert_import_refused,
    edm_network,
    edm_tensors,
    imported,
    module,
    with_parameter,
    write_edm,
    write_pickle,
)

import checkpoint
import import_teacher
from support.script import UserError


def test_import_by_command_line(tmp_path):
    """The output and the file; fp16 storage; names; the source code in the file is not used; no silent overwriting."""
    tensors = {name: tensor.half() for name, tensor in edm_tensors(**DDPMPP).items()}
    network = edm_network(tensors, source=f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    source, output = write_pickle(tmp_path / "a.pkl", {"ema": network}), tmp_path / "new" / "teacher.pt"
    names = ",".join("abcdefghij")
    out = succeed("import_teacher.py", "--source", source, "--output", output, "--class_names", names)
    assert "left out: map_augment.weight [16, 9] (augmentation labels), 4 low-pass filters (constants)" in out
    state = checkpoint.load(output)
    assert checkpoint.kind(state) == "teacher" and state["class_names"] == list("abcdefghij")
    assert all(tensor.dtype == torch.float32 for tensor in state["ema_state_dict"].values())
    assert torch.equal(state["ema_state_dict"]["conv_in.weight"], tensors["enc.8x8_conv.weight"].float())
    assert not (tmp_path / "it-ran").exists()
    with pytest.raises(UserError, match="exists"):
        import_teacher.main(["--source", str(source), "--output", str(output)])
    for wrong, found in (("a,b", 2), (names + ",k", 11), ("a,b,c,d,e,f,g,h,i,i", 9)):
        with pytest.raises(UserError, match=f"^--class_names has {found} different names; the network has 10 classes$"):
            imported(source, tmp_path, "--class_names", wrong)


@pytest.mark.parametrize(
    "name, data, shape, expected",
    [
        ("edm-cifar10-32x32-cond-vp.pkl", None, {}, True),
        ("a.pkl", "./data/CIFAR-10.zip", {}, True),
        ("cifar10-uncond.pkl", None, {"label_dim": 0}, True),
        ("mine.pkl", "./data/mine.zip", {}, False),
        ("a.pkl", None, {}, False),
        ("cifar100.pkl", None, {"label_dim": 0}, False),
        ("cifar10.pkl", None, {"img_resolution": 64}, False),
        ("cifar10.pkl", None, {"img_channels": 1}, False),
        ("cifar10.pkl", None, {"label_dim": 100}, False),
    ],
)
def test_what_is_cifar10(tmp_path, name, data, shape, expected):
    config = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, **shape}
    found = SimpleNamespace(net=SimpleNamespace(config=config), data=data)
    assert import_teacher.of_cifar10(found, tmp_path / name) == expected


@pytest.mark.parametrize("resolution, name, dataset", [(32, "cat", "cifar10"), (16, "3", "folder")])
def test_names_of_imported_classes(tmp_path, resolution, name, dataset):
    """NVIDIA's own record of the training data says cifar10.zip."""
    source = write_edm(tmp_path / "a.pkl", resolution=resolution, mult=(1, 1), attention=())
    state = checkpoint.load(imported(source, tmp_path))
    assert state["class_names"][3] == name and state["config"]["dataset"] == dataset


TENSORS = edm_tensors(**DDPMPP)
OTHER = {name: tensor + 1 for name, tensor in TENSORS.items()}


def under(prefix, tensors=TENSORS):
    return {prefix + name: tensor for name, tensor in tensors.items()}


LIGHTNING = {"epoch": 3, "hyper_parameters": Namespace(lr=1e-4), "state_dict": under("net."), "optimizer_states": [{}]}
PLACES = {  # what is saved, and the line that says what was taken
    "DistributedDataParallel, compiled": (under("module._orig_mod."), None),
    "averages beside": (
        {"model": OTHER, "ema": TENSORS, "step": 3},
        "a dict with model, ema, step: its `ema` was taken",
    ),
    "one part": ({"weights": under("model."), "step": 3}, "its `weights` was taken"),
    "parts in parts": ({"ema": {"state_dict": TENSORS}}, "a dict with state_dict: its `state_dict` was taken"),
    "Lightning": (LIGHTNING, "a dict with epoch, hyper_parameters, state_dict, optimizer_states: its `state_dict` was"),
    "ema_pytorch": (
        under("online_model.", OTHER) | under("ema_model.") | {"step": torch.tensor(3)},
        "those under `ema_model.` were taken, not online_model.map_label.weight",
    ),
    "AveragedModel": (under("module.") | {"n_averaged": torch.tensor(3)}, "not n_averaged"),
}


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_where_others_save_them(tmp_path, what, zipped):
    """In torch's present and former file format; the averaged weights are preferred, and a line says so."""
    content, line = PLACES[what]
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found = import_teacher.load(tmp_path / "a.ckpt")
    assert torch.equal(found.state["conv_in.weight"], TENSORS["enc.8x8_conv.weight"])
    assert (line in found.notes[-1]) if line else not found.notes


def without(*names):
    return {key: tensor for key, tensor in TENSORS.items() if key not in names}


WRONG = {  # what is saved, part of the one-line message
    "missing": (without("dec.8x8_up.skip.bias"), "no tensor dec.8x8_up.skip.bias"),
    "left over": ({**TENSORS, "u": torch.ones(3)}, "tensor 'u' does not belong to SongUNet"),
    "shape": ({**TENSORS, "map_layer1.bias": torch.ones(3)}, "tensor map_layer1.bias has shape [3], not [64]"),
    "not finite": ({**TENSORS, "map_layer1.bias": torch.full((64,), torch.nan)}, "map_layer1.bias is not finite"),
    "integers": ({**TENSORS, "map_layer1.bias": torch.ones(64).char()}, "map_layer1.bias holds torch.int8"),
    "filter": (
        {**TENSORS, "enc.4x4_down.skip.resample_filter": torch.ones(1, 1, 2, 2)},
        "is not the low-pass of [1, 1]",
    ),
    "half a label layer": (without("map_label.weight"), "tensor 'map_label.bias' does not belong to SongUNet"),
    "other network": ({"conv.weight": torch.ones(3)}, "no tensor map_layer0.weight; it has conv.weight"),
    "diffusers'": (
        {"conv_in.weight": torch.ones(3), "time_embedding.linear_1.bias": torch.ones(3)},
        "give their folder",
    ),
    "flat": ({**TENSORS, "enc.8x8_conv.weight": torch.ones(3)}, "damaged, or not a network that is known here"),
    "no tensors": ({"step": 3}, "no network in it, but a dict with step. Save the network's tensors alone"),
    "two parts": ({"a": TENSORS, "b": OTHER}, "no network in it, but a dict with a, b. Save"),
    "two prefixes": (under("a.") | under("b."), "2 networks, under a., b.. Save"),
    "whole module": (torch.nn.Linear(1, 1), "a whole object of torch.nn.modules.linear.Linear"),
    "function": ({"model": TENSORS, "schedule": functools.partial(print)}, "it asks for 'functools.partial'"),
    "ours": ({"model_config": {}}, "already a checkpoint of this project"),
    "expanded": ({**TENSORS, "map_layer1.bias": torch.ones(1).expand(1 << 40)}, "they are expanded. Save"),
    "blocks": (
        {**TENSORS, **{f"enc.8x8_block{index}.conv0.weight": torch.ones(1) for index in range(1, 65)}},
        "num_blocks 65: at most 64 are supported",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_other_files_are_refused(tmp_path, what):
    content, message = WRONG[what]
    torch.save(content, tmp_path / "a.pth")
    assert_import_refused(tmp_path / "a.pth", tmp_path, message)


def test_compressed_storages_are_refused(tmp_path):
    """A small file that would fill the memory: sizes are looked at before contents."""
    torch.save(TENSORS, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as given, zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in given.namelist():
            packed.writestr(name, bytes(1 << 20))
    assert_import_refused(tmp_path / "a.pth", tmp_path, "its contents are compressed")


def test_safetensors(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    package.save_file(under("module.model."), tmp_path / "a.safetensors", {"license": "mit"})
    found = import_teacher.load(tmp_path / "a.safetensors")
    assert torch.equal(found.state["conv_in.weight"], TENSORS["enc.8x8_conv.weight"]) and found.licence == "mit"
    for length in (1 << 40, 60):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a": [' + bytes(60))
        assert_import_refused(tmp_path / "a.safetensors", tmp_path, "damaged, or not safetensors")


def loop():
    network = edm_network(TENSORS)
    unet = network.meta["state"]["_modules"]["model"].meta["state"]["_modules"]
    unet["again"] = module("Layer", {}, {"and_again": unet["map_label"]})
    return network


PICKLES = {  # other pickles, part of the one-line message
    "other preconditioning": (
        lambda: edm_network({}, precond="VPPrecond"),
        "preconditioned by 'VPPrecond'; only EDM's",
    ),
    "other network": (lambda: edm_network({}, unet="DiT"), "the network is a 'DiT'; only SongUNet"),
    "number": (lambda: 7, "no network in it, but a dict with ema, dataset_kwargs"),
    "shared": (loop, "the module 'again.and_again.' occurs twice"),
    "expanded": (lambda: with_parameter(torch.nn.Parameter(torch.ones(1).expand(1 << 40), False)), "they are expanded"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_other_networks_are_refused(tmp_path, what):
    build, message = PICKLES[what]
    assert_import_refused(write_pickle(tmp_path / "a.pkl", {"ema": build()}), tmp_path, message)


def test_missing_files(tmp_path):
    for name, message in (("none.pkl", "none.pkl: No such file"), (".", "No such file")):
        assert_import_refused(tmp_path / name, tmp_path, message)
