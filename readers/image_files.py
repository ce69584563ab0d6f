"""Images in a folder or a ZIP: which files are images, and of which class. `readers/pixels.py` decodes them."""

import json
import math
import os
import re
import zipfile
from collections import Counter, namedtuple
from functools import partial
from pathlib import Path

import torch

from readers.pixels import IMAGE_SUFFIXES, cached, decoded, in_memory, readable
from support.script import UserError
from support.shared_work import one_first

LARGE = 1e9  # bytes of image files or of pixels; above, pixels are cached beside the images and memory-mapped
MOST = 20e9  # bytes of pixels; above, a data set is refused
LARGEST_FILE = 200_000_000  # bytes of an image file; a small ZIP may hold one of many gigabytes
LITTER = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}  # of macOS, network drives, Windows and Linux
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
EDM_NAME = re.compile(r"\d{5}/img\d{8}\.\w+")  # EDM's dataset tool spreads images over folders that are not classes
File = namedtuple("File", "source size version")  # what opens it; in bytes; what changes with its content


def load(name, data_dir, shape):
    """The images of a folder or ZIP: one subfolder per class, or images alone, or EDM's layout with `dataset.json`.

    `dataset.json` holds `labels`, pairs of file name and class index. A single folder around all else does not count.
    Class names that are whole numbers are sorted by value. Prints which files are left out, and why.
    shape: channels (1 or 3), height and width of the result. Returns (images uint8 `[N, *shape]`, labels int64 `[N]`,
    class names); without classes labels are 0, and there are no names.
    Raises UserError if an image or a label is missing or damaged, if images differ in size, or if they are too many.
    """
    path = Path(data_dir)
    if path.is_dir():
        with readable(path, "folder"):
            files = dict(list_folder(path))
        return load_files(path, files, partial(open, mode="rb"), shape)
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise UserError(f"{path}: neither a folder nor a ZIP archive")
    with readable(path, "ZIP archive"):
        archive = zipfile.ZipFile(path)
    with archive:
        return load_files(path, dict(list_zip(path, archive)), archive.open, shape)


def list_folder(path, folder="", above=()):
    """Yields (name, `File`) of what is in `path`. Folders, with names that end in "/", and broken links have no `File`.

    Links are followed, but not to a folder that they lie in. Litter is named, but not entered.
    """
    above = (*above, os.path.realpath(path / folder))
    for entry in sorted(os.scandir(path / folder), key=lambda entry: entry.name):
        name = folder + entry.name
        if entry.is_dir():
            yield name + "/", None
            if not is_litter(name) and os.path.realpath(entry) not in above:
                yield from list_folder(path, name + "/", above)
        else:
            stat = entry.stat() if entry.is_file() else None
            yield name, stat and File(entry.path, stat.st_size, stat.st_mtime_ns)


def list_zip(path, archive):
    """Yields (name, `File`) of what is in a ZIP, as `list_folder` does."""
    for member in archive.infolist():
        name = tidy(member.filename)
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
            raise UserError(f"{path}: {name} is compressed in an unusual way; pack it without compression")
        yield name, None if name.endswith("/") else File(member, member.file_size, member.CRC)


def tidy(name):
    return name.replace("\\", "/").removeprefix("./").lstrip("/")


def is_litter(name):
    return any(part.startswith(".") or part in LITTER for part in name.split("/"))


def is_image(name):
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def load_files(path, files, open_source, shape):
    """`load` for a folder or ZIP with `files`, a dict from name to `File`. `open_source` opens a `File`'s source."""
    skipped = Counter({"hidden or of the system": sum(map(is_litter, files))})
    files = {name: file for name, file in files.items() if not is_litter(name)}
    outer = outer_folder(files)
    files = {name.removeprefix(outer): file for name, file in files.items() if name != outer}
    inside = path / outer

    def read(name, most=LARGEST_FILE):
        if files[name].size > most:
            raise UserError(f"{inside}/{name}: larger than {most / 1e6:.0f} MB, the most that such a file may have")
        with readable(f"{inside}/{name}", "file"), open_source(files[name].source) as stream:
            return stream.read(most)  # what a ZIP says of its sizes may be wrong

    images = [name for name, file in files.items() if file and is_image(name)]
    names, labels, class_names = json_labels(inside, files, images, read) or folder_labels(inside, files, images)
    skipped["beside the class folders"] = len(images) - len(names)
    for name in files.keys() - set(images) - {"dataset.json"}:
        if not name.endswith("/"):
            kind = f"in no image format that is read ({Path(name).suffix or 'no suffix'})"
            skipped[kind if files[name] else "that are no files (broken links?)"] += 1
    if reasons := ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()) if number):
        print(f"{path}: files skipped: {reasons}")
    if not names:
        raise UserError(f"{path}: no images; it needs one subfolder of images per class, or images without subfolders")
    shape = (len(names), *shape)
    if (size := math.prod(shape)) > MOST:
        size = f"{len(names)} images of {shape[3]}x{shape[2]} are {size / 1e9:.1f} GB of pixels"
        raise UserError(f"{path}: {size}; at most {MOST / 1e9:.0f} GB are supported: take fewer, or a lower resolution")

    decode = partial(decoded, inside, names, read, shape)
    if max(size, sum(files[name].size for name in names)) <= LARGE:
        return in_memory(decode, shape), torch.tensor(labels), class_names
    content = [(name, files[name].size, files[name].version) for name in names]
    with one_first():
        return cached(Path(os.path.abspath(path)), content, decode, shape), torch.tensor(labels), class_names


# ---- classes --------------------------------------------------------------------------------------------------------


def outer_folder(files):
    """The folder around all else with its "/", if there is one, or "". A folder with images right in it is a class."""
    tops = {name.split("/")[0] for name in files}
    outer = f"{min(tops)}/" if len(tops) == 1 else ""
    is_class = any(is_image(name) and name.count("/") <= 1 for name in files)
    return "" if is_class and f"{outer}dataset.json" not in files else outer


def json_labels(path, files, names, read):
    """(names, labels, class names) as `dataset.json` gives them; None if there is none, or none with labels."""
    if "dataset.json" not in files:
        if lower := [name for name in files if name.endswith("/dataset.json")]:
            raise UserError(f"{path}: {lower[0]} is not read; dataset.json must lie at the top")
        return None
    content = read("dataset.json", 1_000_000 + 300 * len(files))
    try:
        pairs = json.loads(content).get("labels")
        if pairs is None:
            return None
        given = [tidy(name) for name, _ in pairs]
        listed = {name: label for name, (_, label) in zip(given, pairs, strict=True)}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: dataset.json must hold labels as pairs of file name and class index") from None
    if len(listed) < len(given):
        raise UserError(f"{path}: dataset.json gives {Counter(given).most_common(1)[0][0]} more than one label")
    absent = sorted(name for name in listed.keys() - set(names) if is_image(name) and not is_litter(name))
    if absent:
        raise UserError(f"{path}: dataset.json names {absent[0]}, which is not there ({len(absent)} such)")
    for name in names:
        label = listed.get(name)
        if type(label) is not int or not 0 <= label < len(names):
            needs = "each image needs a class index, from 0 without gaps"
            raise UserError(f"{path}: dataset.json gives {name} the label {label!r}; {needs}")
    labels = [listed[name] for name in names]
    return names, labels, [str(label) for label in range(max(labels, default=-1) + 1)]


def folder_labels(path, files, names):
    """(names, labels, class names), where each folder at the top is a class. Images alone have no classes."""
    if all("/" not in name for name in names) or all(map(EDM_NAME.fullmatch, names)):
        return names, [0] * len(names), []
    folders = {name.split("/")[0] for name in files if "/" in name}
    if len(folders) > 1 and {folder.lower() for folder in folders} <= SPLITS:
        listed = ", ".join(sorted(folders))
        raise UserError(f"{path}: its folders, {listed}, are no classes; give a folder or ZIP of one of them")
    class_names = sorted(folders, key=by_value)
    label = {name: index for index, name in enumerate(class_names)}
    pairs = [(label[name.split("/")[0]], name) for name in names if "/" in name]
    labels, names = zip(*sorted(pairs, key=lambda pair: pair[0]), strict=True)
    return names, labels, class_names


def by_value(name):
    """The key that sorts class names: whole numbers by value, before all others."""
    is_number = name.isdecimal() and len(name) < 20
    return not is_number, int(name) if is_number else 0, name
