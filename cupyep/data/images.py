"""Arithmetic on uint8 images (N, H, W, C): resizing by area, statistics per channel. Exact, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

BLOCK = 2000  # images treated at a time


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def shrink(images: np.ndarray, factor: int) -> np.ndarray:
    """Return images (N, H, W, C), of uint8, each `factor` x `factor` square replaced by its mean, rounded half up.

    `factor` is a common divisor of H and W.
    """
    if factor == 1:
        return images
    count, height, width, channels = images.shape
    small = np.empty((count, height // factor, width // factor, channels), np.uint8)
    area = factor * factor
    for rows in _blocks(count):
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


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of ``images / 255`` over all pixels, each float32 (C,).

    The sums are exact integers. A channel without any variation gets std 1, so that it can be divided by.
    """
    values, pixels = np.arange(256), images[..., 0].size
    mean, std = np.empty((2, images.shape[-1]), np.float32)
    for c in range(images.shape[-1]):
        counts = sum(np.bincount(images[rows, ..., c].ravel(), minlength=256) for rows in _blocks(len(images)))
        total, squares = int(counts @ values), int(counts @ values**2)
        # In Python's unbounded integers: pixels**2 times the variance, exactly 0 for a constant channel.
        spread = pixels * squares - total**2
        mean[c] = total / (pixels * 255)
        std[c] = math.sqrt(spread) / (pixels * 255) if spread else 1.0
    return mean, std
