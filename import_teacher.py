"""Convert a network of EDM (Karras et al. 2022) or diffusers to a teacher checkpoint, without running its code."""

import os
import re
from pathlib import Path

import checkpoint
from importers.diffusers import load_diffusers
from importers.edm import load_edm
from support.options import Option, parse_args, path, text
from support.script import UserError, run_script

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
OPTIONS = {
    "teacher": [
        Option("source", "./edm-cifar10-32x32-cond-vp.pkl", path, "NVIDIA's pickle, a state_dict or diffusers' folder"),
        Option("output", "./log/checkpoints/teacher/edm_cifar10_cond_vp.pt", path, "file to write; must not exist"),
        Option("class_names", None, text, "names of its classes; default: CIFAR-10's, or numbers", "+"),
    ]
}


def load(source):
    """The network at `source` as `importers.state_dict.Imported`. Raises UserError for any file that holds none."""
    try:
        return load_diffusers(source) if os.path.isdir(source) else load_edm(source)
    except UserError as error:
        reason = error
    except OSError as error:
        reason = f"{os.path.basename(error.filename or source)}: {error.strerror or error}"
    except Exception as error:  # a damaged or hostile file can make torch and diffusers raise anything
        reason = f"damaged, or not a network that is known here ({type(error).__name__}: {error!s:.120})"
    raise UserError(f"--source {source}: {reason}")


def of_cifar10(imported, source):
    """Whether the network is CIFAR-10's: by its shape, and by the name of its file or of NVIDIA's training data."""
    config, names = imported.net.config, [source.resolve().name, imported.data]
    shape = config["img_resolution"], config["img_channels"], config["label_dim"] in (0, 10)
    named = any(isinstance(name, str) and re.search(r"cifar-?10(?!\d)", name.lower()) for name in names)
    return shape == (32, 3, True) and named


def main(argv=None):
    args = parse_args(OPTIONS, __doc__, argv)
    if os.path.exists(args.output):
        raise UserError(f"--output {args.output} exists; give another name, or delete it first")
    names = args.class_names
    imported = load(args.source)
    net, label_dim, resolution = imported.net, imported.net.label_dim, imported.net.config["img_resolution"]
    if names and not len(names) == len(set(names)) == label_dim:
        found = f"--class_names has {len(set(names))} different names"
        raise UserError(f"{found}; the network has {label_dim or 'no'} classes")
    cifar10 = of_cifar10(imported, Path(args.source))
    default_names = CIFAR10 if cifar10 and label_dim else [str(label) for label in range(label_dim)]
    trained_on = {"dataset": "cifar10" if cifar10 else "folder", "data_dir": "./data"}
    teacher = {
        "ema_state_dict": imported.state,
        "step": 0,
        "images_seen": 0,
        "model_config": net.config,
        "config": trained_on | {"source": args.source, "licence": imported.licence},
        "class_names": names or default_names,
        "versions": checkpoint.versions(),
    }
    checkpoint.save(args.output, teacher)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    found = f"{type(net).__name__}, {size:.1f} M parameters, {resolution}x{resolution}, {label_dim or 'no'} classes"
    print(f"found {found}, licence: {imported.licence or 'not stated'}", *imported.notes, sep="\n")
    print(f"{len(imported.state)} tensors imported; left out: {', '.join(imported.left_out) or 'none'}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
