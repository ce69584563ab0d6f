"""Convert a pretrained network of EDM (Karras et al. 2022) or diffusers to a teacher checkpoint, without running its code."""

from support.config import IMPORT_TEACHER, UserError, exit_on_error, parse_args

args = (
    exit_on_error(parse_args, IMPORT_TEACHER, __doc__) if __name__ == "__main__" else None
)  # before torch: --help answers at once

import os
from pathlib import Path

import checkpoint
from importers.diffusers import load_diffusers
from importers.edm import load_edm

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def main(args):
    """Writes a teacher checkpoint with the options `args` from `parse_args(IMPORT_TEACHER, ...)`."""
    source = Path(args.source)
    if os.path.exists(args.output):
        raise UserError(f"--output {args.output} exists; give another name, or delete it first")
    net, state, left_out, licence = (load_diffusers if os.path.isdir(source) else load_edm)(source)
    label_dim, resolution = net.config["label_dim"], net.config["img_resolution"]
    # EDM's only networks with ten classes are for CIFAR-10.
    like_edms = label_dim == len(CIFAR10) and net.config["img_channels"] == 3 and os.path.isfile(source)
    of_cifar10 = like_edms or (label_dim in (0, len(CIFAR10)) and "cifar10" in source.resolve().name)
    teacher = {
        "ema_state_dict": state,
        "step": 0,
        "images_seen": 0,
        "model_config": net.config,
        "config": {
            "dataset": "cifar10" if of_cifar10 else "folder",
            "data_dir": "./data",
            "source": args.source,
            "licence": licence,
        },
        "class_names": CIFAR10 if label_dim and of_cifar10 else [str(label) for label in range(label_dim)],
        "versions": checkpoint.versions(),
    }
    checkpoint.save(args.output, teacher)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    classes = f"{label_dim} classes" if label_dim else "without classes"
    found = f"{type(net).__name__}, {size:.1f} M parameters, {resolution}x{resolution}, {classes}"
    print(f"found {found}, licence: {licence or 'not stated'}")
    print(f"{len(state)} tensors imported; left out: {', '.join(left_out) or 'none'}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    exit_on_error(main, args)
