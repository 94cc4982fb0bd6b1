"""MNIST and Fashion-MNIST: four files in the IDX format, plain or gzip-compressed, under any of their usual names.

IDX: four magic bytes ``0 0 type rank`` (type 8 is uint8), `rank` big-endian uint32 lengths, then the bytes.
Source: https://yann.lecun.com/exdb/mnist/
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import numpy as np

from cupyep.data.files import check_labels, check_length, find_file, read_bounded
from cupyep.data.sources import Arrays, Layout, Source
from cupyep.errors import DataError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST", "fashion_mnist", "fashion", "fashionmnist"),
}


def layouts(source: Source, folder: Path) -> list[Layout]:
    """Return the places below `folder` where the four files may lie.

    Both data sets use the same file names, so `folder` itself counts for Fashion-MNIST only when it is named
    so, and for MNIST only when it is not.
    """
    places = [folder / name for name in FOLDERS[source.name]]
    named_fashion = {"fashion-mnist", "FashionMNIST", "fashion_mnist"} & {folder.name, folder.parent.name}
    if bool(named_fashion) == (source.name == "fashion-mnist"):
        places.append(folder)
    return [_layout(source, place) for place in places]


def _layout(source: Source, place: Path) -> Layout:
    files = tuple(find_file(place, name) for name in FILES)
    return Layout(files, functools.partial(_read, source, files))


def _read(source: Source, files: tuple[Path, ...]) -> tuple[Arrays, Arrays]:
    train_images, train_labels, test_images, test_labels = files
    return (
        _read_split(source, train_images, train_labels, source.train_count),
        _read_split(source, test_images, test_labels, source.test_count),
    )


def _read_split(source: Source, images: Path, labels: Path, count: int) -> Arrays:
    height, width, _ = source.shape
    pixels = read_idx(images, (count, height, width))
    classes = read_idx(labels, (count,)).astype(np.int64)
    check_labels(classes, len(source.classes), labels)
    return pixels[..., None], classes


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the uint8 array of `shape` in the IDX file `path`; any other content is a `DataError`."""
    header = 4 + 4 * len(shape)
    expected = header + int(np.prod(shape))
    content = read_bounded(path, expected)
    if len(content) < header:
        raise DataError(f"{path}: ends within its header; it is truncated, get it again")
    if content[:4] != bytes((0, 0, 8, len(shape))):
        raise DataError(f"{path}: is not an IDX file of uint8 with {len(shape)} dimensions; get the original file")
    lengths = struct.unpack(f">{len(shape)}I", content[4:header])
    if lengths != shape:
        raise DataError(f"{path}: holds an array of shape {lengths}, expected {shape}; get the original file")
    check_length(content, expected, path)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
