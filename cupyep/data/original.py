"""Are these the images that the name of a data set promises? Counts of each class, fingerprints of labels and images.

Files of one format have the same names and sizes whatever they show: Fashion-MNIST, KMNIST and MNIST, for example.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from cupyep.data.sources import SOURCES, Arrays, Source
from cupyep.errors import DataError

SAMPLES = 100  # images of a part that its fingerprint looks at
OWN = "for images of your own use Dataset.from_splits in Python"


def fingerprint(arrays: Arrays) -> str:
    """Return the MD5 sum of all labels (a byte each) and of every n-th image, about `SAMPLES` of them."""
    images, labels = arrays
    digest = hashlib.md5(labels.astype(np.uint8).tobytes())
    digest.update(np.ascontiguousarray(images[:: max(1, len(images) // SAMPLES)]))
    return digest.hexdigest()


def check_original(source: Source, arrays: tuple[Arrays, Arrays], where: str | Path) -> None:
    """Raise `DataError` if `arrays` (train, test), read from `where`, are not those of the data set `source`.

    Counts are compared with those of the whole data set, which every reader insists on; a table that was told another
    size, as tests do, has no counts to compare.
    """
    found = tuple(map(fingerprint, arrays))
    if found == source.fingerprints:
        return
    other = next((name for name, known in SOURCES.items() if known.fingerprints == found), None)
    if other is not None:
        raise DataError(
            f"{where}: holds {other}, not {source.name}; get the files of {source.name}, or use --dataset {other}, "
            f"which wants {SOURCES[other].accepts}"
        )
    for split, (_, labels), wanted in zip(("train", "test"), arrays, source.per_class, strict=True):
        if len(labels) == sum(wanted):
            _check_counts(source, split, labels, np.array(wanted), where)
    if source.fingerprints:
        raise DataError(
            f"{where}: the labels or images are not those of {source.name}, though their sizes are: other images, "
            f"another order or other labels; get the original files, or {OWN}"
        )


def _check_counts(source: Source, split: str, labels: np.ndarray, wanted: np.ndarray, where: str | Path) -> None:
    counts = np.bincount(labels, minlength=len(wanted))
    wrong = np.flatnonzero(counts != wanted)
    if wrong.size:
        c = int(wrong[0])
        raise DataError(
            f"{where}: {counts[c]} {split} images of class '{source.classes[c]}', {source.name} has {wanted[c]} "
            f"({wrong.size} classes differ); these are not the original data, get them again, or {OWN}"
        )
