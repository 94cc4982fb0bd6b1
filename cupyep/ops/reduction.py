"""Reductions of a state over all axes but the channels (bias gradients, how active a layer is), norms of gradients.

`ReductionOps` is plain array code for NumPy and CuPy alike, and the reference; ``reduction.cu`` does the same in two
stages (`CudaReductionOps`). CuPy's own reductions launch a block for every 32 channels, a few blocks on a card of more
than a hundred multiprocessors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.backend.device import launcher_for, workspace_for
from cupyep.errors import require
from cupyep.ops.launch import BLOCK, arithmetic, require_type, type_name, vector_width

SOURCE = Path(__file__).with_name("reduction.cu")
BLOCKS = 264  # two for each multiprocessor of the largest cards of today
ROWS_OF_A_SLAB = 64  # at least: fewer would cost more in the second stage than they gain in the first
SLABS = 32  # blocks a segment of packed gradients
WARP = 32
SCRATCH_BYTES = 3 * BLOCKS * WARP * 32  # three sums of the channels of every block, 32 bytes a thread


class ReductionOps:
    """Reductions of arrays (..., C), C-contiguous, in float32 whatever is stored (float64 for float64)."""

    def add_sum(self, s: Any, out: Any) -> None:
        """Add the sum of `s` over all axes but the last to `out` (C,)."""
        out += s.reshape(-1, s.shape[-1]).sum(axis=0, dtype=out.dtype)

    def levels(self, s: Any, top: float, dead: float, out: Any, scratch: Any) -> None:
        """Write into `out` (3,) the mean ``|s|``, the share of units with ``|s| >= top``, and the share of channels in
        which no ``|s|`` is above `dead`.

        `scratch` has the shape of `s` and the type of `out`.
        """
        xp, dtype = array_module(s), out.dtype
        xp.abs(s, out=scratch)
        out[0] = scratch.mean(dtype=dtype)
        out[2] = (scratch.reshape(-1, s.shape[-1]).max(axis=0) <= dead).mean(dtype=dtype)
        out[1] = xp.greater_equal(scratch, top, out=scratch).mean(dtype=dtype)

    def norms(self, packed: Any, bounds: Sequence[int], places: Any, out: Any) -> None:
        """Write into `out` (S,) the Euclidean norms of the segments ``packed[bounds[i] : bounds[i + 1]]``.

        `packed` is 1-D, `places` the bounds as an int64 array on the device. Segments begin at whole packs of 16 bytes.
        """
        for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
            segment = packed[start:stop]
            out[i] = array_module(packed).dot(segment, segment)
        array_module(packed).sqrt(out, out=out)


class CudaReductionOps(ReductionOps):
    """`ReductionOps` through the kernels of ``reduction.cu``; `levels` does not look at its `scratch`.

    Parameters
    ----------
    launcher : Launcher
        Of `SOURCE`.
    scratch : uint8 array
        For what the blocks of the first stage leave, at least `SCRATCH_BYTES`.
    """

    def __init__(self, launcher: Any, scratch: Any):
        self.launcher = launcher
        self._scratch = scratch

    def add_sum(self, s: Any, out: Any) -> None:
        require_type(arithmetic(s.dtype), out)
        rows, channels = _matrix(s)
        partials = self._partials(out)
        plan = _plan(rows, channels, vector_width(channels, s, out, partials), BLOCKS)
        slabs = plan[0]
        if slabs > 1:
            partials = partials[: slabs * channels]
            self._sum(s, partials, plan, accumulate=False)
            s, plan = partials, _plan(slabs, channels, vector_width(channels, partials, out), 1)
        self._sum(s, out, plan, accumulate=True)

    def _sum(self, s: Any, out: Any, plan: tuple[int, ...], accumulate: bool) -> None:
        slabs, columns, vec, *sizes = plan
        self._launch("column_sums", [type_name(s.dtype), vec], (columns, slabs, 1), (s, out), (*sizes, accumulate))

    def levels(self, s: Any, top: float, dead: float, out: Any, scratch: Any) -> None:
        number, (rows, channels) = out.dtype.type, _matrix(s)
        require_type(arithmetic(s.dtype), out)
        partials = self._partials(out)
        slabs, columns, vec, *sizes = _plan(rows, channels, vector_width(channels, s, partials), BLOCKS)
        if 3 * slabs * channels > partials.size:  # tens of thousands of channels: CuPy has blocks enough for them
            super().levels(s, top, dead, out, scratch)
            return
        arguments: tuple[Any, ...] = s, partials, number(top)
        self._launch("column_levels", [type_name(s.dtype), vec], (columns, slabs, 1), arguments, sizes)
        arguments = partials, out, number(dead), number(s.size)
        self._launch("level_shares", [type_name(out.dtype)], (1, 1, 1), arguments, (slabs, channels, _lanes(channels)))

    def norms(self, packed: Any, bounds: Sequence[int], places: Any, out: Any) -> None:
        require_type(arithmetic(packed.dtype), packed, out)
        segments, partials, types = len(bounds) - 1, self._partials(out), [type_name(out.dtype)]
        require(segments * SLABS <= partials.size, f"gradients of {segments} layers are more than a kernel adds up")
        self._launch("segment_squares", types, (SLABS, segments, 1), (packed, places, partials), ())
        self._launch("segment_norms", types, (segments, 1, 1), (partials, out), (SLABS,))

    def _partials(self, out: Any) -> Any:
        return self._scratch[:SCRATCH_BYTES].view(out.dtype)

    def _launch(self, kernel: str, types: list, grid: tuple[int, int, int], arrays: tuple, sizes: Any) -> None:
        self.launcher.launch(kernel, types, grid, (BLOCK, 1, 1), (*arrays, *map(np.int32, sizes)))


def add_sum(s: Any, out: Any) -> None:
    """Add the sum of `s` over all axes but the last to `out`: see `ReductionOps`."""
    _ops_for(s).add_sum(s, out)


def levels(s: Any, top: float, dead: float, out: Any, scratch: Any) -> None:
    """Write into `out` how active the units and channels of `s` are: see `ReductionOps`."""
    _ops_for(s).levels(s, top, dead, out, scratch)


def norms(packed: Any, bounds: Sequence[int], places: Any) -> Any:
    """Return the Euclidean norms of segments of `packed`: see `ReductionOps`."""
    out = array_module(packed).empty(len(bounds) - 1, packed.dtype)
    _ops_for(packed).norms(packed, bounds, places, out)
    return out


def _ops_for(s: Any) -> ReductionOps:
    launcher = launcher_for(s, SOURCE)
    return ReductionOps() if launcher is None else CudaReductionOps(launcher, workspace_for(s))


def _plan(rows: int, channels: int, vec: int, most: int) -> tuple[int, ...]:
    """Return slabs of rows, blocks over the channels, VEC, rows, packs of channels, rows of a slab, and lanes.

    At most `most` blocks, unless the channels alone take more.
    """
    lanes = _lanes(channels // vec)
    columns = -(-channels // (vec * lanes))
    slab = -(-rows // max(1, min(most // columns, rows // ROWS_OF_A_SLAB)))
    return -(-rows // slab), columns, vec, rows, channels // vec, slab, lanes


def _matrix(s: Any) -> tuple[int, int]:
    return math.prod(s.shape[:-1]), s.shape[-1]


def _lanes(groups: int) -> int:
    """Return the smallest power of two that covers so many packs of channels, at most a warp."""
    return min(WARP, 1 << (groups - 1).bit_length())
