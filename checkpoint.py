"""Checkpoints: written whole or not at all, read without running code."""

import json
import math
import os
import pickle
import platform
import re
import subprocess
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from model import SimpleUNet, memory_layout
from networks.dhariwal_unet import DhariwalUNet
from networks.diffusers_unet import DiffusersUNet
from networks.song_unet import SongUNet
from sampling import heun_sampler, student_sampler
from support.config import UserError

# `model_config` names the class under `network`; SimpleUNet's has no such key.
NETWORKS = {"SimpleUNet": SimpleUNet, "SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet, "DiffusersUNet": DiffusersUNet}
SHARED = ("step", "images_seen", "model_config", "config", "class_names", "student_sigmas", "versions")  # with weights


def save(path, state):
    """Writes `state` (tensors and plain containers) to `path` as torch.save does. Raises UserError as `write` does."""
    write(path, partial(torch.save, state))


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
        os.fsync(folder)  # so that the new name survives a power cut too
        os.close(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps what the file object raised
        if not isinstance(cause, OSError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(cause, "strerror", None) or "the file could not be written; is the disk full?"
        raise UserError(f"checkpoint {path}: {reason}; earlier checkpoints are intact") from None


def load(path, device="cpu"):
    """The state that `save` wrote, or the part of it that `save_safetensors` wrote.

    Raises UserError if the file is missing, damaged, or not a checkpoint of this project.
    """
    try:
        if is_safetensors(path):
            state, intact = load_safetensors(path, device), True
        else:
            with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not check them
                intact = archive.testzip() is None
            state = torch.load(path, map_location=device, weights_only=True) if intact else None
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror or error}") from None
    except UserError:
        raise
    except (RuntimeError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError):
        intact = False
    if not intact:
        raise UserError(f"checkpoint {path}: damaged, or not written by train_teacher.py or train_dmd2.py")
    complete = isinstance(state, dict) and {"step", "model_config", "config"} <= state.keys()
    if not complete or not isinstance(state["model_config"], dict) or not isinstance(state["config"], dict):
        raise UserError(f"checkpoint {path}: not written by train_teacher.py or train_dmd2.py")
    # Older checkpoints do not store these values: fill in those that were then in use.
    if "guidance_cls_state_dict" in state:
        state.setdefault("gan_channels_per_group", 16 if {"network", "channels_per_group"} & state["model_config"].keys() else 4)
    if "network" not in state["model_config"]:
        state["model_config"].setdefault("channels_per_group", 4)  # a SimpleUNet
    if kind(state) == "dmd2":  # there was one level, stored in the options
        state.setdefault("student_sigmas", [state["config"].get("conditioning_sigma", 80.0)])
    if "0.weight" in (head := state.get("guidance_cls_state_dict", {})):  # there was a single head, not a list
        state["guidance_cls_state_dict"] = {f"heads.0.{name}": tensor for name, tensor in head.items()}
    return state


def save_safetensors(path, state):
    """Writes the shareable part of a checkpoint's `state` to `path` as safetensors, a format that cannot hold code.

    The tensors are the weights (averaged if there are any). The metadata hold network, options and classes as JSON. `load` reads
    the file. Raises UserError as `write` does, and if the package safetensors is not installed.
    """
    facts = {"kind": kind(state), **{name: state[name] for name in SHARED if name in state}}
    tensors = {name: tensor.contiguous() for name, tensor in weights(state).items()}
    content = safetensors(path).torch.save(tensors, {"format": "pt", "minimal_dmd2": json.dumps(facts)})
    write(path, lambda file: file.write(content))


def load_safetensors(path, device="cpu"):
    """The state that `save_safetensors` wrote, with its weights on `device`."""
    tensors, metadata = read_safetensors(path, device)
    if "minimal_dmd2" not in metadata:
        raise UserError(f"checkpoint {path}: not written by export.py; import other networks with import_teacher.py")
    state = json.loads(metadata["minimal_dmd2"])
    state["feedforward_model_state_dict" if state["kind"] == "dmd2" else "model_state_dict"] = tensors
    return state


def read_safetensors(path, device="cpu"):
    """Returns (tensors by name, metadata), two dicts, from a safetensors file. Raises ValueError if it is damaged."""
    package = safetensors(path)
    try:
        with package.safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
    except package.SafetensorError:
        raise ValueError("damaged, or not safetensors") from None


def is_safetensors(path):
    """Whether the file at `path` starts like a safetensors file: a length in eight bytes, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def safetensors(path):
    """The package safetensors. Raises UserError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(f"{path}: needs a package that is not installed: pip install safetensors") from None
    return safetensors


def kind(state):
    """`teacher` or `dmd2`, depending on the script that wrote the checkpoint."""
    return "dmd2" if "feedforward_model_state_dict" in state else "teacher"


def weights(state):
    """The `state_dict` of a checkpoint's network: averaged weights if there are any."""
    return state.get("ema_state_dict") or state["feedforward_model_state_dict" if kind(state) == "dmd2" else "model_state_dict"]


def network(state, path, device="cpu"):
    """The network of a `state` loaded from `path`, on `device`: averaged weights if there are any, in eval mode, frozen."""
    try:
        config = dict(state["model_config"])
        net = NETWORKS[config.pop("network", "SimpleUNet")](**config)
        net.load_state_dict(weights(state))
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path}: does not hold a {' or '.join(NETWORKS)} ({str(error).splitlines()[0]})") from None
    # Tensor cores are faster with channels last. A CPU runs SongUNet no faster with it, and rounds its output far more coarsely.
    tensor_cores = torch.device(device).type == "cuda"
    layout = memory_layout(device) if tensor_cores or isinstance(net, SimpleUNet) else torch.contiguous_format
    return net.to(device, memory_format=layout).eval().requires_grad_(False)


def load_network(path, device="cpu"):
    """The network of a teacher's or generator's checkpoint (averaged weights if there are any), in eval mode.

    Raises UserError as `load` does.
    """
    return network(load(path, device), path, device)


def load_teacher(path):
    """The state of the teacher at `path`, the value of `--teacher_checkpoint`. Raises UserError if it is not a teacher."""
    if not os.path.exists(path):
        raise UserError(
            f"--teacher_checkpoint {path}: there is no such file; train_teacher.py trains a teacher, import_teacher.py imports a "
            "pretrained one"
        )
    state = load(path)
    if kind(state) != "teacher":
        raise UserError(f"--teacher_checkpoint {path}: a generator; give a teacher's checkpoint")
    return state


def sampler(state, steps=18):
    """Returns (the sampler `f(net, noise, labels)` for a loaded checkpoint, its network evaluations per image).

    A generator is called once at each noise level that it was trained at. A teacher is sampled with `steps` Heun steps.
    """
    if kind(state) == "dmd2":
        return partial(student_sampler, sigmas=state["student_sigmas"]), len(state["student_sigmas"])
    return partial(heun_sampler, num_steps=steps), 2 * steps - 1


def load_sampler(path, device="cpu", steps=18):
    """A function from standard normal noise `[B, C, H, W]` and labels `[B]` to images, from the checkpoint at `path`.

    The images may slightly exceed [-1, 1]; `support.images.to_uint8` and `images.clamp(-1, 1)` clamp them.
    Raises UserError as `load` does.
    """
    state = load(path, device)
    return partial(sampler(state, steps)[0], network(state, path, device))


def numbered(folder, kind):
    """The step checkpoints of `kind` (teacher or dmd2) in `folder`: a dict from step to file, in order."""
    matches = [(re.fullmatch(rf"{kind}_checkpoint_step_(\d+)\.pt", file.name), file) for file in Path(folder).glob("*.pt")]
    return dict(sorted((int(match[1]), file) for match, file in matches if match))


def by_step(folder, kind):
    """All checkpoints of `kind` in `folder` as pairs (step, file), in order; a damaged final one counts as the last."""
    found = list(numbered(folder, kind).items())
    final = Path(folder) / f"{kind}_final.pt"
    if final.exists():
        try:
            found.append((load(final)["step"], final))
        except UserError:
            found.append((math.inf, final))
    return sorted(found)


def versions():
    """The versions of Python and torch, and the commit of this repository if git knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "commit": commit or "unknown"}
