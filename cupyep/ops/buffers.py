"""Scratch that is allocated once and handed out again: nothing in a settle loop allocates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ALIGNMENT = 256  # bytes, of every array in an arena
Request = tuple[tuple[int, ...], Any]


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
        return sum(padded_bytes(shape, dtype) for shape, dtype in requests)

    def views(self, requests: list[Request]) -> list[Any]:
        """Return one array a request, laid out one after the other from the start of the block."""
        return carve(self.block, requests)


def carve(block: Any, requests: list[Request]) -> list[Any]:
    """Return one array a request, laid out one after the other from the start of `block`, an array of bytes."""
    arrays, start = [], 0
    for shape, dtype in requests:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        arrays.append(block[start : start + nbytes].view(dtype).reshape(shape))
        start += padded_bytes(shape, dtype)
    return arrays


def padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Return the bytes that an array takes in an arena."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
