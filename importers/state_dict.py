"""Finds the tensors of a network in another project's file, and matches them to ours. No code in the file is run."""

import argparse
import pickle
import zipfile
from collections import namedtuple

import torch

from importers.safe_pickle import Reader

# net: the network, without weights; state: its float32 `state_dict`; left_out: what in the file was not used;
# notes: what was chosen, for the user to check; licence, data: as the file names them, or None
Imported = namedtuple("Imported", "net state left_out notes licence data", defaults=[None])

ADVICE = "Save the network's tensors alone: torch.save(net.state_dict(), 'weights.pth')"
MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in torch's former file format


def read_safetensors(path):
    """The tensors by name."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("it needs a package that is not installed: pip install safetensors") from None
    return load_file(path)


def read_file(path):
    """The content of what torch.save wrote, or that of another pickle, as plain data and `Record`s."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            file.seek(0)
            content = Reader(file).load()
            if content != MAGIC:
                return content
        return load_torch(file)


def load_torch(file):
    """Plain data with tensors, or the storage of one, as torch.save wrote them in its present or former format."""
    file.seek(0)
    if file.read(2) == b"PK":  # a ZIP, the present format
        stored, size = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist()), file.seek(0, 2)
        if stored > size:
            raise ValueError(f"its contents are compressed ({stored} bytes in {size}), as torch.save never writes them")
    file.seek(0)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # options beside the weights
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its message advises to run the file
        raise ValueError(f"damaged, or of more than tensors and plain data; nothing in it was run. {ADVICE}") from None


def find_network(content, sign):
    """(the tensors by name of the network in the dict `content`, notes). `sign` is the name of one of them.

    They may lie in dicts within it, under prefixes such as `module.`, `_orig_mod.` or `ema_model.`. Averaged weights
    are preferred. Raises ValueError if `content` has no network, or several and does not say which.
    """
    parts = {"": content}
    for _ in range(3):  # deep enough for {"ema": {"state_dict": ...}}; a hostile dict may hold itself
        inner = [(f"{where}{name!s:.40}.", part) for where, whole in parts.items() for name, part in whole.items()]
        parts |= {where: part for where, part in inner if isinstance(part, dict)}
    found = {}
    for where, part in parts.items():
        for name, value in part.items():
            if isinstance(value, torch.Tensor) and f".{name}".endswith(f".{sign}"):
                prefix = name.removesuffix(sign)
                found[where + prefix] = prefix, part
    chosen = [where for where in found if "ema" in where] if len(found) > 1 else list(found)
    if not found:
        raise ValueError(f"no tensor {sign} in it, but {listed(content)}. {ADVICE}; of diffusers give the folder")
    if len(chosen) != 1:
        raise ValueError(f"{len(found)} networks, under {listed(found)}. {ADVICE}")
    prefix, part = found.pop(chosen[0])
    notes = [f"the network under `{chosen[0]:.80}` was taken, not {listed(found)}"] * bool(found)
    inside = {str(name): value for name, value in part.items() if isinstance(value, torch.Tensor)}
    return {name.removeprefix(prefix): value for name, value in inside.items() if name.startswith(prefix)}, notes


def listed(names, most=6):
    names = [f"{name!s:.40}" for name in names]
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "nothing"


def match(tensors, net, their_name):
    """The float32 `state_dict` of `net`, from the dict `tensors` by name, each used once.

    their_name: a function from the name of a tensor in `net` to its name in `tensors`.
    Raises ValueError if one is missing or left over, has another shape, or does not hold finite numbers.
    """
    names, state = {name: their_name(name) for name in net.state_dict()}, {}
    if left_over := tensors.keys() - set(names.values()):
        found = f"tensor {min(left_over)!r:.60} does not belong to"
        raise ValueError(f"{found} {net.config['network']} ({len(left_over)} such, of {len(tensors)})")
    for name, expected in net.state_dict().items():
        if names[name] not in tensors:
            raise ValueError(f"no tensor {names[name]}")
        tensor = tensors[names[name]]
        if tensor.shape != expected.shape:
            raise ValueError(f"tensor {names[name]} has shape {list(tensor.shape)}, not {list(expected.shape)}")
        state[name] = tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not tensor.is_floating_point() or not state[name].isfinite().all():
            raise ValueError(f"tensor {names[name]} ({tensor.dtype}) does not hold finite floating-point numbers")
    return state
