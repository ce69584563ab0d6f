"""What sees images: Inception (FID), or a small classifier trained on the data set itself.

A judge is a function of uint8 images `[N, C, H, W]` that returns (features `[N, D]`, logits `[N, K]`) on the CPU.
"""

import hashlib
import pickle
import struct
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity.utils import create_feature_extractor

import checkpoint
from data import Batches, Dataset
from support.config import UserError
from support.images import to_float
from support.parallel import broadcast, gather_rows, one_first, own_rows, rank

BATCH_SIZE = 250


def apply(network, images, device):
    """A judge's features and logits of all `images`, in batches, shared by torchrun's processes."""
    with torch.inference_mode():
        outputs = [network(batch.to(device)) for batch in own_rows(images).split(BATCH_SIZE)]
    return tuple(gather_rows(torch.cat([output[i].float().cpu() for output in outputs])) for i in range(2))


def pixels(images):
    """uint8 `[N, C, H, W]` to two float `[N, D]`: the pixels in [-1, 1], and the same averaged over 2x2 squares until D <= 256.

    No label has a part in them, and nothing was trained: what a classifier throws away they keep.
    """
    images = small = to_float(images)
    while small[0].numel() > 256:
        small = F.avg_pool2d(small, 2)
    return images.flatten(1), small.flatten(1)


def inception(weights, device):
    """The Inception network of FID, from torch-fidelity; `weights` is a file, or None to download them.

    Raises UserError where they cannot be had.
    """
    try:
        if weights:
            torch.load(weights, weights_only=True)  # torch-fidelity's own loader would run code from a hostile file
        with one_first():
            network = create_feature_extractor(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=weights,
                cuda=False,
                verbose=False,
            ).to(device)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        if weights:
            raise UserError(f"--inception_weights {weights}: not torch-fidelity's Inception weights ({reason})") from None
        raise UserError(
            f"Inception's weights could not be downloaded ({reason}); fetch weights-inception-2015-12-05-6726825d.pth "
            "elsewhere and name it with --inception_weights, or use --features classifier, which needs no download"
        ) from None
    return lambda images: apply(network, images.expand(-1, 3, -1, -1), device)


class Classifier(nn.Module):
    """Three convolutions and a linear layer: enough to read digits, and quick to train."""

    def __init__(self, img_channels, num_classes):
        super().__init__()
        widths = [img_channels, 32, 64, 128]
        layers = []
        for width_in, width in pairwise(widths):
            layers += [nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1], num_classes)

    def forward(self, images):
        """Images in [-1, 1] to (penultimate features, logits)."""
        features = self.layers(images).mean(dim=(2, 3))
        return features, self.out(features)


def split(dataset):
    """The fixed four fifths of a data set that the classifier trains on, and the fifth held out."""
    order = torch.randperm(len(dataset.labels), generator=torch.Generator().manual_seed(0)).to(dataset.labels.device)
    cut = len(order) // 5
    return tuple(Dataset(dataset.images[index], dataset.labels[index], dataset.class_names) for index in (order[cut:], order[:cut]))


def augment(images):
    """Each image of the batch turned by up to 10 degrees, scaled by up to 10% and moved by up to 8% of its side."""
    turn, zoom, right, down = (torch.rand(4, len(images), device=images.device) * 2 - 1) * torch.tensor(
        [[0.17], [0.1], [0.16], [0.16]], device=images.device
    )
    zoom = 1 + zoom
    rows = [zoom * turn.cos(), -zoom * turn.sin(), right, zoom * turn.sin(), zoom * turn.cos(), down]
    grid = F.affine_grid(torch.stack(rows, dim=1).reshape(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def classifier(dataset, cache, device, steps=1500, batch_size=128):
    """A judge trained on four fifths of the real images of `dataset`, the same at every call; kept in the file `cache`.

    Returns (judge, its accuracy on the fifth held out).
    """
    if len(dataset.labels) < 10:
        raise UserError(f"--features classifier: the data set has only {len(dataset.labels)} images")
    network = Classifier(dataset.images.shape[1], len(dataset.class_names))
    identity = hashlib.sha256(f"{network} {steps} {batch_size}".encode())
    identity.update(dataset.images.cpu().numpy().tobytes() + dataset.labels.cpu().numpy().tobytes())
    fingerprint = identity.hexdigest()
    train_set, held_out = split(dataset)
    try:
        cached = torch.load(cache, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, IndexError, struct.error, pickle.UnpicklingError):
        cached = {}  # none yet, or damaged: it is made again
    if cached.get("fingerprint") == fingerprint:
        network.load_state_dict(cached["model_state_dict"])
        network.to(device, memory_format=torch.channels_last)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = train_classifier(train_set, device, steps, min(batch_size, len(train_set.labels)))
        try:
            if not rank():
                checkpoint.save(cache, {"model_state_dict": network.state_dict(), "fingerprint": fingerprint})
        except UserError as error:  # no place to keep it: it serves this time
            print(error, file=sys.stderr)
    broadcast(network)
    network.eval()

    def judge(images):
        return apply(lambda batch: network(to_float(batch)), images, device)

    accuracy = (judge(held_out.images)[1].argmax(1) == held_out.labels.cpu()).float().mean().item()
    return judge, accuracy


def train_classifier(dataset, device, steps, batch_size):
    network = Classifier(dataset.images.shape[1], len(dataset.class_names)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    batches = Batches(dataset, batch_size, seed=0)
    for _ in range(steps):
        images, labels = next(batches)
        images = augment(images).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(images)[1], labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return network


def cache_path(dataset_name, data_dir, config):
    """Where the classifier of a data set is kept: beside the data."""
    path = Path(data_dir).resolve() if dataset_name == "folder" else Path(data_dir) / dataset_name
    return path.with_name(f"{path.stem}_judge_{config['img_resolution']}x{config['img_channels']}.pt")
