"""Make a teacher checkpoint of one of NVIDIA's pretrained EDM networks (Karras et al. 2022), without running code from its file."""

from support.config import IMPORT_TEACHER, UserError, exit_on_error, parse_args

args = (
    exit_on_error(parse_args, IMPORT_TEACHER, __doc__) if __name__ == "__main__" else None
)  # before torch: --help answers at once

from pathlib import Path

import checkpoint
from importers.edm import load_edm

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def main(args):
    """Writes a teacher by the options `args`, as `parse_args(IMPORT_TEACHER, ...)` gives them."""
    if Path(args.output).exists():
        raise UserError(f"--output {args.output}: exists; give another name, or delete it first")
    net, state, left_out = load_edm(args.source)
    label_dim, resolution = net.config["label_dim"], net.config["img_resolution"]
    of_cifar10 = label_dim == len(CIFAR10)
    teacher = {
        "ema_state_dict": state,
        "step": 0,
        "images_seen": 0,
        "model_config": net.config,
        "config": {"dataset": "cifar10" if of_cifar10 else "folder", "data_dir": "./data", "source": args.source},
        "class_names": CIFAR10 if of_cifar10 else [str(label) for label in range(label_dim)],
        "versions": checkpoint.versions(),
    }
    checkpoint.save(args.output, teacher)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{type(net).__name__}, {resolution}x{resolution}, {label_dim} classes, {size:.1f} M parameters")
    print(f"{len(state)} tensors taken; left out: {', '.join(left_out) or 'none'}")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    exit_on_error(main, args)
