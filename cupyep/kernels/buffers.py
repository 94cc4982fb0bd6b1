"""Arrays that are allocated once and handed out again: nothing in a settle loop allocates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ALIGNMENT = 256  # bytes, of every array in an arena
Request = tuple[tuple[int, ...], Any]


class Buffers:
    """Named arrays on one device, allocated at first request and reused afterwards.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    dtype : dtype
        Default element type.
    """

    def __init__(self, xp: Any, dtype: Any):
        self.xp = xp
        self.dtype = np.dtype(dtype)
        self._arrays: dict[Any, Any] = {}

    def get(self, name: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """Return the array called `name`; its content is whatever was last written there."""
        dtype = self.dtype if dtype is None else np.dtype(dtype)
        array = self._arrays.get(name)
        if array is None or array.shape != shape or array.dtype != dtype:
            array = self._arrays[name] = self.xp.empty(shape, dtype)
        return array

    @property
    def nbytes(self) -> int:
        """Total size of the arrays held, in bytes."""
        return sum(array.nbytes for array in self._arrays.values())


class Arena:
    """One block of memory that several users view in turn, each from its start.

    The scratch of an edge (padded map, columns, map before pooling) is dead as soon as the edge is done, so
    all edges share one arena as large as the hungriest needs.
    """

    def __init__(self, xp: Any, nbytes: int):
        self.block = xp.empty(nbytes, np.uint8)

    @staticmethod
    def size(requests: list[Request]) -> int:
        """Return the bytes that `requests`, pairs of shape and dtype, take together."""
        return sum(_padded(shape, dtype) for shape, dtype in requests)

    def views(self, requests: list[Request]) -> list[Any]:
        """Return one array a request, laid out one after the other from the start of the block."""
        return carve(self.block, requests)


def carve(block: Any, requests: list[Request]) -> list[Any]:
    """Return one array a request, laid out one after the other from the start of `block`, an array of bytes."""
    arrays, start = [], 0
    for shape, dtype in requests:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        arrays.append(block[start : start + nbytes].view(dtype).reshape(shape))
        start += _padded(shape, dtype)
    return arrays


def _padded(shape: tuple[int, ...], dtype: Any) -> int:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
