"""Two classes of tiny images, and a tiny network, for the tests of `cupyep.training`."""

from __future__ import annotations

import numpy as np

from cupyep.data import Dataset, Split

TINY = {"arch": "vgg5", "width": 0.02, "free_steps": 6, "nudged_steps": 4, "batch_size": 16, "device": "cpu"}


def quadrant_data(train=40, test=20, flip=True):
    """Two classes of 16 x 16 images: the upper or the lower half is brighter. Mirroring keeps the class."""
    rng = np.random.default_rng(5)

    def split(name, count):
        labels = np.arange(count) % 2
        images = rng.integers(0, 100, (count, 16, 16, 3))
        for image, label in zip(images, labels, strict=True):
            image[8 * label : 8 * label + 8] += 120
        return Split(name, images.astype(np.uint8), labels.astype(np.int64))

    return Dataset.from_splits("quadrants", ("up", "down"), split("train", train), split("test", test), flip, pad=2)


def silent(_):
    """Take a line and print nothing."""
