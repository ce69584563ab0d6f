"""Generate images of each class from a generator (one network evaluation per image) or a teacher (Heun's method).

Without classes, the images are named `samples`, and --num_samples is their total number.

Without --overwrite, a folder that already holds images of the same --format is refused, since old images among new ones would
spoil an FID. Grids, which are only looked at, replace those of the same name.
"""

from support.config import GENERATE, UserError, did_you_mean, exit_on_error, make_folder, parse_args, writing

args = exit_on_error(parse_args, GENERATE, __doc__) if __name__ == "__main__" else None  # before torch: --help answers at once

import csv
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import checkpoint
from sampling import class_noise, sample_in_batches
from support.device import autocast, choose_device, compile_networks
from support.image_files import IMAGE_SUFFIXES
from support.images import save_grid, to_uint8
from support.parallel import rank

NUMBER = r"(\d{6}|[1-9]\d{6,})\.png"  # the end of the file names that `write_pngs` makes


def main(args):
    """Writes images with the options `args` from `parse_args(GENERATE, ...)`."""
    device = choose_device(args)
    state = checkpoint.load(args.checkpoint)
    net = checkpoint.network(state, args.checkpoint, device)
    compile_networks(args, net)
    names = state.get("class_names") or [str(label) for label in range(net.label_dim)]
    classes = choose_classes(args.classes, names)
    output_dir = Path(args.output_dir)
    stems = file_names(names) or ["samples"]
    earlier = earlier_files(output_dir, args.format, stems, args.overwrite)
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
    number = f"{len(images)} image{'s' * (len(images) > 1)}"
    print(f"{number} in {seconds:.2f} s, {evaluations} network evaluation{'s' * (evaluations > 1)} per image")

    delete(earlier, output_dir)
    if args.format == "npz":
        write_npz(output_dir / "samples.npz", images, labels)
        print(f"wrote {output_dir / 'samples.npz'}")
        return
    by_class = {output_dir / stems[label]: part for label, part in zip(classes, images.split(args.num_samples), strict=True)}
    if args.format == "png":
        for path, class_images in by_class.items():
            make_folder("--output_dir", path)
            write_pngs(f"{path}/", class_images)
    elif args.format == "flat":
        for path, class_images in by_class.items():
            write_pngs(f"{path}_", class_images.expand(-1, 3, -1, -1))
    else:
        for path, class_images in by_class.items():
            name = f"{path}_samples.png" if names else f"{path}.png"
            save_grid(name, class_images, columns=max(1, round(args.num_samples**0.5)))
    if args.format == "grid" and names:
        overview = torch.cat([class_images[:16] for class_images in by_class.values()])
        save_grid(output_dir / "overview.png", overview, columns=min(args.num_samples, 16))
    of_classes = f" of {len(classes)} class{'es' * (len(classes) > 1)}" if names else ""
    print(f"wrote {number}{of_classes} to {output_dir}")


def earlier_files(folder, format, stems, overwrite):
    """The files of an earlier run of this `format` and with these classes, `stems`, in `folder`, to be deleted; none for grids.

    Raises UserError if there are some and `overwrite` is off, or if there are images that no run of this format wrote: readers
    would take those for samples. For the same reason, grids are refused in a folder with images of --format flat.
    """
    stem = ".+" if format == "grid" else f"({'|'.join(map(re.escape, stems))})"
    where, pattern = {  # where readers of the format look for images, and the file names that this script writes there
        "png": ("*/**/*", rf"{stem}/{NUMBER}"),
        "flat": ("*", rf"{stem}_{NUMBER}"),
        "npz": ("samples.npz", r"samples\.npz"),
    }["flat" if format == "grid" else format]
    files = [path for path in sorted(folder.glob(where)) if path.suffix.lower() in IMAGE_SUFFIXES or format == "npz"]
    ours = [path for path in files if re.fullmatch(pattern, path.relative_to(folder).as_posix())]
    if format == "grid":
        if ours:
            raise UserError(f"--output_dir {folder}: holds images of --format flat; a grid would be read as one; choose another")
        return []
    if ours and not overwrite:
        name = ours[0].relative_to(folder)
        raise UserError(f"--output_dir {folder}: holds another run's {name}; --overwrite deletes what that run wrote")
    if len(files) > len(ours):
        name = min(set(files) - set(ours)).relative_to(folder)
        raise UserError(f"--output_dir {folder}: holds {name}, which --overwrite does not delete; choose another")
    return ours


def delete(files, output_dir):
    """Deletes `files`, and the class folders in `output_dir` that are then empty."""
    for path in files:
        with writing(path):
            path.unlink()
    for folder in {path.parent for path in files} - {output_dir}:
        if not any(folder.iterdir()):
            with writing(folder):
                folder.rmdir()


def choose_classes(wanted, names):
    """The indices in `names` of the classes in `--classes`, in that order; all if it is not given.

    Names are separated by commas. A name that contains a comma must be in double quotes, or the only one. Without classes the
    result is [0], a label that the network ignores. Raises UserError for an unknown name.
    """
    if not wanted:
        return list(range(len(names))) or [0]
    if not names:
        raise UserError(f"--classes {wanted}: the network has no classes; leave it out")
    if wanted in names:
        return [names.index(wanted)]
    wanted = dict.fromkeys(name.strip() for row in csv.reader(wanted.splitlines(), skipinitialspace=True) for name in row)
    for name in wanted:
        if name not in names:
            known = ", ".join(f'"{known}"' if "," in known else known for known in names)
            raise UserError(f"--classes: no class {name!r}{did_you_mean(name, names)}; there are {known}")
    return [names.index(name) for name in wanted]


def file_names(names):
    """The class names as unique and valid file names; "T-shirt/top" is not a valid one."""
    safe = [re.sub(r"[^\w-]", "_", name.lower()) for name in names]
    mended = [name if safe.count(name) == 1 else f"{name}_{label}" for label, name in enumerate(safe)]
    if len(set(mended)) == len(mended):
        return mended
    return [f"{name}_{label}" for label, name in enumerate(safe)]  # for example "a", "A" and "a_0"


def write_npz(path, images, labels):
    """Writes `images` uint8 `[N, H, W, C]` and `labels` int64 `[N]`. Without classes the labels are 0.

    The file holds both again under guided-diffusion's names: `arr_0`, always RGB `[N, H, W, 3]`, and `arr_1`.
    """
    pixels, labels = to_uint8(images).permute(0, 2, 3, 1), labels.numpy()
    with writing(path):
        np.savez(path, images=pixels.numpy(), labels=labels, arr_0=pixels.expand(-1, -1, -1, 3).numpy(), arr_1=labels)


def write_pngs(stem, images):
    """Writes each of the images `[N, C, H, W]` to a file, named `stem` followed by its number."""
    for index, pixels in enumerate(to_uint8(images).permute(0, 2, 3, 1).numpy()):
        path = f"{stem}{index:06d}.png"
        with writing(path):
            Image.fromarray(pixels.squeeze()).save(path)


if __name__ == "__main__":
    exit_on_error(main, args)
