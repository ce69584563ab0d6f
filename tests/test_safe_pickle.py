import io
import os
import pickle
import sys
import types

import pytest
import torch
from edm_files import assert_import_refused, edm_tensors, precond, write_pickle

from importers.safe_pickle import Reader


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_bytes(command, zipped=True):
    """What torch.save writes of an object that runs `command` where it is loaded without `weights_only`."""
    buffer = io.BytesIO()
    torch.save(Call(os.system, command), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def hostile_storage(command):
    """A whole network, one of whose parameters has hostile bytes where a tensor's numbers belong."""
    storage = Call(torch.storage._load_from_bytes, hostile_bytes(command, zipped=False))
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, {})
    return {"ema": precond(edm_tensors() | {"w": tensor})}


def opcodes(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


def called(command):
    return pickle.dumps((command,))[2:-1]


DAMAGED, REFUSED = "damaged, or not a network that is known here", "system'; nothing in it was run"
NOT_RUN = "of more than tensors and plain data; nothing in it was run. Save the network's tensors alone"
DOUBLING = [b"}(X\1\0\0\0ah%cX\1\0\0\0bh%cuq%c" % (n, n, n + 1) for n in range(100)]  # a dict that holds the last twice


def wide(shared, levels=4):
    """A pickle of some kilobytes with 500 ways from each dict to the next: 500^4 paths in all."""
    for _ in range(levels):
        shared = dict.fromkeys(range(500), shared)
    return shared


HOSTILE = {  # command -> pickle, or object to pickle; part of the one-line message
    "call": (lambda command: Call(os.system, command), REFUSED),
    "eval": (lambda command: Call(eval, f"__import__('os').system({command!r})"), "it asks for 'builtins.eval'"),
    "beside a network": (lambda command: {"ema": precond({}), "x": [{"y": Call(os.system, command)}]}, REFUSED),
    "function of torch": (lambda command: Call(torch.load, hostile_bytes(command)), "but torch.serialization.load. S"),
    "torch's file": (hostile_bytes, NOT_RUN),
    "tensor's bytes": (hostile_storage, NOT_RUN),
    "state": (lambda command: opcodes(b"cfunctools\npartial\n)\x81(cos\nsystem\n", called(command), b"tb"), "partial'"),
    "class as a call": (lambda command: opcodes(b"cos\nsystem\n", called(command), b"\x81"), "it asks for 'os.system'"),
    "state of a name": (lambda command: opcodes(b"cdnnlib.util\nEasyDict\n}b"), "but dnnlib.util.EasyDict. S"),
    "call of a record": (lambda command: opcodes(b"cany\nThing\n)\x81)R"), "but any.Thing. S"),
    "huge memo": (lambda command: opcodes(b"Nr\xff\xff\xff\xff"), "but NoneType. S"),
    "huge bytes": (lambda command: opcodes(b"\x8e" + (1 << 40).to_bytes(8, "little")), DAMAGED),
    "huge bytearray": (lambda command: opcodes(b"\x96" + (1 << 33).to_bytes(8, "little")), DAMAGED),
    "call of bytearray": (lambda command: Call(bytearray, 1 << 33), "it asks for 'builtins.bytearray'"),
    "a dict in itself": (lambda command: opcodes(b"}\x94\x8c\3emah\x00s"), "no tensor map_layer0.weight in it, but e"),
    "a tree of dicts": (lambda command: opcodes(b"}q\0", *DOUBLING), "no tensor map_layer0.weight in it, but a, b"),
    "shared dicts": (lambda command: wide({}), "no tensor map_layer0.weight in it, but 0, 1"),
    "deep key": (lambda command: opcodes(b"})" + b"\x85" * 100_000 + b"Ns"), "keys are neither text nor numbers"),
    "endless name": (lambda command: opcodes(b"]\x94h\x00h\x00\x86\x94h\x01h\x01\x93"), DAMAGED),
    "registry": (lambda command: opcodes(b"\x82\x01"), DAMAGED),
    "text": (lambda command: b"no pickle", DAMAGED),
    "cut": (lambda command: pickle.dumps(["a" * 99])[:50], DAMAGED),
    "empty": (lambda command: b"", DAMAGED),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, what):
    build, message = HOSTILE[what]
    content = build(f"touch {tmp_path / 'it-ran'}")
    if isinstance(content, dict):
        write_pickle(tmp_path / "a.pkl", content)
    else:
        (tmp_path / "a.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    assert_import_refused(tmp_path / "a.pkl", tmp_path, message)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("what", ["call", "eval"])
def test_hostile_pickles_are_hostile(tmp_path, what):
    """Python's own unpickler runs them, so the test above tests real attacks."""
    pickle.loads(pickle.dumps(HOSTILE[what][0](f"touch {tmp_path / 'it-ran'}")))
    assert (tmp_path / "it-ran").exists()


def test_reader_gives_plain_data_and_records():
    """An instance of an unknown class, referred to twice, is one record with its state; sets are lists."""

    class Unknown:
        pass

    unknown = Unknown()
    unknown.x = [1, 2.5, None, True, b"b", ("t",), {"a"}, -(2**70)]
    Unknown.__module__, Unknown.__qualname__ = "elsewhere", "Unknown"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "elsewhere", types.SimpleNamespace(Unknown=Unknown))
        data = {protocol: pickle.dumps({"one": unknown, "two": unknown}, protocol) for protocol in (4, 5)}
    for protocol in data:
        content = Reader(io.BytesIO(data[protocol])).load()
        assert content["one"] is content["two"] and content["one"].made_by == "elsewhere.Unknown"
        assert content["one"].state == {"x": [1, 2.5, None, True, b"b", ("t",), ["a"], -(2**70)]}
