"""docs/options.md, made from the tables of `support/config.py`:  python -m support.options_page > docs/options.md"""

from support.config import MACHINE, SAMPLING, SCRIPTS, TRAINING, flag

HEAD = """# Options

Every option of every script, with its default and what it means. `SCRIPT --help` prints the same.

`--config FILE` reads options from YAML: the keys are the flags' names without dashes, and `wandb: {project: ...}` stands for
`wandb_project: ...`. A flag beats the file, and the file beats the default. A misspelt name is an error. On/off flags have a
negative: `--no-hflip`. Without `--config`, `benchmark.py` reads `configs/mnist0.yaml`.

This page is written by `python -m support.options_page > docs/options.md`; a test compares the two.
"""
SHARED = {"Training": TRAINING, "Sampling": SAMPLING, "Machine": MACHINE}


def page():
    """The page's text: the options that several scripts share, then those of each script."""
    parts = [HEAD]
    for script, options in SCRIPTS.items():
        also = {name: common for name, common in SHARED.items() if all(option in options for option in common)}
        note = f"And those under {', '.join(f'[{name}](#{name.lower()})' for name in also)}.\n\n" if also else ""
        own = [option for option in options if not any(option in common for common in also.values())]
        parts.append(f"## {script}\n\n{note}{table(own)}")
    parts += [f"## {name}\n\n{table(options)}" for name, options in SHARED.items()]
    return "\n".join(parts)


def table(options):
    rows = [f"| `--{option.name}` | {default(option)} | {option.help} |\n" for option in options]
    return "| option | default | meaning |\n|---|---|---|\n" + "".join(rows)


def default(option):
    if option.parse is flag and option.default is not None:
        return "on" if option.default else "off"
    if option.default is None:
        return ""
    values = option.default if isinstance(option.default, list) else [option.default]
    return f"`{' '.join(map(str, values))}`"


if __name__ == "__main__":
    print(page(), end="")
