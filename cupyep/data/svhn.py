"""SVHN, cropped digits: two MATLAB files with ``X`` (32, 32, 3, N) uint8 and ``y`` (N, 1), where 10 means digit 0.

Source: http://ufldl.stanford.edu/housenumbers/
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from cupyep.data.files import check_labels, find_file, read_bounded
from cupyep.data.matlab import read_matlab
from cupyep.data.sources import Arrays, Layout, Source
from cupyep.errors import DataError, one_line

SLACK = 16 << 20  # bytes granted to a file beside its pixels
FILES = ("train_32x32.mat", "test_32x32.mat")


def layouts(source: Source, folder: Path) -> list[Layout]:
    """Return the places below `folder` where the two files may lie."""
    found = []
    for place in (folder / "svhn", folder / "SVHN", folder):
        files = tuple(find_file(place, name) for name in FILES)
        found.append(Layout(files, functools.partial(_read, source, files)))
    return found


def _read(source: Source, files: tuple[Path, ...]) -> tuple[Arrays, Arrays]:
    return _read_split(source, files[0], source.train_count), _read_split(source, files[1], source.test_count)


def _read_split(source: Source, path: Path, count: int) -> Arrays:
    size = math.prod(source.shape) * count
    content = read_bounded(path, size + SLACK)
    try:
        variables = read_matlab(content, size + SLACK)
    except (ValueError, struct.error, zlib.error) as error:
        raise DataError(
            f"{path}: is not a readable MATLAB file ({one_line(error)}); it is truncated or damaged, get it again"
        ) from error
    for name, shape in {"X": (*source.shape, count), "y": (count, 1)}.items():
        if name not in variables or variables[name].shape != shape:
            found = f"shape {variables[name].shape}" if name in variables else "no such array"
            raise DataError(f"{path}: array '{name}' should have shape {shape}, found {found}; get the original file")
    images, labels = variables["X"], variables["y"]
    if images.kind != "uint8" or images.values.dtype != np.uint8 or labels.values is None:
        raise DataError(f"{path}: 'X' and 'y' should be uint8, found {images.kind} and {labels.kind}")
    classes = labels.values.reshape(count).astype(np.int64)
    classes[classes == 10] = 0
    check_labels(classes, len(source.classes), path)
    return np.ascontiguousarray(images.values.transpose(3, 0, 1, 2)), classes
