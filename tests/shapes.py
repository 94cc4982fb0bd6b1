"""A folder of pictures made on the spot: discs and bars, PNG and JPEG, of many sizes, some on their side by EXIF."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDEWAYS = 6  # EXIF's orientation: to be turned by 90 degrees clockwise to stand upright


def shape_of(kind, rng, height, width):
    """Return a bright shape on a dark, noisy ground, (height, width, 3): a disc, or a bar from left to right."""
    y, x = np.mgrid[:height, :width]
    side = min(height, width)
    cy, cx = height / 2 + rng.uniform(-0.1, 0.1) * side, width / 2 + rng.uniform(-0.1, 0.1) * side
    inside = (y - cy) ** 2 + (x - cx) ** 2 < (0.3 * side) ** 2 if kind == "disc" else abs(y - cy) < 0.12 * side
    image = rng.integers(0, 60, (height, width, 3))
    image[inside] += rng.integers(120, 190, 3)
    return image.astype(np.uint8)


def make_folder(folder, discs, bars, seed=0, low=20, high=60):
    """Fill `folder` with the classes ``bar`` and ``disc``; every third picture is stored on its side."""
    rng = np.random.default_rng(seed)
    for kind, count in (("disc", discs), ("bar", bars)):
        (folder / kind).mkdir(parents=True)
        for n in range(count):
            pixels, exif = shape_of(kind, rng, *rng.integers(low, high, 2)), Image.Exif()
            if n % 3 == 0:
                pixels = np.rot90(pixels)  # counter-clockwise
                exif[0x0112] = SIDEWAYS
            path = folder / kind / f"{n:03d}.{'png' if n % 2 else 'jpg'}"
            Image.fromarray(pixels).save(path, exif=exif)
    return folder
