"""Finds the tensors of a network in another project's file, and matches them to ours. No code in the file is run."""

import argparse
import pickle
import zipfile
from collections import namedtuple

import torch

from importers.safe_pickle import Reader
from support.script import UserError

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
        raise UserError("it needs a package that is not installed: pip install safetensors") from None
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
            raise UserError(f"its contents are compressed ({stored} bytes in {size}), as torch.save never writes them")
    file.seek(0)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # options beside the weights
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its message advises to run the file
        raise UserError(f"damaged, or of more than tensors and plain data; nothing in it was run. {ADVICE}") from None


def find_network(content, sign):
    """(the tensors by name of the network in the dict `content`, notes). `sign` is the name of one of them.

    They may lie in dicts within it, under prefixes such as `module.`, `_orig_mod.` or `ema_model.`. Averaged weights
    are preferred. Raises UserError if `content` has no network, or several and does not say which.
    """
    tensors = dict(named_tensors(content, "", seen=set()))
    found = [name.removesuffix(sign) for name in tensors if f".{name}".endswith(f".{sign}")]
    chosen = [prefix for prefix in found if "ema" in prefix] if len(found) > 1 else found
    if not found:
        raise UserError(f"no tensor {sign} in it, but {listed(content)}. {ADVICE}; of diffusers give the folder")
    if len(chosen) != 1:
        raise UserError(f"{len(found)} networks, under {listed(found)}. {ADVICE}")
    prefix, others = chosen[0], [prefix for prefix in found if prefix not in chosen]
    notes = [f"the network under `{prefix:.80}` was taken, not {listed(others)}"] * bool(others)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}, notes


def named_tensors(part, where, seen):
    """Pairs (name, tensor) of a dict and of the dicts in it, each once: a hostile dict may hold itself."""
    seen.add(id(part))
    for name, value in part.items():
        if isinstance(value, torch.Tensor):
            yield f"{where}{name!s:.200}", value
        elif isinstance(value, dict) and id(value) not in seen and len(where) < 200:
            yield from named_tensors(value, f"{where}{name!s:.40}.", seen)


def listed(names, most=6):
    names = [f"{name!s:.40}" for name in names]
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "nothing"


def match(tensors, net, their_name):
    """The float32 `state_dict` of `net`, from the dict `tensors` by name, each used once.

    their_name: a function from the name of a tensor in `net` to its name in `tensors`.
    Raises UserError if one is missing or left over, has another shape, or does not hold finite numbers.
    """
    names, state = {name: their_name(name) for name in net.state_dict()}, {}
    if left_over := tensors.keys() - set(names.values()):
        found = f"tensor {min(left_over)!r:.60} does not belong to"
        raise UserError(f"{found} {net.config['network']} ({len(left_over)} such, of {len(tensors)})")
    for name, expected in net.state_dict().items():
        if names[name] not in tensors:
            raise UserError(f"no tensor {names[name]}")
        tensor = tensors[names[name]]
        if tensor.shape != expected.shape:
            raise UserError(f"tensor {names[name]} has shape {list(tensor.shape)}, not {list(expected.shape)}")
        state[name] = tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not tensor.is_floating_point() or not state[name].isfinite().all():
            raise UserError(f"tensor {names[name]} ({tensor.dtype}) does not hold finite floating-point numbers")
    return state
