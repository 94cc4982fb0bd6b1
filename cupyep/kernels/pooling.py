"""Pooling over non-overlapping ``p x p`` windows, its winners and its adjoint, channels last.

Winners are one byte each: the offset ``dy * p + dx`` of the maximum in its window; ties go to the first in row
order. Rows and columns that do not fill a window are dropped (floor mode) and get zero from the adjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cupyep.backend import array_module


def windows(u: Any, p: int) -> list[Any]:
    """Return the units of `u` (n, H, W, C) at each offset of their windows: p * p views (n, H // p, W // p, C)."""
    height, width = u.shape[1] // p * p, u.shape[2] // p * p
    return [u[:, dy:height:p, dx:width:p] for dy in range(p) for dx in range(p)]


def clear_remainder(u: Any, p: int) -> None:
    """Write zeros where `windows` does not reach."""
    height, width = u.shape[1] // p * p, u.shape[2] // p * p
    if height < u.shape[1]:
        u[:, height:] = 0
    if width < u.shape[2]:
        u[:, :height, width:] = 0


def max_pool(units: Sequence[Any], out: Any, winners: Any, mask: Any) -> None:
    """Write the maxima of windows into `out` and the offsets of the maxima into `winners`.

    Parameters
    ----------
    units : sequence of arrays of the shape of `out`
        The units at each offset, as `windows` returns them.
    out : array
    winners : uint8 array of the shape of `out`
    mask : bool array of the shape of `out`
        Scratch.
    """
    xp = array_module(out)
    greater = mask.view(winners.dtype)
    out[...] = units[0]
    winners[...] = 0
    for offset, unit in enumerate(units[1:], 1):
        xp.greater(unit, out, out=mask)
        # Offsets rise, so the new one is the larger. (A copy by mask, ``copyto``, takes seven times as long in NumPy.)
        xp.multiply(greater, offset, out=greater, dtype=winners.dtype)
        xp.maximum(winners, greater, out=winners)
        xp.maximum(out, unit, out=out)


def max_gather(units: Sequence[Any], winners: Any, out: Any, mask: Any) -> None:
    """Write the units at given winners into `out`: max-pooling linearised, the operator G.

    The other units are overwritten by zeros.
    """
    xp = array_module(out)
    for offset, unit in enumerate(units):
        xp.equal(winners, winners.dtype.type(offset), out=mask)
        if offset == 0:
            xp.multiply(unit, mask, out=out)
            continue
        xp.multiply(unit, mask, out=unit)
        out += unit


def max_scatter(s: Any, winners: Any, units: Sequence[Any], mask: Any) -> None:
    """Write `s` to the units that its winners name, zero to the others: U, the adjoint of G."""
    xp = array_module(s)
    for offset, unit in enumerate(units):
        xp.equal(winners, winners.dtype.type(offset), out=mask)
        xp.multiply(s, mask, out=unit, dtype=unit.dtype)


def average_pool(units: Sequence[Any], out: Any) -> None:
    """Write the means of windows into `out`; arguments as for `max_pool`."""
    out[...] = units[0]
    for unit in units[1:]:
        out += unit
    out *= out.dtype.type(1 / len(units))


def average_scatter(s: Any, units: Sequence[Any]) -> None:
    """Spread `s` evenly over the units of its windows: the adjoint of `average_pool`."""
    xp = array_module(s)
    for unit in units:
        xp.multiply(s, unit.dtype.type(1 / len(units)), out=unit, dtype=unit.dtype)


def add_average_scatter(s: Any, units: Sequence[Any]) -> None:
    """Add to the units what `average_scatter` would write; `s` is overwritten by a unit's share."""
    s *= s.dtype.type(1 / len(units))
    for unit in units:
        unit += s
