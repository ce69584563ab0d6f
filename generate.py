"""Generate images of each class from a generator (one network evaluation per image) or a teacher (Heun's method)."""

from support.config import GENERATE, UserError, did_you_mean, exit_on_error, make_folder, parse_args, writing

args = exit_on_error(parse_args, GENERATE, __doc__) if __name__ == "__main__" else None  # before torch: --help answers at once

import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
from sampling import class_noise, sample_in_batches
from support.images import save_grid, to_uint8
from support.parallel import rank
from support.training import autocast, choose_device, compile_networks


def main(args):
    """Writes images by the options `args`, as `parse_args(GENERATE, ...)` gives them."""
    device = choose_device(args)
    state = checkpoint.load(args.checkpoint)
    net = checkpoint.network(state, args.checkpoint, device)
    compile_networks(args, net)
    names = state.get("class_names") or [str(label) for label in range(net.label_dim)]
    classes = choose_classes(args.classes, names)
    output_dir = Path(args.output_dir)
    make_folder("--output_dir", output_dir)
    shape = (net.config["img_channels"], net.config["img_resolution"], net.config["img_resolution"])
    noise, labels = class_noise(classes, args.num_samples, shape, args.seed)

    start = time.perf_counter()
    sampler, evaluations = checkpoint.sampler(state, args.steps)
    with autocast(args, device):
        images = sample_in_batches(sampler, net, noise, labels, args.batch_size)
    if rank():
        return
    seconds = time.perf_counter() - start
    print(f"{len(images)} images in {seconds:.2f} s, {evaluations} network evaluation{'s' * (evaluations > 1)} an image")

    by_class = dict(zip(classes, images.split(args.num_samples), strict=True))
    if args.format == "npz":
        write_npz(output_dir / "samples.npz", images, labels)
        print(f"wrote {output_dir / 'samples.npz'}")
        return
    folders = file_names(names)
    if args.format == "grid":
        for label, class_images in by_class.items():
            save_grid(output_dir / f"{folders[label]}_samples.png", class_images, columns=max(1, round(args.num_samples**0.5)))
        overview = torch.cat([class_images[:16] for class_images in by_class.values()])
        save_grid(output_dir / "overview.png", overview, columns=min(args.num_samples, 16))
    else:
        for label, class_images in by_class.items():
            write_pngs(output_dir / folders[label], class_images)
    print(f"wrote {args.format} PNGs of {len(classes)} classes to {output_dir}")


def choose_classes(wanted, names):
    """The indices in `names` of the classes that `--classes` names, in its order; all where it is not given."""
    if not wanted:
        return list(range(len(names)))
    wanted = dict.fromkeys(name.strip() for name in wanted.split(","))
    for name in wanted:
        if name not in names:
            raise UserError(f"--classes: no class {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    return [names.index(name) for name in wanted]


def file_names(names):
    """The classes' names as names of files, each another: "T-shirt/top" is none."""
    safe = [re.sub(r"[^\w-]", "_", name.lower()) for name in names]
    return [name if safe.count(name) == 1 else f"{name}_{label}" for label, name in enumerate(safe)]


def write_npz(path, images, labels):
    with writing(path):
        np.savez(path, images=to_uint8(images).permute(0, 2, 3, 1).numpy(), labels=labels.numpy())


def write_pngs(folder, images):
    """A file for each image, in a folder for each class, as --dataset folder reads it."""
    make_folder("--output_dir", folder)
    for index, pixels in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy()):
        with writing(folder / f"{index:06d}.png"):
            Image.fromarray(pixels.squeeze()).save(folder / f"{index:06d}.png")


if __name__ == "__main__":
    exit_on_error(main, args)
