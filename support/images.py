"""Images: conversion between [-1, 1] and 8 bits, and grids as PNG files."""

import torch
import torch.nn.functional as F
from PIL import Image

from support.config import writing


def to_float(images):
    """uint8 pixels to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float images in [-1, 1] to the nearest uint8 pixels; values outside are clamped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def tile(images, columns):
    """uint8 `[N, C, H, W]` as one picture `[rows * (H + 2), columns * (W + 2), C]` on white. torchvision's is slow to import."""
    images = F.pad(images, (1, 1, 1, 1), value=255)
    missing = -len(images) % columns
    images = torch.cat([images, torch.full_like(images[:1], 255).expand(missing, -1, -1, -1)])
    N, C, H, W = images.shape
    return images.reshape(N // columns, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(N // columns * H, columns * W, C)


def join(pictures, dim):
    """Pictures `[H, W, C]` of one size as one, along `dim`, with white gaps between them."""
    gap = torch.full_like(pictures[0].split(8, dim)[0], 255)
    return torch.cat([part for picture in pictures for part in (gap, picture)][1:], dim)


def save_grid(path, *blocks, columns):
    """Writes image batches `[N, C, H, W]` in [-1, 1] as one PNG: grids of `columns` columns, three in a row, enlarged if tiny."""
    tiles = [tile(to_uint8(block).cpu(), columns) for block in blocks]
    lines = [tiles[start : start + 3] for start in range(0, len(tiles), 3)]
    lines[-1] += [torch.full_like(tiles[0], 255)] * (len(lines[0]) - len(lines[-1]))
    picture = join([join(line, 1) for line in lines], 0)
    picture = Image.fromarray(picture.squeeze(2).numpy())
    scale = max(1, 64 // blocks[0].shape[-1])
    with writing(path):
        picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)


def save_comparison(path, teacher_images, student_images, labels):
    """Writes a PNG with two rows per class, at most ten: the teacher's uint8 images over the student's from the same noise."""
    classes = labels.unique()[:10]
    columns = min([16, *((labels == label).sum().item() for label in classes)])
    index = [(labels == label).nonzero().flatten()[:columns] for label in classes]
    rows = [images[row] for row in index for images in (teacher_images, student_images)]
    save_grid(path, to_float(torch.cat(rows)), columns=columns)


def save_diversity(path, sets, labels):
    """Writes a PNG with 8x8 images of one class from each of the `sets` (uint8 `[N, C, H, W]`, `labels` `[N]`).

    It is the class in which the last set varies least relative to the first. Returns that class.
    """

    def spread(images, of, label):
        part = images[of == label].float()
        return part.var(0).sum().item() if len(part) > 1 else float("inf")

    label = min(
        labels[0].unique().tolist(), key=lambda k: spread(sets[-1], labels[-1], k) / max(spread(sets[0], labels[0], k), 1e-9)
    )
    grids = [to_float(images[of == label][:64]) for images, of in zip(sets, labels, strict=True)]
    blank = torch.ones_like(grids[0][:1])
    save_grid(path, *[torch.cat([grid, blank.expand(64 - len(grid), -1, -1, -1)]) for grid in grids], columns=8)
    return label
