"""The update of one layer's state in one call: total drive, activation, change.

`UpdateOps` is plain array code for NumPy and CuPy alike, and the reference; ``update.cu`` does the same in one pass
(`cupyep.ops.cuda_update`). States and deviations may be stored in a narrower type than the one computed in, which
is that of the scratch.
"""

from __future__ import annotations

import math
from typing import Any

from cupyep.ops.pooling import average_pool, windows


class UpdateOps:
    """Updates in place, without allocation.

    Parameters
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    activation : Activation

    Notes
    -----
    Arrays are C-contiguous, of shape (B, *shape) where nothing else is said. `drive`, `topdown` and `force` may be None
    for nothing there. `residual` (B,), or None, gains the mean squared change of each sample, taken of the values as
    stored. `scratch` is 1-D with at least `scratch_size` elements of the type to compute in. With `relaxation`
    omega an update goes omega times as far: ``s <- s + omega (new - s)``.
    """

    def __init__(self, xp: Any, activation: Any):
        self.xp = xp
        self.activation = activation

    @staticmethod
    def scratch_size(batch: int, size: int) -> int:
        """Return the elements of scratch that a batch of states with `size` units needs."""
        return 2 * batch * size + batch

    def states(
        self,
        s: Any,
        drive: Any,
        topdown: Any,
        feedback: float,
        force: Any,
        g: Any,
        residual: Any,
        scratch: Any,
        relaxation: float = 1.0,
    ) -> None:
        """Overwrite the states `s` by ``sigma(drive + feedback * topdown + force)``.

        Parameters
        ----------
        g : array or None
            Receives the total drive, the argument of sigma.
        """
        fresh, change, row = self._parts(s, scratch)
        total = fresh if g is None else g
        self._total(total, topdown, feedback, drive, force)
        if residual is None and g is not None and s.dtype == g.dtype and relaxation == 1.0:
            self.activation.value(total, s)
            return
        self.activation.value(total, fresh)
        self._replace(s, fresh, change, row, residual, relaxation)

    def deviations(
        self,
        eps: Any,
        drive: Any,
        topdown: Any,
        feedback: float,
        force: Any,
        weight: float,
        g: Any,
        residual: Any,
        scratch: Any,
        relaxation: float = 1.0,
    ) -> None:
        """Overwrite `eps` by ``a [sigma(g + t / a) - sigma(g)]``, ``t = feedback * drive + topdown + force``.

        Parameters
        ----------
        weight : float
            a, the weight of the layer in the energy.
        g : array of shape (N, *shape)
            Rest drive, of the type to compute in: rounded to halves it would move the rest point. B is a multiple of
            N, phase-major.
        """
        t, change, row = self._parts(eps, scratch)
        self._total(t, drive, feedback, topdown, force)
        if weight != 1.0:
            t *= 1 / weight
        self._increment(g.reshape(-1), t.reshape(-1), scratch[t.size :])
        if weight != 1.0:
            t *= weight
        self._replace(eps, t, change, row, residual, relaxation)

    def _increment(self, g: Any, t: Any, scratch: Any) -> None:
        """Overwrite drives `t` by increments, half a phase at a time: then the scratch of one phase holds a pair."""
        half = -(-g.size // 2)
        for start in range(0, t.size, g.size):
            for first in (0, half):
                units = slice(first, min(first + half, g.size))
                size = units.stop - units.start
                pair = scratch[:size], scratch[size : 2 * size]
                self.activation.increment(g[units], t[start + units.start : start + units.stop], pair)

    def tangents(
        self,
        eps: Any,
        drive: Any,
        topdown: Any,
        feedback: float,
        force: Any,
        slope: Any,
        residual: Any,
        scratch: Any,
        relaxation: float = 1.0,
    ) -> None:
        """Overwrite `eps` by ``slope * (feedback * drive + topdown + force)``, `slope` (N, *shape) the derivative."""
        t, change, row = self._parts(eps, scratch)
        self._total(t, drive, feedback, topdown, force)
        for start in range(0, len(eps), len(slope)):
            part = t[start : start + len(slope)]
            part *= slope
        self._replace(eps, t, change, row, residual, relaxation)

    def see(self, s: Any, scale: float, g: Any, pool: int | None, out: Any, scratch: Any) -> None:
        """Write what a loss sees into `out`: ``sigma(g) + scale * s``, rounded to its type.

        Parameters
        ----------
        s : array of shape (B, *shape), or None
            Deviations, or states if there is no `g`.
        g : array of shape (N, *shape), or None
            Rest drive, as for `deviations`.
        pool : int or None
            Of maps (H, W, C): the means over ``pool x pool`` windows are written.
        out : array of shape (B, *shape), or (B, H // pool, W // pool, C)
        """
        step = len(out) if g is None else len(g)
        size = math.prod((s if g is None else g).shape)
        rest, moved = (scratch[start : start + size] for start in (0, size))
        if g is not None:
            rest, moved = rest.reshape(g.shape), moved.reshape(g.shape)
            self.activation.value(g, rest)
        # Pooled is what lies in `moved`, or in `rest`; with several phases `rest` is wanted again.
        free = scratch[size if s is None else 2 * size if len(out) > step else 0 :]
        for start in range(0, len(out), step):
            rows, seen = slice(start, start + step), rest
            if g is None:
                seen = s
            elif s is not None:
                seen = self.xp.multiply(s[rows], scale, out=moved, dtype=moved.dtype)
                seen += rest
            if pool is not None:
                mean = free[: math.prod(out[rows].shape)].reshape(out[rows].shape)
                average_pool(windows(seen, pool), mean)
                seen = mean
            out[rows] = seen

    def compare(
        self, first: Any, second: Any, g: Any, share: float, mean: Any, size: Any, divisor: float, work: tuple[Any, Any]
    ) -> Any:
        """Write ``sigma(g) + share * (first + second)`` into `mean`, ``first - second`` into `second`, and return that.

        Parameters
        ----------
        first, second : arrays of shape (N, *shape)
            Deviations of two phases from the rest drive `g`. `second` may be None: then `first` is the difference, and
            left as it is.
        mean : array of shape (N, *shape)
            May be `first` where there is a `second`.
        size : array of shape (1,)
            Gains the mean ``|difference|``, of the values as stored, divided by `divisor`.
        work : two arrays of shape (N, *shape)
            Scratch of the type to compute in.
        """
        xp, (wide, half) = self.xp, work
        total = difference = first
        if second is not None:
            total = xp.add(first, second, out=half, dtype=half.dtype)
            difference = xp.subtract(first, second, out=second)
        if mean.dtype == half.dtype:
            wide = mean
        size += xp.abs(difference, out=wide).mean() / divisor
        self.activation.value(g, wide)
        if share:
            wide += xp.multiply(total, share, out=half, dtype=half.dtype)
        if wide is not mean:
            mean[...] = wide
        return difference

    def _parts(self, s: Any, scratch: Any) -> tuple[Any, Any, Any]:
        """Return two arrays of the shape of `s` and one of shape (B,)."""
        size = math.prod(s.shape)
        return scratch[:size].reshape(s.shape), scratch[size : 2 * size].reshape(s.shape), scratch[2 * size :][: len(s)]

    def _total(self, total: Any, scaled: Any, feedback: float, plain: Any, force: Any) -> None:
        """Write ``feedback * scaled + plain + force`` into `total`."""
        if scaled is not None:
            self.xp.multiply(scaled, feedback, out=total, dtype=total.dtype)
            if plain is not None:
                total += plain
        elif plain is not None:
            total[...] = plain
        else:
            total[...] = 0
        if force is not None:
            total += force

    def _replace(self, s: Any, fresh: Any, change: Any, row: Any, residual: Any, relaxation: float) -> None:
        if relaxation != 1.0:
            self.xp.subtract(fresh, s, out=change)
            change *= relaxation
            self.xp.add(s, change, out=fresh)
        if residual is None:
            s[...] = fresh
            return
        change[...] = s
        s[...] = fresh
        self.xp.subtract(s, change, out=change)
        change *= change
        self.xp.mean(change.reshape(len(s), -1), axis=1, out=row)
        residual += row
