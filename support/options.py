"""Options: the tables of a script, read from the command line and a YAML file. A mistake is a `UserError`.

The command line overrides the YAML file, which overrides the default.
"""

import argparse
import difflib
import math
import os
from collections import namedtuple

import yaml

from support.script import UserError, as_user_error

# parse: text -> value, raising UserError; `nargs` as in argparse for options that take several values.
Option = namedtuple("Option", "name default parse help nargs", defaults=[None])


# ---- kinds of values ------------------------------------------------------------------------------------------------


def number(low=-math.inf, high=math.inf, *, whole=False, above=None):
    """A parser of finite numbers in [low, high], greater than `above` where that is given; `whole` for integers."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"needs a number, not {text!r}") from None
        if whole and not value.is_integer():  # 1e5 is a whole number too
            raise UserError(f"needs a whole number, not {text}")
        if not math.isfinite(value) or not low <= value <= high or (above is not None and value <= above):
            lower = f"above {above}" if above is not None else f"at least {low}" if low > -math.inf else ""
            upper = f"at most {high}" if high < math.inf else ""
            raise UserError(f"must be {' and '.join(filter(None, [lower, upper])) or 'finite'}, not {text}")
        return int(value) if whole else value

    return parse


def choice(*allowed):
    def parse(text):
        if text not in allowed:
            raise UserError(f"must be one of {', '.join(allowed)}, not {text!r}{did_you_mean(text, allowed)}")
        return text

    parse.metavar = "{" + ",".join(allowed) + "}"
    return parse


def text(value):
    if not value:
        raise UserError("must not be empty")
    return value


def path(value):
    """`~` and variables such as `$SCRATCH` are expanded, in YAML files too."""
    return os.path.expanduser(os.path.expandvars(text(value)))


def flag(value):
    return choice("true", "false")(value.lower()) == "true"


count, positive = number(1, whole=True), number(above=0)
noise_level = number(above=0, high=1e6)  # sigma = 1e6 is flow matching's t = 0.999999, beyond which float32 has little
share = number(0, 1)


# ---- reading --------------------------------------------------------------------------------------------------------


def did_you_mean(word, known):
    close = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def parse_args(tables, description, argv=None):
    """The options of `tables`, a dict from a heading of `--help` to a list of `Option`s, as a namespace.

    The namespace also has `given`, the names of the options in the command line or the YAML file. Raises UserError for
    the first wrong value, key or flag.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=description, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it")
    options = {}
    for heading, table in tables.items():
        group = parser.add_argument_group(heading)
        for option in table:
            options[option.name] = option
            help = option.help.replace("%", "%%") + ("" if option.default is None else f" [{option.default}]")
            if option.parse is flag:
                group.add_argument(f"--{option.name}", action=argparse.BooleanOptionalAction, help=help)
            else:
                kind = option.parse.__name__.upper() if option.parse in (text, path) else "X"
                metavar = getattr(option.parse, "metavar", kind)
                group.add_argument(f"--{option.name}", nargs=option.nargs, metavar=metavar, help=help)
    with as_user_error("the options", argparse.ArgumentError):
        given, unknown = parser.parse_known_args(argv)
    given = {name: value for name, value in vars(given).items() if value is not None}
    if unknown:
        word = unknown[0].split("=")[0]
        hint = f" (did you mean --config {word}?)" if word.endswith((".yaml", ".yml")) else ""
        raise UserError(f"unknown argument {word}{hint or did_you_mean(word, [f'--{name}' for name in options])}")

    file = given.pop("config", None)
    raw = (read_yaml(file) if file else {}) | given
    values = argparse.Namespace(given={*raw}, **{name: option.default for name, option in options.items()})
    for name, value in raw.items():
        if name not in options:
            raise UserError(f"{file}: unknown key {name}{did_you_mean(name, options)}")
        setattr(values, name, convert(options[name], value, f"--{name}" if name in given else f"{file}: {name}"))
    return values


def convert(option, raw, source):
    """The value of `option` from `raw`, the text or YAML value given for it."""
    if raw is None and option.default is None:
        return None
    if option.nargs and isinstance(raw, (str, int, float)):
        raw = [raw]
    unfit = raw is None or isinstance(raw, dict) or isinstance(raw, list) != (option.nargs is not None)
    if unfit or (option.nargs == "+" and not raw):
        raise UserError(f"{source} needs {'a list' if option.nargs else 'a single value'}, not {raw}")
    try:
        return [option.parse(str(item)) for item in raw] if option.nargs else option.parse(str(raw))
    except UserError as error:
        raise UserError(f"{source} {error}") from None


def read_yaml(file):
    """The options in a YAML file; keys of its `wandb` block get the prefix of their flags. None is given twice."""
    content, pairs = {}, []
    not_read, not_yaml = as_user_error(f"--config {file}", OSError), as_user_error(f"{file}: not YAML", Exception)
    with not_read, open(file, encoding="utf-8") as stream, not_yaml:
        loader = yaml.SafeLoader(stream)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{file}: needs lines of the form `key: value`")
        for key, node in root.value:
            if key.value == "wandb" and isinstance(node, yaml.MappingNode):
                pairs += [("wandb" if k.value == "enabled" else f"wandb_{k.value}", v) for k, v in node.value]
            else:
                pairs.append((key.value, node))
        for name, node in pairs:
            if name in content:
                raise UserError(f"{file}, line {node.start_mark.line + 1}: key {name} is given twice")
            content[name] = loader.construct_object(node, deep=True)
    return content


def public(args):
    """The options that may be stored, as a dict: all but the API key."""
    return {name: value for name, value in vars(args).items() if name not in ("wandb_key", "given")}
