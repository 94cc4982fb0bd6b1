"""Arithmetic on uint8 images (N, H, W, C): resizing by area, statistics per channel. Exact, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

BLOCK = 2000  # images treated at a time


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def shrink(images: np.ndarray, factor: int) -> np.ndarray:
    """Return `images` with every `factor` x `factor` square replaced by its mean, rounded half up.

    Parameters
    ----------
    images : ndarray of uint8, shape (N, H, W, C)
    factor : int
        A common divisor of H and W.

    Returns
    -------
    ndarray of uint8, shape (N, H / factor, W / factor, C)
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
    channels = images.shape[-1]
    total, squares = np.zeros((2, channels), np.int64)
    for rows in _blocks(len(images)):
        block = images[rows].reshape(len(images[rows]), -1).astype(np.uint32)
        total += _sum_per_channel(block, channels)
        block *= block
        squares += _sum_per_channel(block, channels)
    pixels = images.size // channels
    # In Python's unbounded integers: pixels**2 times the variance, exactly 0 for a constant channel.
    spread = [pixels * int(q) - int(t) ** 2 for t, q in zip(total, squares, strict=True)]
    mean = total / (pixels * 255)
    std = [math.sqrt(s) / (pixels * 255) if s else 1.0 for s in spread]
    return mean.astype(np.float32), np.array(std, np.float32)


def _sum_per_channel(block: np.ndarray, channels: int) -> np.ndarray:
    per_pixel = block.sum(axis=0, dtype=np.uint32)  # at most BLOCK * 255**2, far below 2**32
    return per_pixel.reshape(-1, channels).sum(axis=0, dtype=np.int64)
