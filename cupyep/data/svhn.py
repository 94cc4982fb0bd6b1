"""SVHN, cropped digits: two MATLAB files with ``X`` (32, 32, 3, N) uint8 and ``y`` (N, 1), where 10 means digit 0.

Source: http://ufldl.stanford.edu/housenumbers/
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io

from cupyep.data.files import check_labels, one_line
from cupyep.data.sources import Arrays, Layout, Source
from cupyep.errors import DataError

FILES = ("train_32x32.mat", "test_32x32.mat")


def layouts(source: Source, folder: Path) -> list[Layout]:
    """Return the places below `folder` where the two files may lie."""
    found = []
    for place in (folder / "svhn", folder / "SVHN", folder):
        files = tuple(place / name for name in FILES)
        found.append(Layout(files, functools.partial(_read, source, files)))
    return found


def _read(source: Source, files: tuple[Path, ...]) -> tuple[Arrays, Arrays]:
    return _read_split(source, files[0], source.train_count), _read_split(source, files[1], source.test_count)


def _read_split(source: Source, path: Path, count: int) -> Arrays:
    # The shapes are looked at before any data are decompressed.
    shapes = {name: shape for name, shape, _ in _matlab(scipy.io.whosmat, path)}
    expected = {"X": (*source.shape, count), "y": (count, 1)}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = f"shape {shapes[name]}" if name in shapes else "no such array"
            raise DataError(f"{path}: array '{name}' should have shape {shape}, found {found}; get the original file")
    content = _matlab(functools.partial(scipy.io.loadmat, variable_names=list(expected)), path)
    images, labels = content["X"], content["y"]
    if images.dtype != np.uint8 or labels.dtype.kind not in "ui":
        raise DataError(f"{path}: 'X' and 'y' should be uint8, found {images.dtype} and {labels.dtype}")
    labels = labels.reshape(count).astype(np.int64)
    labels[labels == 10] = 0
    check_labels(labels, len(source.classes), path)
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels


def _matlab(read: Any, path: Path) -> Any:
    try:
        return read(path)
    except Exception as error:  # scipy.io raises many types on damaged files; each becomes one line that names the file
        raise DataError(
            f"{path}: is not a readable MATLAB file ({one_line(error)}); it is truncated or damaged, get it again"
        ) from error
