"""Arrays that are allocated once and handed out again: nothing in a settle loop allocates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ALIGNMENT = 256  # bytes, of every array in an arena
Request = tuple[tuple[int, ...], Any]


class Stack:
    """Arrays laid into one block of memory, each on top of those before.

    What is released may be laid over by what comes next: so phases that follow one another share memory.

    Parameters
    ----------
    block : array of bytes, optional
        Without one it lays out on paper: sizes and places are counted, and what is taken is None.
    base : int
        Bytes at the start of the block that are left alone.

    Attributes
    ----------
    top : int
        Bytes in use.
    peak : int
        The largest top so far.
    at_peak : dict
        Bytes by purpose when the top was highest.
    """

    def __init__(self, block: Any = None, base: int = 0):
        self._block = block
        self._taken: list[tuple[int, int, str]] = []  # from, to, what for
        self.top = self.peak = base
        self.at_peak: dict[str, int] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array whose content is whatever was last written there."""
        return self.take_turns(purpose, [shape], dtype)[0]

    def take_turns(self, purpose: str, shapes: Sequence[tuple[int, ...]], dtype: Any) -> list[Any]:
        """Return one array a shape, all in the same place: only one of them holds data at a time."""
        start, nbytes = self.top, max((_padded(shape, dtype) for shape in shapes), default=0)
        self.top += nbytes
        self._taken.append((start, self.top, purpose))
        if self.top > self.peak:
            self.peak, self.at_peak = self.top, self._by_purpose()
        if self._block is None:
            return [None] * len(shapes)
        return [carve(self._block[start:], [(shape, dtype)])[0] for shape in shapes]

    def since(self, top: int, dtype: Any) -> Any:
        """Return all that lies above `top`, a former value of the attribute, as one array: to fill it at once."""
        return None if self._block is None else self._block[top : self.top].view(dtype)

    def release(self, top: int) -> None:
        """Give back what was taken above `top`, a former value of the attribute."""
        self.top = top
        self._taken = [taken for taken in self._taken if taken[1] <= top]

    def _by_purpose(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for start, end, purpose in self._taken:
            sizes[purpose] = sizes.get(purpose, 0) + end - start
        return {purpose: size for purpose, size in sizes.items() if size}


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
