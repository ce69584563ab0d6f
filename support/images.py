"""Images: conversion between [-1, 1] and 8 bits, resizing, and grids as PNG files."""

import torch
import torch.nn.functional as F
from PIL import Image

from support.script import writing


def to_float(images):
    """uint8 pixels to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float images in [-1, 1] to the nearest uint8 pixels; values outside are clamped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def resize(images, resolution):
    """uint8 `[N, C, H, H]` to `resolution`: means over blocks of pixels if it divides H, else antialiased bilinear."""
    size = images.shape[-1]
    if size == resolution:
        return images
    how = dict(mode="area") if size % resolution == 0 else dict(mode="bilinear", antialias=True)
    chunks = [F.interpolate(chunk.float(), (resolution, resolution), **how) for chunk in images.split(4096)]
    return torch.cat([chunk.round().clamp(0, 255).to(torch.uint8) for chunk in chunks])


def save_grid(path, *blocks, columns):
    """Writes batches `[N, C, H, W]` in [-1, 1] as one PNG: grids of `columns` columns, three in a row, enlarged."""
    from torchvision.utils import make_grid  # here: it takes seconds to import

    tiles = [make_grid(to_uint8(block).cpu(), columns, pad_value=255) for block in blocks]
    picture = Image.fromarray(make_grid(tiles, 3, padding=8, pad_value=255).permute(1, 2, 0).numpy())
    scale = max(1, 64 // blocks[0].shape[-1])
    with writing(path):
        picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)
