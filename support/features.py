"""Feature extractors for evaluation: Inception (FID), or a small classifier trained on the data set itself.

A judge is a function of uint8 images `[N, C, H, W]` that returns (features `[N, D]`, logits `[N, K]`) on the CPU.
"""

import hashlib
import inspect
import pickle
import sys
import time
import zipfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity.utils import create_feature_extractor

import checkpoint
from data import Batches, subset
from model import memory_layout
from sampling import random_stream
from support.config import UserError
from support.images import to_float
from support.logger import progress
from support.parallel import barrier, broadcast, gather_rows, one_first, own_rows, rank
from support.training import load_optimizer, lr_factor

BATCH_SIZE = 250
EPOCHS, MOST_PIXELS = 24, 640_000 * 32 * 32  # length of a classifier's training: the lesser of the two
SAVE_SECONDS = 10  # between two saves of a judge in training


def apply(network, images, device):
    """A judge's features and logits of all `images`, in batches; torchrun's processes share the work."""
    with torch.inference_mode():
        outputs = [network(batch.to(device)) for batch in own_rows(images).split(BATCH_SIZE)]
    return tuple(gather_rows(torch.cat([output[i].float().cpu() for output in outputs])) for i in range(2))


def pixels(images):
    """uint8 `[N, C, H, W]` to two float `[N, D]`: the pixels in [-1, 1], and the same averaged over 2x2 squares until D <= 256.

    They need no labels and no training, so they keep what a classifier discards.
    """
    images = small = to_float(images)
    while small[0].numel() > 256:
        small = F.avg_pool2d(small, 2)
    return images.flatten(1), small.flatten(1)


def inception(weights, device):
    """The Inception network of FID, from torch-fidelity; `weights` is a file, or None to download them.

    Raises UserError if they cannot be loaded.
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
    except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        if weights:
            raise UserError(f"--inception_weights {weights}: not torch-fidelity's Inception weights ({reason})") from None
        raise UserError(
            f"Inception's weights could not be downloaded ({reason}); fetch weights-inception-2015-12-05-6726825d.pth "
            "elsewhere and name it with --inception_weights, or use --features classifier, which needs no download"
        ) from None
    return lambda images: apply(network, images.expand(-1, 3, -1, -1), device)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x):
        return x + self.layers(x)


class Classifier(nn.Module):
    """A small residual network with features `[N, 128]`."""

    def __init__(self, img_channels, num_classes):
        super().__init__()
        widths = [16, 32, 64, 128]
        layers = [nn.Conv2d(img_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for width_in, width in pairwise(widths):
            layers += [nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [Residual(width)]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1], num_classes)

    def forward(self, images):
        """Images in [-1, 1] to (penultimate features, logits)."""
        features = self.layers(images).mean(dim=(2, 3))
        return features, self.out(features)


def split(dataset):
    """A fixed split of a data set: four fifths to train the classifier, one fifth held out. Raises UserError for too few images."""
    if len(dataset.labels) < 20:
        raise UserError(f"the data set has only {len(dataset.labels)} images: too few to hold a fifth out; at least 20 are needed")
    order = torch.randperm(len(dataset.labels), generator=torch.Generator().manual_seed(0))
    cut = len(order) // 5
    return subset(dataset, order[cut:]), subset(dataset, order[:cut])


def augment(images, stream):
    """The batch with each image moved by up to 8% of its side, and more; `stream` is the generator of the random numbers.

    Grey images, which may be digits, are also turned by up to 10 degrees and scaled by up to 10%. Coloured ones move by whole
    pixels, which blurs nothing, and half of them are mirrored.
    """
    turn, zoom, right, down, mirror = torch.rand(5, len(images), generator=stream) * 2 - 1
    turn, zoom, right, down, mirror = 0.17 * turn, 1 + 0.1 * zoom, 0.16 * right, 0.16 * down, mirror.sign()
    if torch.equal(images, images[:, :1].expand_as(images)):
        mirror = torch.ones_like(mirror)
    else:
        half = images.shape[-1] / 2  # in the units of grid_sample a side is 2
        turn, zoom, right, down = 0 * turn, torch.ones_like(zoom), (half * right).round() / half, (half * down).round() / half
    rows = [mirror * zoom * turn.cos(), -zoom * turn.sin(), right, mirror * zoom * turn.sin(), zoom * turn.cos(), down]
    grid = F.affine_grid(torch.stack(rows, dim=1).reshape(-1, 2, 3).to(images), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def plan(dataset):
    """(steps, batch size) to train on `dataset`; at least 300 steps, however few the images."""
    size, pixels = len(dataset.labels), dataset.images[0, 0].numel()
    batch_size = min(128, size // 4)
    images_seen = min(EPOCHS * size, MOST_PIXELS / pixels)
    return max(300, round(images_seen / batch_size)), batch_size


def classifier(dataset, cache, device):
    """A judge trained on four fifths of the real images of `dataset`, the same at every call; cached in the file `cache`.

    Returns (judge, its accuracy on the held-out fifth): 0.86 for CIFAR-10, 0.98 for digits at 16x16. Under
    torchrun rank 0 trains and the others wait for its weights.
    """
    train_set, held_out = split(dataset)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        network = Classifier(dataset.images.shape[1], len(dataset.class_names)).to(device, memory_format=memory_layout(device))
    if not rank():
        identity = hashlib.sha256(f"{network} {plan(train_set)}".encode())
        for code in (Residual, Classifier, augment, train_classifier):  # a change of these makes another judge
            identity.update(inspect.getsource(code).encode())
        identity.update(dataset.images.cpu().numpy().tobytes() + dataset.labels.cpu().numpy().tobytes())
        fingerprint = identity.hexdigest()
        if state := stored(cache, fingerprint):
            network.load_state_dict(state["model_state_dict"])
        else:
            train_classifier(network, train_set, Path(cache), fingerprint)
    barrier()
    broadcast(network)
    network.eval()

    def judge(images):
        return apply(lambda batch: network(to_float(batch)), images, device)

    accuracy = (judge(held_out.images)[1].argmax(1) == held_out.labels.cpu()).float().mean().item()
    return judge, accuracy


def stored(path, fingerprint):
    """The state that `checkpoint.save` wrote to `path`, if it is intact and has this fingerprint; else an empty dict."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums but does not check them
            intact = archive.testzip() is None
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state if intact and state.get("fingerprint") == fingerprint else {}
    except Exception:  # missing, damaged or foreign: it is made again
        return {}


def train_classifier(network, dataset, cache, fingerprint):
    """Trains `network`, in place, and saves it as `cache`.

    Now and then it saves what it has, as `cache` with `.part` at the end, and the next call goes on from there as if nothing had
    happened: data, augmentation and learning rate follow from the number of the step alone.
    """
    steps, batch_size = plan(dataset)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05, fused=True)
    batches = Batches(dataset, batch_size, seed=0)
    part, done = cache.with_name(cache.name + ".part"), 0
    if state := stored(part, fingerprint):
        done = state["step"]
        network.load_state_dict(state["model_state_dict"])
        load_optimizer(optimizer, state["optimizer_state_dict"])
        batches.images_seen = done * batch_size

    print(f"training the judge, a classifier, on {len(dataset.labels)} real images, this once", flush=True)
    saved = time.monotonic()
    for step in progress(range(done, steps), "training the judge", "step"):
        images, labels = next(batches)
        images = augment(images, random_stream(0, step)).contiguous(memory_format=memory_layout(images.device))
        loss = F.cross_entropy(network(images)[1], labels, label_smoothing=0.1)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * lr_factor(step, steps // 4, 0.75, steps)
        optimizer.step()
        optimizer.zero_grad()
        if time.monotonic() > saved + SAVE_SECONDS:
            state = {"step": step + 1, "model_state_dict": network.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
            with suppress(UserError):  # there is no place for it
                checkpoint.save(part, state | {"fingerprint": fingerprint})
            saved = time.monotonic()
    try:
        checkpoint.save(cache, {"model_state_dict": network.state_dict(), "fingerprint": fingerprint})
    except UserError as error:  # no place to keep it: it serves this time
        print(error, file=sys.stderr)
    with suppress(OSError):
        part.unlink()


def cache_path(dataset_name, data_dir, config):
    """The file where the classifier of a data set is cached: beside the data."""
    path = Path(data_dir).resolve() if dataset_name == "folder" else Path(data_dir) / dataset_name
    return path.with_name(f"{path.stem}_judge_{config['img_resolution']}x{config['img_channels']}.pt")
