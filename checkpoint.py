"""Checkpoints: written whole or not at all, read without running code."""

import math
import os
import pickle
import platform
import re
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from config import UserError
from edm_model import SongUNet
from model import SimpleUNet
from sampling import heun_sampler, one_step_sampler

# `model_config` names the class under `network`; SimpleUNet's has no such key.
NETWORKS = {"SimpleUNet": SimpleUNet, "SongUNet": SongUNet}


def save(path, state):
    """Writes `state` (tensors and plain containers) to `path`: a temporary file beside it, flushed to disk, then renamed.

    Raises UserError where that fails (full disk, no permission); what was at `path` is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
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
    """The state that `save` wrote. Raises UserError where the file is missing, damaged, or no checkpoint of this project."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not read them
            intact = archive.testzip() is None
        state = torch.load(path, map_location=device, weights_only=True) if intact else None
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror or error}") from None
    except (RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError):
        intact = False
    if not intact:
        raise UserError(f"checkpoint {path}: damaged, or not written by train_teacher.py or train_dmd2.py")
    complete = isinstance(state, dict) and {"step", "model_config", "config"} <= state.keys()
    if not complete or not isinstance(state["model_config"], dict):
        raise UserError(f"checkpoint {path}: not written by train_teacher.py or train_dmd2.py")
    if "network" not in state["model_config"]:
        state["model_config"].setdefault("channels_per_group", 4)  # SimpleUNet's, until it was recorded
    return state


def kind(state):
    """`teacher` or `dmd2`, by which script wrote the checkpoint."""
    return "dmd2" if "feedforward_model_state_dict" in state else "teacher"


def network(state, path, device="cpu"):
    """The network of the state loaded from `path` on `device`: averaged weights where there are any, in eval mode, frozen."""
    raw = "feedforward_model_state_dict" if kind(state) == "dmd2" else "model_state_dict"
    try:
        config = dict(state["model_config"])
        net = NETWORKS[config.pop("network", "SimpleUNet")](**config)
        net.load_state_dict(state.get("ema_state_dict") or state[raw])
        if "conditioning_sigma" in state["config"]:  # a generator's; `one_step_sampler` looks for it there
            net.conditioning_sigma = state["config"]["conditioning_sigma"]
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"checkpoint {path}: does not hold a {' or '.join(NETWORKS)} ({str(error).splitlines()[0]})") from None
    # Tensor cores want the channels last; a CPU gains nothing by that in SongUNet, whose output it then rounds far more coarsely.
    tensor_cores = torch.device(device).type == "cuda"
    layout = torch.channels_last if tensor_cores or isinstance(net, SimpleUNet) else torch.contiguous_format
    return net.to(device, memory_format=layout).eval().requires_grad_(False)


def load_network(path, device="cpu"):
    """The network of a teacher's or generator's checkpoint (averaged weights where there are any), in eval mode.

    A teacher goes to `sampling.heun_sampler`, a generator to `sampling.one_step_sampler`, which calls it at the noise level that it
    was trained at. Raises UserError as `load` does.
    """
    return network(load(path, device), path, device)


def sampler(state, steps):
    """The sampler `f(net, noise, labels)` that suits a loaded checkpoint, and its network evaluations an image.

    One step for a generator; `steps` steps of Heun's method for a teacher.
    """
    if kind(state) == "dmd2":
        return one_step_sampler, 1
    return partial(heun_sampler, num_steps=steps), 2 * steps - 1


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


def resume(path, folder, kind):
    """What `--resume_from_checkpoint path` means: (file, state). `latest` is the newest of `kind` in `folder` that is whole.

    Raises UserError where there is none.
    """
    if path != "latest":
        return path, load(path)
    for _, file in reversed(by_step(folder, kind)):
        try:
            return file, load(file)
        except UserError as error:
            print(f"{error}; going on from the one before", file=sys.stderr)
    raise UserError(f"--resume_from_checkpoint latest: no checkpoints in {folder}")


def prune(folder, kind, keep_last, keep_every):
    """Deletes the step checkpoints in `folder` but the `keep_last` newest and, where given, each `keep_every`-th step."""
    files = numbered(folder, kind)
    for step in list(files)[:-keep_last]:
        if not keep_every or step % keep_every:
            files[step].unlink()


def versions():
    """Python, torch, and the commit of this repository, where git knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "commit": commit or "unknown"}


def random_state(device):
    """The state of torch's random generators, for `set_random_state`."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state, device):
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
