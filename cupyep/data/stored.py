"""Images that stay where they are, in a file or in a larger array, and are read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESIDENT_BYTES = 64 << 20  # images of so many bytes are read as a whole, more of them batch by batch


class StoredImages:
    """What an array of images looks like as long as only some are read at a time.

    `read` takes a slice, or an array of row numbers in any order, and returns these images, a new array or a view.
    `shape` is (N, H, W, C) of all of them, `dtype` uint8, or float32 to which anything else is converted. Of the rows
    of `read` only those of `rows` count, if given.
    """

    ndim = 4

    def __init__(
        self, read: Callable[[Any], np.ndarray], shape: Sequence[int], dtype: Any, rows: np.ndarray | None = None
    ):
        self._read, self._rows = read, rows
        self.shape = (shape[0] if rows is None else len(rows), *shape[1:])
        self.dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_large(self) -> bool:
        """Whether they are better not read as a whole."""
        return self.nbytes > RESIDENT_BYTES

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return the images of a slice or of an array of row numbers, in memory."""
        with np.errstate(over="ignore"):  # what becomes infinite is found by who looks for it
            images = self._read(rows if self._rows is None else self._rows[rows])
            return np.ascontiguousarray(images.reshape(-1, *self.shape[1:]), self.dtype)

    def select(self, rows: np.ndarray) -> StoredImages:
        """Return the images in some rows, still where they are."""
        return StoredImages(self._read, self.shape, self.dtype, rows if self._rows is None else self._rows[rows])


def stored(read: Callable[[Any], np.ndarray], shape: Sequence[int], dtype: np.dtype) -> StoredImages:
    """Return images that `read` gives as (N, H, W, C) or (N, H, W) of any `dtype`; `ValueError` if it is no number."""
    if dtype.kind not in "uifb":
        raise ValueError(f"images of {dtype}; they should be uint8, other integers or floats")
    shape = (*shape, 1) if len(shape) == 3 else shape
    return StoredImages(read, shape, np.uint8 if dtype == np.uint8 else np.float32)


def chosen(images: Any, rows: np.ndarray) -> Any:
    """Return some rows of an array of images: a copy, or as `StoredImages` where they are that."""
    return images.select(rows) if isinstance(images, StoredImages) else images[rows]


def joined(first: Any, second: Any) -> Any:
    """Return two arrays of images, one behind the other, without copying what is stored."""
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return np.concatenate([first, second])
    count, total = len(first), len(first) + len(second)

    def read(rows: Any) -> np.ndarray:
        numbers = np.arange(total)[rows]
        found, early = np.empty((len(numbers), *first.shape[1:]), first.dtype), numbers < count
        found[early], found[~early] = first[numbers[early]], second[numbers[~early] - count]
        return found

    return StoredImages(read, (total, *first.shape[1:]), first.dtype)
