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

import functools
import math
from collections.abc import Callable, Sequence
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
# Multiplications of a product that OpenBLAS does without copying its factors: a third faster, another third if none is
# transposed. As large are those of a chunk where this leaves `LEAST_ROWS`.
SMALL = 10**6
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


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what a method returns for some arguments, views of scratch, until `WinogradOps.bind`.

    Making them anew for every chunk took as long as a product of few channels, and holds the interpreter lock.
    """

    @functools.wraps(make)
    def get(self: Any, *how: Any) -> Any:
        key = make, how
        if key not in self._kept:
            self._kept[key] = make(self, *how)
        return self._kept[key]

    return get


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
        self._makes = "two" if geometry.pooling == "none" else "one"  # the block of pooled tiles
        self._apart = m // geometry.pool  # units of the pooled map a tile has on an axis
        self._tiles = tiles(geometry, m)
        self._blocks = [
            max(count + 1, -(-(size + 2 * geometry.padding) // m))
            for count, size in zip(self._tiles, geometry.in_shape[:2], strict=True)
        ]
        channels, outputs = geometry.in_shape[2], geometry.map_shape[2]
        rows, count = max(ROWS, UNITS // max(channels, outputs)), math.prod(self._tiles)
        most, small = -(-rows // count), SMALL // (channels * outputs)
        if small >= LEAST_ROWS:
            most = min(most, max(1, small // count))
        self.chunks = chunked(batch, min(most, nbytes // Arena.size(self._map_requests(1))))
        self.flops = 2 * multiplications(geometry, m)
        gradient = (((m + 2) ** 2 + 9) * min(channels, GRADIENT_CHANNELS) * outputs,)
        self.requests = [*self._map_requests(self.chunks[0][1]), (gradient, dtype)]
        self.nbytes = Arena.size(self.requests)
        self.derived = [(((m + 2) ** 2, channels, outputs), dtype)]
        if small >= LEAST_ROWS:
            self.derived.append((((m + 2) ** 2, outputs, channels), dtype))
        at, g, bt = matrices(m)
        self._to_u = xp.asarray(np.kron(g, g), dtype)
        to_y, to_v = (xp.asarray(each, dtype) for each in (at, bt))
        self._matrices = {"A^T": to_y, "A": to_y.T, "B^T": to_v, "B": to_v.T}

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
        """Take views of the arena, and the arrays of `derived`."""
        self._u, *self._transposed = derived
        self._u_transposed = self._transposed[0] if self._transposed else self._u.transpose(0, 2, 1)
        one, *others = arena.views(self.requests)
        low, high = one[: len(one) // 2], one[len(one) // 2 :]
        names = ("one", "two", "mask", "winners", "gradient", "low", "high")
        self._scratch = dict(zip(names, (one, *others, low, high), strict=True))
        self._kept: dict[Any, Any] = {}

    def refresh(self, weight: Any) -> None:
        """Take up a weight (3, 3, C, K): make ``U = G w G^T``."""
        if self.derives:
            self._transform_weight(self._to_u, weight.reshape(9, *self._u.shape[1:]), self._u.reshape(-1))
            for copy in self._transposed:
                copy[...] = self._u.transpose(0, 2, 1)

    @kept
    def _tiled(self, block: str, places: int, m: int, channels: int) -> Any:
        """Return an array (places, m * tiles, channels) at the start of a block of scratch."""
        rows = m * math.prod(self._tiles)
        return self._scratch[block][: places * rows * channels].reshape(places, rows, channels)

    def _transform(self, matrix: str, *blocks_and_size: Any) -> Any:
        """Return ``matrix @ tile @ matrix^T`` of all tiles: see `_transformation`."""
        factors, places, out = self._transformation(matrix, *blocks_and_size)
        for x, y in zip(factors, places, strict=True):
            self._xp.matmul(self._matrices[matrix], x, out=y)
        return out

    @kept
    def _transformation(self, name: str, block: str, first: str, second: str, m: int, channels: int) -> Any:
        """Return what a matrix is multiplied with and where to, an axis after the other, and what comes of it.

        From the tiles (places, tiles, channels) at the start of `block`, which may be the second one, by way of the
        first to the second.
        """
        after, before = self._matrices[name].shape
        tiled = self._tiled(block, before**2, m, channels)
        units = width = tiled.size // before**2
        while after * before * width > TRANSFORMED and width % 2 == 0:
            width //= 2
        half = self._scratch[first][: after * before * units].reshape(after, before, units)
        out = self._scratch[second][: after**2 * units].reshape(after, after, units)
        factors, places = (tiled.reshape(1, before, -1), half), (half.reshape(1, after, -1), out)
        split = [[_split(x, width) for x in each] for each in (factors, places)]
        return *split, out.reshape(after**2, -1, channels)

    def _transform_weight(self, matrix: Any, weight: Any, block: Any) -> Any:
        """Return ``matrix @ weight`` along the first axis, in a block: a small product a channel (see `SMALL`)."""
        out = block[: len(matrix) * weight[0].size].reshape(len(matrix), *weight.shape[1:])
        self._xp.matmul(matrix, weight.transpose(1, 0, 2), out=out.transpose(1, 0, 2))
        return out

    def product(self, s: Any, out: Any, m: int) -> Any:
        """Return ``w * s`` before pooling, for `pool` or `gather`: its `_units`, in scratch."""
        u = self._u
        v = self._inputs(s, "two", "one")
        self._factors.product(v, u, self._tiled("two", len(u), m, u.shape[2]))
        self._transform("A^T", "two", "one", "two", m, u.shape[2])
        return self._units(m)

    def topdown(self, s: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``weight^T * U(s)`` into `out` (m, H, W, C), the weight being that of the last `refresh`."""
        u, channels = self._u_transposed, out.shape[3]
        dm, dv = self._products(s, winners, m), self._tiled("one", len(u), m, channels)
        self._factors.product(dm, u, dv)
        self._transform("B", "one", "two", "one", m, channels)
        padded, windows = self._windows("two", "one", m, channels)
        inner_view(padded, (self._tiles[0] * self._m, self._tiles[1] * self._m), 0)
        for number, (place, inputs) in enumerate(windows):
            if number == 0:
                place[...] = inputs
            else:
                place += inputs
        height, width = out.shape[1:3]
        start = self.geometry.padding
        out[...] = padded[:, start : start + height, start : start + width]

    def add_gradient(self, below: Any, s: Any, winners: Any, gradient: Any) -> None:
        """Add ``corr(below, U(s))`` over all chunks to `gradient` (3, 3, C, K)."""
        half = -(-below.shape[3] // 2)  # so that there is room for one more array
        for part, m in self.chunks:
            self._products(s[part], part_of(winners, part), m)
            for start in range(0, below.shape[3], half):
                channels = slice(start, start + half)
                self._inputs(below[part][..., channels], "low", "high")
                self._add_product(m, gradient[:, :, channels])

    def _products(self, s: Any, winners: Any, m: int) -> Any:
        """Return ``dM = A dY A^T`` of ``dY = U(s)``, shape (places, tiles, K), in the second block."""
        self._unpool(s, winners, m)
        return self._transform("A", "two", "one", "two", m, s.shape[3])

    def _add_product(self, m: int, gradient: Any) -> None:
        """Add ``G^T (V^T dM) G`` to `gradient`, some of its input channels at once; V is in the "high" block."""
        for channels, v, dm, split, du, rest in self._gradient_products(m, gradient.shape[2]):
            out = gradient[:, :, channels]
            self._factors.product(v, dm, split)
            out += self._transform_weight(self._to_u.T, du, rest).reshape(out.shape)

    @kept
    def _gradient_products(self, m: int, channels: int) -> list[tuple[Any, ...]]:
        """Return of some input channels at once: which, factors of V^T dM, its place twice, and scratch beyond it."""
        places, scratch, products = len(self._u), self._scratch["gradient"], []
        v, dm = (self._tiled(block, places, m, n) for block, n in (("high", channels), ("two", self._u.shape[2])))
        width = dm.shape[2]
        while dm.shape[1] * GRADIENT_CHANNELS * width > SMALL and width % 2 == 0:
            width //= 2
        for start in range(0, channels, GRADIENT_CHANNELS):
            part = slice(start, start + GRADIENT_CHANNELS)
            some = v[:, :, part].transpose(0, 2, 1)
            size = some[:, :, 0].size * dm.shape[2]
            du = scratch[:size].reshape(places, -1, dm.shape[2])
            products.append((part, some[:, None], _split(dm, width), _split(du, width), du, scratch[size:]))
        return products

    def pool(self, u: Any, bias: Any, out: Any, winners: Any, m: int) -> None:
        """Write ``P(u + bias)`` into `out` and its winners into `winners`; `u` is what `product` returned."""
        pooled = self._pooled(self._makes, m)
        if self.geometry.pooling == "max":
            max_pool(u, pooled, self._pooled("winners", m), self._pooled("mask", m), self._tie_margin)
            self._put_together("winners", winners)
        elif self.geometry.pooling == "average":
            average_pool(u, pooled)
        pooled += bias
        self._put_together(self._makes, out)

    def gather(self, u: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``G(u)`` into `out`: max-pooling replaced by reading `u` at `winners`; `u` is overwritten."""
        pooled = self._pooled(self._makes, m)
        if self.geometry.pooling == "max":
            max_gather(u, self._taken_apart(winners, "winners"), pooled, self._pooled("mask", m))
        elif self.geometry.pooling == "average":
            average_pool(u, pooled)
        self._put_together(self._makes, out)

    def _unpool(self, s: Any, winners: Any, m: int) -> None:
        """Write the tiles dY of ``U(s)`` into the second block, where `product` has its own."""
        pooled, units = self._taken_apart(s, self._makes), self._units(m)
        if self.geometry.pooling == "max":
            max_scatter(pooled, self._taken_apart(winners, "winners"), units, self._pooled("mask", m))
        elif self.geometry.pooling == "average":
            average_scatter(pooled, units)

    @kept
    def _units(self, m: int) -> list[Any]:
        """Return the units before pooling, in the second block, at each offset of windows: arrays like `_pooled`."""
        window, apart = self.geometry.pool, self._apart
        y = self._tiled("two", self._m**2, m, self.geometry.map_shape[2])
        places = y.reshape(apart, window, apart, window, *y.shape[1:])
        return [places[:, row, :, column] for row, column in np.ndindex(window, window)]

    @kept
    def _pooled(self, block: str, m: int) -> Any:
        """Return an array (rows, columns of the pooled tile, tiles, K) at the start of a block."""
        tiled = self._tiled(block, self._apart**2, m, self.geometry.map_shape[2])
        return tiled.reshape(self._apart, self._apart, *tiled.shape[1:])

    @kept
    def _places(self, block: str, m: int) -> list[tuple[Any, Any]]:
        """Return pairs: a view of one place in all pooled tiles, and an index of the same units in a map."""
        apart, pooled = self._apart, self._pooled(block, m)
        by_place = pooled.reshape(apart, apart, m, *self._tiles, -1)
        height, width = self.geometry.out_shape[:2]
        return [
            (
                by_place[y, x, :, : len(range(y, height, apart)), : len(range(x, width, apart))],
                (slice(None), slice(y, None, apart), slice(x, None, apart)),
            )
            for y, x in np.ndindex(apart, apart)
        ]

    def _put_together(self, block: str, out: Any) -> None:
        for tiled, units in self._places(block, len(out)):
            out[units] = tiled

    def _taken_apart(self, whole: Any, block: str) -> Any:
        """Return a map as pooled tiles, in a block; zeros where a tile reaches beyond the map."""
        pooled = self._pooled(block, len(whole))
        if any(size % self._apart for size in whole.shape[1:3]):
            pooled[...] = 0
        for tiled, units in self._places(block, len(whole)):
            tiled[...] = whole[units]
        return pooled

    def _inputs(self, s: Any, first: str, second: str) -> Any:
        """Return ``V = B^T d B`` of the padded `s`, shape (places, tiles, channels), in the second of two blocks."""
        m, channels = len(s), s.shape[3]
        padded, windows = self._windows(first, second, m, channels)
        inner_view(padded, s.shape[1:3], self.geometry.padding)[...] = s
        for place, inputs in windows:
            inputs[...] = place
        return self._transform("B^T", second, first, second, m, channels)

    @kept
    def _windows(self, block: str, inputs: str, m: int, channels: int) -> tuple[Any, list[tuple[Any, Any]]]:
        """Return padded maps in one block, and four pairs of views: places of them, and the same in tiles of another.

        The maps are as high and wide as some tiles together, a block of tiles more than there are. No place is twice in
        a view; the first view has all places but for those of the blocks that are too many.
        """
        edge, (down, across) = self._m, self._tiles
        height, width = (count * edge for count in self._blocks)
        padded = self._scratch[block][: m * height * width * channels].reshape(m, height, width, channels)
        shape = (m, self._blocks[0], edge, self._blocks[1], edge, channels)
        blocks = padded.reshape(shape).transpose(2, 4, 0, 1, 3, 5)
        d = self._tiled(inputs, (edge + 2) ** 2, m, channels).reshape(edge + 2, edge + 2, m, down, across, channels)
        windows = []
        for i, j in np.ndindex(2, 2):  # the inputs of a tile's own block, and the first two of the next one
            rows, columns = edge if i == 0 else 2, edge if j == 0 else 2
            place = blocks[:rows, :columns, :, i : i + down, j : j + across]
            windows.append((place, d[i * edge : i * edge + rows, j * edge : j * edge + columns]))
        return padded, windows


def _split(stack: Any, width: int) -> Any:
    """Return matrices (n, rows, columns) as views (n, columns / width, rows, width)."""
    return stack.reshape(*stack.shape[:2], -1, width).transpose(0, 2, 1, 3)
