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
SHARED = ("step", "images_seen", "model_config", "config", "class_names", "student_sigmas", "versions")  # beside the weights


def save(path, state):
    """Writes `state` (tensors and plain containers) to `path` as torch.save does. Raises UserError as `write` does."""
    write(path, partial(torch.save, state))


def write(path, writer):
    """Has `writer` write to `path`, which it gets as a file: a temporary one beside it, flushed to disk, then renamed.

    Raises UserError where that fails (full disk, no permission); what was at `path` is then as it was.
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
        os.fsync(folder)  # the new name, too, survives a power cut
        os.close(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps what the file object raised
        if not isinstance(cause, OSError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = getattr(cause, "strerror", None) or "the file could not be written; is the disk full?"
        raise UserError(f"checkpoint {path}: {reason}; checkpoints before it are whole") from None


def load(path, device="cpu"):
    """The state that `save` wrote, or what `save_safetensors` kept of it.

    Raises UserError where the file is missing, damaged, or no checkpoint of this project.
    """
    try:
        if is_safetensors(path):
            state, intact = load_safetensors(path, device), True
        else:
            with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not read them
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
    # What earlier checkpoints lack, as it then was.
    if "guidance_cls_state_dict" in state:
        state.setdefault("gan_channels_per_group", 16 if {"network", "channels_per_group"} & state["model_config"].keys() else 4)
    if "network" not in state["model_config"]:
        state["model_config"].setdefault("channels_per_group", 4)  # SimpleUNet's
    if kind(state) == "dmd2":  # one level, which stood in the options
        state.setdefault("student_sigmas", [state["config"].get("conditioning_sigma", 80.0)])
    if "0.weight" in (head := state.get("guidance_cls_state_dict", {})):  # a single head, and not in a list
        state["guidance_cls_state_dict"] = {f"heads.0.{name}": tensor for name, tensor in head.items()}
    return state


def save_safetensors(path, state):
    """Writes what others need of a checkpoint's `state` to `path`, in the format safetensors, which can hold no code: the weights
    (averaged where there are any), and in the metadata, as JSON, network, options and classes. `load` reads it.

    Raises UserError as `write` does, and where the package safetensors is not installed.
    """
    facts = {"kind": kind(state), **{name: state[name] for name in SHARED if name in state}}
    tensors = {name: tensor.contiguous() for name, tensor in weights(state).items()}
    content = safetensors(path).torch.save(tensors, {"format": "pt", "minimal_dmd2": json.dumps(facts)})
    write(path, lambda file: file.write(content))


def load_safetensors(path, device="cpu"):
    """The state that `save_safetensors` kept, its weights on `device`."""
    tensors, metadata = read_safetensors(path, device)
    if "minimal_dmd2" not in metadata:
        raise UserError(f"checkpoint {path}: not written by export.py; other networks come in by import_teacher.py")
    state = json.loads(metadata["minimal_dmd2"])
    state["feedforward_model_state_dict" if state["kind"] == "dmd2" else "model_state_dict"] = tensors
    return state


def read_safetensors(path, device="cpu"):
    """(the tensors by name, the metadata, both in dicts) of a safetensors file. Raises ValueError where it is damaged."""
    package = safetensors(path)
    try:
        with package.safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
    except package.SafetensorError:
        raise ValueError("damaged, or not safetensors") from None


def is_safetensors(path):
    """Whether the file at `path` begins as the format does: eight bytes that tell a length, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def safetensors(path):
    """The package of that name. Raises UserError where it is missing."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(f"{path}: needs a package that is not installed: pip install safetensors") from None
    return safetensors


def kind(state):
    """`teacher` or `dmd2`, by which script wrote the checkpoint."""
    return "dmd2" if "feedforward_model_state_dict" in state else "teacher"


def weights(state):
    """The `state_dict` of a checkpoint's network: averaged weights where there are any."""
    return state.get("ema_state_dict") or state["feedforward_model_state_dict" if kind(state) == "dmd2" else "model_state_dict"]


def network(state, path, device="cpu"):
    """The network of the state loaded from `path` on `device`: averaged weights where there are any, in eval mode, frozen."""
    try:
        config = dict(state["model_config"])
        net = NETWORKS[config.pop("network", "SimpleUNet")](**config)
        net.load_state_dict(weights(state))
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"checkpoint {path}: does not hold a {' or '.join(NETWORKS)} ({str(error).splitlines()[0]})") from None
    # Tensor cores want the channels last; a CPU gains nothing by that in SongUNet, whose output it then rounds far more coarsely.
    tensor_cores = torch.device(device).type == "cuda"
    layout = memory_layout(device) if tensor_cores or isinstance(net, SimpleUNet) else torch.contiguous_format
    return net.to(device, memory_format=layout).eval().requires_grad_(False)


def load_network(path, device="cpu"):
    """The network of a teacher's or generator's checkpoint (averaged weights where there are any), in eval mode.

    Raises UserError as `load` does.
    """
    return network(load(path, device), path, device)


def load_teacher(path):
    """The state of the teacher at `path`, the value of `--teacher_checkpoint`. Raises UserError where it is none."""
    if not Path(path).exists():
        raise UserError(
            f"--teacher_checkpoint {path}: there is no such file; train_teacher.py trains a teacher, import_teacher.py takes a "
            "pretrained one"
        )
    state = load(path)
    if kind(state) != "teacher":
        raise UserError(f"--teacher_checkpoint {path}: a generator; it takes what train_teacher.py writes")
    return state


def sampler(state, steps=18):
    """The sampler `f(net, noise, labels)` that suits a loaded checkpoint, and its network evaluations per image.

    A generator is called once at each of the noise levels that it was trained at; a teacher by `steps` steps of Heun's method.
    """
    if kind(state) == "dmd2":
        return partial(student_sampler, sigmas=state["student_sigmas"]), len(state["student_sigmas"])
    return partial(heun_sampler, num_steps=steps), 2 * steps - 1


def load_sampler(path, device="cpu", steps=18):
    """A function of standard normal noise `[B, C, H, W]` and labels `[B]` to images, by the checkpoint at `path`.

    The images may leave [-1, 1] a little: `support.images.to_uint8` clamps, and so does `images.clamp(-1, 1)`.
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
    """Python, torch, and the commit of this repository, where git knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "commit": commit or "unknown"}
