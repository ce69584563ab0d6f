"""Estimate the memory and time of a training, on any machine: its networks run once, with shapes in place of numbers.

Usage: python -m extras.estimate teacher [options of train_teacher.py], or dmd2 [options of train_dmd2.py]
"""

import sys

import torch

import checkpoint
import train_dmd2
import train_teacher
from data import LARGE, load_dataset
from evaluation.costs import iteration_flops, optimizer_costs, teacher_costs, turn_costs
from support.options import Option, parse_args, positive
from support.script import UserError, run_script

SHARE_OF_PEAK = 0.4  # of a GPU's peak FLOP/s that training reaches; assumed, not measured
HEADROOM = 0.15  # of a GPU's memory, for what is not counted: driver, cuDNN workspaces, gaps between tensors; assumed
GIB = 2**30
# Images and channels of data sets that need not be there; each has ten classes.
DATA_SETS = {"cifar10": (50_000, 3), "mnist": (60_000, 1), "fashion_mnist": (60_000, 1), "mnist5k": (5000, 1)}
DATA_SETS["none"] = (0, 0)
ESTIMATE = [
    Option("peak_tflops", None, positive, "the device's peak TFLOP/s in the run's precision; gives the time"),
    Option("memory_gb", None, positive, "the device's memory in GiB; gives the least grad_accum that fits"),
]


def main(argv=None):
    kind, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if kind not in ("teacher", "dmd2"):
        raise UserError(f"give teacher or dmd2 first, then --help, or its training script's options, not {kind!r}")
    script, estimate = (train_teacher, of_teacher) if kind == "teacher" else (train_dmd2, of_dmd2)
    args = parse_args(script.OPTIONS | {"estimate": ESTIMATE}, __doc__, options)
    if args.batch_size % args.grad_accum:
        raise UserError(f"--batch_size {args.batch_size} must be divisible by --grad_accum {args.grad_accum}")
    fixed, activations, flops = estimate(args)

    print(f"batch {args.batch_size} in {args.grad_accum} parts, {args.precision}; GiB at the peak, counted:")
    rows = fixed | {"activations": activations(args.batch_size // args.grad_accum)}
    for name, size in (rows | {"together": sum(rows.values())}).items():
        print(f"  {name:20}{size / GIB:10.4g}")
    print(f"{flops / 1e12:.4g} TFLOP per iteration, {args.step_number} iterations")
    if args.peak_tflops:
        seconds = flops / (SHARE_OF_PEAK * args.peak_tflops * 1e12)
        print(f"{seconds:.3g} s per iteration, {seconds * args.step_number / 3600:.3g} hours in total")
        print(f"(at {SHARE_OF_PEAK:.0%} of {args.peak_tflops:g} TFLOP/s, a share that is assumed, not measured)")
    if args.memory_gb:
        limit = (1 - HEADROOM) * args.memory_gb * GIB - sum(fixed.values())
        parts = (parts for parts in range(1, args.batch_size + 1) if args.batch_size % parts == 0)
        least = next((number for number in parts if activations(args.batch_size // number) <= limit), None)
        answer = {1: "it fits", None: "too little even for one image"}.get(least, f"use --grad_accum {least}")
        print(f"--memory_gb {args.memory_gb:g}: {answer}; {HEADROOM:.0%} is reserved for what is not counted")


def of_teacher(args):
    """For train_teacher.py: (bytes in use throughout, by part; function from images at once to more bytes; FLOPs)."""
    data, channels, classes = data_set(args, args.img_resolution, args.img_channels)
    with torch.device("meta"):
        net = train_teacher.build_network(args, channels, classes if args.label_dim is None else args.label_dim)
    net = net.to(memory_format=torch.channels_last)
    flops, moments = optimizer_costs(args.optimizer, net)
    flops += teacher_costs(net, 1)[0] * args.batch_size
    weights = nbytes(net)
    fixed = {"weights": weights, "averaged weights": weights, "moments": moments, "gradients": weights, "data": data}
    return fixed, lambda images: teacher_costs(net, images, args.precision == "bf16")[1], flops


def of_dmd2(args):
    """The same for train_dmd2.py. The name of a network stands for a teacher of that kind, with default arguments."""
    if (path := args.teacher_checkpoint) in checkpoint.NETWORKS and path != "DiffusersUNet":  # which has no defaults
        with torch.device("meta"):
            teacher = checkpoint.network_class(path)().to(memory_format=torch.channels_last)
    else:
        teacher = checkpoint.network(checkpoint.load_teacher(path), path, "meta")
    model = train_dmd2.build_model(args, teacher, "meta")
    heads = nbytes(model.guidance_model.cls_pred_branch) if args.gan_classifier else 0
    generator, trained = model.feedforward_model, [model.feedforward_model, model.fake_unets]
    fixed = {
        "weights": nbytes(model),
        "averaged weights": nbytes(generator) * sum(map(bool, args.ema_decay)),
        "moments": sum(optimizer_costs(args.optimizer, net)[1] for net in trained) + 2 * heads,
        "gradients": max(nbytes(generator), nbytes(teacher) + heads),  # of the networks that are trained in a turn
        "data": data_set(args, teacher.config["img_resolution"], teacher.config["img_channels"])[0],
    }
    flops, bf16 = iteration_flops(args, model) * args.batch_size, args.precision == "bf16"
    return fixed, lambda images: max(peak for _, peak in turn_costs(model, images, bf16=bf16)), flops


def data_set(args, side, channels):
    """(bytes of the data set and of a batch on the device, channels, classes). Only a data set of one's own is read."""
    if args.dataset == "folder":
        images, _, names = load_dataset("folder", args.data_dir, side, channels)
        (number, channels), classes = images.shape[:2], len(names)
    else:
        number, own_channels = DATA_SETS[args.dataset]
        channels, classes = channels or own_channels, 10
    size = channels * side**2
    batch = 3 * 4 * size * args.batch_size  # images and noise, and of a student generated images
    return batch + (number * size if number * size <= LARGE else 0), channels, classes


def nbytes(module):
    return sum(parameter.nbytes for parameter in module.parameters())


if __name__ == "__main__":
    run_script(main)
