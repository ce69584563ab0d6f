"""Reads a pickle without running any of it: the objects and calls that it asks for are recorded as data, never made.

Python's unpickler imports and calls what a pickle names, and allocates as much memory as it asks for. The one that is
written in Python is a table of small functions, one per opcode. This reader keeps those that only build plain data,
replaces those that import or hash, and has none of the others.
"""

import pickle
import sys

DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
SET = "builtins.set"
# The opcodes that only build plain data, and those that call what `find_class` returns: a `Record`.
KEPT = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST EMPTY_DICT
    APPEND APPENDS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BININT BININT1 BININT2
    LONG1 LONG4 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8"""


class Refused(ValueError):
    """The pickle is not of the harmless kind that `Reader` accepts."""


class Record:
    """A record of a class or function that the pickle names: `made_by`; or of the object that calling it with `args`
    would make, and of the `state` that it would get."""

    def __init__(self, made_by, args=None):
        self.made_by, self.args, self.state = made_by, args, None

    def __call__(self, *args):
        return {} if self.made_by in DICTS else args[0] if self.made_by == SET else Record(self.made_by, args)

    def extend(self, items):
        """Items of lists and dicts of other classes are not kept."""

    append = update = extend


class Reader(pickle._Unpickler):
    """`Reader(file).load()` is what the pickle at this place in the binary `file` describes.

    That are dicts, lists, tuples, text, numbers, bytes, and a `Record` for each other object; sets come as lists.
    Raises Refused for a damaged pickle, and for one that names more of Python's standard library than dicts and sets.
    """

    def load(self):
        try:
            return super().load()
        except Refused:
            raise
        except Exception:  # in damaged bytes any opcode may meet anything
            raise Refused("damaged, or not a pickle of tensors and plain data") from None

    def find_class(self, module, name):
        name = f"{module}.{name}"
        if name.partition(".")[0] in sys.stdlib_module_names and name not in {*DICTS, SET}:
            raise Refused(f"it asks for {name!r:.60}; nothing in it was run")
        return Record(name)

    def build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, dict):
            target.state = state

    def set_items(self, items=None):
        items = self.pop_mark() if items is None else items
        if not all(isinstance(key, (str, int, float)) for key in items[::2]):  # to hash a deep tuple crashes Python
            raise Refused("it has a dict whose keys are neither text nor numbers")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def set_item(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])


opcodes = pickle._Unpickler.dispatch
Reader.dispatch = {getattr(pickle, name)[0]: opcodes[getattr(pickle, name)[0]] for name in KEPT.split()} | {
    pickle.NEWOBJ[0]: opcodes[pickle.REDUCE[0]],
    pickle.BUILD[0]: Reader.build,
    pickle.SETITEM[0]: Reader.set_item,
    pickle.SETITEMS[0]: Reader.set_items,
    pickle.EMPTY_SET[0]: opcodes[pickle.EMPTY_LIST[0]],
    pickle.ADDITEMS[0]: opcodes[pickle.APPENDS[0]],
    pickle.FROZENSET[0]: opcodes[pickle.LIST[0]],
}
