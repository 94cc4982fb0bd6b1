"""Arithmetic on images (N, H, W, C) in bounded memory: resizing by area, statistics per channel, checksums."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

BLOCK_BYTES = 8 << 20  # of images treated at a time


def blocks(images: Any) -> Iterator[slice]:
    """Return the rows of an array, a moderate number of them at a time."""
    size = max(1, images.dtype.itemsize * math.prod(images.shape[1:]))
    step = max(1, BLOCK_BYTES // size)
    return (slice(start, start + step) for start in range(0, len(images), step))


def shrink(images: np.ndarray, factor: int) -> np.ndarray:
    """Return images (N, H, W, C), of uint8, each `factor` x `factor` square replaced by its mean, rounded half up.

    `factor` is a common divisor of H and W.
    """
    if factor == 1:
        return images
    count, height, width, channels = images.shape
    small = np.empty((count, height // factor, width // factor, channels), np.uint8)
    area = factor * factor
    for rows in blocks(images):
        total = np.full(small[rows].shape, area // 2, np.uint32)
        for dy in range(factor):
            for dx in range(factor):
                total += images[rows, dy::factor, dx::factor]
        total //= area
        small[rows] = total
    return small


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Return square `images` as `size` x `size`: shrunk (`shrink`), or enlarged by repeating pixels."""
    old = images.shape[1]
    if size <= old:
        return shrink(images, old // size)
    return images.repeat(size // old, axis=1).repeat(size // old, axis=2)


def bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Return float `images` (N, H, W, C) as (N, `size`, `size`, C), bilinear, and averaged where they shrink.

    As Pillow's BILINEAR, and PyTorch's ``interpolate(mode="bilinear", antialias=True)``: pixels are squares, and the
    weights of a new pixel's neighbours fall linearly to zero a (larger) pixel away.
    """
    count, height, width, channels = images.shape
    rows, columns = (_triangles(old, size).astype(images.dtype) for old in (height, width))
    tall = rows @ images.reshape(count, height, width * channels)
    return (columns @ tall.reshape(count * size, width, channels)).reshape(count, size, size, channels)


def _triangles(old: int, new: int) -> np.ndarray:
    """Return the weights (new, old) of old pixels in new ones."""
    scale = old / new
    places = (np.arange(new) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - abs(np.arange(old) - places[:, None]) / max(scale, 1.0))
    return weights / weights.sum(axis=1, keepdims=True)


def channel_statistics(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation over all pixels of images (N, H, W, C), uint8 or float, each float32 (C,).

    They are those of ``images / 255`` where they are uint8, and of floats as they are. Sums of uint8 images are exact
    integers; those of floats are taken block by block, each from its own mean, so that a large mean costs no digits. A
    channel without any variation gets std 1, so that it can be divided by.
    """
    mean, std = _of_bytes(images) if images.dtype == np.uint8 else _of_floats(images)
    return mean.astype(np.float32), std.astype(np.float32)


def _of_bytes(images: Any) -> tuple[np.ndarray, np.ndarray]:
    channels, pixels = images.shape[-1], math.prod(images.shape[:-1])
    counts, values = np.zeros((channels, 256), np.int64), np.arange(256)
    for rows in blocks(images):
        block = images[rows]
        for c in range(channels):
            counts[c] += np.bincount(block[..., c].ravel(), minlength=256)
    mean, std = np.empty((2, channels))
    for c in range(channels):
        total, squares = int(counts[c] @ values), int(counts[c] @ values**2)
        # In Python's unbounded integers: pixels**2 times the variance, exactly 0 for a constant channel.
        spread = pixels * squares - total**2
        mean[c] = total / (pixels * 255)
        std[c] = math.sqrt(spread) / (pixels * 255) if spread else 1.0
    return mean, std


def _of_floats(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Combine the mean and the squares of every block with those before it (Chan, Golub and LeVeque 1983)."""
    channels, count = images.shape[-1], 0
    mean, squares = np.zeros((2, channels))
    for rows in blocks(images):
        block = images[rows].reshape(-1, channels).astype(np.float64)
        own, more = block.mean(axis=0), len(block)
        block -= own
        squares += (block**2).sum(axis=0) + (own - mean) ** 2 * (count * more / (count + more))
        mean += (own - mean) * (more / (count + more))
        count += more
    std = np.sqrt(squares / count)
    return mean, np.where(std > 1e-12 * np.abs(mean), std, 1.0)


def first_not_finite(images: Any) -> int | None:
    """Return the number of the first image with a NaN or an infinite value, None if there is none."""
    for rows in blocks(images) if images.dtype.kind == "f" else ():
        wrong = ~np.isfinite(images[rows]).all(axis=(1, 2, 3))
        if wrong.any():
            return rows.start + int(wrong.argmax())
    return None


def add_to_digest(digest: Any, *arrays: Any) -> None:
    """Update a checksum of `hashlib` by the shapes and the values of arrays, a block at a time."""
    for array in arrays:
        digest.update(repr(array.shape).encode())
        for rows in blocks(array):
            digest.update(np.ascontiguousarray(array[rows]))
