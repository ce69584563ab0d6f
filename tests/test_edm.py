import io
import zipfile
from argparse import Namespace

import pytest
import torch
from conftest import refuses, succeed
from edm_files import Persistent, assert_import_refused, edm_tensors, imported, precond, write_edm, write_pickle

import checkpoint
import import_teacher
from importers.edm import make_tensors
from importers.safe_pickle import Record

TENSORS = edm_tensors(label_dim=10)
OTHER = {name: tensor + 1 for name, tensor in TENSORS.items()}


def test_import_by_command_line(tmp_path):
    """The output and the file; fp16 storage; names; the source code in the file is not used; no silent overwriting."""
    tensors = {name: tensor.half() for name, tensor in TENSORS.items()}
    network = precond(tensors, source=f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    source, output = write_pickle(tmp_path / "a.pkl", {"ema": network}), tmp_path / "new" / "teacher.pt"
    out = succeed("import_teacher.py", "--source", source, "--output", output, "--class_names", *"abcdefghij")
    assert "left out: map_augment.weight (augmentation labels), 4 low-pass filters (constants)" in out
    state = checkpoint.load(output)
    assert checkpoint.kind(state) == "teacher" and state["class_names"] == list("abcdefghij")
    assert all(tensor.dtype == torch.float32 for tensor in state["ema_state_dict"].values())
    assert torch.equal(state["ema_state_dict"]["conv_in.weight"], tensors["enc.8x8_conv.weight"].float())
    assert not (tmp_path / "it-ran").exists()
    refuses("exists", "import_teacher.py", source=source, output=output)
    for wrong, found in (("ab", 2), ("abcdefghijk", 11), ("abcdefghii", 9)):
        told = f"--class_names has {found} different names; the network has 10 classes"
        refuses(told, "import_teacher.py", source=source, output=tmp_path / "other.pt", class_names=list(wrong))


def test_what_is_cifar10(tmp_path):
    """By the name of the file or of NVIDIA's training data, and by the network's shape."""

    def is_cifar10(name, data=None, img_resolution=32, img_channels=3, label_dim=10):
        config = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim)
        return import_teacher.of_cifar10(Namespace(net=Namespace(config=config), data=data), tmp_path / name)

    assert is_cifar10("edm-cifar10-32x32-cond-vp.pkl") and is_cifar10("a.pkl", "./data/CIFAR-10.zip")
    assert is_cifar10("cifar10-uncond.pkl", label_dim=0)
    assert not is_cifar10("mine.pkl", "./data/mine.zip") and not is_cifar10("cifar100.pkl", label_dim=0)
    for shape in (dict(img_resolution=64), dict(img_channels=1), dict(label_dim=100)):
        assert not is_cifar10("cifar10.pkl", **shape)


@pytest.mark.parametrize("resolution, name, dataset", [(32, "cat", "cifar10"), (16, "3", "folder")])
def test_names_of_imported_classes(tmp_path, resolution, name, dataset):
    """NVIDIA's own record of the training data says cifar10.zip."""
    source = write_edm(tmp_path / "a.pkl", img_resolution=resolution, attn_resolutions=[])
    state = checkpoint.load(imported(source, tmp_path))
    assert state["class_names"][3] == name and state["config"]["dataset"] == dataset


def test_licence(tmp_path):
    text = "# licensed under a Creative Commons\n# Attribution-NonCommercial-ShareAlike 4.0 International License."
    assert import_teacher.load(write_edm(tmp_path / "a.pkl", source=text)).licence == "CC BY-NC-SA 4.0"
    assert import_teacher.load(write_edm(tmp_path / "a.pkl")).licence is None


def under(prefix, tensors=TENSORS):
    return {prefix + name: tensor for name, tensor in tensors.items()}


STEP = torch.tensor(3)
LIGHTNING = {"epoch": 3, "hyper_parameters": Namespace(lr=1e-4), "state_dict": under("net."), "optimizer_states": [{}]}
PLACES = {  # what is saved, and the line that says what was taken
    "DistributedDataParallel, compiled": (under("module._orig_mod."), []),
    "averages beside": (
        {"model": OTHER, "ema": TENSORS, "step": 3},
        ["the network under `ema.` was taken, not model."],
    ),
    "one part": ({"weights": under("model."), "step": 3}, []),
    "parts in parts": ({"ema": {"state_dict": TENSORS}, "optimizer": {"state": {0: {"exp_avg": STEP}}}}, []),
    "Lightning": (LIGHTNING, []),
    "ema_pytorch": (
        under("online_model.", OTHER) | under("ema_model.") | {"step": STEP},
        ["the network under `ema_model.` was taken, not online_model."],
    ),
    "AveragedModel": (under("module.") | {"n_averaged": STEP}, []),
}


@pytest.mark.parametrize("what", PLACES)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_where_others_save_them(tmp_path, what, zipped):
    """In torch's present and former file format; the averaged weights are preferred, and a line says so."""
    content, notes = PLACES[what]
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found = import_teacher.load(tmp_path / "a.ckpt")
    assert torch.equal(found.state["conv_in.weight"], TENSORS["enc.8x8_conv.weight"]) and found.notes == notes


def but(**changes):
    """The tensors with changes; `None` for one that is missing. Two underscores stand for a dot."""
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in (TENSORS | changes).items() if tensor is not None}


BIAS = "map_layer1__bias"
MANY_BLOCKS = {f"enc.8x8_block{index}.conv0.weight": torch.ones(1) for index in range(1, 65)}
WRONG = {  # what is saved, part of the one-line message
    "missing": (but(dec__8x8_up__skip__bias=None), "no tensor dec.8x8_up.skip.bias"),
    "left over": (but(u=STEP), "tensor 'u' does not belong to SongUNet (1 such, of "),
    "NCSN++": (but(map_noise__freqs=STEP), 'an NCSN++ (EDM\'s "ve" files), which is not supported; take DDPM++ ("vp")'),
    "shape": (but(**{BIAS: torch.ones(3)}), "tensor map_layer1.bias has shape [3], not [64]"),
    "not finite": (but(**{BIAS: torch.full((64,), torch.nan)}), "map_layer1.bias (torch.float32) does not hold finite"),
    "integers": (but(**{BIAS: torch.ones(64).char()}), "map_layer1.bias (torch.int8) does not hold"),
    "filter": (but(enc__4x4_down__skip__resample_filter=torch.ones(1, 1, 2, 2)), "is not the mean of 2x2 pixels"),
    "half a label layer": (but(map_label__weight=None), "tensor 'map_label.bias' does not belong to SongUNet"),
    "other network": ({"conv.weight": STEP}, "no tensor map_layer0.weight in it, but conv.weight. Save the network's"),
    "flat": (but(enc__8x8_conv__weight=torch.ones(3)), "damaged, or not a network that is known here"),
    "two parts": ({"a": TENSORS, "b": OTHER}, "2 networks, under a., b.. Save"),
    "two prefixes": (under("a.") | under("b."), "2 networks, under a., b.. Save"),
    "whole module": (torch.nn.Linear(1, 1), "of more than tensors and plain data; nothing in it was run. Save the"),
    "ours": ({"model_config": {}}, "already a checkpoint of this project"),
    "expanded": (but(**{BIAS: torch.ones(1).expand(1 << 40)}), "they are expanded. Save"),
    "blocks": (TENSORS | MANY_BLOCKS, "65 blocks at a resolution; at most 64 are supported"),
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
    package.save_file(under("module.model."), tmp_path / "a.safetensors")
    found = import_teacher.load(tmp_path / "a.safetensors")
    assert torch.equal(found.state["conv_in.weight"], TENSORS["enc.8x8_conv.weight"])
    for length in (1 << 40, 60):
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a": [' + bytes(60))
        assert_import_refused(tmp_path / "a.safetensors", tmp_path, "damaged, or not a network")


def shared(copied=lambda module: module):
    network = precond(TENSORS)
    modules = network.meta["state"]["_modules"]["model"].meta["state"]["_modules"]
    modules["again"] = copied(modules["map_label"])
    return network


def with_same_parts(module):
    return Persistent("Layer", **module.meta["state"])


def without_scale():
    network = precond(TENSORS)
    network.meta["state"]["sigma_data"] = float("nan")
    return network


PICKLES = {  # other pickles, part of the one-line message
    "other preconditioning": (lambda: precond({}, "VPPrecond"), "preconditioned by 'VPPrecond'; only EDM's"),
    "other network": (lambda: precond({}, unet="DiT"), "the network is a 'DiT'; only SongUNet"),
    "number": (lambda: 7, "no tensor map_layer0.weight in it, but ema, dataset_kwargs"),
    "shared": (shared, "the module 'again.' occurs twice"),
    "shared parts": (lambda: shared(with_same_parts), "the module 'again.' occurs twice"),
    "scale": (without_scale, "sigma_data must be above 0"),
    "expanded": (lambda: precond({**TENSORS, "w": torch.ones(1).expand(1 << 40)}), "they are expanded"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_other_networks_are_refused(tmp_path, what):
    build, message = PICKLES[what]
    assert_import_refused(write_pickle(tmp_path / "a.pkl", {"ema": build()}), tmp_path, message)


def test_a_deep_tuple_for_a_storage_is_an_error():
    """To hash it would end Python."""
    deep = ()
    for _ in range(1_000_000):
        deep = (deep,)
    with pytest.raises(TypeError):
        make_tensors([("w", Record("tensor", (Record("storage", (deep,)), 0, (1,), (1,))))])


def test_missing_files(tmp_path):
    for name, message in (("none.pkl", "none.pkl: No such file"), (".", "but nothing in")):
        assert_import_refused(tmp_path / name, tmp_path, message)
