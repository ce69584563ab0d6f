"""Options of the scripts, one table per script. The command line overrides the YAML file, which overrides the default.

Every mistake becomes a `UserError`: one line on standard error and exit status 2. This module does not import torch, so that
`--help` and a wrong option answer at once.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
import time
import traceback
from collections import namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from support.terminal import outlive_readers

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # this is one of the processes that torchrun started


class UserError(ValueError):
    """A user's mistake, reported in one line: what is wrong, where, and what would be right."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))  # names in a damaged file may contain line breaks


# parse: text -> value, raising UserError; `nargs` as in argparse for options that take several values.
Option = namedtuple("Option", "name default parse help nargs", defaults=[None])


# ---- kinds of values ----------------------------------------------------------------------------------------------------


def number(low=-math.inf, high=math.inf, *, whole=False, above=None):
    """A parser of finite numbers in [low, high], greater than `above` where that is given; `whole` for integers."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"needs a number, not {text!r}") from None
        if whole and value.is_integer():  # 1e5 is a whole number too
            value = int(text) if text.lstrip("+-").isdigit() else int(value)
        elif whole:
            raise UserError(f"needs a whole number, not {text}")
        if not math.isfinite(value) or not low <= value <= high or (above is not None and value <= above):
            lower = f"above {above}" if above is not None else f"at least {low}" if low > -math.inf else ""
            upper = f"at most {high}" if high < math.inf else ""
            bounds = " and ".join(filter(None, [lower, upper])) or "finite"
            raise UserError(f"must be {bounds}, not {text}")
        return value

    return parse


def choice(*allowed):
    def parse(text):
        if text not in allowed:
            raise UserError(f"must be one of {', '.join(allowed)}, not {text!r}{did_you_mean(text, allowed)}")
        return text

    return parse


def text(value):
    if not value:
        raise UserError("must not be empty")
    return value


def flag(value):
    if value.lower() not in ("true", "false"):
        raise UserError(f"must be true or false, not {value!r}")
    return value.lower() == "true"


def device_name(value):
    if value not in ("auto", "cpu", "cuda", "mps") and not re.fullmatch(r"cuda:\d{1,2}", value):
        raise UserError(f"must be auto, cpu, cuda, cuda:N or mps, not {value!r}")
    return value


count, positive = number(1, whole=True), number(above=0)
share, nonnegative = number(0, 1), number(0)


# ---- the tables ---------------------------------------------------------------------------------------------------------

F_DIVERGENCES = ("rkl", "kl", "js", "softened_rkl", "hellinger", "jeffreys", "neyman")
FEATURES = ("inception", "classifier", "pixels")
DATASETS = ("cifar10", "mnist", "fashion_mnist", "mnist5k", "folder")

MACHINE = [
    Option("seed", 0, number(0, 2**31 - 1, whole=True), "seed of everything random"),
    Option("device", "auto", device_name, "auto (CUDA if there is one), cpu, cuda, cuda:N or mps (Apple's GPUs; untested)"),
    Option("precision", "tf32", choice("fp32", "tf32", "bf16"), "of the networks; tf32 is fp32 except on CUDA; bf16 is autocast"),
    Option("compile", False, flag, "compile the networks with torch.compile: slower to start, then faster"),
]
DATA = [
    Option("dataset", "cifar10", choice(*DATASETS), f"one of {', '.join(DATASETS)}"),
    Option("data_dir", "./data", text, "folder where data sets are, or are downloaded to; for `folder`: the folder or ZIP itself"),
]
TRAINING = [
    Option("batch_size", 128, count, "images per step, over all processes"),
    Option("grad_accum", 1, count, "number of parts into which a batch is split, if it does not fit into memory at once"),
    Option("step_number", 100_000, count, "training steps in total"),
    Option("optimizer", "adamw", choice("adamw", "muon"), "muon: Muon for the weights inside the blocks, AdamW for the rest"),
    Option("lr_warmup_steps", 500, number(0, whole=True), "steps over which the learning rate rises to its full value"),
    Option("lr_decay", 0.0, share, "share of the steps, at the end of training, over which the learning rate falls to zero"),
    Option("clip_grad_norm", 10.0, positive, "largest norm of a gradient; larger ones are scaled down to it"),
    Option("save_every", 5000, count, "steps between checkpoints"),
    Option(
        "resume_from_checkpoint",
        None,
        text,
        "checkpoint to resume from, or `latest`, the newest in output_dir. Options that are not given are those of its run, and "
        "output_dir is its folder; device, compile and max_minutes are never taken from it",
    ),
    Option("keep_last", 3, count, "number of newest step checkpoints to keep; the final one is always kept"),
    Option("keep_every", None, count, "also keep each checkpoint whose step is a multiple of this"),
    Option("overwrite", False, flag, "start a new run in an output_dir that holds another: its checkpoints are deleted"),
    Option("max_minutes", None, positive, "stop after this time, with a checkpoint to resume from"),
    Option("max_bad_steps", 10, count, "stop after this many steps in a row whose gradients are not finite (they are skipped)"),
    Option("log_every", 50, count, "steps between lines of metrics.jsonl"),
    Option("sample_every", 1000, count, "steps between sample grids in output_dir/samples"),
    Option("wandb", False, flag, "log to Weights & Biases"),
    Option("wandb_project", "minimal-dmd", text, "W&B project"),
    Option("wandb_run_name", None, text, "W&B run name"),
    Option("wandb_mode", "online", choice("online", "offline", "disabled"), "W&B mode"),
    Option("wandb_dir", "./log/wandb", text, "folder of W&B's local files, including copies of checkpoints"),
    Option("wandb_key", None, text, "W&B API key; never stored (alternatives: `wandb login`, WANDB_API_KEY)"),
    Option("wandb_log_every", 50, count, "steps between scalars sent to W&B; if below log_every, it replaces log_every"),
    Option("wandb_log_images", False, flag, "send noised and denoised images from the losses"),
    Option("wandb_log_samples", False, flag, "send sample grids"),
    Option("wandb_sample_every", 1000, count, "steps between images and sample grids sent to W&B"),
    Option("wandb_log_checkpoints", False, flag, "send checkpoints as artifacts"),
]
DRY_RUN = [
    Option("dry_run", False, flag, "count the memory and time of the training, and stop: nothing is trained or written"),
    Option("peak_tflops", None, positive, "for --dry_run: the device's peak in TFLOP/s at the run's precision"),
    Option("memory_gb", None, positive, "for --dry_run: the device's memory (1 GB: 2^30 bytes), to suggest a --grad_accum"),
]
SAMPLING = [
    Option("steps", 18, count, "Heun steps for a teacher (2 * steps - 1 network evaluations)"),
    Option("batch_size", 250, count, "images generated at once, over all processes"),
]

TEACHER = [
    *DATA,
    Option("output_dir", "./log/checkpoints/teacher", text, "where checkpoints, metrics and samples go"),
    *TRAINING,
    Option("lr", 1e-4, positive, "learning rate"),
    Option("ema_decay", 0.9999, share, "decay of the averaged weights, which are sampled and distilled; reached gradually"),
    Option("hflip", None, flag, "flip half of the images left to right (default: for cifar10 and folder)"),
    Option("P_mean", -1.2, number(), "mean of ln(sigma) in training (EDM)"),
    Option("P_std", 1.2, positive, "standard deviation of ln(sigma) in training (EDM)"),
    Option("img_resolution", 32, number(8, 64, whole=True), "side to which the images are resized"),
    Option("img_channels", None, number(1, 3, whole=True), "1 (grey) or 3; default: the data set's own (folder: 3)"),
    Option("label_dim", None, number(0, whole=True), "number of classes, 0 to ignore labels; default: the data set's own"),
    Option("model_channels", 128, number(8, whole=True), "base width of the network, a multiple of 8"),
    Option("channel_mult", [1, 2, 2, 2], count, "width at each resolution, in units of model_channels", "+"),
    Option("num_blocks", 2, count, "residual blocks at each resolution"),
    Option("attn_resolutions", [16], count, "resolutions with self-attention", "*"),
    Option("dropout", 0.1, number(0, 0.99), "dropout probability"),
    Option("sigma_data", 0.5, positive, "standard deviation of the data (EDM)"),
    Option("channels_per_group", 16, count, "least width of the groups in the network's norms"),
    *MACHINE,
    *DRY_RUN,
]
DMD2 = [
    *DATA,
    Option("output_dir", "./log/checkpoints/dmd2", text, "where checkpoints, metrics and samples go"),
    Option("teacher_checkpoint", "./log/checkpoints/teacher/teacher_final.pt", text, "the teacher to distil"),
    *TRAINING,
    Option("generator_lr", 2e-6, positive, "learning rate of the generator"),
    Option("guidance_lr", 2e-6, positive, "learning rate of the guidance model"),
    Option("dfake_gen_update_ratio", 10, count, "iterations per generator update"),
    Option("guidance_updates", 1, count, "guidance updates per iteration, on the same images at fresh noise levels"),
    Option("alternate_turns", False, flag, "no guidance update in an iteration that updates the generator (FastGen)"),
    Option("clip_guidance", True, flag, "apply clip_grad_norm to the guidance model too"),
    Option("conditioning_sigma", 80.0, positive, "noise level at which the generator is called; with several steps, the first"),
    Option("student_steps", 1, count, "steps of the generator, at noise levels spaced evenly over the schedule"),
    Option("student_sigmas", None, positive, "noise levels of the generator's steps, descending; instead of student_steps", "+"),
    Option("num_train_timesteps", 1000, number(2, whole=True), "noise levels in the schedule"),
    Option("sigma_min", 0.002, positive, "lowest noise level of the schedule"),
    Option("sigma_max", 80.0, positive, "highest noise level of the schedule"),
    Option("rho", 7.0, number(0.1), "shape of the schedule (EDM eq. 5)"),
    Option("min_step_percent", 0.02, share, "the distribution-matching loss uses noise levels from this share of the schedule"),
    Option("max_step_percent", 0.98, share, "... up to this share"),
    Option("objective", "dmd", choice("dmd", "sid"), "the generator's objective: dmd, or score identity distillation (sid)"),
    Option("sid_alpha", 1.0, number(), "alpha of --objective sid; its papers use 1.0 and 1.2"),
    Option(
        "f_divergence",
        "rkl",
        choice(*F_DIVERGENCES),
        "divergence that dmd minimises; all but rkl need --gan_classifier, and many images in each part of a batch (grad_accum)",
    ),
    Option("fake_loss_weighting", "edm", choice("edm", "none"), "of fake_unet's loss by noise level; none: plain squared error"),
    Option("gan_classifier", False, flag, "add DMD2's GAN loss on real images"),
    Option("gan_features", "fake", choice("fake", "teacher"), "features for the GAN's heads: fake_unet's or the teacher's"),
    Option("gan_resolutions", None, count, "resolutions of these features, one head per resolution; default: the coarsest", "+"),
    Option("gan_lr", None, positive, "learning rate of the GAN's heads, which then have their own optimizer"),
    Option("gen_cls_loss_weight", 3e-3, nonnegative, "weight of the GAN loss in the generator's loss"),
    Option("cls_loss_weight", 1e-2, nonnegative, "weight of the GAN loss in the guidance model's loss"),
    Option("diffusion_gan", True, flag, "the GAN's heads see noised images, as in the paper"),
    Option("diffusion_gan_max_timestep", 1000, count, "... noised at this many of the schedule's lowest levels"),
    Option("ema_decay", 0.0, share, "decay of the generator's averaged weights, which are then sampled; 0: no average"),
    *MACHINE,
    *DRY_RUN,
]
GENERATE = [
    Option("checkpoint", "./log/checkpoints/dmd2/dmd2_final.pt", text, "generator or teacher"),
    Option("output_dir", "./generated", text, "where images go"),
    Option("num_samples", 16, count, "images per class; without classes, images in total"),
    Option("classes", None, text, 'names of classes, separated by commas, as in cat,"a, b",dog; default: all'),
    Option(
        "format",
        "grid",
        choice("grid", "png", "npz", "flat"),
        "grid: one per class and an overview; png: a folder per class, for --dataset folder; npz: arrays; "
        "flat: RGB in one folder, for FID tools",
    ),
    Option("overwrite", False, flag, "delete what an earlier run of the same format (png, flat, npz) wrote to output_dir"),
    *SAMPLING,
    *MACHINE,
]
BENCHMARK = [
    *[option for option in TEACHER if option not in DRY_RUN],
    Option("repeats", 7, count, "how many times each task is timed; medians are reported"),
    Option("output", "benchmark.json", text, "file to write the results to"),
    Option("peers", False, flag, "also time diffusers' UNet2DModel, at equal FLOPs (needs pip install diffusers)"),
]
EVALUATE = [
    Option("checkpoint", "./log/checkpoints/dmd2/dmd2_final.pt", text, "generator or teacher, or a folder of checkpoints"),
    Option("teacher_checkpoint", None, text, "teacher to compare with"),
    Option("output_dir", None, text, "where the results go; default: the checkpoint's folder"),
    Option("dataset", None, choice(*DATASETS), "data set of real images; default: that of the training"),
    Option("data_dir", None, text, "where it is; default: as in the training"),
    Option("num_samples", 50_000, number(4, whole=True), "images to generate, of random classes"),
    Option(
        "features",
        "inception",
        choice(*FEATURES),
        "of the Frechet distance: inception, which also gives the FID; classifier, trained on the data set's classes; or pixels",
    ),
    Option("inception_weights", None, text, "file of torch-fidelity's Inception weights; default: download"),
    Option("inception_score", False, flag, "report the Inception Score too"),
    Option("fid_reference", None, text, "file with the statistics (mu, sigma) of real images for the FID; default: the data set's"),
    Option("repeats", 1, count, "draws of num_samples images; EDM publishes the least FID of three"),
    Option("plot", False, flag, "only draw the run's curves from metrics.jsonl, as curves.png"),
    *SAMPLING,
    *MACHINE,
]
COMPARE = [
    Option("teacher_checkpoint", "./log/checkpoints/teacher/teacher_final.pt", text, "the teacher to distil"),
    Option("configs", ["config_train1.yaml"], text, "option files for train_dmd2.py, one per configuration", "+"),
    Option("seeds", [0, 1, 2], number(0, 2**31 - 1, whole=True), "seeds of each configuration's runs", "+"),
    Option("minutes", None, positive, "equal time: minutes of training per run, on a machine that does nothing else meanwhile"),
    Option("forward_passes", None, positive, "equal work: train each run for the FLOPs of this many forward passes of a batch"),
    Option("output_dir", "./log/compare", text, "where runs, tables and pictures go; finished parts are not repeated"),
    Option("num_samples", 2000, number(4, whole=True), "images per checkpoint that evaluate.py generates"),
    Option("features", "classifier", choice(*FEATURES), "of evaluate.py's Frechet distance"),
    *MACHINE[1:],
]
IMPORT_TEACHER = [
    Option(
        "source",
        "./edm-cifar10-32x32-cond-vp.pkl",
        text,
        "NVIDIA's pickle, a state_dict (.pth, .safetensors), or diffusers' folder",
    ),
    Option("output", "./log/checkpoints/teacher/edm_cifar10_cond_vp.pt", text, "teacher checkpoint to write; must not exist"),
]
EXPORT = [
    Option("checkpoint", "./log/checkpoints/dmd2/dmd2_final.pt", text, "generator; for safetensors also a teacher"),
    Option(
        "format", "onnx", choice("onnx", "safetensors"), "onnx: to run elsewhere; safetensors: to share, in a file without code"
    ),
    Option("output", None, text, "file to write; default: ./generator.onnx or .safetensors, with --page in its folder"),
    Option("page", None, text, "folder to write a page into that runs the generator in a browser"),
    Option("ort", None, text, "folder of npm's package onnxruntime-web for --page; default: fetched by npm"),
    Option("overwrite", False, flag, "replace existing files"),
]

SCRIPTS = {
    "train_teacher.py": TEACHER,
    "train_dmd2.py": DMD2,
    "generate.py": GENERATE,
    "evaluate.py": EVALUATE,
    "export.py": EXPORT,
    "import_teacher.py": IMPORT_TEACHER,
    "benchmark.py": BENCHMARK,
    "compare.py": COMPARE,
}
# A resumed run does not take these from its checkpoint: they belong to the machine, or to one call of the script.
NOT_RESUMED = ("resume_from_checkpoint", "overwrite", "device", "compile", "max_minutes", "dry_run", "peak_tflops", "memory_gb")


# ---- reading ------------------------------------------------------------------------------------------------------------


def did_you_mean(word, known):
    close = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def meant(word, table):
    """The hint for an unknown flag or key: the script that has it, that a file needs --config, or the option of a similar name."""
    name = str(word).removeprefix("--")
    script = next((script for script, other in SCRIPTS.items() if name in [option.name for option in other]), None)
    if script:
        return f": it is an option of {script}"
    if name.endswith((".yaml", ".yml")):
        return f" (did you mean --config {word}?)"
    dashes = str(word)[: len(str(word)) - len(name)]
    return did_you_mean(word, [dashes + option.name for option in table])


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse_args(table, description, argv=None, config=None):
    """The options of `table` as a namespace, from the command line, `--config` and the defaults, each checked.

    The namespace also has `given`, the names of the options in the command line or YAML. With `--resume_from_checkpoint` the
    options are not complete yet, so `options_of_run` checks how they fit together.
    config: the YAML file to read if there is no `--config`. Raises UserError for the first wrong value, key or flag.
    """
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it")
    for option in table:
        help = option.help.replace("%", "%%") + ("" if option.default is None else f" [{option.default}]")
        if option.parse is flag:
            parser.add_argument(f"--{option.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            metavar = option.parse.__name__.upper() if option.parse is text else "X"
            parser.add_argument(f"--{option.name}", nargs=option.nargs, metavar=metavar, help=help)
    given, unknown = parser.parse_known_args(argv)
    given = vars(given)
    if unknown:
        word = unknown[0].split("=")[0]
        raise UserError(f"unknown argument {word}{meant(word, table)}")

    named = given.pop("config", None)
    path = named or config
    from_file = read_yaml(path) if path else {}
    for key in from_file:
        if key not in [option.name for option in table]:
            raise UserError(f"{path}: unknown key {key}{meant(key, table)}")

    values = argparse.Namespace(given={*given, *(from_file if named else [])})
    for option in table:
        value = option.default
        for source, raw in ((f"--{option.name}", given), (f"{path}: {option.name}", from_file)):
            if option.name in raw:
                value = convert(option, raw[option.name], source)
                break
        setattr(values, option.name, value)
    if not getattr(values, "resume_from_checkpoint", None):
        check(values)
        if hasattr(values, "attn_resolutions"):
            values.attn_resolutions = reached(values)
    elif values.overwrite:
        raise UserError("--overwrite starts a new run and --resume_from_checkpoint continues one: give only one of them")
    return values


def reached(args):
    """The `attn_resolutions` that occur in the network. Raises UserError if a given one does not occur; a default one need not."""
    sides = [args.img_resolution >> level for level in range(len(args.channel_mult))]
    missing = [side for side in args.attn_resolutions if side not in sides]
    if missing and "attn_resolutions" in args.given:
        raise UserError(f"--attn_resolutions {missing[0]}: the network's resolutions are {', '.join(map(str, sides))}")
    return [side for side in args.attn_resolutions if side in sides]


def options_of_run(args, kind, stored, source):
    """Returns `args`, checked, where each option that was not given has its value in the run that is resumed.

    args: from `parse_args`; kind: teacher or dmd2; stored: the options of that run, a dict; source: its checkpoint, for messages.
    The options in `NOT_RESUMED` are not taken from it.
    """
    values = vars(args).copy()
    for option in {"teacher": TEACHER, "dmd2": DMD2}[kind]:
        if option.name in stored and option.name not in args.given and option.name not in NOT_RESUMED:
            values[option.name] = convert(option, stored[option.name], f"checkpoint {source}: {option.name}")
    args = argparse.Namespace(**values)
    check(args)
    return args


def convert(option, raw, source):
    """The value of `option` from `raw`, the text or YAML value given for it."""
    if raw is None and option.default is None:
        return None
    if (option.nargs is not None) != isinstance(raw, list) or (option.nargs == "+" and not raw):
        raise UserError(f"{source} needs {'a list' if option.nargs else 'a single value'}, not {raw}")
    if isinstance(raw, dict) or raw is None:
        raise UserError(f"{source} needs a value")
    try:
        return [option.parse(str(item)) for item in raw] if option.nargs else option.parse(str(raw))
    except UserError as error:
        raise UserError(f"{source} {error}") from None


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses duplicate keys in YAML; the plain loader silently keeps the last of them."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"key {key} is given twice")
        return super().construct_mapping(node, deep)


def read_yaml(path):
    """The options in a YAML file; keys of its `wandb` block get the prefix of their flags."""
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, UniqueKeyLoader)
    except OSError as error:
        moved = Path("configs", Path(path).name.removeprefix("config_"))
        hint = f"; it is now {moved}" if (Path(__file__).parents[1] / moved).exists() else ""
        raise UserError(f"--config {path}: {error.strerror}{hint}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, AttributeError, TypeError) as error:  # of the loader and its conversions
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: needs lines of the form `key: value`")
    block = content.get("wandb")
    if isinstance(block, dict):
        del content["wandb"]
        for key, value in block.items():
            name = "wandb" if key == "enabled" else f"wandb_{key}"
            if name in content:
                raise UserError(f"{path}: {name} is given twice")
            content[name] = value
    return content


def check(args):
    """Raises UserError if options do not fit together."""
    low_high = [("sigma_min", "sigma_max"), ("min_step_percent", "max_step_percent")]
    for low, high in low_high:
        if hasattr(args, low) and getattr(args, low) >= getattr(args, high):
            raise UserError(f"--{low} ({getattr(args, low)}) must be below --{high} ({getattr(args, high)})")
    if hasattr(args, "model_channels"):
        if args.model_channels % 8:
            raise UserError(f"--model_channels must be a multiple of 8, not {args.model_channels}")
        if args.img_channels == 2:
            raise UserError("--img_channels must be 1 or 3, not 2")
        divisor = 2 ** (len(args.channel_mult) - 1)
        if args.img_resolution % divisor:
            raise UserError(
                f"--img_resolution {args.img_resolution} must be divisible by {divisor}: channel_mult has "
                f"{len(args.channel_mult)} resolutions, each half of the one before"
            )
    if hasattr(args, "grad_accum"):
        if args.batch_size % args.grad_accum:
            raise UserError(f"--grad_accum {args.grad_accum} must divide --batch_size {args.batch_size}")
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if args.batch_size // args.grad_accum % processes:
            raise UserError(
                f"--batch_size {args.batch_size} in {args.grad_accum} parts (--grad_accum) must be divisible by torchrun's "
                f"{processes} processes, which share each part"
            )
    if getattr(args, "dry_run", False) and TORCHRUN:
        raise UserError("--dry_run counts one process: start it without torchrun, with one process's share of --batch_size")
    for name in ("inception_score", "fid_reference"):
        if getattr(args, name, None) and args.features != "inception":
            raise UserError(f"--{name} needs --features inception")
    if getattr(args, "f_divergence", "rkl") != "rkl":
        if not args.gan_classifier:
            raise UserError(f"--f_divergence {args.f_divergence} takes its weights from the GAN's heads: add --gan_classifier")
        if args.objective != "dmd":
            raise UserError(f"--f_divergence {args.f_divergence} needs --objective dmd, not {args.objective}")
    if sigmas := getattr(args, "student_sigmas", None):
        if sigmas != sorted(set(sigmas), reverse=True):
            raise UserError(f"--student_sigmas {' '.join(map(str, sigmas))}: must descend, starting with the most noise")
        if args.student_steps not in (1, len(sigmas)):
            raise UserError(f"--student_steps {args.student_steps}: --student_sigmas gives {len(sigmas)} levels; give one of them")
    if getattr(args, "gan_lr", None) and not args.gan_classifier:
        raise UserError("--gan_lr needs --gan_classifier")
    if hasattr(args, "forward_passes") and (args.minutes is None) == (args.forward_passes is None):
        raise UserError("give --minutes, for equal time, or --forward_passes, for equal work")
    if getattr(args, "alternate_turns", False) and args.dfake_gen_update_ratio == 1:
        raise UserError("--alternate_turns needs a --dfake_gen_update_ratio of at least 2, or fake_unet never trains")
    if getattr(args, "page", None) and args.output:
        raise UserError("--output and --page: give only one of them; the page's folder gets its own generator.onnx")
    if getattr(args, "page", None) and args.format != "onnx":
        raise UserError(f"--page needs --format onnx, not {args.format}")
    if getattr(args, "ort", None) and not args.page:
        raise UserError("--ort names the runtime of a page: add --page")
    if getattr(args, "dataset", None) == "folder" and args.data_dir and not os.path.exists(args.data_dir):
        raise UserError(f"--data_dir {args.data_dir} does not exist; --dataset folder needs a folder of classes or a ZIP")


def make_folder(source, path):
    """Makes the folder `path`, the value of the option `source`. Raises UserError if that fails."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{source} {path}: {error.strerror}") from None


@contextmanager
def writing(path):
    """Turns a failure to write to `path` (full disk, read-only folder) into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from None


def public(args):
    """The options that may be stored, as a dict: all but the API key."""
    return {name: value for name, value in vars(args).items() if name not in ("wandb_key", "given")}


def exit_on_error(function, *arguments):
    """`function(*arguments)`. A UserError becomes one line and exit status 2; any other error is a bug and shows its traceback.

    A closed terminal or pipe is not an error: later output is dropped.
    """
    outlive_readers()
    try:
        return function(*arguments)
    except UserError as error:
        leave(f"{os.path.basename(sys.argv[0])}: error: {error}", 2)
    except KeyboardInterrupt:  # outside the training loop, which handles it
        sys.exit(130)
    except Exception:
        if not TORCHRUN:
            raise
        leave(traceback.format_exc(), 1)


def leave(message, status):
    """Ends the process with `message` on standard error. Under torchrun only the first process that fails prints it.

    There it exits without cleanup, which would wait for the other processes, while they wait for this one.
    """
    if TORCHRUN:
        from support.parallel import first_to_fail  # imports torch, so only here

        if first_to_fail():
            print(message, file=sys.stderr, flush=True)
            report_to_torchrun(message)
        sys.stdout.flush()
        os._exit(status)
    print(message, file=sys.stderr)
    sys.exit(status)


def report_to_torchrun(message):
    """Makes torchrun repeat `message` at the end of its own report, whose forty lines would otherwise hide it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun shows the earliest failure last, as the root cause. Times are whole seconds: be earlier than others of this one.
        report = {"message": message, "extraInfo": {"timestamp": int(time.time()) - 1}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": report}))
