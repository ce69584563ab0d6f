"""Images in a folder or a ZIP: which files are images, of which class, and their pixels."""

import io
import json
import math
import os
import re
import unicodedata
import warnings
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from support.images import resize
from support.processes import is_main
from support.script import UserError, as_user_error

MOST = 20e9  # bytes of pixels; above, a data set is refused
LARGEST_FILE = 200_000_000  # bytes; a small ZIP may hold a file of many gigabytes
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses images of more than twice as many: they would take gigabytes
FORMATS = ["PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM", "TGA"]  # not EPS: it runs a program
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # Pillow may be built without some
LITTER = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}  # of macOS, network drives, Windows and Linux
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
EDM_NAME = re.compile(r"\d{5}/img\d{8}\.\w+")  # EDM's dataset tool spreads images over folders that are not classes


def load(name, data_dir, shape):
    """The images of a folder or ZIP: one subfolder per class, or images alone, or EDM's layout with `dataset.json`.

    `dataset.json` holds `labels`, pairs of file name and class index. A single folder around all else does not count.
    Class names that are whole numbers are sorted by value. Prints how many files are skipped, and why.
    shape: channels (1 or 3), height and width of the result. Returns (images uint8 `[N, *shape]`, labels int64 `[N]`,
    class names); without classes labels are 0, and there are no names.
    Raises UserError for missing or damaged images and labels, images of several sizes, too many, or an empty class.
    """
    path = Path(data_dir)
    all_files = list_folder(path) if path.is_dir() else list_zip(path)
    files = {name: opened for name, opened in all_files.items() if not is_litter(name)}
    outer = outer_folder(files)
    files = {name.removeprefix(outer): opened for name, opened in files.items() if name != outer}
    inside, images = f"{path}/{outer}", [name for name in files if suffix(name) in SUFFIXES]
    names, labels, class_names = json_labels(inside, files, images) or folder_labels(path, files, images)

    used = {outer + name for name in [*names, "dataset.json"]}
    skipped = Counter(suffix(name) for name in all_files if name not in used and not name.endswith("/"))
    if skipped:
        listed = ", ".join(f"{number} {kind or 'without suffix'}" for kind, number in skipped.most_common(5))
        why = "hidden, beside the class folders, or in no image format that is read"
        print(f"{path}: {skipped.total()} files skipped ({why}): {listed}")
    if not names:
        raise UserError(f"{path}: no images; it needs one subfolder of images per class, or images without subfolders")
    if absent := set(range(len(class_names))) - set(labels):
        raise UserError(f"{path}: class {class_names[min(absent)]} has no images")
    if (size := len(names) * math.prod(shape)) > MOST:
        size = f"{len(names)} images of {shape[2]}x{shape[1]} are {size / 1e9:.1f} GB, more than {MOST / 1e9:.0f} GB"
        raise UserError(f"{path}: {size}; take fewer, or a lower resolution")
    pixels = read_images(path, {inside + name: files[name] for name in names}, shape)
    return pixels, torch.tensor(labels), class_names


# ---- files ----------------------------------------------------------------------------------------------------------


def list_folder(path, inside="", above=()):
    """A dict from the name of each file in `path` to a function that opens it. Names of folders end in "/"."""
    files, above = {}, (*above, os.path.realpath(path))
    with as_user_error(f"{path}: not a readable folder", Exception):
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            name = inside + entry.name
            if not entry.is_dir():
                files[name] = partial(open, entry.path, "rb")
            elif not is_litter(name) and os.path.realpath(entry) not in above:  # not links in a circle
                files |= {f"{name}/": None} | list_folder(entry.path, f"{name}/", above)
    return files


def list_zip(path):
    """The same of a ZIP, in its own order."""
    with as_user_error(f"{path}: not a readable folder or ZIP archive", Exception):
        archive = zipfile.ZipFile(path)
    members = {tidy(member.filename): member for member in archive.infolist()}
    for name, member in members.items():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
            raise UserError(f"{path}: {name} is compressed in an unusual way; pack it without compression")
    return {name: partial(archive.open, member) for name, member in members.items()}


def tidy(name):
    return name.replace("\\", "/").removeprefix("./").lstrip("/")


def is_litter(name):
    return any(part.startswith(".") or part in LITTER for part in name.split("/"))


def suffix(name):
    return os.path.splitext(name)[1].lower()


def read(path, opened):
    """The content of the file `path`, which `opened()` opens."""
    with as_user_error(f"{path}: not a readable file", Exception), opened() as stream:
        content = stream.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: larger than {LARGEST_FILE / 1e6:.0f} MB, the most that a file may have")
    return content


def read_images(path, files, shape):
    """The images `files`, a dict as listed above, of the data set `path`: uint8 `[N, *shape]`. Reports progress."""
    names, side = list(files), None
    pixels = torch.empty(len(names), *shape, dtype=torch.uint8)
    numbers = tqdm(range(len(names)), f"reading {path}", unit="image", delay=5, mininterval=5, disable=not is_main())
    for index in numbers:
        image = read_image(names[index], files[names[index]], channels=shape[0])
        side = side or image.shape[1]
        if image.shape[1:] != (side, side):
            sizes = f"{names[index]} is {image.shape[2]}x{image.shape[1]}, not {side}x{side}"
            raise UserError(f"{path}: images must be square and of one size ({sizes}); crop and resize them first")
        pixels[index] = resize(image[None], shape[2])[0]
    return pixels


def read_image(path, opened, channels):
    """The pixels of an image file, uint8 `[channels, H, W]`, on white where it is transparent, turned as EXIF says."""
    content = read(path, opened)
    with as_user_error(f"{path}: not a readable image", Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, such as of damaged EXIF data
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{path}: {image.mode} pixels of more than 8 bits; convert it to 8 bits per channel first")
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels.reshape(*pixels.shape[:2], channels).permute(2, 0, 1)


# ---- classes --------------------------------------------------------------------------------------------------------


def outer_folder(files):
    """The folder around all else with its "/", if there is one, or "". A folder with images right in it is a class."""
    tops = {name.split("/")[0] for name in files}
    outer = f"{min(tops)}/" if len(tops) == 1 else ""
    is_class = any(suffix(name) in SUFFIXES and name.count("/") <= 1 for name in files)
    return "" if is_class and f"{outer}dataset.json" not in files else outer


def json_labels(path, files, images):
    """(names, labels, class names) as `dataset.json` gives them; None if there is none, or none with labels."""
    if "dataset.json" not in files:
        if lower := [name for name in files if name.endswith("/dataset.json")]:
            raise UserError(f"{path}{lower[0]} is not read; dataset.json must lie at the top")
        return None
    where = f"{path}dataset.json"
    with as_user_error(f"{where}: no object with labels, pairs of file name and class index", Exception):
        pairs = json.loads(read(where, files["dataset.json"])).get("labels")
        listed = {tidy(name): label for name, label in pairs or []}
    if pairs is None:
        return None
    if len(listed) < len(pairs):
        raise UserError(f"{where} gives {len(pairs) - len(listed)} of its files more than one label")
    if absent := listed.keys() - files:
        raise UserError(f"{where} names {min(absent)}, which is not there ({len(absent)} such)")
    labels = [listed.get(name) for name in images]
    for name, label in zip(images, labels, strict=True):
        if type(label) is not int or not 0 <= label < len(images):
            raise UserError(f"{where} gives {name} the label {label!r}; each image needs a class index, from 0 on")
    return images, labels, [str(label) for label in range(max(labels, default=-1) + 1)]


def folder_labels(path, files, images):
    """(names, labels, class names), where each folder at the top is a class. Images alone have no classes."""
    if all("/" not in name for name in images) or all(map(EDM_NAME.fullmatch, images)):
        return images, [0] * len(images), []
    class_names = sorted({name.split("/")[0] for name in files if "/" in name}, key=by_value)
    if len(class_names) > 1 and {name.lower() for name in class_names} <= SPLITS:
        raise UserError(f"{path}: {', '.join(class_names)} are no classes; give a folder or ZIP of one of them")
    label = {name: index for index, name in enumerate(class_names)}
    pairs = [(label[name.split("/")[0]], name) for name in images if "/" in name]
    labels, names = zip(*sorted(pairs, key=lambda pair: pair[0]), strict=True)
    return names, labels, [unicodedata.normalize("NFC", name) for name in class_names]  # macOS decomposes letters


def by_value(name):
    """The key that sorts class names: whole numbers by value, before all others."""
    return not name.isdecimal(), name.zfill(20) if name.isdecimal() else "", name
