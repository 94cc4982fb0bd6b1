"""Are the files, and the images in them, what the name of a data set promises?

Everything is read as training reads it, so that a truncated or damaged file is named by the reader's own message. Files
of one format have the same names and sizes whatever they show: Fashion-MNIST, KMNIST and MNIST, for example.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupyep.data.files import Arrays, Layout, check_sum, plain_name, read_bounded
from cupyep.data.formats import layouts_found
from cupyep.data.sources import SOURCES, Source
from cupyep.errors import DataError

SAMPLES = 100  # images of a part that its fingerprint looks at
LIMIT = 1 << 31  # bytes of a file that has a published sum; the largest has 1.3 GB
OWN = "for images of your own use --dataset file:PATH"


@dataclass(frozen=True)
class Finding:
    """What was found of one data set in one place."""

    place: str
    good: bool
    text: str  # one line: what was right, or what is wrong and what to do


def verify(name: str, folder: Path) -> Iterator[Finding]:
    """Yield a finding for every complete set of files of the data set `name` below `folder`; nothing where none is."""
    source = SOURCES[name]
    if source.remotes or importlib.util.find_spec("sklearn") is not None:
        for layout in layouts_found(name, folder)[0]:
            yield _finding(source, layout)


def _finding(source: Source, layout: Layout) -> Finding:
    try:
        check_original(source, layout.read(), layout.place)
        compared = sum(_check_file(source, file) for file in layout.files)
    except DataError as error:
        return Finding(str(layout.place), False, str(error))
    ranges = [f"{min(c)}" if min(c) == max(c) else f"{min(c)} to {max(c)}" for c in source.per_class]
    counts = f"{source.train_count} + {source.test_count} images, {' + '.join(ranges)} a class"
    sums = f"MD5 sums of {compared} files as published" if compared else "no MD5 sums published for these files"
    return Finding(str(layout.place), True, f"{counts}; {sums}")


def _check_file(source: Source, file: Path) -> bool:
    """Return whether there is a published MD5 sum for `file`; raise `DataError` if there is and it has another."""
    known = {Path(remote.place).name: remote.md5 for remote in source.remotes} | dict(source.sums)
    if plain_name(file) in known:  # compressed anew by some mirrors: the content counts
        check_sum(read_bounded(file, LIMIT), known[plain_name(file)], file)
    elif file.name in known:
        check_sum(file.read_bytes(), known[file.name], file)
    else:
        return False
    return True


def fingerprint(arrays: Arrays) -> str:
    """Return the MD5 sum of all labels (a byte each) and of every n-th image, about `SAMPLES` of them."""
    images, labels = arrays
    digest = hashlib.md5(labels.astype(np.uint8).tobytes())
    digest.update(np.ascontiguousarray(images[:: max(1, len(images) // SAMPLES)]).data)
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
