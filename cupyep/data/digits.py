"""The 8x8 digits bundled with scikit-learn: data for a first run on any machine, without network or files."""

from __future__ import annotations

import numpy as np

from cupyep.data.sources import Arrays, Source
from cupyep.errors import DataError

BRIGHTEST = 16  # the bundled images count ink from 0 to 16


def read(source: Source) -> tuple[Arrays, Arrays]:
    """Return (train, test), each images (N, 8, 8, 1) uint8 with 16 scaled to 255 and labels (N,) int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError('data set digits comes with scikit-learn: pip install "cupyep[demo]"') from error
    bundle = load_digits()
    if len(bundle.target) != source.train_count + source.test_count:
        raise DataError(f"scikit-learn's digits hold {len(bundle.target)} images, expected 1797")
    images = np.rint(bundle.images * (255 / BRIGHTEST)).astype(np.uint8)[..., None]
    labels = bundle.target.astype(np.int64)
    n = source.train_count
    return (images[:n], labels[:n]), (images[n:], labels[n:])
