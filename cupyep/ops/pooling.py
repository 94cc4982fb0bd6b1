"""Pooling over non-overlapping ``p x p`` windows, its winners and its adjoint, channels last.

Winners are one byte each: the offset ``dy * p + dx`` of the maximum in its window; ties go to the first in row order.
Units of flat image areas are equal but for rounding, which differs with the size of the batch: what is not below the
maximum by more than a margin counts as equal to it, so that a sample's winners do not depend on its batch. Rows and
columns that do not fill a window are dropped (floor mode) and get zero from the adjoint.
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


def max_pool(units: Sequence[Any], out: Any, winners: Any, mask: Any, margin: float) -> None:
    """Write the maxima of windows into `out` and the offsets of their winners (uint8) into `winners`.

    The `units` at each offset, as `windows` returns them, and all other arrays have the shape of `out`; the last units
    are overwritten, and `mask` (bool) is scratch. Units above ``max - margin * max(|max|, 1)`` are equal to the
    maximum; the first of them wins.
    """
    xp = array_module(out)
    out[...] = units[0]
    winners[...] = 0
    for unit in units[1:]:
        xp.maximum(out, unit, out=out)
    if len(units) == 1:
        return
    *earlier, least = units
    xp.abs(out, out=least)
    xp.maximum(least, 1, out=least)
    least *= -margin
    least += out
    below = mask.view(winners.dtype)
    for unit in reversed(earlier):  # the number of units from here on that are passed over: one more, or none
        xp.less(unit, least, out=mask)
        winners += 1
        winners *= below


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
