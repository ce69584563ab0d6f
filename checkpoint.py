"""Checkpoints: written whole or not at all, read without running code."""

import os
import pickle
import re
from functools import partial
from pathlib import Path

import torch

from config import UserError
from model import SimpleUNet
from sampling import heun_sampler, one_step_sampler


def save(path, state):
    """Writes `state` (tensors and plain containers) to `path`: a temporary file beside it, flushed to disk, then renamed."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name, too, survives a power cut
    os.close(folder)


def load(path, device="cpu"):
    """The state that `save` wrote. Raises UserError where the file is missing, damaged, or no checkpoint of this project."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path}: {error.strerror or error}") from None
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        raise UserError(f"checkpoint {path}: damaged, or no checkpoint written by train_teacher.py or train_dmd2.py") from None
    if not isinstance(state, dict) or not {"step", "model_config", "config"} <= state.keys():
        raise UserError(f"checkpoint {path}: not written by train_teacher.py or train_dmd2.py")
    return state


def kind(state):
    """`teacher` or `dmd2`, by which script wrote the checkpoint."""
    return "dmd2" if "feedforward_model_state_dict" in state else "teacher"


def network(state):
    """The network of a loaded checkpoint, averaged weights where there are any, in eval mode, without gradients."""
    net = SimpleUNet(**state["model_config"])
    raw = "feedforward_model_state_dict" if kind(state) == "dmd2" else "model_state_dict"
    net.load_state_dict(state.get("ema_state_dict") or state[raw])
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def load_network(path, device="cpu"):
    """The network of a teacher's or generator's checkpoint (averaged weights where there are any), in eval mode.

    A teacher goes to `sampling.heun_sampler`, a generator to `sampling.one_step_sampler`. Raises UserError as `load` does.
    """
    return network(load(path, device)).to(device)


def sampler(state, steps):
    """The sampler `f(net, noise, labels)` that suits a loaded checkpoint, and its network evaluations an image.

    One step for a generator, at the noise level it was trained at; `steps` steps of Heun's method for a teacher.
    """
    if kind(state) == "dmd2":
        return partial(one_step_sampler, conditioning_sigma=state["config"]["conditioning_sigma"]), 1
    return partial(heun_sampler, num_steps=steps), 2 * steps - 1


def by_step(folder):
    """The checkpoints in `folder`, of a teacher or a generator, as a dict from step to file, in order."""
    found = {}
    for file in Path(folder).glob("*.pt"):
        match = re.fullmatch(r"(teacher|dmd2)_(final|checkpoint_step_(\d+))\.pt", file.name)
        if match:
            found[int(match[3]) if match[3] else load(file)["step"]] = file
    return dict(sorted(found.items()))


def resolve(path, folder):
    """The checkpoint that `--resume_from_checkpoint path` means: `latest` is the one in `folder` with the most steps."""
    if path != "latest":
        return Path(path)
    found = by_step(folder)
    if not found:
        raise UserError(f"--resume_from_checkpoint latest: no checkpoints in {folder}")
    return list(found.values())[-1]


def random_state(device):
    """The state of torch's random generators, for `set_random_state`."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state, device):
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
