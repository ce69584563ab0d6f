"""What sees images: Inception (for FID), a small classifier trained on the data set itself, or averages of pixels.

Inception and the classifier are functions of uint8 images `[N, C, H, W]`. Inception returns features `[N, D]`, and the
classifier features and logits `[N, K]`, float32 on its device.
"""

import hashlib
import sys
import tempfile
from contextlib import suppress
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from tqdm import tqdm

import checkpoint
from data import Batches, subset
from sampling import random_stream
from support.images import to_float
from support.optimizers import lr_factor
from support.script import UserError

BATCH_SIZE = 250
EPOCHS, MOST_PIXELS = 24, 640_000 * 32 * 32  # length of the classifier's training: the lesser of the two
VERSION = 3  # of the classifier: a change of its network, its data or its training needs another number


def averaged_pixels(images):
    """uint8 `[N, C, H, W]` to float `[N, D]` in [-1, 1]: the pixels, averaged over 2x2 squares until D <= 256."""
    small = []
    for batch in images.split(BATCH_SIZE):
        batch = to_float(batch)
        while batch[0].numel() > 256:
            batch = F.avg_pool2d(batch, 2)
        small.append(batch.flatten(1))
    return torch.cat(small)


@torch.inference_mode()
def in_batches(network, device, images):
    """What `network`, which maps a batch on `device` to a tuple of tensors, makes of all `images`."""
    batches = [network(batch.to(device)) for batch in images.split(BATCH_SIZE)]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def inception(weights, device):
    """The Inception network of FID, from torch-fidelity; `weights`: its file, None to download. Raises UserError."""
    try:
        with tempfile.NamedTemporaryFile() as copy:
            if weights:  # torch-fidelity's own loader would run code from a hostile file, and needs the file's device
                torch.save(torch.load(weights, "cpu", weights_only=True), copy.name)
            file = copy.name if weights else None
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file, verbose=False)
    except Exception as error:  # any file may be given
        advice = "name torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or use --features classifier"
        raise UserError(f"--inception_weights {weights or '(download)'}: {error!s:.200}; {advice}") from None
    network.eval().to(device)
    return lambda images: in_batches(lambda batch: network(batch.expand(-1, 3, -1, -1)), device, images)[0]


def convolution(width_in, width, *pool):
    """A 3x3 convolution, pooled if `pool` says how, with batch norm and ReLU."""
    layers = [nn.Conv2d(width_in, width, 3, padding=1, bias=False), *pool, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """A small residual network with features `[N, 128]`."""

    def __init__(self, img_channels, num_classes):
        super().__init__()
        widths = [16, 32, 64, 128]
        self.first = convolution(img_channels, widths[0])
        halving = [[convolution(a, b, nn.MaxPool2d(2)), convolution(b, b)] for a, b in pairwise(widths)]
        self.stages = nn.ModuleList(map(nn.ModuleList, halving))
        self.out = nn.Linear(widths[-1], num_classes)

    def forward(self, images):
        """Images in [-1, 1] to (penultimate features, logits)."""
        x = self.first(images)
        for halve, residual in self.stages:
            x = halve(x)
            x = x + residual(x)
        features = x.mean(dim=(2, 3))
        return features, self.out(features)


def split(dataset):
    """A fixed split: four fifths to train the classifier, one fifth held out. Raises UserError for too few images."""
    if (size := len(dataset.labels)) < 20:
        raise UserError(f"the data set has only {size} images: too few to hold a fifth out; at least 20 are needed")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    return subset(dataset, order[size // 5 :]), subset(dataset, order[: size // 5])


def augment(images, stream, coloured):
    """The batch with each image moved by up to 8% of its side, and more; `stream` is the generator of random numbers.

    Grey images, which may be digits, are also turned by up to 10 degrees and scaled by up to 10%. Coloured ones move by
    whole pixels, which blurs nothing, and half of them are mirrored.
    """
    turn, zoom, right, down, mirror = torch.rand(5, len(images), generator=stream) * 2 - 1
    right, down = 0.16 * right, 0.16 * down  # in the units of grid_sample a side is 2
    if coloured:
        half = images.shape[-1] / 2
        turn, zoom, mirror = torch.zeros_like(turn), torch.ones_like(zoom), mirror.sign()
        right, down = (half * right).round() / half, (half * down).round() / half
    else:
        turn, zoom, mirror = 0.17 * turn, 1 + 0.1 * zoom, torch.ones_like(mirror)
    rows = [mirror * zoom * turn.cos(), -zoom * turn.sin(), right, mirror * zoom * turn.sin(), zoom * turn.cos(), down]
    matrices = torch.stack(rows, dim=1).reshape(-1, 2, 3).to(images.device)
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def plan(dataset):
    """(steps, batch size) to train on `dataset`; at least 300 steps, however few the images."""
    size, pixels = len(dataset.labels), dataset.images[0, 0].numel()
    batch_size = min(128, size // 4)
    return max(300, round(min(EPOCHS * size, MOST_PIXELS / pixels) / batch_size)), batch_size


def classifier(dataset, cache, device):
    """A classifier trained on four fifths of the images of `dataset`, the same at every call; `cache` is its file.

    Returns (what sees images, its accuracy on the held-out fifth): 0.86 for CIFAR-10, 0.98 for digits at 16x16.
    """
    train_set, held_out = split(dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(dataset.images.shape[1], len(dataset.class_names))
    network.to(device, memory_format=torch.channels_last)
    content = hashlib.sha256(dataset.images.cpu().numpy().tobytes())
    content.update(dataset.labels.cpu().numpy().tobytes())
    fingerprint = f"{VERSION} {content.hexdigest()}"
    weights = None
    with suppress(Exception):  # missing, damaged or foreign: it is made again
        state = checkpoint.read(cache)
        weights = state["model_state_dict"] if state.get("fingerprint") == fingerprint else None
    if weights:
        network.load_state_dict(weights)
    else:
        print(f"training the classifier on {len(train_set.labels)} real images, this once", flush=True)
        train_classifier(network, train_set)
        try:
            checkpoint.save(cache, {"model_state_dict": network.state_dict(), "fingerprint": fingerprint})
        except UserError as error:  # no place to keep it: it serves this time
            print(error, file=sys.stderr)
    network.eval()
    see = partial(in_batches, lambda batch: network(to_float(batch)), device)
    return see, (see(held_out.images)[1].argmax(1) == held_out.labels).float().mean().item()


def train_classifier(network, dataset):
    """Trains `network`, in place. Data and augmentation of a step follow from its number alone."""
    steps, batch_size = plan(dataset)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05, fused=True)
    batches = Batches(dataset, batch_size, seed=0)
    coloured = not torch.equal(dataset.images, dataset.images[:, :1].expand_as(dataset.images))
    for step in tqdm(range(steps), "training the classifier", unit="step", delay=5, mininterval=5):
        images, labels = next(batches)
        images = augment(images, random_stream(0, step), coloured)
        images = images.contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(images)[1], labels, label_smoothing=0.1)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * lr_factor(step, steps // 4, 0.75, steps)
        optimizer.step()
        optimizer.zero_grad()
