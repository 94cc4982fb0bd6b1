"""Standardized weights, and the way back of a gradient, for the matrix (fan_in, K) of a weight: a filter a column.

`StandardizeOps` is plain array code for NumPy and CuPy alike, and the reference; ``standardize.cu`` does the same in
one kernel each (`CudaStandardizeOps`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.backend.device import launcher_for
from cupyep.ops.launch import BLOCK, require_type, type_name, vector_width

SOURCE = Path(__file__).with_name("standardize.cu")
AT_ONCE = 1 << 16  # numbers of a piece of rows: it stays in a core's cache, and the scratch is small beside a weight
CHANNELS_OF_A_BLOCK = 8  # a sector of 32 bytes a row; fewer waste memory accesses, more leave too few blocks


class StandardizeOps:
    """Both directions without allocation. Arrays are C-contiguous, of one floating type.

    With d = v - mean(v), r = (mean(d^2) + epsilon)^-1/2, both of a column, and a = factor * gain * r (gain (K,), or
    None for 1)::

        w = a d
        dv = a (dw - mean(dw) - d r^2 mean(dw d)),        dgain = factor r sum(dw d)
    """

    def scratch_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the scratch for a matrix of a shape: a piece of its rows, and three sums."""
        rows, columns = shape
        return (3 + min(rows, _rows_at_once(columns)), columns)

    def forward(self, v: Any, gain: Any, factor: float, epsilon: float, w: Any, statistics: Any, scratch: Any) -> None:
        """Write w (fan_in, K), not `v` itself, and into `statistics` (2, K) the mean and r of every column."""
        xp, rows = array_module(v), len(v)
        (mean, inverse), row, work = statistics, scratch[0], scratch[3:]
        mean[...] = inverse[...] = 0
        for part in _pieces(v.shape):
            mean += xp.sum(v[part], axis=0, out=row)
        mean /= rows
        for part in _pieces(v.shape):
            d = xp.subtract(v[part], mean, out=w[part])
            inverse += xp.sum(xp.multiply(d, d, out=work[: len(d)]), axis=0, out=row)
        inverse /= rows
        inverse += epsilon
        xp.sqrt(inverse, out=inverse)
        xp.divide(1.0, inverse, out=inverse)
        w *= _scale(inverse, gain, factor, out=row)

    def pullback(
        self, dw: Any, v: Any, gain: Any, factor: float, statistics: Any, dv: Any, dgain: Any, scratch: Any
    ) -> None:
        """Write dv (fan_in, K), which may be `dw`, and dgain (K,) unless None; `statistics` are those of `forward`."""
        xp, rows = array_module(v), len(v)
        (mean, inverse), (row, total, dot), work = statistics, scratch[:3], scratch[3:]
        total[...] = dot[...] = 0
        for part in _pieces(v.shape):
            total += xp.sum(dw[part], axis=0, out=row)
            d = xp.subtract(v[part], mean, out=work[: len(v[part])])
            d *= dw[part]
            dot += xp.sum(d, axis=0, out=row)
        dot *= inverse
        if dgain is not None:
            xp.multiply(dot, factor, out=dgain)
        dot *= inverse
        dot /= rows
        total /= rows
        scale = _scale(inverse, gain, factor, out=row)
        for part in _pieces(v.shape):
            d = xp.subtract(v[part], mean, out=work[: len(v[part])])
            d *= dot
            here = xp.subtract(dw[part], d, out=dv[part])
            here -= total
            here *= scale


class CudaStandardizeOps(StandardizeOps):
    """`StandardizeOps` through the kernels of ``standardize.cu``; `scratch` is not looked at.

    Parameters
    ----------
    launcher : Launcher
        Of `SOURCE`.
    """

    def __init__(self, launcher: Any):
        self.launcher = launcher

    def scratch_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return (0, 0)

    def forward(self, v: Any, gain: Any, factor: float, epsilon: float, w: Any, statistics: Any, scratch: Any) -> None:
        self._launch("standardize", v, (v, gain, w, statistics), (factor, epsilon))

    def pullback(
        self, dw: Any, v: Any, gain: Any, factor: float, statistics: Any, dv: Any, dgain: Any, scratch: Any
    ) -> None:
        self._launch("standardize_pullback", v, (dw, v, gain, statistics, dv, dgain), (factor,))

    def _launch(self, kernel: str, v: Any, arrays: tuple, numbers: tuple[float, ...]) -> None:
        require_type(v.dtype, *arrays)
        rows, columns = v.shape
        vec = vector_width(columns, *arrays)
        lanes = CHANNELS_OF_A_BLOCK // vec
        packs = columns // vec
        scalars = (*map(v.dtype.type, numbers), *map(np.int32, (rows, packs, lanes)))
        grid = (-(-packs // lanes), 1, 1)
        self.launcher.launch(kernel, [type_name(v.dtype), vec], grid, (BLOCK, 1, 1), (*arrays, *scalars))


def standardize_ops(v: Any) -> StandardizeOps:
    """Return the operations for an array: kernels where it is on a GPU."""
    launcher = launcher_for(v, SOURCE)
    return StandardizeOps() if launcher is None else CudaStandardizeOps(launcher)


def _scale(inverse: Any, gain: Any, factor: float, out: Any) -> Any:
    array_module(inverse).multiply(inverse, factor, out=out)
    if gain is not None:
        out *= gain
    return out


def _rows_at_once(columns: int) -> int:
    return max(1, AT_ONCE // columns)


def _pieces(shape: tuple[int, int]) -> Iterator[slice]:
    """Yield slices of about `AT_ONCE` numbers of rows."""
    step = _rows_at_once(shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, start + step)
