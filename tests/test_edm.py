import pytest
import torch
from conftest import run_script, succeed
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
from test_config import assert_refused
from test_safe_pickle import hostile_bytes

import checkpoint
from support.config import UserError


def test_import_by_command_line(tmp_path):
    """The output and the file; fp16 storage; class names; the source code in the file is not used; no silent overwriting."""
    tensors = {name: tensor.half() for name, tensor in edm_tensors(**DDPMPP).items()}
    source = write_pickle(tmp_path / "a.pkl", {"ema": edm_network(tensors, source=f"open({str(tmp_path / 'it-ran')!r}, 'w')")})
    output = tmp_path / "new" / "teacher.pt"
    out = succeed("import_teacher.py", "--source", source, "--output", output)
    assert "left out: map_augment.weight [16, 9] (augmentation labels), 4 low-pass filters (constants)" in out
    state = checkpoint.load(output)
    assert checkpoint.kind(state) == "teacher" and state["class_names"][3] == "cat" and state["config"]["dataset"] == "cifar10"
    assert all(tensor.dtype == torch.float32 for tensor in state["ema_state_dict"].values())
    assert torch.equal(state["ema_state_dict"]["conv_in.weight"], tensors["enc.8x8_conv.weight"].float())
    assert not (tmp_path / "it-ran").exists()

    output = imported(write_edm(tmp_path / "b.pkl", classes=3), tmp_path)
    with pytest.raises(UserError, match="exists"):
        imported(tmp_path / "b.pkl", tmp_path)
    state = checkpoint.load(output)
    assert state["class_names"] == ["0", "1", "2"] and state["config"]["dataset"] == "folder"


def without(tensors, *names):
    return {key: tensor for key, tensor in tensors.items() if key not in names}


WRONG = {  # change of the tensors, part of the one-line message
    "missing": (lambda t: without(t, "dec.8x8_up.skip.bias"), "no tensor dec.8x8_up.skip.bias"),
    "left over": (lambda t: {**t, "u": torch.ones(3)}, "tensor 'u' does not belong to SongUNet"),
    "shape": (lambda t: {**t, "map_layer1.bias": torch.ones(3)}, "tensor map_layer1.bias has shape [3], not [64]"),
    "not finite": (lambda t: {**t, "map_layer1.bias": torch.full((64,), torch.nan)}, "tensor map_layer1.bias is not finite"),
    "filter": (lambda t: {**t, "enc.4x4_down.skip.resample_filter": torch.ones(1, 1, 2, 2)}, "is not the low-pass of [1, 1]"),
    "half a label layer": (lambda t: without(t, "map_label.weight"), "tensor 'map_label.bias' does not belong to SongUNet"),
    "other network": (lambda t: {"out_conv.weight": torch.ones(3)}, "(ADM)): no tensor enc.32x32_conv.weight"),
    "diffusers'": (lambda t: {"conv_in.weight": torch.ones(3), "time_embedding.linear_1.bias": torch.ones(3)}, "give their folder"),
    "no shapes": (lambda t: {**t, "enc.8x8_conv.weight": torch.ones(0, 0)}, "not an EDM network"),
    "no tensors": (lambda t: {"step": 3}, "not a state_dict"),
}


@pytest.mark.parametrize("what", WRONG)
def test_other_tensors_are_refused(tmp_path, what):
    change, message = WRONG[what]
    torch.save(change(edm_tensors(**DDPMPP)), tmp_path / "a.pth")
    assert_import_refused(tmp_path / "a.pth", tmp_path, message)


def loop():
    network = edm_network(edm_tensors(**DDPMPP))
    unet = network.meta["state"]["_modules"]["model"]
    unet.meta["state"]["_modules"]["again"] = module("Layer", {}, {"and_again": unet.meta["state"]["_modules"]["map_label"]})
    return network


OTHER = {  # other pickles, part of the one-line message
    "other preconditioning": (
        lambda: {"ema": edm_network({}, precond="VPPrecond")},
        "preconditioned by 'VPPrecond'; only EDM's own",
    ),
    "other network": (lambda: {"ema": edm_network({}, unet="DiT")}, "the network is a 'DiT'; only SongUNet"),
    "number": (lambda: {"ema": 7}, "damaged, or not an EDM network"),
    "no network": (lambda: {"G_ema": 7}, "no entry `ema`"),
    "shared": (lambda: {"ema": loop()}, "the module 'again.and_again.' occurs twice"),
    "larger than stored": (
        lambda: {"ema": with_parameter(torch.nn.Parameter(torch.ones(1).expand(1 << 40), False))},
        "a tensor is larger than its storage",
    ),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_networks_are_refused(tmp_path, what):
    build, message = OTHER[what]
    assert_import_refused(write_pickle(tmp_path / "a.pkl", build()), tmp_path, message)


def test_a_hostile_state_dict_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(hostile_bytes(f"touch {tmp_path / 'it-ran'}"))
    done = run_script("import_teacher.py", "--source", tmp_path / "a.pth", "--output", tmp_path / "imported" / "x.pt")
    assert_refused(done, "it holds more than tensors, or is damaged; nothing in it was run")
    for name, message in (("none.pkl", "No such file"), (".", "config.json: No such file")):
        assert_import_refused(tmp_path / name, tmp_path, message)
    assert not (tmp_path / "it-ran").exists()
