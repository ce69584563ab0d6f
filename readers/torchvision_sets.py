"""CIFAR-10, MNIST and Fashion-MNIST through torchvision, which downloads them."""

import torch
from torchvision import datasets

from support.processes import all_max, local_rank
from support.script import UserError

CLASSES = {"cifar10": datasets.CIFAR10, "mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}


def load(name, data_dir, shape):
    """The training images of `name` in `data_dir`: uint8 `[N, C, H, W]`, int64 labels `[N]`, class names.

    They are downloaded if they are missing. `shape` is not used. Raises UserError if they are damaged, or cannot be.
    """
    # The first process of each machine downloads; the others then find the files. Machines that share a folder would
    # download at once: there the files should lie before the start.
    if local_rank():
        all_max(0)  # waits for it
    try:
        dataset = CLASSES[name](data_dir, train=True, download=True)
    except Exception as error:  # no network, or a damaged file
        problem = f"data set {name} is missing from {data_dir} or damaged there, and not downloaded ({error})"
        advice = "copy torchvision's files there, or take --dataset mnist5k, or folder for images of your own"
        raise UserError(f"{problem}; {advice}") from None  # then this process exits, and torchrun ends the others
    if not local_rank():
        all_max(0)
    images = torch.as_tensor(dataset.data)
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images[:, None]
    class_names = [str(digit) for digit in range(10)] if name == "mnist" else dataset.classes
    return images, torch.as_tensor(dataset.targets), class_names
