"""Generate images of each class from a generator (one network evaluation per image) or a teacher (Heun's method).

Nothing is deleted. A folder that holds images of the same --format, or for grids of flat, is refused: they would spoil
an FID. Only grids replace those of the same name.
"""

import re
import time
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
from sampling import class_noise, euler_sampler, guided, heun_sampler, student_sampler
from support.device import MACHINE, autocast, choose_device, compile_networks
from support.images import save_grid, to_uint8
from support.options import Option, choice, count, did_you_mean, number, parse_args, path, text
from support.script import UserError, make_folder, run_script, writing

SAMPLING = [
    Option("sampler", "heun", choice("heun", "euler"), "of a teacher: EDM's, or Euler's in even flow-matching time"),
    Option("steps", 18, count, "steps for a teacher: 2 * steps - 1 network evaluations, with euler as many as steps"),
    Option("guide_checkpoint", None, path, "a weaker teacher to guide a teacher, such as an earlier checkpoint"),
    Option("guidance_scale", 1.5, number(0), "of that guidance; 1: none"),
    Option("batch_size", 250, count, "images generated at once"),
]
FORMATS = "grid: one per class; png: a folder per class, as data; npz: arrays; flat: one folder, for FID tools"
OPTIONS = {
    "images": [
        Option("checkpoint", "./log/checkpoints/dmd2/dmd2_final.pt", path, "generator or teacher"),
        Option("output_dir", "./generated", path, "where images go"),
        Option("num_samples", 16, count, "images per class; without classes, images in total"),
        Option("ema_decay", None, text, "of which of a generator's averages; default: the first"),
        Option("classes", None, text, "names of classes; default: all", "+"),
        Option("format", "grid", choice("grid", "png", "npz", "flat"), FORMATS),
        *SAMPLING,
    ],
    "machine": MACHINE,
}


def main(argv=None):
    """Writes images with the options in `argv`, by default those of the command line."""
    args = parse_args(OPTIONS, __doc__, argv)
    device, folder = choose_device(args), Path(args.output_dir)
    state = checkpoint.load(args.checkpoint)
    if args.ema_decay:
        further = checkpoint.averages(state)
        if args.ema_decay not in further:
            known = ", ".join(further) or "none"
            raise UserError(f"--ema_decay {args.ema_decay}: beside its first average, {args.checkpoint} has {known}")
        state = further[args.ema_decay]
    net = checkpoint.network(state, args.checkpoint, device)
    sampler, evaluations = choose_sampler(args, state, net, device)
    names = checkpoint.class_names(state, net.label_dim)
    classes, stems = choose_classes(args.classes, names), file_names(names) or ["samples"]
    stems = [stems[label] for label in classes]
    check_folder(folder, args.format)
    make_folder("--output_dir", folder)

    start = time.perf_counter()
    shape = (net.config["img_channels"], net.config["img_resolution"], net.config["img_resolution"])
    noise, labels = class_noise(classes, args.num_samples, shape, args.seed)
    images = []
    for z, y in zip(noise.split(args.batch_size), labels.split(args.batch_size), strict=True):
        with torch.inference_mode(), autocast(args, device):
            images.append(sampler(z.to(device), y.to(device)).cpu())
    seconds = time.perf_counter() - start
    with writing(folder):
        write(folder, args.format, stems, torch.cat(images), labels, bool(names))
    number = f"{len(labels)} image{'s' * (len(labels) > 1)}"
    print(f"{number} in {seconds:.2f} s, network evaluations per image: {evaluations}; wrote {folder}")


def choose_sampler(args, state, net, device):
    """Returns (a function from noise and labels to images, its network evaluations per image) for a loaded checkpoint.

    A generator is called once at each of its noise levels, a teacher sampled with `--steps` steps of `--sampler` and
    guided by `--guide_checkpoint`, if any. `--compile` compiles both. Raises UserError if the guide does not fit.
    """
    source = f"--guide_checkpoint {args.guide_checkpoint}"
    if "guidance_scale" in args.given and not args.guide_checkpoint:
        raise UserError("--guidance_scale needs --guide_checkpoint")
    compile_networks(args, net)
    if checkpoint.kind(state) == "dmd2":
        if args.guide_checkpoint and "teacher_checkpoint" not in args.given:
            raise UserError(f"{source}: guides a teacher, and --checkpoint is a generator")
        return partial(student_sampler, net, sigmas=state["student_sigmas"]), len(state["student_sigmas"])
    solver, evaluations = (euler_sampler, args.steps) if args.sampler == "euler" else (heun_sampler, 2 * args.steps - 1)
    if args.guide_checkpoint:
        of_guide, config = checkpoint.load_teacher(args.guide_checkpoint, "guide_checkpoint"), net.config
        classes = of_guide["model_config"]["label_dim"] and net.label_dim  # one without classes guides any
        checkpoint.check_same_images(source, of_guide["model_config"], config | {"label_dim": classes}, "the teacher's")
        guide = checkpoint.network(of_guide, args.guide_checkpoint, device)
        compile_networks(args, guide)
        net, evaluations = guided(net, guide, args.guidance_scale), 2 * evaluations
    return partial(solver, net, num_steps=args.steps), evaluations


def load_sampler(path, device="cpu", steps=18):
    """A function from standard normal noise `[B, C, H, W]` and labels `[B]` to images, from the checkpoint at `path`.

    The images may slightly exceed [-1, 1]; `support.images.to_uint8` and `images.clamp(-1, 1)` clamp them.
    Raises UserError as `checkpoint.load` does.
    """
    args, state = parse_args({"": [*SAMPLING, *MACHINE]}, None, ["--steps", str(steps)]), checkpoint.load(path)
    return choose_sampler(args, state, checkpoint.network(state, path, device), device)[0]


def check_folder(folder, format):
    """Raises UserError if `folder` holds images where readers of the `format` look."""
    where = {"png": "*/**/*", "flat": "*", "npz": "samples.npz", "grid": "*_000000.png"}  # which is one of flat
    for file in sorted(folder.glob(where[format])):
        if format == "npz" or file.suffix.lower() in Image.registered_extensions():
            raise UserError(f"--output_dir {folder}: holds {file.relative_to(folder)}; choose another, or empty it")


def write(folder, format, stems, images, labels, has_classes):
    """Writes `images` `[N, C, H, W]` in [-1, 1], as many for each of `stems`, the names of the classes' files."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    by_class, each = images.unflatten(0, (len(stems), -1)), len(images) // len(stems)
    if format == "grid":
        for stem, part in zip(stems, by_class, strict=True):
            name = f"{stem}_samples.png" if has_classes else f"{stem}.png"
            save_grid(folder / name, part, columns=max(1, round(each**0.5)))
        if has_classes:
            save_grid(folder / "overview.png", by_class[:, :16].flatten(0, 1), columns=min(each, 16))
    elif format == "npz":
        rgb = pixels.repeat(3 // pixels.shape[3], axis=3)
        guided_diffusions = {"arr_0": rgb, "arr_1": labels.numpy()}  # for its evaluator
        np.savez(folder / "samples.npz", images=pixels, labels=labels.numpy(), **guided_diffusions)
    else:
        for index, image in enumerate(pixels):
            file = folder / f"{stems[index // each]}{'/' if format == 'png' else '_'}{index % each:06d}.png"
            file.parent.mkdir(exist_ok=True)
            image = Image.fromarray(image.squeeze())
            (image.convert("RGB") if format == "flat" else image).save(file)


def choose_classes(wanted, names):
    """The indices in `names` of the classes in `--classes`, in that order; by default all, or without classes [0]."""
    if not wanted:
        return list(range(len(names))) or [0]
    wanted, names = ([unicodedata.normalize("NFC", name) for name in part] for part in (wanted, names))
    for name in wanted:  # macOS decomposes letters
        if name not in names:
            known = ", ".join(names) or "no classes"
            raise UserError(f"--classes: no class {name!r}{did_you_mean(name, names)}; there are {known}")
    return [names.index(name) for name in dict.fromkeys(wanted)]


def file_names(names):
    """The class names as file names: valid, neither empty nor too long, and with the class's number if not unique."""
    safe = [re.sub(r"[^\w-]", "_", name.lower())[:50] or "_" for name in names]
    return safe if len(set(safe)) == len(safe) else [f"{name}_{label}" for label, name in enumerate(safe)]


if __name__ == "__main__":
    run_script(main)
