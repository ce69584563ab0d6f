"""Finds the tensors of a network in another project's file, and matches them to ours. No code in the file is run."""

import io
import os
import zipfile
from collections import namedtuple
from functools import cache

import torch

from importers.safe_pickle import ADVICE, Reader, Record
from support.script import UserError

# net: the network, without weights; state: its float32 `state_dict`; left_out: what in the file was not used;
# notes: what was chosen, for the user to check; licence, data: as the file names them, or None
Imported = namedtuple("Imported", "net state left_out notes licence data", defaults=[None])

DTYPES = dict(Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64)
DTYPES |= dict(Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool)
DTYPES = {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}
MAGIC = 0x1950A86A20F9469CFC6C  # the first of the pickles in torch's former file format
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema")
PARTS = (*AVERAGED, "state_dict", "model_state_dict", "model", "net", "network", "unet", "params")


def is_safetensors(path):
    """Whether the file at `path` starts like a safetensors file: a length in eight bytes, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path):
    """(tensors by name, metadata), two dicts. Raises ValueError if damaged, UserError without the package."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path}: needs a package that is not installed: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError:
        raise ValueError(f"{os.path.basename(path)} is damaged, or not safetensors") from None


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


def is_tensor(value):
    return isinstance(value, Record) and value.made_by in (TENSOR, PARAMETER)


def may_hold_network(part):
    inside = part.values() if isinstance(part, dict) else []
    return any(isinstance(value, (dict, Record)) for value in inside) or (
        isinstance(part, Record) and not is_tensor(part)
    )


def find_network(content):
    """(the records of tensors by name, or the `Record` of a network; notes on which part of `content` was taken).

    Averaged weights are preferred. Raises ValueError if `content` does not say where the network is.
    """
    notes = []
    for _ in range(4):  # a hostile dict may hold itself
        entries = content if isinstance(content, dict) else {}
        parts = [name for name, part in entries.items() if may_hold_network(part)]
        known = [name for name in PARTS if name in parts]
        if not known and len(parts) != 1:
            break
        part = (known or parts)[0]
        notes.append(f"a dict with {listed(entries)}: its `{part!s:.40}` was taken")
        content = entries[part]
    if isinstance(content, dict) and any(map(is_tensor, content.values())):
        return {str(name): value for name, value in content.items() if is_tensor(value)}, notes
    if isinstance(content, Record):
        return content, notes
    found = f"a dict with {listed(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
    raise ValueError(f"no network in it, but {found}. {ADVICE}")


def listed(names, most=6):
    return ", ".join([*[f"{name!s:.40}" for name in list(names)[:most]], *["..."] * (len(names) > most)]) or "nothing"


def under_one_prefix(tensors, sign):
    """(`tensors` without the prefix that `sign`, the name of one of them, has; notes on what was left out).

    Prefixes are what wrappers add: `module.`, `_orig_mod.`, `ema_model.`. Averaged weights are preferred.
    Raises ValueError if no tensor, or more than one, has this name.
    """
    prefixes = [name.removesuffix(sign) for name in tensors if f".{name}".endswith(f".{sign}")]
    chosen = [prefix for prefix in prefixes if "ema" in prefix] if len(prefixes) > 1 else prefixes
    if not prefixes:
        if any(name.endswith("time_embedding.linear_1.bias") for name in tensors):
            raise ValueError("only weights of diffusers; give their folder, where config.json describes the network")
        raise ValueError(f"no tensor {sign}; it has {listed(tensors)}")
    if len(chosen) != 1:
        raise ValueError(f"{len(prefixes)} networks, under {listed(prefixes)}. {ADVICE}")
    inside = {name.removeprefix(chosen[0]): value for name, value in tensors.items() if name.startswith(chosen[0])}
    others = [name for name in tensors if not name.startswith(chosen[0])]
    return inside, [f"of its tensors those under `{chosen[0]:.40}` were taken, not {listed(others, 3)}"] * bool(others)


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
    """(the float32 `state_dict` of `net`, the tensors left over) from the dict `tensors` by name.

    their_name: a function from the name of a tensor in `net` to its name in `tensors`. All shapes are compared before a
    tensor is copied. Raises ValueError if one is missing, has another shape, holds integers, or is not finite.
    """
    names = {name: their_name(name) for name in net.state_dict()}
    for name, expected in net.state_dict().items():
        if names[name] not in tensors:
            raise ValueError(f"no tensor {names[name]}")
        tensor = tensors[names[name]]
        if tensor.shape != expected.shape:
            raise ValueError(f"tensor {names[name]} has shape {list(tensor.shape)}, not {list(expected.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"tensor {names[name]} holds {tensor.dtype}, not floating-point numbers")
    state = {}
    for name, theirs in names.items():
        state[name] = tensors[theirs].to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not state[name].isfinite().all():
            raise ValueError(f"tensor {theirs} is not finite")
    used = set(names.values())
    return state, {name: tensor for name, tensor in tensors.items() if name not in used}
