"""The update of one layer's state in one call: total drive, activation, change.

`UpdateOps` is plain array code for NumPy and CuPy alike, and the reference; `CudaUpdateOps` does the same with one
kernel an update, and a small one where it is measured. States and deviations may be stored in a narrower type than the
one computed in, which is that of the scratch.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.ops.launch import BLOCK, arithmetic, check_axes, launch_map, packs_of, require_type, type_name, vector_width
from cupyep.ops.pooling import average_pool, windows

SOURCE = Path(__file__).with_name("update.cu")
RULES = {"clip": 0, "tanh": 1}  # enum Rule
SLOPE, STATE = 2, 3
WARP = 32


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

    def value(self, g: Any, out: Any) -> None:
        """Write sigma(g) into `out`, which may be narrower."""
        self.activation.value(g, out)

    def slope(self, g: Any, out: Any) -> None:
        """Write sigma'(g) into `out`, which may be `g`."""
        self.activation.slope(g, out)

    def slope_bytes(self, shape: tuple[int, ...]) -> int:
        """Return how many bytes `slope` takes on the way, for arrays of this shape."""
        return self.activation.slope_bytes(shape)

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
        if g is not None and pool is None and out.dtype == g.dtype:  # made where it goes: scratch of one phase will do
            moved = scratch[:size].reshape(g.shape)
            for start in range(0, len(out), step):
                rows = slice(start, start + step)
                self.activation.value(g, out[rows])
                if s is not None:
                    out[rows] += self.xp.multiply(s[rows], scale, out=moved, dtype=moved.dtype)
            return
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


class CudaUpdateOps(UpdateOps):
    """`UpdateOps` through the kernels of ``update.cu``.

    Parameters
    ----------
    xp : module
    activation : Activation
        One that the kernels know, by its attribute ``code``: ``("clip", (slope, low, high))`` or
        ``("tanh", (center, height, rate))``. Any other works with `UpdateOps`.
    launcher : Launcher
        Of `SOURCE`.

    Notes
    -----
    `drive` and `topdown` have one type, that of the scratch or narrower; `force`, `g`, the slope and the residual have
    that of the scratch.
    """

    def __init__(self, xp: Any, activation: Any, launcher: Any):
        super().__init__(xp, activation)
        self.launcher = launcher
        name, self._numbers = activation.code
        self._rule = RULES[name]
        # Increments of a clip are clamped as drives, see `Clip.increment`.
        first, *others = self._numbers
        self._increments = (first, *(number / first for number in others)) if name == "clip" else self._numbers

    @staticmethod
    def scratch_size(batch: int, size: int) -> int:
        return batch * -(-size // BLOCK)  # one partial sum a block

    def states(self, s: Any, drive: Any, topdown: Any, feedback: float, force: Any,
               g: Any, residual: Any, scratch: Any, relaxation: float = 1.0) -> None:  # fmt: skip
        number = arithmetic(s.dtype).type
        self._launch(
            ("update_states", self._rule, 1),
            (s, drive, topdown, number(feedback), force, *map(number, self._numbers), g),
            number(relaxation),
            residual,
            scratch,
        )

    def deviations(self, eps: Any, drive: Any, topdown: Any, feedback: float, force: Any, weight: float,
                   g: Any, residual: Any, scratch: Any, relaxation: float = 1.0) -> None:  # fmt: skip
        number = arithmetic(eps.dtype).type
        weights = number(weight), number(1 / weight)
        self._launch(
            ("update_deviations", self._rule, len(eps) // len(g)),
            (eps, drive, topdown, number(feedback), force, *weights, g, *map(number, self._increments)),
            number(relaxation),
            residual,
            scratch,
        )

    def tangents(self, eps: Any, drive: Any, topdown: Any, feedback: float, force: Any,
                 slope: Any, residual: Any, scratch: Any, relaxation: float = 1.0) -> None:  # fmt: skip
        number = arithmetic(eps.dtype).type
        unused = [number(0)] * 3
        self._launch(
            ("update_deviations", SLOPE, len(eps) // len(slope)),
            (eps, drive, topdown, number(feedback), force, number(1), number(1), slope, *unused),
            number(relaxation),
            residual,
            scratch,
        )

    def value(self, g: Any, out: Any) -> None:
        self.see(None, 1.0, g, None, out, None)

    def slope(self, g: Any, out: Any) -> None:
        require_type(arithmetic(g.dtype), g, out)
        vec = vector_width(g.size, g, out)
        types, numbers = [type_name(g.dtype), vec, self._rule], map(g.dtype.type, self._increments)
        launch_map(self.launcher, "slopes", types, (g.size // vec, 1, 1), (g, out, *numbers), (g.size // vec,))

    def slope_bytes(self, shape: tuple[int, ...]) -> int:
        return 0

    def see(self, s: Any, scale: float, g: Any, pool: int | None, out: Any, scratch: Any) -> None:
        launch_see(self.launcher, s, scale, g, pool, out, STATE if g is None else self._rule, self._numbers)

    def compare(
        self, first: Any, second: Any, g: Any, share: float, mean: Any, size: Any, divisor: float, work: tuple[Any, Any]
    ) -> Any:
        number, samples, units = arithmetic(first.dtype), len(first), math.prod(first.shape[1:])
        arrays, partials = (first, second, g), work[1]
        require_type(first.dtype, second, mean)
        require_type(number, g, size, partials)
        vec, count, block, parts = packs_of(units, (*arrays, mean))
        check_axes(samples)
        numbers = map(number.type, self._numbers)
        self.launcher.launch(
            "compare_phases",
            [type_name(first.dtype), vec, self._rule],
            (parts, 1, samples),
            (block, 1, 1),
            (*arrays, number.type(share), mean, second, *numbers, partials, np.int32(count)),
        )
        self._add_partials(partials, size, samples * parts, samples * units * divisor, BLOCK)
        return first if second is None else second

    def _launch(
        self, kernel: tuple[str, int, int], arguments: tuple, relaxation: Any, residual: Any, scratch: Any
    ) -> None:
        """Launch an update and, where a residual is wanted, the sum of its partials."""
        name, rule, phases = kernel
        s, drive, topdown = arguments[:3]
        batch, size = len(s), math.prod(s.shape[1:])
        vec, count, block, parts = packs_of(size, arguments)
        check_axes(batch // phases)
        stored = next((array.dtype for array in (drive, topdown) if array is not None), s.dtype)
        require_type(stored, drive, topdown)
        others = (argument for argument in arguments[3:] if getattr(argument, "ndim", 0))
        require_type(arithmetic(s.dtype), *others, residual, scratch)
        measure = "false" if residual is None else "true"
        self.launcher.launch(
            name,
            [type_name(s.dtype), type_name(stored), vec, rule, measure],
            (parts, phases, batch // phases),
            (block, 1, 1),
            (*arguments, relaxation, None if residual is None else scratch, np.int32(count)),
        )
        if residual is not None:
            self._add_partials(scratch, residual, parts, size, WARP)

    def _add_partials(self, partials: Any, out: Any, parts: int, divisor: float, block: int) -> None:
        """Add the sums of each `parts` partials, divided, to the elements of `out`."""
        arguments = (partials, out, np.int32(parts), out.dtype.type(divisor))
        self.launcher.launch("add_partials", [type_name(out.dtype)], (len(out), 1, 1), (block, 1, 1), arguments)


def launch_see(launcher: Any, s: Any, scale: float, g: Any, pool: int | None, out: Any,
               rule: int = STATE, numbers: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:  # fmt: skip
    """Launch `UpdateOps.see`; `rule` and `numbers` are those of the activation, `STATE` and none without a `g`."""
    number, moved = arithmetic(out.dtype), out if s is None else s
    require_type(number, g)
    p = 1 if pool is None else pool
    height, width, channels = (1, 1, math.prod(out.shape[1:])) if pool is None else out.shape[1:]
    map_height, map_width = (1, 1) if pool is None else (s if g is None else g).shape[1:3]
    vec = vector_width(channels, s, g, out)
    threads = (width * (channels // vec), height, len(out) if g is None else len(g))
    sizes = (len(out), map_height, map_width, height, width, channels // vec, p)
    types = [type_name(moved.dtype), type_name(out.dtype), vec, rule]
    launch_map(launcher, "see", types, threads, (s, g, out, *map(number.type, (scale, *numbers))), sizes)
