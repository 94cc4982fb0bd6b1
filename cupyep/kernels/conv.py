"""The array operations of one convolution with pooling, in chunks: product, adjoint, weight gradient, pooling.

`ConvOps` is plain array code for NumPy and CuPy alike, and the reference. Every operation writes into scratch that
exists before: a view of an `Arena` that all edges share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyep.backend.device import gemm
from cupyep.kernels.buffers import Arena, carve
from cupyep.kernels.columns import col2im, im2col, inner_view
from cupyep.kernels.pooling import average_pool, average_scatter, max_gather, max_pool, max_scatter


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
    dtype : dtype
    xp : module
        ``numpy`` or ``cupy``.
    product_first : bool, optional
        Which form the top-down map takes; `ConvGeometry.product_first` unless given.

    Attributes
    ----------
    chunks : list of (slice, int)
        Samples of each chunk and their number.
    nbytes : int
        Bytes wanted from the arena.
    flipped : array of shape (k * k * K, C), or None
        The weight of the top-down product, see `refresh`; product first takes the weight as it is.
    weight : array of shape (k, k, C, K)
        Scratch for a chunk's weight gradient.
    """

    def __init__(
        self,
        geometry: ConvGeometry,
        batch: int,
        nbytes: int,
        dtype: Any,
        xp: Any,
        product_first: bool | None = None,
    ):
        self.geometry = geometry
        self.product_first = geometry.product_first if product_first is None else product_first
        one = Arena.size(self._requests(1, dtype))
        samples = max(1, min(batch, nbytes // one))
        samples = -(-batch // -(-batch // samples))  # equal chunks
        self.chunks = [
            (slice(start, min(start + samples, batch)), min(samples, batch - start))
            for start in range(0, batch, samples)
        ]
        self.requests = self._requests(samples, dtype)
        self.nbytes = Arena.size(self.requests)
        k, channels, outputs = geometry.kernel, geometry.in_shape[2], geometry.map_shape[2]
        self.flipped = None if self.product_first else xp.empty((k * k * outputs, channels), dtype)
        self.weight = xp.empty((k, k, channels, outputs), dtype)
        self._dtype = dtype

    def _requests(self, samples: int, dtype: Any) -> list[tuple[tuple[int, ...], Any]]:
        g = self.geometry
        columns = max(Arena.size(requests) for requests in self._column_requests(samples, dtype))
        return [
            ((columns,), np.uint8),
            ((samples if g.pooling != "none" else 0, *g.map_shape), dtype),
            ((samples if g.pooling == "max" else 0, *g.out_shape), np.bool_),
        ]

    def _column_requests(self, samples: int, dtype: Any) -> list[list[tuple[tuple[int, ...], Any]]]:
        """Return padded map and columns for the drive, and those for the top-down product: never needed together."""
        g = self.geometry
        k, (height, width, channels), outputs = g.kernel, g.in_shape, g.map_shape[2]
        drive = [
            ((samples, height + 2 * g.padding, width + 2 * g.padding, channels), dtype),
            ((samples, *g.map_shape[:2], k, k * channels), dtype),
        ]
        topdown = [
            ((samples, height + k - 1, width + k - 1, outputs), dtype),
            ((samples, height, width, k, k * outputs), dtype),
        ]
        return [drive, drive if self.product_first else topdown]

    def bind(self, arena: Arena) -> None:
        """Take views of the arena."""
        scratch, self._map, self._mask = arena.views(self.requests)
        drive, topdown = self._column_requests(self.chunks[0][1], self._dtype)
        self._padded, self._columns = carve(scratch, drive)
        self._padded_up, self._columns_up = carve(scratch, topdown)

    def refresh(self, weight: Any) -> None:
        """Take up a weight (k, k, C, K) for the top-down product: mirrored, channels exchanged."""
        if self.flipped is not None:
            mirrored = weight[::-1, ::-1].transpose(0, 1, 3, 2)
            self.flipped.reshape(mirrored.shape)[...] = mirrored

    def map(self, m: int) -> Any:
        """Return the scratch map before pooling for `m` samples, shape (m, Ho, Wo, K)."""
        return self._map[:m]

    def product(self, s: Any, weight: Any, out: Any, m: int) -> Any:
        """Return ``w * s`` before pooling, for `pool` or `gather`: in scratch, or without pooling in `out` itself."""
        u = out if self.geometry.pooling == "none" else self.map(m)
        outputs = self.geometry.map_shape[2]
        gemm(self.columns(s, m), weight.reshape(-1, outputs), out=u.reshape(-1, outputs))
        return u

    def columns(self, s: Any, m: int) -> Any:
        """Return the column matrix (m * Ho * Wo, k * k * C) of `s` (m, H, W, C)."""
        g, padded, columns = self.geometry, self._padded[:m], self._columns[:m]
        inner_view(padded, g.in_shape[:2], g.padding)[...] = s
        im2col(padded, g.kernel, g.stride, columns)
        return columns.reshape(-1, g.kernel * g.kernel * g.in_shape[2])

    def columns_up(self, s: Any, winners: Any, m: int) -> Any:
        """Return the column matrix (m * H * W, k * k * K) of ``U(s)`` for the top-down product."""
        g, padded, columns = self.geometry, self._padded_up[:m], self._columns_up[:m]
        self._scatter(s, winners, inner_view(padded, g.map_shape[:2], g.kernel - 1 - g.padding, g.stride), m)
        im2col(padded, g.kernel, 1, columns)
        return columns.reshape(-1, g.kernel * g.kernel * g.map_shape[2])

    def topdown(self, s: Any, winners: Any, weight: Any, out: Any, m: int) -> None:
        """Write ``weight^T * U(s)`` into `out` (m, H, W, C); `refresh` must have taken up the `weight`."""
        g = self.geometry
        if not self.product_first:
            gemm(self.columns_up(s, winners, m), self.flipped, out=out.reshape(-1, g.in_shape[2]))
            return
        u, outputs, columns, padded = self.unpool(s, winners, m), g.map_shape[2], self._columns[:m], self._padded[:m]
        rows = columns.reshape(-1, g.kernel * g.kernel * g.in_shape[2])
        gemm(u.reshape(-1, outputs), weight.reshape(-1, outputs).T, out=rows)
        col2im(columns, g.kernel, g.stride, padded)
        out[...] = padded[:, g.padding : g.padding + g.in_shape[0], g.padding : g.padding + g.in_shape[1]]

    def add_gradient(self, below: Any, s: Any, winners: Any, gradient: Any) -> None:
        """Add ``corr(below, U(s))`` over all chunks to `gradient` (k, k, C, K)."""
        outputs = self.geometry.map_shape[2]
        for part, m in self.chunks:
            u, columns = self.unpool(s[part], part_of(winners, part), m), self.columns(below[part], m)
            gemm(columns.T, u.reshape(-1, outputs), out=self.weight.reshape(-1, outputs))
            gradient += self.weight

    def pool(self, u: Any, bias: Any, out: Any, winners: Any, m: int) -> None:
        """Write ``P(u + bias)`` into `out` and its winners into `winners`; without pooling `u` is `out`."""
        g = self.geometry
        if g.pooling == "max":
            max_pool(u, g.pool, out, winners, self._mask[:m])
        elif g.pooling == "average":
            average_pool(u, g.pool, out)
        out += bias  # after pooling: both poolings commute with a constant a channel

    def gather(self, u: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``G(u)`` into `out`: max-pooling replaced by reading `u` at `winners`."""
        g = self.geometry
        if g.pooling == "max":
            max_gather(u, g.pool, winners, out, self._mask[:m])
        elif g.pooling == "average":
            average_pool(u, g.pool, out)

    def unpool(self, s: Any, winners: Any, m: int) -> Any:
        """Return ``U(s)``, shape (m, Ho, Wo, K): `s` itself without pooling, else in the scratch map."""
        if self.geometry.pooling == "none":
            return s
        u = self._map[:m]
        self._scatter(s, winners, u, m)
        return u

    def _scatter(self, s: Any, winners: Any, out: Any, m: int) -> None:
        g = self.geometry
        if g.pooling == "max":
            max_scatter(s, g.pool, winners, out, self._mask[:m])
        elif g.pooling == "average":
            average_scatter(s, g.pool, out)
        else:
            out[...] = s


def part_of(winners: Any, part: slice) -> Any:
    """Return the winners of a chunk, None without max-pooling."""
    return None if winners is None else winners[part]
