"""Arrays laid into one block of memory, by when they are alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cupyep.ops.buffers import carve, padded_bytes

ALWAYS = -1  # all bits


class Request(NamedTuple):
    """An array that is wanted, and when it is alive: bit n for moment n."""

    shape: tuple[int, ...]
    dtype: Any
    alive: int = ALWAYS


def allot(requests: Sequence[Request]) -> tuple[list[int], int]:
    """Return the place in bytes of each array, and the bytes of all: what is alive at the same time does not overlap.

    The largest first, each in the lowest place that is free whenever it is alive.
    """
    sizes = [padded_bytes(request.shape, request.dtype) for request in requests]
    places = [0] * len(requests)
    placed: list[int] = []
    for n in sorted(range(len(requests)), key=lambda n: -sizes[n]):
        taken = sorted((places[m], places[m] + sizes[m]) for m in placed if requests[m].alive & requests[n].alive)
        for start, end in taken:
            if places[n] + sizes[n] <= start:
                break
            places[n] = max(places[n], end)
        placed.append(n)
    return places, max((place + size for place, size in zip(places, sizes, strict=True)), default=0)


class Stack:
    """Arrays laid into one block of memory, each on top of those before.

    What is released may be laid over by what comes next: so phases that follow one another share memory.

    Parameters
    ----------
    block : array of bytes, optional
        Without one only sizes and places are counted, and what is taken is None: a plan.
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
        return self.take_all(purpose, [Request(shape, dtype)])[0]

    def take_one_of(self, purpose: str, shapes: Sequence[tuple[int, ...]], dtype: Any) -> list[Any]:
        """Return one array a shape, all in the same place: only one of them holds data at a time."""
        return self.take_all(purpose, [Request(shape, dtype, 1 << n) for n, shape in enumerate(shapes)])

    def take_all(self, purpose: str, requests: Sequence[Request]) -> list[Any]:
        """Return one array a request; those that are never alive together share memory."""
        places, nbytes = allot(requests)
        start, self.top = self.top, self.top + nbytes
        self._taken.append((start, self.top, purpose))
        if self.top > self.peak:
            self.peak, self.at_peak = self.top, self._by_purpose()
        if self._block is None:
            return [None] * len(requests)
        return [
            carve(self._block[start + place :], [(request.shape, request.dtype)])[0]
            for place, request in zip(places, requests, strict=True)
        ]

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
