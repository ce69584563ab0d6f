"""Reads a pickle without running any of it: the objects and calls that it asks for are recorded as data, never made.

Python's unpickler imports and calls what a pickle names, and allocates as much memory as it asks for. The one that is
written in Python is a table of small functions, one per opcode. This reader keeps those that only build plain data,
replaces those that import or hash, and has none of the others.
"""

import pickle
import sys

from support.script import UserError

DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
# The opcodes that only build plain data, and those that call what `find_class` returns: a `Record`.
KEPT = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS
    SETITEM SETITEMS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BININT BININT1 BININT2
    LONG1 LONG4 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8"""


class Dict(dict):
    """Its keys are text or numbers: to hash a deep tuple crashes Python."""

    def __setitem__(self, key, value):
        if not isinstance(key, (str, int, float)):
            raise UserError("it has a dict whose keys are neither text nor numbers")
        super().__setitem__(key, value)


class Record:
    """A record of a class or function that the pickle names: `made_by`; or of the object that calling it with `args`
    would make, and of the `state` that it would get."""

    def __init__(self, made_by, args=None):
        self.made_by, self.args, self.state = made_by, args, None

    def __call__(self, *args):
        return Dict() if self.made_by in DICTS else Record(self.made_by, args)


class Reader(pickle._Unpickler):
    """`Reader(file).load()` is what the pickle at this place in the binary `file` describes.

    That are dicts, lists, tuples, text, numbers, bytes, and a `Record` for each other object; sets (of protocol 4) come
    as lists. Raises UserError if it names more of Python's standard library, any exception for a damaged pickle.
    """

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name.partition(".")[0] in sys.stdlib_module_names and name not in DICTS:
            raise UserError(f"it asks for {name!r:.60}; nothing in it was run")
        return Record(name)

    def build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, dict):
            target.state = state


opcodes = pickle._Unpickler.dispatch
Reader.dispatch = {getattr(pickle, name)[0]: opcodes[getattr(pickle, name)[0]] for name in KEPT.split()} | {
    pickle.EMPTY_DICT[0]: lambda reader: reader.append(Dict()),
    pickle.NEWOBJ[0]: opcodes[pickle.REDUCE[0]],
    pickle.BUILD[0]: Reader.build,
    pickle.EMPTY_SET[0]: opcodes[pickle.EMPTY_LIST[0]],
    pickle.ADDITEMS[0]: opcodes[pickle.APPENDS[0]],
}
