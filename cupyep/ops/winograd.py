"""Convolution by Winograd's F(m x m, 3 x 3): 3 x 3 products of stride one with fewer multiplications.

A tile of m x m units of the map before pooling sees (m + 2) x (m + 2) inputs d. With ``V = B^T d B`` and
``U = G w G^T`` the tile is ``A^T (sum over channels of U V) A`` (Winograd 1980; Lavin and Gray 2016, arXiv 1509.09308):
one matrix product a place of V, 16 for 2 x 2 units and 36 for 4 x 4, where the units themselves take 36 and 144. All
of it is linear, so the top-down map is the transpose, factor by factor, and the derivative by w is
``G^T (sum over tiles of V dM) G`` with ``dM = A dY A^T``.

The transforms are two products with ``B^T`` or ``A^T``, one an axis: few large operations, and free in the choice of
the points that the matrices come from (`matrices`). The places of a tile are the first axis of an array: pooling
compares long runs of memory, and the map before pooling never exists as a map.

Plain array code for NumPy and CuPy alike; on a GPU the kernels of `cupyep.ops.cuda_conv` are used all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cupyep.backend.precision import Precision
from cupyep.ops.buffers import Arena
from cupyep.ops.columns import inner_view
from cupyep.ops.conv import ConvGeometry, chunked, part_of
from cupyep.ops.factors import Factors
from cupyep.ops.pooling import average_pool, average_scatter, max_gather, max_pool, max_scatter

# The finite points of F(m x m, 3 x 3), by m. Of four around zero these round least (docs/performance.md): a third of
# what the usual ones do, 1 and 2.
POINTS = {2: (0, 1, -1), 4: (0, 11 / 16, -11 / 16, 3 / 2, -3 / 2)}
TIE_MARGINS = {2: 1, 4: 4}  # in margins of direct products: what equal units differ by is below (docs/performance.md)
PRECISIONS = ("float32",)  # who takes float64 wants direct sums
LEAST_CHANNELS = {2: 32, 4: 16}  # in and out
LEAST_ROWS = 32  # of a product: the tiles of a batch
LEAST_WORK = 1 << 15  # units of all tiles times channels
# Rows of a product, where the budget allows as many: at least the first; more where channels are few. Fewer are many
# short operations, with which threads stand in each other's way, more leave the caches (docs/performance.md).
ROWS, UNITS = 128, 1 << 14
SMALL = 10**6  # multiplications of a product that OpenBLAS does without copying its factors
TRANSFORMED = 250_000  # multiplications of a product of a transform: factor and product stay in the innermost caches
GRADIENT_CHANNELS = 32  # input channels whose weight gradient is transformed back at once


def tile_size(geometry: ConvGeometry, batch: int, precision: Precision) -> int | None:
    """Return the edge m of the tiles with which `WinogradOps` is faster than `ConvOps`, None where none is possible.

    By measurement (docs/performance.md): with few channels the transforms cost more than the products save, with
    smaller tiles sooner; with few rows each product is a small one, and the transformed weights, 36 / 9 times as large
    with ``m = 4``, are read for little. Never where factors are rounded, a transform of them has more digits than they
    are to have, nor where units are to be exact.
    """
    g = geometry
    possible = (g.kernel, g.stride) == (3, 1) and g.padding <= 1 and (g.pooling == "none" or g.pool == 2)
    channels = min(g.in_shape[2], g.map_shape[2])
    if not possible or precision.name not in PRECISIONS or precision.exact:
        return None
    for m in (4, 2) if multiplications(g, 4) < multiplications(g, 2) else (2,):
        rows = batch * math.prod(tiles(g, m))
        if channels >= LEAST_CHANNELS[m] and rows >= LEAST_ROWS and rows * m * m * channels >= LEAST_WORK:
            return m
    return None


def tiles(geometry: ConvGeometry, m: int) -> tuple[int, int]:
    """Return the tiles down and across: enough for all units that are pooled, or for the whole map."""
    apart = m // geometry.pool
    return -(-geometry.out_shape[0] // apart), -(-geometry.out_shape[1] // apart)


def multiplications(geometry: ConvGeometry, m: int) -> int:
    """Return the multiplications of the products for one sample."""
    return (m + 2) ** 2 * math.prod(tiles(geometry, m)) * geometry.in_shape[2] * geometry.map_shape[2]


def matrices(m: int) -> tuple[Any, Any, Any]:
    """Return A^T (m, m + 2), G (m + 2, 3) and B^T (m + 2, m + 2), by the construction of Toom and Cook.

    A product of polynomials is that of their values at points and at infinity; a convolution is its transpose.
    """
    points = POINTS[m]
    others = [[q for q in points if q != p] for p in points]
    at = np.hstack([np.vander(points, m, increasing=True).T, np.eye(m)[:, -1:]])
    g = np.vstack([np.vander(points, 3, increasing=True), np.eye(3)[-1:]])
    g[:-1] /= [[math.prod(p - q for q in rest)] for p, rest in zip(points, others, strict=True)]
    bt = [[*np.polynomial.polynomial.polyfromroots(roots), 0][: m + 2] for roots in (*others, points)]
    return at, g, np.array(bt)


class WinogradOps:
    """What `ConvOps` does, for a convolution with kernel 3, stride 1, padding 0 or 1, and no or 2 x 2 pooling.

    Parameters
    ----------
    geometry, batch, nbytes, precision, xp
        See `ConvOps`. Scratch for the gradient of the weight, ``45 K`` numbers (with ``m = 2``: 25) for each of
        `GRADIENT_CHANNELS`, comes on top of the budget.
    m : {2, 4}
        Edge of a tile.

    Attributes
    ----------
    chunks, nbytes, derived, flops
        See `ConvOps`.

    Notes
    -----
    The rounding error is relative to the largest unit of a tile, and some times that of the direct product: the margin
    within which pooled units are equal is wider by `TIE_MARGINS`.
    """

    derives = True

    def __init__(self, geometry: ConvGeometry, batch: int, nbytes: int, precision: Precision, xp: Any, m: int = 4):
        self.geometry, self._m = geometry, m
        self._xp = xp
        self._dtype = dtype = precision.number
        self._factors = Factors(precision, native=False)
        self._tie_margin = TIE_MARGINS[m] * precision.tie_margin
        self._apart = m // geometry.pool  # units of the pooled map a tile has on an axis
        self._tiles = tiles(geometry, m)
        self._blocks = [
            max(count + 1, -(-(size + 2 * geometry.padding) // m))
            for count, size in zip(self._tiles, geometry.in_shape[:2], strict=True)
        ]
        rows = max(ROWS, UNITS // max(geometry.in_shape[2], geometry.map_shape[2]))
        most = -(-rows // math.prod(self._tiles))
        self.chunks = chunked(batch, min(most, nbytes // Arena.size(self._map_requests(1))))
        channels, outputs = geometry.in_shape[2], geometry.map_shape[2]
        self.flops = 2 * multiplications(geometry, m)
        gradient = (((m + 2) ** 2 + 9) * min(channels, GRADIENT_CHANNELS) * outputs,)
        self.requests = [*self._map_requests(self.chunks[0][1]), (gradient, dtype)]
        self.nbytes = Arena.size(self.requests)
        self.derived = [(((m + 2) ** 2, channels, outputs), dtype)]
        at, g, bt = matrices(m)
        self._to_y, self._to_v, self._to_u = (xp.asarray(each, dtype) for each in (at, bt, np.kron(g, g)))

    def _map_requests(self, samples: int) -> list[tuple[tuple[int, ...], Any]]:
        """Return two blocks in which padded inputs, tiles and products take turns, and bytes for pooling."""
        g, places = self.geometry, (self._m + 2) ** 2
        channels, outputs, count = g.in_shape[2], g.map_shape[2], math.prod(self._tiles)
        padded, even = math.prod(self._blocks) * self._m**2, channels + channels % 2
        pooled = self._apart**2 * count * outputs if g.pooling == "max" else 0
        block = ((samples * max(even * max(places * count, padded), places * count * outputs),), self._dtype)
        return [
            block,
            block,
            ((samples * pooled,), np.bool_),
            ((samples * pooled,), np.uint8),
        ]

    def bind(self, arena: Arena, derived: Sequence[Any]) -> None:
        """Take views of the arena, and the array of `derived`."""
        (self._u,) = derived
        self._one, self._two, self._mask, self._winners, self._gradient = arena.views(self.requests)

    def refresh(self, weight: Any) -> None:
        """Take up a weight (3, 3, C, K): make ``U = G w G^T``."""
        if self.derives:
            self._transform_weight(self._to_u, weight.reshape(9, *self._u.shape[1:]), self._u.reshape(-1))

    def _tiled(self, block: Any, places: int, m: int, channels: int) -> Any:
        """Return an array (places, m * tiles, channels) at the start of a block."""
        rows = m * math.prod(self._tiles)
        return block[: places * rows * channels].reshape(places, rows, channels)

    def _transform(self, matrix: Any, tiled: Any, first: Any, second: Any) -> Any:
        """Return ``matrix @ tile @ matrix^T`` of all tiles, in the second block; one axis is done in the first.

        Shapes (places, tiles, channels), before and after. What is transformed may lie in the second block.
        """
        (after, before), channels = matrix.shape, tiled.shape[-1]
        units = width = tiled.size // before**2
        while after * before * width > TRANSFORMED and width % 2 == 0:
            width //= 2
        half = first[: after * before * units].reshape(after, before, units)
        out = second[: after**2 * units].reshape(after, after, units)
        whole = tiled.reshape(1, before, -1), half.reshape(1, after, -1)
        for x, y in (whole, (half, out)):
            self._xp.matmul(matrix, _split(x, width), out=_split(y, width))
        return out.reshape(after**2, -1, channels)

    def _transform_weight(self, matrix: Any, weight: Any, block: Any) -> Any:
        """Return ``matrix @ weight`` along the first axis, in a block: a small product a channel (see `SMALL`)."""
        out = block[: len(matrix) * weight[0].size].reshape(len(matrix), *weight.shape[1:])
        self._xp.matmul(matrix, weight.transpose(1, 0, 2), out=out.transpose(1, 0, 2))
        return out

    def product(self, s: Any, out: Any, m: int) -> Any:
        """Return ``w * s`` before pooling, for `pool` or `gather`.

        Returns
        -------
        array of shape (m * m, tiles, K)
            Tiles in scratch.
        """
        u = self._u
        v = self._inputs(s, self._two, self._one)
        products = self._tiled(self._two, len(u), m, u.shape[2])
        self._factors.product(v, u, products)
        return self._transform(self._to_y, products, self._one, self._two)

    def topdown(self, s: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``weight^T * U(s)`` into `out` (m, H, W, C), the weight being that of the last `refresh`."""
        u = self._u
        dm = self._transform(self._to_y.T, self._unpool(s, winners, m), self._one, self._two)
        dv = self._tiled(self._one, len(u), m, out.shape[3])
        self._factors.product(dm, u.transpose(0, 2, 1), dv)
        dd = self._transform(self._to_v.T, dv, self._two, self._one)
        padded = self._padded(self._two, m, out.shape[3])
        padded[...] = 0
        for place, inputs in self._overlapping(padded, dd):
            place += inputs
        height, width = out.shape[1:3]
        start = self.geometry.padding
        out[...] = padded[:, start : start + height, start : start + width]

    def add_gradient(self, below: Any, s: Any, winners: Any, gradient: Any) -> None:
        """Add ``corr(below, U(s))`` over all chunks to `gradient` (3, 3, C, K)."""
        half, size = -(-below.shape[3] // 2), len(self._one) // 2  # so that there is room for one more array
        for part, m in self.chunks:
            dm = self._transform(self._to_y.T, self._unpool(s[part], part_of(winners, part), m), self._one, self._two)
            for start in range(0, below.shape[3], half):
                channels = slice(start, start + half)
                v = self._inputs(below[part][..., channels], self._one[:size], self._one[size:])
                self._add_product(v, dm, gradient[:, :, channels])

    def _add_product(self, v: Any, dm: Any, gradient: Any) -> None:
        """Add ``G^T (V^T dM) G`` to `gradient`, some of its input channels at once."""
        places, rows, width = dm.shape
        while rows * GRADIENT_CHANNELS * width > SMALL and width % 2 == 0:
            width //= 2
        for start in range(0, v.shape[2], GRADIENT_CHANNELS):
            channels = slice(start, start + GRADIENT_CHANNELS)
            some, out = v[:, :, channels].transpose(0, 2, 1), gradient[:, :, channels]
            size = some[:, :, 0].size * dm.shape[2]
            du = self._gradient[:size].reshape(places, -1, dm.shape[2])
            self._factors.product(some[:, None], _split(dm, width), _split(du, width))
            out += self._transform_weight(self._to_u.T, du, self._gradient[size:]).reshape(out.shape)

    def pool(self, u: Any, bias: Any, out: Any, winners: Any, m: int) -> None:
        """Write ``P(u + bias)`` into `out` and its winners into `winners`; `u` is what `product` returned."""
        units, pooled = self._units(u), self._pooled(self._one, m)
        if self.geometry.pooling == "max":
            of_tiles = self._pooled(self._winners, m)
            max_pool(units, pooled, of_tiles, self._masked(pooled), self._tie_margin)
            self._put_together(of_tiles, winners)
        elif self.geometry.pooling == "average":
            average_pool(units, pooled)
        else:
            pooled = units[0]
        pooled += bias
        self._put_together(pooled, out)

    def gather(self, u: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``G(u)`` into `out`: max-pooling replaced by reading `u` at `winners`; `u` is overwritten."""
        units, pooled = self._units(u), self._pooled(self._one, m)
        if self.geometry.pooling == "max":
            max_gather(units, self._taken_apart(winners, self._winners, m), pooled, self._masked(pooled))
        elif self.geometry.pooling == "average":
            average_pool(units, pooled)
        else:
            pooled = units[0]
        self._put_together(pooled, out)

    def _unpool(self, s: Any, winners: Any, m: int) -> Any:
        """Return the tiles dY of ``U(s)``, as `product` returns them."""
        if self.geometry.pooling == "none":
            return self._taken_apart(s, self._two, m)
        pooled = self._taken_apart(s, self._one, m)
        y = self._tiled(self._two, self._m**2, m, s.shape[3])
        if self.geometry.pooling == "max":
            max_scatter(pooled, self._taken_apart(winners, self._winners, m), self._units(y), self._masked(pooled))
        else:
            average_scatter(pooled, self._units(y))
        return y

    def _units(self, y: Any) -> list[Any]:
        """Return the units at each offset of the windows, arrays like `_pooled`."""
        window, apart = self.geometry.pool, self._apart
        places = y.reshape(apart, window, apart, window, *y.shape[1:])
        return [places[:, row, :, column] for row, column in np.ndindex(window, window)]

    def _pooled(self, block: Any, m: int) -> Any:
        """Return an array (rows, columns of the pooled tile, tiles, K) at the start of a block."""
        tiled = self._tiled(block, self._apart**2, m, self.geometry.map_shape[2])
        return tiled.reshape(self._apart, self._apart, *tiled.shape[1:])

    def _masked(self, pooled: Any) -> Any:
        return self._mask[: pooled.size].reshape(pooled.shape)

    def _pairs(self, pooled: Any, whole: Any) -> Iterator[tuple[Any, Any]]:
        """Yield pairs of views: one place in all pooled tiles, and the same units in a map (m, Ho, Wo, K)."""
        by_place = pooled.reshape(*pooled.shape[:2], len(whole), *self._tiles, -1)
        for y, x in np.ndindex(self._apart, self._apart):
            units = whole[:, y :: self._apart, x :: self._apart]
            yield by_place[y, x, :, : units.shape[1], : units.shape[2]], units

    def _put_together(self, pooled: Any, out: Any) -> None:
        for tiled, units in self._pairs(pooled, out):
            units[...] = tiled

    def _taken_apart(self, whole: Any, block: Any, m: int) -> Any:
        """Return a map as pooled tiles, in a block; zeros where a tile reaches beyond the map."""
        pooled = self._pooled(block, m)
        if any(size % self._apart for size in whole.shape[1:3]):
            pooled[...] = 0
        for tiled, units in self._pairs(pooled, whole):
            tiled[...] = units
        return pooled

    def _inputs(self, s: Any, first: Any, second: Any) -> Any:
        """Return ``V = B^T d B`` of the padded `s`, shape (places, tiles, channels), in the second of two blocks."""
        m, channels = len(s), s.shape[3]
        padded, d = self._padded(first, m, channels), self._tiled(second, len(self._to_v) ** 2, m, channels)
        inner_view(padded, s.shape[1:3], self.geometry.padding)[...] = s
        for place, inputs in self._overlapping(padded, d):
            inputs[...] = place
        return self._transform(self._to_v, d, first, second)

    def _padded(self, block: Any, m: int, channels: int) -> Any:
        """Return scratch for padded maps, as high and wide as some tiles together: a block more than there are."""
        height, width = (count * self._m for count in self._blocks)
        return block[: m * height * width * channels].reshape(m, height, width, channels)

    def _overlapping(self, padded: Any, d: Any) -> Iterator[tuple[Any, Any]]:
        """Yield four pairs of views: places of padded maps, none twice in one view, and the same in tiles' inputs."""
        m, (samples, _, _, channels) = self._m, padded.shape
        down, across = self._tiles
        blocks = padded.reshape(samples, self._blocks[0], m, self._blocks[1], m, channels).transpose(2, 4, 0, 1, 3, 5)
        d = d.reshape(m + 2, m + 2, samples, down, across, channels)
        for i, j in np.ndindex(2, 2):  # the m inputs of a tile's own block, and the first two of the next one
            rows, columns = m if i == 0 else 2, m if j == 0 else 2
            place = blocks[:rows, :columns, :, i : i + down, j : j + across]
            yield place, d[i * m : i * m + rows, j * m : j * m + columns]


def _split(stack: Any, width: int) -> Any:
    """Return matrices (n, rows, columns) as views (n, columns / width, rows, width)."""
    return stack.reshape(*stack.shape[:2], -1, width).transpose(0, 2, 1, 3)
