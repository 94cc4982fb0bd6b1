"""Reading files that we did not write: whole, bounded in size, and with one clear line when something is wrong."""

from __future__ import annotations

import gzip
import hashlib
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupyep.errors import DataError, one_line

Arrays = tuple[np.ndarray, np.ndarray]
"""Images (N, H, W, C) uint8 and labels (N,) int64."""
#: What NumPy and zipfile raise on a damaged .npy or .npz file.
ARRAY_ERRORS = (
    OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError, zipfile.BadZipFile,
    zlib.error, tokenize.TokenError,
)  # fmt: skip
GZIP = b"\x1f\x8b"  # how a gzip file begins, and nothing else that is read here


@dataclass(frozen=True)
class Layout:
    """One accepted arrangement of files: it is there when all of `files` are, and `read` returns (train, test)."""

    place: Path
    files: tuple[Path, ...]
    read: Callable[[], tuple[Arrays, Arrays]]


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of `path`, decompressed when it begins as gzip files do, whatever it is called.

    `DataError` if it cannot be read, is a truncated or damaged gzip file, or holds more than `limit` bytes,
    decompressed.
    """
    try:
        with open(path, "rb") as raw, gzip.open(raw) if raw.peek(2).startswith(GZIP) else raw as file:
            content = file.read(limit + 1)  # one more: finds what is too long, and makes gzip compare its checksum
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); truncated or damaged, get it again") from error
    if len(content) > limit:
        raise DataError(f"{path}: holds more than the {limit} bytes expected; get the original file")
    return content


def plain_name(path: Path) -> str:
    """Return an original file's name for any of those it goes by: dots, capitals, ``.gz``, a second download."""
    name = re.sub(r"(\.gz|\.\d| ?\(\d\))+$", "", path.name.lower())
    return re.sub(r"\.(idx\d-ubyte)$", r"-\1", name)


def find_file(folder: Path, name: str) -> Path:
    """Return the file in `folder` that `plain_name` calls `name`, or else ``folder / name``.

    Some unpack every archive into a folder that is called like the file in it; that is looked into.
    """
    if (folder / name).is_file():
        return folder / name
    try:
        found = [path for path in sorted(folder.iterdir()) if plain_name(path) == name]
    except OSError:
        return folder / name
    found += [inner for path in found if path.is_dir() for inner in path.iterdir() if plain_name(inner) == name]
    return next((path for path in found if path.is_file()), folder / name)


def check_length(content: bytes | memoryview, expected: int, where: str | Path) -> None:
    """Raise `DataError` unless `content` has exactly `expected` bytes."""
    if len(content) != expected:
        raise DataError(f"{where}: holds {len(content)} bytes, expected {expected}; truncated, get it again")


def check_sum(
    content: bytes | memoryview, expected: str, where: str | Path, remedy: str = "get the original file"
) -> None:
    """Raise `DataError` unless the MD5 sum of `content` is the published one."""
    found = hashlib.md5(content).hexdigest()
    if found != expected:
        raise DataError(f"{where}: MD5 sum {found}, the original has {expected}; {remedy}")


def check_labels(labels: np.ndarray, classes: int, where: str | Path) -> None:
    """Raise `DataError` unless every label lies in ``0 .. classes - 1``."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        first = int(wrong[0])
        raise DataError(
            f"{where}: {wrong.size} of {labels.size} labels lie outside 0..{classes - 1} "
            f"(first: {int(labels[first])} at sample {first}); the data are damaged or of another data set"
        )
