"""Launch code of ``update.cu``: `UpdateOps` with one kernel an update, and a small one where it is measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.ops.launch import BLOCK, arithmetic, check_axes, map_grid, require_type, type_name, vector_width
from cupyep.ops.update import UpdateOps

SOURCE = Path(__file__).with_name("update.cu")
RULES = {"clip": 0, "tanh": 1}  # enum Rule
SLOPE = 2
STATE = 3
WARP = 32


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
        self._increment = (first, *(number / first for number in others)) if name == "clip" else self._numbers

    @staticmethod
    def scratch_size(batch, size):
        return batch * -(-size // BLOCK)  # one partial sum a block

    def states(self, s, drive, topdown, feedback, force, g, residual, scratch, relaxation=1.0):
        number = arithmetic(s.dtype).type
        self._launch(
            ("update_states", self._rule, 1),
            (s, drive, topdown, number(feedback), force, *map(number, self._numbers), g),
            number(relaxation),
            residual,
            scratch,
        )

    def deviations(self, eps, drive, topdown, feedback, force, weight, g, residual, scratch, relaxation=1.0):
        number = arithmetic(eps.dtype).type
        weights = number(weight), number(1 / weight)
        self._launch(
            ("update_deviations", self._rule, len(eps) // len(g)),
            (eps, drive, topdown, number(feedback), force, *weights, g, *map(number, self._increment)),
            number(relaxation),
            residual,
            scratch,
        )

    def tangents(self, eps, drive, topdown, feedback, force, slope, residual, scratch, relaxation=1.0):
        number = arithmetic(eps.dtype).type
        unused = [number(0)] * 3
        self._launch(
            ("update_deviations", SLOPE, len(eps) // len(slope)),
            (eps, drive, topdown, number(feedback), force, number(1), number(1), slope, *unused),
            number(relaxation),
            residual,
            scratch,
        )

    def see(self, s, scale, g, pool, out, scratch):
        number, moved = arithmetic(out.dtype), out if s is None else s
        require_type(number, g)
        p = 1 if pool is None else pool
        maps = (1, 1, math.prod(out.shape[1:])) if pool is None else out.shape[1:]
        height, width, channels = maps
        map_height, map_width = (1, 1) if pool is None else (s if g is None else g).shape[1:3]
        vec = vector_width(channels, s, g, out)
        grid, block = map_grid(width * (channels // vec), height, len(out) if g is None else len(g))
        sizes = (len(out), map_height, map_width, height, width, channels // vec, p)
        numbers = map(number.type, (scale, *self._numbers))
        rule = STATE if g is None else self._rule
        types = [type_name(moved.dtype), type_name(out.dtype), vec, rule]
        self.launcher.launch("see", types, grid, block, (s, g, out, *numbers, *map(np.int32, sizes)))

    def compare(self, first, second, g, share, mean, size, divisor, work):
        number, samples, units = arithmetic(first.dtype), len(first), math.prod(first.shape[1:])
        arrays, partials = (first, second, g), work[1]
        require_type(first.dtype, second, mean)
        require_type(number, g, size, partials)
        vec, count, block, parts = _packs(units, (*arrays, mean))
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
        vec, count, block, parts = _packs(size, arguments)
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


def _packs(size: int, arguments: tuple) -> tuple[int, int, int, int]:
    """Return VEC, packs a sample of `size` units, threads of a block, a power of two, and blocks a sample."""
    vec = vector_width(size, *(argument for argument in arguments if getattr(argument, "ndim", 0)))
    count, block = size // vec, BLOCK
    while block // 2 >= max(count, WARP):
        block //= 2  # as the sum over a block needs
    return vec, count, block, -(-count // block)
