"""Image files decoded to uint8 pixels of one size: in memory, or cached in a file that is memory-mapped."""

import glob
import hashlib
import io
import os
import uuid
import warnings
from contextlib import contextmanager, suppress

import numpy as np
import torch
from PIL import Image, ImageOps

from support.images import resize
from support.progress import progress
from support.script import UserError

Image.init()
# These start a program (EPS), hold a file of any format (IPTC), or are only recognised.
OMITTED = {"EPS", "IPTC", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
FORMATS = ["PNG", "JPEG", *sorted(Image.OPEN.keys() - OMITTED - {"PNG", "JPEG"})]
IMAGE_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow refuses images of more than twice as many: they would take gigabytes


@contextmanager
def readable(what, kind):
    """Turns any error of reading `what`, a `kind` of file of which every byte may be wrong, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: not a readable {kind} ({str(error) or type(error).__name__})") from None


def read_image(content, name, channels):
    """(pixels uint8 `[channels, H, W]`, whether any were transparent) of the image file with the bytes `content`.

    Transparent pixels are shown on white. The image is turned as its camera says (EXIF). channels: 1 or 3.
    """
    with readable(name, "image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, such as of damaged EXIF data
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{name}: {image.mode} pixels of more than 8 bits; convert it to 8 bits per channel first")
        transparent = False
        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            transparent = image.getextrema()[3][0] < 255
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels.reshape(*pixels.shape[:2], channels).permute(2, 0, 1), transparent


def decoded(path, names, read, shape):
    """Yields the images `names` of the data set at `path`, uint8 `shape[1:]`; `read(name)` gives a file's bytes.

    Raises UserError if an image is not square or differs in size from the first. Reports progress.
    """
    side, on_white = None, 0
    for index in progress(range(len(names)), f"reading {path}", "image"):
        pixels, transparent = read_image(read(names[index]), f"{path}/{names[index]}", shape[1])
        _, height, width = pixels.shape
        side = side or height
        if (height, width) != (side, side):
            sizes = f"{names[0]} has height {side}, {names[index]} is {width}x{height}"
            raise UserError(f"{path}: images must be square and of one size ({sizes}); crop and resize them first")
        on_white += transparent
        yield resize(pixels[None], shape[-1])[0]  # at once: the originals may be large
    if on_white:
        print(f"{path}: {on_white} of {len(names)} images have transparent pixels; these are shown on white")


def in_memory(decode, shape):
    """The images that `decode()` yields as one tensor of `shape`."""
    images = torch.empty(shape, dtype=torch.uint8)
    for index, image in enumerate(decode()):
        images[index] = image
    return images


# ---- cache ----------------------------------------------------------------------------------------------------------


def cached(path, content, decode, shape):
    """The same, memory-mapped from a file beside the folder or ZIP at `path`, which is written if there is none.

    content: what identifies the images' content. Where the file cannot be written, the images are read into memory.
    """
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    file = path.with_name(f"{path.name}_pixels_{shape[-1]}x{shape[1]}_{digest}.npy")
    if (images := mapped(file, shape)) is None:
        print(f"{path}: writing its {shape[0]} images as pixels to {file}, only once", flush=True)
        try:
            write(file, decode, shape)
        except OSError as error:
            print(f"{file}: could not be written ({error.strerror}): images are read at every start", flush=True)
        images = mapped(file, shape)
    return in_memory(decode, shape) if images is None else images


def write(file, decode, shape):
    """Writes the images to `file` in numpy's format, whole or not at all."""
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")  # two starts at once write two
    try:
        with open(temporary, "wb") as stream:  # not np.memmap, with which a full disk would kill the process
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for image in decode():
                stream.write(image.contiguous().numpy())
            stream.flush()
            os.fsync(stream.fileno())
        with suppress(FileNotFoundError):  # another start was first, and has cleaned up
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    prefix = file.name.rpartition("_")[0]
    for other in file.parent.glob(f"{glob.escape(prefix)}_*.npy*"):  # of earlier images, or of a start that was killed
        if other != file:
            other.unlink(missing_ok=True)


def mapped(file, shape):
    """The images in `file`, which `write` wrote; None if it is missing, damaged, or of another shape."""
    with suppress(Exception):
        images = torch.from_numpy(np.load(file, mmap_mode="c"))  # copy on write: torch has no read-only tensors
        return images if images.shape == shape and images.dtype == torch.uint8 else None
    return None
