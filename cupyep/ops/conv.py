"""The array operations of one convolution with pooling, in chunks: product, adjoint, weight gradient, pooling.

`ConvOps` is plain array code for NumPy and CuPy alike, and the reference. Every operation writes into scratch that
exists before: a view of an `Arena` that all edges share. States, drives and gradients may be stored in halves; scratch
is of the type to compute in, and results are rounded once, when they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyep.backend.precision import Precision
from cupyep.ops.buffers import Arena, carve
from cupyep.ops.columns import col2im, im2col, inner_view
from cupyep.ops.factors import Factors
from cupyep.ops.pooling import (
    average_pool,
    average_scatter,
    clear_remainder,
    max_gather,
    max_pool,
    max_scatter,
    windows,
)


@dataclass(frozen=True)
class ConvGeometry:
    """Sizes of a convolution: `in_shape` (H, W, C), `map_shape` (Ho, Wo, K) before and `out_shape` after pooling."""

    in_shape: tuple[int, int, int]
    map_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    kernel: int
    stride: int
    padding: int
    pooling: str
    pool: int

    @property
    def window(self) -> int:
        """Numbers that the kernel sees at one place: k * k * C."""
        return self.kernel**2 * self.in_shape[2]

    @property
    def flops(self) -> int:
        """Operations (multiply and add counted apart) of one direct product for one sample."""
        return 2 * math.prod(self.map_shape) * self.window

    @property
    def product_first(self) -> bool:
        """Whether the top-down map multiplies before it spreads.

        The columns of ``U(s)`` have a row a pixel of the input. Where the map before pooling has at most half as many
        pixels (a stride, no padding on a small map), most of their entries are zeros.
        """
        return 2 * math.prod(self.map_shape[:2]) <= math.prod(self.in_shape[:2])


class ConvOps:
    """Chunks, scratch and operations of one convolution for one batch size.

    Samples are processed in chunks whose scratch fits the byte budget (at least one sample), so that the columns stay
    in cache.

    Parameters
    ----------
    geometry : ConvGeometry
    batch : int
    nbytes : int
        Budget of the scratch.
    precision : Precision
    xp : module
        ``numpy`` or ``cupy``.
    product_first : bool, optional
        Which form the top-down map takes; `ConvGeometry.product_first` unless given.
    has_topdown : bool
        Whether there is a top-down map at all: its columns make chunks short, and nobody asks an edge of the image.

    Attributes
    ----------
    chunks : list of (slice, int)
        Samples of each chunk and their number.
    nbytes : int
        Bytes wanted from the arena.
    derives : bool
        Whether `refresh` makes the arrays of `derived` anew; others that share them may have made them.
    derived : list of (shape, dtype)
        What `refresh` makes of the weight: arrays, zeros at first, that operations for other batch sizes may share.
    flops : int
        Operations that one product takes for one sample.
    kernel : array of shape (k, k, C, K)
        The weight as a factor, see `refresh`: itself, or a rounded copy.
    factor : array of shape (inputs, K)
        What the columns are multiplied with: `kernel`, followed by zeros where they are longer.
    inputs : int
        Length of a row of the columns, ``k * k * C`` at least.
    flipped : array of shape (k * k * K, C), or None
        The weight of the top-down product, see `refresh`; product first takes `kernel`.
    weight : array of shape (k * k * C, K), or None
        Scratch for a chunk's weight gradient, where the device does not add products.
    """

    NATIVE = False  # whether halves and TF32 are multiplied as such, and products added
    TILE_ROWS = 1  # a product should have a multiple of so many rows

    derives = True

    def __init__(
        self,
        geometry: ConvGeometry,
        batch: int,
        nbytes: int,
        precision: Precision,
        xp: Any,
        product_first: bool | None = None,
        has_topdown: bool = True,
    ):
        self.geometry, self.has_topdown = geometry, has_topdown
        self.flops = geometry.flops
        self.precision = precision
        self.factors = Factors(precision, self.NATIVE)
        self.product_first = geometry.product_first if product_first is None else product_first
        self.inputs = self._inputs()
        one = Arena.size(self._requests(1))
        pixels = math.gcd(math.prod(geometry.map_shape[:2]), math.prod(geometry.in_shape[:2]))
        self.chunks = chunked(batch, nbytes // one, self.TILE_ROWS // math.gcd(self.TILE_ROWS, pixels))
        k, channels, outputs = geometry.kernel, geometry.in_shape[2], geometry.map_shape[2]
        self.requests = self._requests(self.chunks[0][1])
        if not self.NATIVE:
            self.requests.append(((k * k * channels, outputs), precision.number))
            self.requests.append(((self.factors.scratch_size,), np.uint32))
        self.nbytes = Arena.size(self.requests)
        copy, flipped = (
            ((self.inputs, outputs), self.factors.dtype),
            ((k * k * outputs, channels), self.factors.dtype),
        )
        self.copies = self.factors.copies or self.inputs > geometry.window
        self.derived = ([copy] if self.copies else []) + ([flipped] if self._flips else [])

    def _inputs(self) -> int:
        return self.geometry.window

    @property
    def _flips(self) -> bool:
        return self.has_topdown and not self.product_first

    def _requests(self, samples: int) -> list[tuple[tuple[int, ...], Any]]:
        g, dtype = self.geometry, self.precision.number
        columns = max(Arena.size(requests) for requests in self._column_requests(samples))
        wide = max(math.prod(g.in_shape), math.prod(g.out_shape)) if self.factors.widens else 0
        return [
            ((columns,), np.uint8),
            ((samples if g.pooling != "none" or self.factors.copies else 0, *g.map_shape), dtype),
            ((samples if g.pooling == "max" else 0, *g.out_shape), np.bool_),
            ((samples * wide,), dtype),
        ]

    def _column_requests(self, samples: int) -> list[list[tuple[tuple[int, ...], Any]]]:
        """Return padded map and columns for the drive, and those for the top-down product: never needed together."""
        g, dtype = self.geometry, self.factors.dtype
        k, (height, width, channels), outputs = g.kernel, g.in_shape, g.map_shape[2]
        drive = [
            ((samples, height + 2 * g.padding, width + 2 * g.padding, channels), dtype),
            ((samples, *g.map_shape[:2], k, k * channels), dtype),
        ]
        topdown = [
            ((samples, height + k - 1, width + k - 1, outputs), dtype),
            ((samples, height, width, k, k * outputs), dtype),
        ]
        return [drive, topdown if self._flips else drive]

    def bind(self, arena: Arena, derived: Sequence[Any]) -> None:
        """Take views of the arena, and the arrays of `derived`."""
        self._take_derived(derived)
        scratch, self._map, self._mask, self._wide, self.weight, self.factors.scratch = arena.views(self.requests)
        drive, topdown = self._column_requests(self.chunks[0][1])
        self._padded, self._columns = carve(scratch, drive)
        self._padded_up, self._columns_up = carve(scratch, topdown)

    def _take_derived(self, derived: Sequence[Any]) -> None:
        derived, g = list(derived), self.geometry
        if self.copies:
            self.factor = derived.pop(0)
            self.kernel = self.factor[: g.window].reshape(g.kernel, g.kernel, g.in_shape[2], g.map_shape[2])
        self.flipped = derived.pop(0) if self._flips else None

    def refresh(self, weight: Any) -> None:
        """Take up a weight (k, k, C, K) as a factor of products; for the top-down one mirrored, channels exchanged."""
        if not self.copies:
            self.kernel, self.factor = weight, weight.reshape(-1, weight.shape[-1])
        elif self.derives:
            self.factors.take_up(weight, self.kernel)
        if self.flipped is not None and self.derives:
            mirrored = self.kernel[::-1, ::-1].transpose(0, 1, 3, 2)
            self.flipped.reshape(mirrored.shape)[...] = mirrored

    def map(self, m: int) -> Any:
        """Return the scratch map before pooling for `m` samples, shape (m, Ho, Wo, K)."""
        return self._map[:m]

    def _wider(self, out: Any) -> Any:
        """Return where to compute `out`: `out` itself, or scratch of its shape where it is stored in halves."""
        return self._wide[: math.prod(out.shape)].reshape(out.shape) if self.factors.widens else out

    def product(self, s: Any, out: Any, m: int) -> Any:
        """Return ``w * s`` before pooling, for `pool` or `gather`: in scratch, or without pooling in `out` itself."""
        outputs = self.geometry.map_shape[2]
        if self.geometry.pooling != "none":
            u = self.map(m)
            self.factors.product(self.columns(s, m), self.factor, u.reshape(-1, outputs))
            return u
        u = self._wider(out)
        self.factors.product(self.columns(s, m), self.factor, u.reshape(-1, outputs))
        _store(u, out)
        return out

    def columns(self, s: Any, m: int) -> Any:
        """Return the column matrix (m * Ho * Wo, inputs) of `s` (m, H, W, C)."""
        g, padded, columns = self.geometry, self._padded[:m], self._columns[:m]
        inner_view(padded, g.in_shape[:2], g.padding)[...] = s
        self.factors.round(padded)
        im2col(padded, g.kernel, g.stride, columns)
        return columns.reshape(-1, g.kernel * g.kernel * g.in_shape[2])

    def columns_up(self, s: Any, winners: Any, m: int) -> Any:
        """Return the column matrix (m * H * W, k * k * K) of ``U(s)`` for the top-down product."""
        g, padded, columns = self.geometry, self._padded_up[:m], self._columns_up[:m]
        self._scatter(s, winners, inner_view(padded, g.map_shape[:2], g.kernel - 1 - g.padding, g.stride), m)
        self.factors.round(padded)
        im2col(padded, g.kernel, 1, columns)
        return columns.reshape(-1, g.kernel * g.kernel * g.map_shape[2])

    def topdown(self, s: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``weight^T * U(s)`` into `out` (m, H, W, C), the weight being that of the last `refresh`."""
        self._check_topdown()
        g = self.geometry
        if not self.product_first:
            result = self._wider(out)
            self.factors.product(self.columns_up(s, winners, m), self.flipped, result.reshape(-1, g.in_shape[2]))
            _store(result, out)
            return
        u, outputs = self._factor_map(s, winners, m), g.map_shape[2]
        columns, padded = self._columns[:m], self._padded[:m]
        rows = columns.reshape(-1, g.kernel * g.kernel * g.in_shape[2])
        self.factors.product(u.reshape(-1, outputs), self.kernel.reshape(-1, outputs).T, rows)
        col2im(columns, g.kernel, g.stride, padded)
        out[...] = padded[:, g.padding : g.padding + g.in_shape[0], g.padding : g.padding + g.in_shape[1]]

    def _check_topdown(self) -> None:
        if not self.has_topdown:
            raise TypeError("operations of an edge that reads the image have no top-down product")

    def add_gradient(self, below: Any, s: Any, winners: Any, gradient: Any) -> None:
        """Add ``corr(below, U(s))`` over all chunks to `gradient` (k, k, C, K)."""
        outputs = self.geometry.map_shape[2]
        for part, m in self.chunks:
            u, columns = self._factor_map(s[part], part_of(winners, part), m), self.columns(below[part], m)
            rows = gradient.reshape(-1, outputs)
            self.factors.add_product(columns.T, u.reshape(-1, outputs), rows, self.weight)

    def pool(self, u: Any, bias: Any, out: Any, winners: Any, m: int) -> None:
        """Write ``P(u + bias)`` into `out` and its winners into `winners`; without pooling `u` is `out`."""
        g = self.geometry
        result = out if g.pooling == "none" else self._wider(out)
        if g.pooling == "max":
            max_pool(windows(u, g.pool), result, winners, self._mask[:m], self.precision.tie_margin)
        elif g.pooling == "average":
            average_pool(windows(u, g.pool), result)
        result += bias  # after pooling: both poolings commute with a constant a channel
        _store(result, out)

    def gather(self, u: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``G(u)`` into `out`: max-pooling replaced by reading `u` at `winners`; without pooling `u` is `out`."""
        g = self.geometry
        result = out if g.pooling == "none" else self._wider(out)
        if g.pooling == "max":
            max_gather(windows(u, g.pool), winners, result, self._mask[:m])
        elif g.pooling == "average":
            average_pool(windows(u, g.pool), result)
        _store(result, out)

    def unpool(self, s: Any, winners: Any, m: int) -> Any:
        """Return ``U(s)``, shape (m, Ho, Wo, K): `s` itself without pooling, else in the scratch map."""
        if self.geometry.pooling == "none":
            return s
        u = self._map[:m]
        self._scatter(s, winners, u, m)
        return u

    def _factor_map(self, s: Any, winners: Any, m: int) -> Any:
        """Return ``U(s)`` as a factor: of its type and with its digits."""
        u = self.unpool(s, winners, m)
        if self.factors.widens or self.factors.rounds:
            if u is s:
                u = self._map[:m]
                u[...] = s
            self.factors.round(u)
        return u

    def _scatter(self, s: Any, winners: Any, out: Any, m: int) -> None:
        g = self.geometry
        if g.pooling == "max":
            max_scatter(s, winners, windows(out, g.pool), self._mask[:m])
        elif g.pooling == "average":
            average_scatter(s, windows(out, g.pool))
        else:
            out[...] = s
        clear_remainder(out, g.pool)


def _store(result: Any, out: Any) -> None:
    if result is not out:
        out[...] = result


def chunked(batch: int, most: int, multiple: int = 1) -> list[tuple[slice, int]]:
    """Return slices of equal chunks (but for the last) of at most `most` samples, at least one, and their lengths.

    Chunks that can be are a multiple of `multiple` samples long.
    """
    most = max(1, min(batch, most))
    samples = -(-batch // -(-batch // most))
    above = -(-samples // multiple) * multiple
    if samples < batch and above <= most:
        samples = above
    elif samples < batch and above > multiple:
        samples = above - multiple
    return [
        (slice(start, min(start + samples, batch)), min(samples, batch - start)) for start in range(0, batch, samples)
    ]


def part_of(winners: Any, part: slice) -> Any:
    """Return the winners of a chunk, None without max-pooling."""
    return None if winners is None else winners[part]
