"""Checkpoints: written whole or not at all, read without running code."""

import importlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from model import SimpleUNet
from support.script import UserError, as_user_error

# `model_config` names the class under `network`; SimpleUNet's has no such key. Modules are imported when needed.
NETWORKS = {
    "SimpleUNet": "model",
    "SongUNet": "networks.edm_unet",
    "DhariwalUNet": "networks.edm_unet",
    "DiffusersUNet": "networks.diffusers_unet",
}
WEIGHTS = {"teacher": "model_state_dict", "dmd2": "feedforward_model_state_dict"}  # used without ema_state_dict
# The types of entries; what ends in _state_dict is a dict.
FIELDS = dict(step=int, images_seen=int, class_names=list, student_sigmas=list, model_config=dict, config=dict)
FOREIGN = "not written by train_teacher.py or train_dmd2.py"
MAX_SIZE = 100_000  # of any number in `model_config`, as a hostile file may ask for anything; narrower limits of some:
LIMITS = {"label_dim": (0, MAX_SIZE), "img_resolution": (1, 1024), "img_channels": (1, 1024), "num_blocks": (1, 100)}


def save(path, state):
    """Writes `state` (tensors and plain containers) to `path` as torch.save does. Raises UserError as `write` does."""
    write(path, lambda file: torch.save(state, file))


def write(path, writer):
    """Calls `writer(file)` on a temporary file beside `path`, flushes it to disk, then renames it to `path`.

    Raises UserError if that fails (full disk, no permission); the file at `path` is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # some file systems cannot; the file itself is safe
            os.fsync(folder)  # so that the new name survives a power cut too
        os.close(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps what the file object raised
        if not isinstance(cause, OSError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(cause, "strerror", None) or "the file could not be written; is the disk full?"
        raise UserError(f"{path}: {reason}; an earlier file of this name is intact") from None


def read(path):
    """What `save` wrote to `path`, on the CPU. No code in the file is run. May raise anything if it is damaged."""
    with zipfile.ZipFile(path) as archive:
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())  # as torch does
        if not stored or archive.testzip():  # torch writes checksums but does not check them
            raise ValueError("damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def load(path):
    """The state in the checkpoint at `path`, on the CPU. No code in the file is run.

    Raises UserError if the file is missing, damaged, or not a checkpoint of this project.
    """
    with as_user_error(f"checkpoint {path}", (OSError, ValueError)):
        try:
            state = read(path)
        except Exception as error:  # a damaged file can make torch's reader raise anything
            if isinstance(error, (OSError, MemoryError)) or "allocate memory" in str(error):
                raise
            raise ValueError(f"damaged, or {FOREIGN}") from None
        check_state(state)
    return state


def check_state(state):
    """Raises ValueError if `state` is not what `run.Run` or import_teacher.py saves: keys, types, lengths, sizes."""
    require(isinstance(state, dict) and {"step", "model_config", "config"} <= state.keys(), FOREIGN)
    for name, value in state.items():
        expected = dict if isinstance(name, str) and name.endswith("_state_dict") else FIELDS.get(name, object)
        require(isinstance(value, expected) and not isinstance(value, bool), f"its {name} is no {expected.__name__}")
    config = state["model_config"]
    require(all(isinstance(name, str) for name in (*state, *config, *state["config"])), FOREIGN)
    require(kind(state) == "teacher" or "student_sigmas" in state, "of an early version, without student_sigmas")
    require(min(state["step"], state.get("images_seen", 0)) >= 0, "its step or images_seen is below 0")
    sizes = {"num_blocks": 1} | config  # a DiffusersUNet checks its own
    for name, (least, most) in LIMITS.items():
        fits = type(sizes.get(name)) is int and least <= sizes[name] <= most
        require(fits, f"its {name} is no whole number from {least} to {most}")
    names, label_dim = state.get("class_names", []), config["label_dim"]
    require(len(names) in (0, label_dim), f"it has {len(names)} class_names for {label_dim} classes")
    require(all(isinstance(name, str) for name in names), "its class_names are no texts")
    sigmas = state.get("student_sigmas", [1.0])
    finite = all(type(sigma) in (int, float) and 0 < sigma < math.inf for sigma in sigmas)
    descend = finite and bool(sigmas) and sigmas == sorted(set(sigmas), reverse=True)
    require(descend, "its student_sigmas are not finite noise levels that descend")

    above = f"its model_config has a number above {MAX_SIZE}"  # json calls parse_int with every integer in it
    try:
        json.loads(json.dumps(config), parse_int=lambda text: require(abs(int(text)) <= MAX_SIZE, above))
    except (TypeError, RecursionError):
        raise ValueError("its model_config is no plain data") from None
    for average in (state, *averages(state).values()):
        tensors = list(weights(average).values())
        are_tensors = bool(tensors) and all(isinstance(tensor, torch.Tensor) for tensor in tensors)
        require(are_tensors, "its weights are no tensors")
        whole = all(t.numel() * t.element_size() <= t.untyped_storage().nbytes() for t in tensors)
        require(whole, "its weights have a tensor that is larger than its content")


def require(condition, otherwise):
    if not condition:
        raise ValueError(otherwise)


def kind(state):
    """`teacher` or `dmd2`, depending on the script that wrote the checkpoint."""
    return "dmd2" if WEIGHTS["dmd2"] in state else "teacher"


def class_names(state, label_dim):
    """The names of the `label_dim` classes that a network knows; their numbers if the checkpoint has no names."""
    return state.get("class_names") or [str(label) for label in range(label_dim)]


def weights(state):
    """The `state_dict` of a checkpoint's network: averaged weights if there are any."""
    return state.get("ema_state_dict") or state.get(WEIGHTS[kind(state)], {})


def averages(state):
    """The generator's further averages: a dict from their decays, as in `--ema_decay`, to states that load them."""
    keys = {match[1]: match[0] for name in state if (match := re.fullmatch("ema_(.+)_state_dict", name))}
    return {decay: state | {"ema_state_dict": state[key]} for decay, key in keys.items()}


def network_class(name):
    """The class of networks that `model_config` calls `name`. Raises KeyError for an unknown one."""
    return getattr(importlib.import_module(NETWORKS[name]), name)


def network(state, path, device="cpu"):
    """The network of a `state` loaded from `path`, on `device`, frozen: averaged weights if there are any."""
    config, tensors = dict(state["model_config"]), weights(state)
    name = config.pop("network", "SimpleUNet")
    try:
        build = network_class(name)
        with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
            shapes = {key: tensor.shape for key, tensor in build(**config).state_dict().items()}
        if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
            raise ValueError("weights of other shapes or names")
        net = build(**config)
        net.load_state_dict(tensors)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint {path}: its network cannot be built: {reason:.200}") from None
    # Tensor cores are faster with channels last. A CPU runs SongUNet no faster with it, and rounds more coarsely.
    tensor_cores = torch.device(device).type == "cuda"
    layout = torch.channels_last if tensor_cores or isinstance(net, SimpleUNet) else torch.contiguous_format
    return net.to(device, memory_format=layout).eval().requires_grad_(False)


def load_network(path, device="cpu"):
    """The frozen network of a checkpoint, averaged weights if there are any. Raises UserError as `load` does."""
    return network(load(path), path, device)


def load_teacher(path, option="teacher_checkpoint"):
    """The state of the teacher at `path`, the value of `option`. Raises UserError for anything else."""
    if not os.path.exists(path):
        raise UserError(f"--{option} {path}: there is no such file; train_teacher.py or import_teacher.py makes one")
    state = load(path)
    if kind(state) != "teacher":
        raise UserError(f"--{option} {path}: a generator; give a teacher's checkpoint")
    return state


def check_same_images(source, config, other, whose):
    """Raises UserError if the network of `source` makes other images than another one, by their `model_config`."""
    for name in ("img_resolution", "img_channels", "label_dim"):
        if config[name] != other[name]:
            raise UserError(f"{source}: its {name} is {config[name]}, {whose} {other[name]}")


def step_checkpoints(folder, kind):
    """The step checkpoints of `kind` (teacher or dmd2) in `folder` as pairs (step, file), in order."""
    pattern = re.compile(rf"{kind}_checkpoint_step_(\d+)\.pt")
    matches = [(pattern.fullmatch(file.name), file) for file in Path(folder).glob("*.pt")]
    return sorted((int(match[1]), file) for match, file in matches if match)


def all_checkpoints(folder, kind):
    """`step_checkpoints` and the final one, at the step that it holds, or last if it is damaged."""
    found, final = step_checkpoints(folder, kind), Path(folder) / f"{kind}_final.pt"
    if final.exists():
        try:
            found.append((load(final)["step"], final))
        except UserError:
            found.append((math.inf, final))
    return sorted(found)


def versions():
    """The versions of Python and torch, and the commit of this repository if git knows it."""
    folder = shlex.quote(str(Path(__file__).parent))
    commit = subprocess.getoutput(f"git -C {folder} rev-parse --verify HEAD 2>/dev/null")
    return {"python": platform.python_version(), "torch": str(torch.__version__), "commit": commit or "unknown"}
