"""Pooling over non-overlapping ``p x p`` windows, its winners and its adjoint, channels last.

Winners are one byte each: the offset ``dy * p + dx`` of the maximum in its window; ties go to the first in row
order. Rows and columns that do not fill a window are dropped (floor mode) and get zero from the adjoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cupyep.backend import array_module


def _windows(u: Any, p: int) -> Iterator[tuple[int, Any]]:
    """Yield ``(offset, view)``: the view of shape (n, H // p, W // p, C) of the units at that offset of each window."""
    height, width = u.shape[1] // p * p, u.shape[2] // p * p
    for dy in range(p):
        for dx in range(p):
            yield dy * p + dx, u[:, dy:height:p, dx:width:p]


def _clear_remainder(u: Any, p: int) -> None:
    height, width = u.shape[1] // p * p, u.shape[2] // p * p
    if height < u.shape[1]:
        u[:, height:] = 0
    if width < u.shape[2]:
        u[:, :height, width:] = 0


def max_pool(u: Any, p: int, out: Any, winners: Any, mask: Any) -> None:
    """Write the window maxima of `u` into `out` and their offsets into `winners`.

    Parameters
    ----------
    u : array of shape (n, H, W, C)
    p : int
    out : array of shape (n, H // p, W // p, C)
    winners : uint8 array of the shape of `out`
    mask : bool array of the shape of `out`
        Scratch.
    """
    xp = array_module(u)
    greater = mask.view(winners.dtype)
    for offset, view in _windows(u, p):
        if offset == 0:
            out[...] = view
            winners[...] = 0
            continue
        xp.greater(view, out, out=mask)
        # Offsets rise, so the new one is the larger. (A copy by mask, ``copyto``, takes seven times as long in NumPy.)
        xp.multiply(greater, offset, out=greater, dtype=winners.dtype)
        xp.maximum(winners, greater, out=winners)
        xp.maximum(out, view, out=out)


def max_gather(u: Any, p: int, winners: Any, out: Any, mask: Any) -> None:
    """Write the units of `u` at given winners into `out`: max-pooling linearised, the operator G.

    The other units of `u` are overwritten by zeros.
    """
    xp = array_module(u)
    for offset, view in _windows(u, p):
        xp.equal(winners, winners.dtype.type(offset), out=mask)
        if offset == 0:
            xp.multiply(view, mask, out=out)
            continue
        xp.multiply(view, mask, out=view)
        out += view


def max_scatter(s: Any, p: int, winners: Any, out: Any, mask: Any) -> None:
    """Write `s` to where its winners were in `out` (n, H, W, C), zero elsewhere: U, the adjoint of G."""
    xp = array_module(s)
    for offset, view in _windows(out, p):
        xp.equal(winners, winners.dtype.type(offset), out=mask)
        xp.multiply(s, mask, out=view, dtype=out.dtype)
    _clear_remainder(out, p)


def average_pool(u: Any, p: int, out: Any) -> None:
    """Write the window means of `u` (n, H, W, C) into `out` (n, H // p, W // p, C)."""
    for offset, view in _windows(u, p):
        if offset == 0:
            out[...] = view
        else:
            out += view
    out *= out.dtype.type(1 / p**2)


def average_scatter(s: Any, p: int, out: Any) -> None:
    """Spread `s` evenly over its windows in `out` (n, H, W, C): the adjoint of `average_pool`."""
    xp = array_module(s)
    share = out.dtype.type(1 / p**2)
    for _, view in _windows(out, p):
        xp.multiply(s, share, out=view, dtype=out.dtype)
    _clear_remainder(out, p)


def add_average_scatter(s: Any, p: int, out: Any) -> None:
    """Add to `out` (n, H, W, C) what `average_scatter` would write; `s` is overwritten by a unit's share."""
    s *= s.dtype.type(1 / p**2)
    for _, view in _windows(out, p):
        view += s
