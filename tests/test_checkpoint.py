"""Checkpoints as safetensors files: what `export.py --format safetensors` writes, and who reads it."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import TINY, run_script, succeed
from edm_files import DDPMPP, assert_import_refused, edm_tensors, imported
from test_config import assert_refused

import checkpoint
from support.config import UserError

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("safetensors"), reason="needs safetensors, not installed")


def test_shared_generator_is_used_as_the_checkpoint(runs, tmp_path):
    """The averaged weights, bit for bit; the same images; a third of the size or less, without optimizer states."""
    source, shared = runs / "dmd2" / "dmd2_final.pt", tmp_path / "new" / "generator.safetensors"
    out = succeed("export.py", "--checkpoint", source, "--format", "safetensors", "--output", shared)
    assert f"wrote {shared}" in out and [file.name for file in shared.parent.iterdir()] == [shared.name]
    assert shared.stat().st_size < source.stat().st_size / 3
    state, kept = checkpoint.load(source), checkpoint.load(shared)
    assert checkpoint.kind(kept) == "dmd2" and kept["config"] == state["config"] and kept["class_names"] == state["class_names"]
    net, again = checkpoint.load_network(source), checkpoint.load_network(shared)
    assert type(net) is type(again) and net.config == again.config
    assert all(torch.equal(tensor, state["ema_state_dict"][name]) for name, tensor in again.state_dict().items())
    noise, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 9])
    assert torch.equal(checkpoint.load_sampler(shared)(noise, labels), checkpoint.load_sampler(source)(noise, labels))
    arguments = ["--num_samples", 1, "--format", "npz", "--classes", "0,3", "--output_dir"]
    succeed("generate.py", "--checkpoint", shared, *arguments, tmp_path / "images")
    assert (tmp_path / "images" / "samples.npz").exists()


def test_shared_teacher_is_distilled_and_not_resumed(runs, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    checkpoint.save_safetensors(teacher, checkpoint.load(runs / "teacher" / "teacher_final.pt"))
    assert checkpoint.kind(checkpoint.load(teacher)) == "teacher"
    succeed("train_dmd2.py", *TINY, "--step_number", 1, "--teacher_checkpoint", teacher, "--output_dir", tmp_path / "run")
    done = run_script("train_teacher.py", *TINY, "--resume_from_checkpoint", teacher, "--output_dir", tmp_path / "other")
    assert_refused(done, "only weights, to sample or distil; training cannot resume here")


def test_damaged_and_other_files_are_refused(runs, tmp_path):
    """Cut short anywhere, with other metadata, or from another project: each is refused in one line."""
    from safetensors.torch import save_file

    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    checkpoint.save_safetensors(good, checkpoint.load(runs / "teacher" / "teacher_final.pt"))
    content = good.read_bytes()
    for size in (5, 9, 500, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:size])
        with pytest.raises(UserError, match="damaged, or not written by"):
            checkpoint.load(bad)
    for metadata in ("no JSON", "[1]", "7", json.dumps({"kind": "teacher", "step": 1, "model_config": 3, "config": {}})):
        save_file({"x": torch.ones(1)}, bad, {"minimal_dmd2": metadata})
        with pytest.raises(UserError, match="not written by"):
            checkpoint.load(bad)
    save_file({"x": torch.ones(1)}, bad)
    with pytest.raises(UserError, match=r"not written by export.py; import other networks with import_teacher.py"):
        checkpoint.load(bad)
    for already in (good, runs / "teacher" / "teacher_final.pt"):
        assert_import_refused(already, tmp_path, "already a checkpoint of this project: give it to --teacher_checkpoint as it is")


def test_edms_state_dict_as_safetensors(tmp_path):
    """It is imported like a .pth, with the licence that its metadata states; a damaged one is refused."""
    from safetensors.torch import save_file

    tensors, source = edm_tensors(**DDPMPP), tmp_path / "a.safetensors"
    save_file({f"model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, source, {"license": "cc0"})
    state = checkpoint.load(imported(source, tmp_path))
    assert state["config"]["licence"] == "cc0" and state["model_config"]["network"] == "SongUNet"
    assert torch.equal(state["ema_state_dict"]["conv_in.weight"], tensors["enc.8x8_conv.weight"])
    source.write_bytes(source.read_bytes()[:-1])
    assert_import_refused(source, tmp_path / "again", "damaged, or not safetensors")


def test_without_the_package_one_line_says_so(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=r"x.safetensors: needs .* pip install safetensors$"):
        checkpoint.load(tmp_path / "x.safetensors")
