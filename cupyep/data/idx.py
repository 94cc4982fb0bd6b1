"""IDX files of MNIST, Fashion-MNIST, KMNIST and EMNIST: plain bytes, checked as such, in a folder or EMNIST's archive.

Source: https://yann.lecun.com/exdb/mnist/
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from cupyep.data.files import ARRAY_ERRORS, Arrays, Layout, check_labels, check_length, find_file, read_bounded
from cupyep.data.sources import IDX_FILES, Source, emnist_file
from cupyep.errors import DataError, one_line

FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST", "fashion_mnist", "fashion", "fashionmnist"),
    "kmnist": ("kmnist", "KMNIST/raw", "KMNIST"),
}
NAMED_AFTER = {"fashion-mnist": {"fashion-mnist", "FashionMNIST", "fashion_mnist"}, "kmnist": {"kmnist", "KMNIST"}}
EMNIST_FOLDERS = ("emnist", "EMNIST/raw", "EMNIST/raw/gzip", "emnist/gzip", "EMNIST", "gzip", ".")
EMNIST_ARCHIVES = ("emnist/gzip.zip", "EMNIST/raw/gzip.zip", "EMNIST/gzip.zip", "gzip.zip")


def plain(source: Source, folder: Path) -> Iterator[Layout]:
    """Yield where MNIST, Fashion-MNIST and KMNIST may lie.

    All of them use the same file names, so `folder` itself counts for Fashion-MNIST and KMNIST only when it is named
    so, and for MNIST only when it is not.
    """
    names, called = FOLDERS[source.name], {folder.name, folder.parent.name}
    named = next((name for name, known in NAMED_AFTER.items() if known & called), "mnist")
    for name in (*names, ".") if named == source.name else names:
        files = tuple(find_file(folder / name, file) for file in IDX_FILES)
        yield Layout(folder / name, files, partial(_read, source, files))


def emnist(source: Source, folder: Path) -> Iterator[Layout]:
    """Yield where a part of EMNIST may lie: files in a folder, or members of the original archive."""
    names = tuple(emnist_file(source.name.removeprefix("emnist-"), file) for file in IDX_FILES)
    for place in EMNIST_FOLDERS:
        files = tuple(find_file(folder / place, name) for name in names)
        yield Layout(folder / place, files, partial(_read, source, files))
    members = tuple(Path(f"gzip/{name}.gz") for name in names)
    for place in EMNIST_ARCHIVES:
        yield Layout(folder / place, (folder / place,), partial(_read, source, members, folder / place))


def _read(source: Source, files: tuple[Path, ...], archive: Path | None = None) -> tuple[Arrays, Arrays]:
    """Return the images in four files, or in members of an archive called so."""

    def split(images: Path, labels: Path, count: int) -> Arrays:
        first = 1 if source.name == "emnist-letters" else 0  # letters count from 1
        classes = read_idx(labels, (count,), archive).astype(np.int64) - first
        check_labels(classes, len(source.classes), labels)
        pixels = read_idx(images, (count, *source.shape[:2]), archive)
        if source.name.startswith("emnist-"):  # rows and columns are exchanged
            pixels = np.ascontiguousarray(pixels.transpose(0, 2, 1))
        return pixels[..., None], classes

    return split(files[0], files[1], source.train_count), split(files[2], files[3], source.test_count)


def read_idx(path: Path, shape: tuple[int, ...], archive: Path | None = None) -> np.ndarray:
    """Return the uint8 array of `shape` in an IDX file, or a member of an archive; other content is a `DataError`.

    IDX: four magic bytes ``0 0 type rank`` (type 8 is uint8), `rank` big-endian uint32 lengths, then the bytes.
    """
    header = 4 + 4 * len(shape)
    expected = header + math.prod(shape)
    where = path if archive is None else f"{archive}: {path.as_posix()}"
    content = read_bounded(path, expected) if archive is None else _member(archive, path, expected + 1)
    if len(content) < header:
        raise DataError(f"{where}: ends within its header; it is truncated, get it again")
    if content[:4] != bytes((0, 0, 8, len(shape))):
        raise DataError(f"{where}: is not an IDX file of uint8 with {len(shape)} dimensions; get the original file")
    lengths = struct.unpack(f">{len(shape)}I", content[4:header])
    if lengths != shape:
        raise DataError(f"{where}: holds an array of shape {lengths}, expected {shape}; get the original file")
    check_length(content, expected, where)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _member(archive: Path, member: Path, most: int) -> bytes:
    try:
        with zipfile.ZipFile(archive) as file, file.open(member.as_posix()) as raw, gzip.open(raw) as content:
            return content.read(most)
    except ARRAY_ERRORS as error:
        where = f"{archive}: {member.as_posix()}"
        raise DataError(f"{where}: cannot be read ({one_line(error)}); get the archive again") from error
