"""Finds the tensors of a network in another project's file, and matches them to ours. No code in the file is run."""

import io
import os
import zipfile
from collections import namedtuple
from functools import cache

import torch

from importers.safe_pickle import Reader

# net: the network, without weights; state: its float32 `state_dict`; left_out: what in the file was not used;
# notes: what was chosen, for the user to check; licence, data: as the file names them, or None
Imported = namedtuple("Imported", "net state left_out notes licence data", defaults=[None])

DTYPES = dict(Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64)
DTYPES |= dict(Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool)
DTYPES = {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}
ADVICE = "Save the network's tensors alone: torch.save(net.state_dict(), 'weights.pth')"
MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in torch's former file format
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"


def read_safetensors(path):
    """(tensors by name, metadata), two dicts."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise ValueError("it needs a package that is not installed: pip install safetensors") from None
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_file(path):
    """(content, storage) of what torch.save wrote, in today's format (a ZIP) or the former one, or of another pickle.

    content: plain data and `Record`s; storage: a function from the key of a tensor's storage to its bytes.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            file.seek(0)
            return read_pickles(file)
    archive = zipfile.ZipFile(path)
    total, size = sum(entry.file_size for entry in archive.infolist()), os.path.getsize(path)
    if total > size:
        raise ValueError(f"its contents are compressed ({total} bytes in {size}), as torch.save never writes them")
    pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
    folder = pickled.removesuffix("data.pkl")
    content = Reader(io.BytesIO(archive.read(pickled))).load()
    return content, cache(lambda key: bytearray(archive.read(f"{folder}data/{key}")))


def read_pickles(file):
    content = Reader(file).load()
    if content != MAGIC:
        return content, None
    Reader(file).load(), Reader(file).load()  # the format's version, facts about the machine
    reader = Reader(file)
    content, storages = reader.load(), {}
    Reader(file).load()  # the keys of the storages, whose bytes follow in this order
    for key, kind in sorted(reader.storages.items()):
        count = int.from_bytes(file.read(8), "little")
        storages[key] = bytearray(file.read(count * DTYPES[kind].itemsize))
    return content, storages.__getitem__


def find_network(content, sign):
    """(the tensors by name of the network in the dict `content`, notes). `sign` is the name of one of them.

    They may lie in dicts within it, under prefixes such as `module.`, `_orig_mod.` or `ema_model.`. Averaged weights
    are preferred. Raises ValueError if `content` has no network, or several and does not say which.
    """
    found, places, seen = {}, [("", content)], set()
    for where, part in places:  # which grows on the way
        for name, value in part.items():
            if isinstance(value, dict) and id(value) not in seen and len(where) < 200:  # a hostile dict may hold itself
                seen.add(id(value))
                places.append((f"{where}{name!s:.40}.", value))
            elif is_tensor(value) and len(str(name)) < 200 and f".{name}".endswith(f".{sign}"):
                prefix = name.removesuffix(sign)
                found[where + prefix] = prefix, part
    chosen = [where for where in found if "ema" in where] if len(found) > 1 else list(found)
    if not found:
        raise ValueError(f"no tensor {sign} in it, but {listed(content)}. {ADVICE}; of diffusers give the folder")
    if len(chosen) != 1:
        raise ValueError(f"{len(found)} networks, under {listed(found)}. {ADVICE}")
    prefix, part = found.pop(chosen[0])
    inside = [name for name, value in part.items() if is_tensor(value) and str(name).startswith(prefix)]
    notes = [f"the network under `{chosen[0]:.80}` was taken, not {listed(found)}"] * bool(found)
    return {str(name).removeprefix(prefix): part[name] for name in inside}, notes


def is_tensor(value):
    return isinstance(value, torch.Tensor) or getattr(value, "made_by", None) in (TENSOR, PARAMETER)


def listed(names, most=6):
    names = [f"{name!s:.40}" for name in names]
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "nothing"


def make_tensors(records, storage, size):
    """The tensors that `records` describe, by name, as views of the bytes in the file.

    Raises ValueError if together they are larger than `size`, the bytes in the file: they repeat what is stored once.
    """
    tensors, opened = {}, {}
    for name, record in records.items():
        if record.made_by == PARAMETER:
            record = record.args[0]
        stored, offset, shape, stride = record.args[:4]
        source = storage
        if stored.made_by == "torch.storage._load_from_bytes":  # in a pickle a storage is a file of torch.save itself
            data = stored.args[0]
            if id(data) not in opened:
                opened[id(data)] = read_pickles(io.BytesIO(data))
            stored, source = opened[id(data)]
        flat = torch.frombuffer(source(stored.args), dtype=DTYPES[stored.made_by])
        tensors[name] = flat.as_strided(shape, stride, offset)
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > size:
        raise ValueError(f"its tensors take {total} bytes, but the file has {size}: they are expanded. {ADVICE}")
    return tensors


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
