"""Images in a folder or a ZIP archive, as uint8 tensors; the pixels of a large ZIP are cached in a file and memory-mapped."""

import fcntl
import io
import json
import lzma
import math
import os
import warnings
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from support.config import UserError, writing
from support.logger import progress
from support.parallel import agree, one_first

# Bytes of pixels. Above LARGE, those of a ZIP stay on disk, and no data set moves to the GPU. Above MOST, a data set is refused.
LARGE, MOST = 4e9, 20e9
CHUNK = 1000  # images that are read from files at once
HEADER = 4096  # bytes at the start of a file of pixels
FORMATS = ["PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF"]  # Pillow's others include some that start programs
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def load(path, shape):
    """The images of a folder with one subfolder per class, of a folder of images alone, or of a ZIP (`load_zip`).

    shape: channels (1 or 3), height and width of the result. Returns (images uint8 `[N, *shape]`, labels int64 `[N]`, class
    names); without classes labels are 0, and there are no names. Raises UserError if an image or a label is missing or damaged.
    """
    if not path.is_dir():
        return load_zip(path, shape)
    class_names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    folders = [sorted((path / name).rglob("*")) for name in class_names] or [sorted(path.glob("*"))]
    found = [(file, label) for label, files in enumerate(folders) for file in files if is_image(file.name)]
    if not found:
        raise UserError(f"{path}: no images; it needs one subfolder per class, with images in it, or images without subfolders")
    files, labels = zip(*found, strict=True)
    check_size(path, len(files), shape)
    chunks = read_images(path, files, lambda file: read_image(file, file, shape[0]), shape)
    return in_memory(chunks, len(files), shape), torch.tensor(labels), class_names


def load_zip(path, shape):
    """The images of a ZIP in the layout of EDM's dataset tool, each of `shape`; classes as its `dataset.json` gives them.

    Up to 4 GB of pixels are read into memory. For a larger ZIP, a file with the pixels is written beside it once and
    memory-mapped. Later starts open only that file, as long as the ZIP's size and time of change stay the same. If the file
    cannot be created, the pixels are read into memory.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: neither a folder nor a ZIP archive")
    kept = path.with_name(f"{path.stem}_pixels_{shape[-1]}x{shape[0]}.bin")
    if not agree(int((dataset := map_pixels(kept, path, shape)) is None)):  # all have it
        return dataset
    with reading(path):
        archive = zipfile.ZipFile(path)
    with archive:
        files, labels, class_names = zip_labels(path, archive)
        check_size(path, len(files), shape)

        def read(name):
            with reading(path):
                content = archive.read(name)
            return read_image(io.BytesIO(content), f"{path}: {name}", shape[0])

        chunks = read_images(path, files, read, shape)
        if len(files) * math.prod(shape) <= LARGE:
            return in_memory(chunks, len(files), shape), labels, class_names
        with one_first():
            dataset = keep_pixels(kept, path, chunks, labels, class_names, shape)
            return dataset or (in_memory(chunks, len(files), shape), labels, class_names)


@contextmanager
def reading(path):
    """Turns the errors of reading a damaged, encrypted or unusual ZIP into a UserError."""
    try:
        yield
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable ZIP archive ({error})") from None


def zip_labels(path, archive):
    """The names of the images in an EDM ZIP, in its order, their labels, and the class names, both as `load` returns them."""
    names = archive.namelist()
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{path}: unsafe file name {name}; names must be relative and without ..")
    files = [name for name in names if is_image(name)]
    if not files:
        raise UserError(f"{path}: no images in it")
    with reading(path):
        content = archive.read("dataset.json") if "dataset.json" in names else b"{}"
    try:
        listed = json.loads(content).get("labels")
        listed = None if listed is None else {name.replace("\\", "/"): label for name, label in listed}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: dataset.json must hold labels as pairs of file name and class index") from None
    if listed is None:
        return files, torch.zeros(len(files), dtype=torch.long), []
    for name in files:
        label = listed.get(name)
        if not isinstance(label, int) or not 0 <= label < len(files):
            raise UserError(
                f"{path}: dataset.json gives {name} the label {label}; each image needs a class index, from 0 without gaps"
            )
    labels = torch.tensor([listed[name] for name in files])
    return files, labels, [str(label) for label in range(int(labels.max()) + 1)]


def check_size(path, count, shape):
    if count * math.prod(shape) > MOST:
        raise UserError(
            f"{path}: {count} images of {shape[2]}x{shape[1]} are {count * math.prod(shape) / 1e9:.1f} GB of pixels; at most "
            f"{MOST / 1e9:.0f} GB are supported: take fewer images, or a lower resolution"
        )


def is_image(name):
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


# ---- pixels -------------------------------------------------------------------------------------------------------------


def read_images(path, files, read, shape):
    """Yields the images of the data set at `path`, uint8 `[at most CHUNK, *shape]`; `read(file)` gives pixels `[H, W, C]`.

    Raises UserError if an image is not square or differs in size from the first. Reports progress for a large set.
    """
    starts, first = range(0, len(files), CHUNK), None
    for start in progress(starts, f"reading {path}", "image") if len(files) * math.prod(shape) > LARGE else starts:
        chunk = []
        for file in files[start : start + CHUNK]:
            pixels = read(file)
            first = first or (file, pixels.shape)
            if pixels.shape != first[1]:
                sizes = [f"{name} is {size[1]}x{size[0]}" for name, size in (first, (file, pixels.shape))]
                raise UserError(f"{path}: images differ in size ({', '.join(sizes)}); bring them to one size first")
            if pixels.shape[0] != pixels.shape[1]:
                raise UserError(f"{path}: images are {pixels.shape[1]}x{pixels.shape[0]}; they must be square")
            chunk.append(resize(torch.tensor(pixels).permute(2, 0, 1)[None], shape[-1]))  # at once: the originals may be large
        yield torch.cat(chunk)


def in_memory(chunks, count, shape):
    """The `chunks` of images as one tensor `[count, *shape]`."""
    images = rest = torch.empty(count, *shape, dtype=torch.uint8)
    for chunk in chunks:
        rest[: len(chunk)] = chunk
        rest = rest[len(chunk) :]
    return images


def keep_pixels(kept, path, chunks, labels, class_names, shape):
    """Writes the data set of the ZIP at `path` to the file `kept`, whole or not at all, and returns the result of `map_pixels`.

    Returns None if the file cannot be created. The file holds a header in JSON, the labels and the pixels.
    """
    temporary = kept.with_name(kept.name + ".tmp")
    try:
        file = open(temporary, "ab")  # noqa: SIM115 - closed below. "a": another run may be writing it
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for that run
    except OSError as error:
        print(f"{path}: its pixels cannot be cached beside it ({error.strerror}): they are read into memory at every start")
        return None
    try:
        with writing(kept), file:
            if dataset := map_pixels(kept, path, shape):
                return dataset
            print(f"{path}: writing its {len(labels)} images as pixels to {kept}, only once", flush=True)
            header = {"zip": identity(path), "shape": [len(labels), *shape], "classes": len(class_names)}
            file.truncate(0)
            file.write(json.dumps(header).encode().ljust(HEADER))
            file.write(labels.numpy())
            for chunk in chunks:
                file.write(chunk.contiguous().numpy())
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(kept)
    finally:
        temporary.unlink(missing_ok=True)
    if dataset := map_pixels(kept, path, shape):
        return dataset
    raise UserError(f"{path}: changed while it was read; start again")


def map_pixels(kept, path, shape):
    """The data set that `keep_pixels` wrote to `kept`, memory-mapped; None if it is not whole or the ZIP at `path` has changed."""
    try:
        with open(kept, "rb") as file:
            header = json.loads(file.read(HEADER))
        count, start = header["shape"][0], HEADER + 8 * header["shape"][0]  # of images, of pixels
        whole = kept.stat().st_size == start + count * math.prod(shape)
        if not whole or header["zip"] != identity(path) or header["shape"] != [count, *shape]:
            return None
        labels = np.fromfile(kept, np.int64, count, offset=HEADER)
        images = np.memmap(kept, np.uint8, "r", start, (count, *shape))
        class_names = [str(label) for label in range(header["classes"])]
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the array is read-only
        return torch.from_numpy(images), torch.from_numpy(labels), class_names


def identity(path):
    """The size in bytes and the time of change in nanoseconds of the file at `path`, which identify its content."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def read_image(file, name, channels):
    """Pixels uint8 `[H, W, channels]` of an image of any colour mode; channels: 1 or 3."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{name}: {image.mode} pixels of more than 8 bits; convert it to 8 bits per channel first")
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image ({error})") from None
    return pixels.reshape(*pixels.shape[:2], -1)


def resize(images, resolution):
    """uint8 `[N, C, H, H]` to `resolution`: means over blocks of pixels if it divides H, else antialiased bilinear."""
    size = images.shape[-1]
    if size == resolution:
        return images
    how = dict(mode="area") if size % resolution == 0 else dict(mode="bilinear", antialias=True)
    chunks = [F.interpolate(chunk.float(), (resolution, resolution), **how) for chunk in images.split(4096)]
    return torch.cat([chunk.round().clamp(0, 255).to(torch.uint8) for chunk in chunks])
