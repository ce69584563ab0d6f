"""Reads a pickle without running any of it: the objects and calls that it asks for are recorded as data, never made.

Python's own unpickler imports and calls what a pickle names. Even with a restricted `find_class`, it allocates as much memory as
the pickle asks for. This reader interprets the opcodes that `pickletools` decodes, and cannot import or call anything.
"""

import pickletools
import sys

DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
SETS = {"builtins.set", "__builtin__.set"}
# The calls in a harmless file with tensors, numpy scalars and NVIDIA's persistent classes.
CALLS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage._load_from_bytes",
    "torch_utils.persistence._reconstruct_persistent_obj",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
}
TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}


class Refused(ValueError):
    """The pickle is not of the harmless kind that `read` accepts."""


class Name:
    """A class or function that the pickle names; not imported."""

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name


class Record:
    """A record of the object that calling `made_by` with `args` would make, and of the `state` that it would get."""

    __slots__ = ("args", "made_by", "state")

    def __init__(self, made_by, args):
        self.made_by, self.args, self.state = made_by, args, None


def read(data):
    """What the pickle `data` (bytes) describes: dicts, lists, tuples, text, numbers, bytes and `Record`s; sets come as lists.

    Instances of any class become `Record`s. Raises Refused, with the reason, for a damaged pickle, and for one that names
    something of Python's standard library or calls a function that is not in the lists above.
    """
    try:
        return run(data)
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, AttributeError, TypeError, OverflowError, MemoryError):
        raise Refused("damaged, or not a pickle") from None


def run(data):
    stack, marks, memo = [], [], {}

    def since_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "FROZENSET":
                stack.append(since_mark())
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS" | "ADDITEMS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key], [value])
            case "SETITEMS":
                items = since_mark()
                set_items(stack[-1], items[::2], items[1::2])
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(named(arg.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not isinstance(name, str) or not isinstance(module, str):  # the text of nested lists may be endless
                    raise Refused("it names something by more than text")
                stack.append(named(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                args, maker = stack.pop(), stack.pop()
                stack.append(record(maker.name, args, called=opcode.name == "REDUCE"))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case name if name in TEXT | BYTES | NUMBERS:
                stack.append(arg)
            case name:
                raise Refused(f"it has the opcode {name}, which files of this kind do not use")


def set_items(target, keys, values):
    if not all(isinstance(key, (str, int, float)) for key in keys):  # hashing a tuple nested a million deep crashes Python
        raise Refused("it has a dict whose keys are neither text nor numbers")
    target.update(zip(keys, values, strict=True))


def named(name):
    if name.partition(".")[0] in sys.stdlib_module_names and name not in DICTS | SETS:
        raise Refused(f"it asks for {name!r:.60}; nothing in it was run")
    return Name(name)


def record(name, args, called):
    if name in DICTS and not args:
        return {}
    if name in SETS:
        return args[0]
    if called and name not in CALLS:
        raise Refused(f"it asks to call {name!r:.60}; nothing in it was run")
    return Record(name, args)
