"""Checkpoints that are damaged, changed or hostile: `check_state`, and what is allocated before it."""

import copy
import random
import subprocess
import sys
import zipfile
from contextlib import suppress

import pytest
import torch
from conftest import ROOT, tiny_unet

import checkpoint
import train_dmd2
import train_teacher
from support.script import UserError


@pytest.fixture(scope="module")
def states():
    """A teacher's and a student's, of one network."""
    net = tiny_unet()
    shared = {"step": 3, "images_seen": 48, "config": {"lr": 1e-4}, "versions": {"torch": "2"}}
    shared |= {"model_config": net.config, "class_names": [str(digit) for digit in range(10)]}
    student = {"feedforward_model_state_dict": net.state_dict(), "student_sigmas": [80.0, 3.0]}
    return [{"ema_state_dict": net.state_dict(), **shared}, {**student, **shared}]


def refused(state, path):
    """The message with which the network of `state` is refused; None if it is built."""
    try:
        checkpoint.check_state(state)
        checkpoint.network(state, path)
    except ValueError as error:  # a UserError is one
        return str(error)


STRANGE = [None, True, -1, 2.5, float("nan"), float("inf"), "", "x" * 99, b"x", [], [1], ["a"], {}, {"a": 1}, {1: 2}]
STRANGE += [10**9, 10**30, [10**9], [80.0, float("nan")], [3.0, 80.0], torch.zeros(3), torch.zeros(1).expand(10**12)]


def changed(state, draw):
    """A copy of `state` with one entry, at any depth, deleted or replaced by something strange."""
    place = state = copy.deepcopy(state)
    key = draw.choice(list(place))
    while isinstance(place[key], dict) and place[key] and draw.random() < 0.6:
        place = place[key]
        key = draw.choice(list(place))
    if draw.random() < 0.2:
        del place[key]
    else:
        place[key] = draw.choice(STRANGE)
    return state


@pytest.mark.parametrize("seed", range(300))
def test_a_changed_state_is_refused_or_works(states, seed, tmp_path):
    """Seeded changes of types, lengths and values: never another exception, never a hang or gigabytes."""
    draw = random.Random(seed)
    refused(changed(changed(draw.choice(states), draw), draw), tmp_path / "x.pt")


@pytest.mark.parametrize("seed", range(60))
def test_a_changed_checkpoint_is_resumed_or_refused(runs, seed, tmp_path):
    """The same for what only a resume reads: moments, random numbers, position, options."""
    draw = random.Random(seed)
    kind, train = draw.choice([("teacher", train_teacher), ("dmd2", train_dmd2)])
    checkpoint.save(tmp_path / "x.pt", changed(checkpoint.load(runs / kind / f"{kind}_checkpoint_step_2.pt"), draw))
    options = ["--resume_from_checkpoint", tmp_path / "x.pt", "--output_dir", tmp_path / "out", "--step_number", 3]
    with suppress(UserError):
        train.main([*map(str, options)])


def nested(key, inner, value):
    return lambda state: state[key].__setitem__(inner, value)


CHANGES = [  # change, part of the message
    (lambda state: state.pop("step"), "not written by train_teacher.py"),
    (lambda state: state.update(step=-1), "its step or images_seen is below 0"),
    (lambda state: state.update(images_seen="many"), "its images_seen is no int"),
    (lambda state: state.update(class_names=["a", 2] * 5), "its class_names are no texts"),
    (lambda state: state.update(class_names=["a", "b"]), "2 class_names for 10 classes"),
    (nested("model_config", "model_channels", 10**7), "above 100000"),
    (nested("model_config", "img_resolution", 8192), "its img_resolution is no whole number from 1 to 1024"),
    (nested("model_config", "num_blocks", 10**4), "its num_blocks is no whole number from 1 to 100"),
    (nested("model_config", "dropout", torch.zeros(1)), "its model_config is no plain data"),
    (nested("model_config", "prediction", "eps"), "prediction must be one of edm, flow"),
    (nested("model_config", "num_blocks", 2), "weights of other shapes or names"),
    (nested("model_config", "network", "NoUNet"), "its network cannot be built: 'NoUNet'"),
    (nested("model_config", "depth", 3), "unexpected keyword argument 'depth'"),
    (lambda state: state["model_config"].pop("img_channels"), "its img_channels is no whole number"),
]
STUDENTS = [
    (lambda state: state.pop("student_sigmas"), "of an early version"),
    (lambda state: state.update(student_sigmas=[80.0, float("nan")]), "not finite noise levels that descend"),
    (lambda state: state.update(student_sigmas=[3.0, 80.0]), "not finite noise levels that descend"),
    (nested("feedforward_model_state_dict", "conv_in.bias", torch.zeros(1).expand(8)), "larger than its content"),
    (nested("feedforward_model_state_dict", "conv_in.bias", [0.0]), "its weights are no tensors"),
    (lambda state: state.update({"ema_0.9_state_dict": [0.0]}), "its ema_0.9_state_dict is no dict"),
    (lambda state: state.update({"ema_0.9_state_dict": {"a": torch.zeros(1).expand(8)}}), "larger than its content"),
]


@pytest.mark.parametrize("kind, change, told", [(0, *row) for row in CHANGES] + [(1, *row) for row in STUDENTS])
def test_what_is_wrong_is_named(states, kind, change, told, tmp_path):
    state = copy.deepcopy(states[kind])
    assert refused(state, tmp_path / "x.pt") is None
    change(state)
    assert told in (refused(state, tmp_path / "x.pt") or "")


def bomb(path, what):
    """A small file that asks for gigabytes."""
    net = tiny_unet()
    state = {"ema_state_dict": net.state_dict(), "step": 1, "model_config": dict(net.config), "config": {}}
    if what == "wide network":
        state["model_config"] |= {"model_channels": 80_000, "channel_mult": [90_000]}
    if what == "expanded tensor":
        state["ema_state_dict"]["conv_in.bias"] = torch.zeros(1).expand(2 * 10**9)
    if what == "endless list":
        state["model_config"]["x"] = endless = []
        endless.append(endless)
    if what == "many blocks":
        state["model_config"]["num_blocks"] = 10**9
    torch.save(state, path)
    if what == "compressed zeros":  # 2 GB in the place of a tensor
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                with archive.open(name, "w", force_zip64=True) as file:
                    for _ in range(500 if name.endswith("/data/0") else 1):
                        file.write(bytes(4_000_000) if name.endswith("/data/0") else content)


@pytest.mark.parametrize("what", ["wide network", "expanded tensor", "many blocks", "compressed zeros", "endless list"])
def test_small_files_do_not_take_gigabytes(tmp_path, what):
    """One line within 20 seconds of computing, and less than 1 GB beyond what torch takes."""
    bomb(tmp_path / "bomb.pt", what)
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import checkpoint\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF)\n"
        "before = used()\n"
        "try:\n    checkpoint.load_network(sys.argv[2])\n"
        "except ValueError as error:\n    print(error, file=sys.stderr)\n"
        "print(used().ru_maxrss - before.ru_maxrss, used().ru_utime - before.ru_utime)\n"
    )
    command = [sys.executable, "-c", code, ROOT, tmp_path / "bomb.pt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1 and "bomb.pt" in done.stderr, done.stderr
    memory, seconds = map(float, done.stdout.split())
    assert memory < 1_000_000 and seconds < 20


def test_an_error_of_the_disk_is_told_as_such(tmp_path):
    with pytest.raises(UserError, match=r"missing\.pt: No such file"):
        checkpoint.load(tmp_path / "missing.pt")
