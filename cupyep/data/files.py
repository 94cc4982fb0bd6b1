"""Reading files that we did not write: whole, bounded in size, and with one clear line when something is wrong."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from cupyep.errors import DataError


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of `path`, decompressed when its name ends in ``.gz``.

    Parameters
    ----------
    path : Path
    limit : int
        Largest content accepted, in bytes after decompression.

    Raises
    ------
    DataError
        If the file cannot be read, is a truncated or damaged gzip file, or holds more than `limit` bytes.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(limit + 1)  # one more: finds what is too long, and makes gzip compare its checksum
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); truncated or damaged, get it again") from error
    if len(content) > limit:
        raise DataError(f"{path}: holds more than the {limit} bytes expected; get the original file")
    return content


def check_length(content: bytes | memoryview, expected: int, where: str | Path) -> None:
    """Raise `DataError` unless `content` has exactly `expected` bytes."""
    if len(content) != expected:
        raise DataError(f"{where}: holds {len(content)} bytes, expected {expected}; truncated, get it again")


def check_labels(labels: np.ndarray, classes: int, where: str | Path) -> None:
    """Raise `DataError` unless every label lies in ``0 .. classes - 1``."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        first = int(wrong[0])
        raise DataError(
            f"{where}: {wrong.size} of {labels.size} labels lie outside 0..{classes - 1} "
            f"(first: {int(labels[first])} at sample {first}); the data are damaged or of another data set"
        )


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return ``Type: message`` of `error` on one line of at most about `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[:limit] + "..."
