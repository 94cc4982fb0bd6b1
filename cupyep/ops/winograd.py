"""Convolution by Winograd's F(2x2, 3x3): a 3 x 3 product of stride one with 2.25 times fewer multiplications.

A 2 x 2 tile of the map before pooling sees 4 x 4 inputs d. With ``V = B^T d B`` and ``U = G w G^T``, both 4 x 4, the
tile is ``A^T (sum over channels of U V) A`` (Winograd 1980; Lavin and Gray 2016, arXiv 1509.09308): 16 matrix products,
one a place (a, b), instead of 36. The transforms only add and subtract. All of it is linear, so the top-down map is the
transpose, factor by factor, and the derivative by w is ``G^T (sum over tiles of V dM) G`` with ``dM = A dY A^T``.

A tile is also a window of 2 x 2 pooling. So the four places of a window are four arrays, pooling compares them, and the
map before pooling never exists as a map. Likewise inputs are kept apart by the parities of their row and column: what a
transform adds are then long runs of memory. One row a of V at a time keeps the scratch small.

Plain array code for NumPy and CuPy alike; on a GPU the kernels of `cupyep.ops.cuda_conv` are used all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cupyep.backend.precision import Precision
from cupyep.ops.buffers import Arena
from cupyep.ops.conv import ConvGeometry, chunked, part_of
from cupyep.ops.factors import Factors
from cupyep.ops.pooling import average_pool, average_scatter, max_gather, max_pool, max_scatter

LEAST_CHANNELS = 32  # in and out
LEAST_ROWS = 64  # of a product: the tiles of a batch
LEAST_WORK = 8192  # rows times channels

G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
# Row a of B^T: INPUTS[a] = (i, j, sign) stands for input i plus or minus input j. The last row has the opposite sign of
# the published one, and so has the last row of A, ((1, 0), (1, 1), (1, -1), (0, 1)): nothing then has to be negated.
INPUTS = ((0, 2, -1), (1, 2, 1), (2, 1, -1), (3, 1, -1))


def possible(geometry: ConvGeometry, precision: Precision) -> bool:
    """Return whether `WinogradOps` can do a convolution.

    Not where factors are rounded: a transform of them has more digits than they are to have.
    """
    g = geometry
    return (
        (g.kernel, g.stride) == (3, 1)
        and g.padding <= 1
        and (g.pooling == "none" or g.pool == 2)
        and precision.name in ("float32", "float64")
    )


def pays(geometry: ConvGeometry, batch: int) -> bool:
    """Return whether `WinogradOps` is faster than `ConvOps`, by measurement (docs/performance.md).

    With few channels the transforms cost more than the products save; with few rows each of the 16 products is a small
    one, and the transformed weights, 16 / 9 times as large, are read for little.
    """
    channels = min(geometry.in_shape[2], geometry.map_shape[2])
    rows = batch * math.prod(_tiles(geometry))
    return channels >= LEAST_CHANNELS and rows >= LEAST_ROWS and rows * channels >= LEAST_WORK


class WinogradOps:
    """What `ConvOps` does, for a convolution with kernel 3, stride 1, padding 0 or 1, and no or 2 x 2 pooling.

    Parameters
    ----------
    geometry, batch, nbytes, precision, xp
        See `ConvOps`. The transformed gradient of the weight, ``16 C K`` numbers, comes on top of the budget.

    Attributes
    ----------
    chunks, nbytes, derived, flops
        See `ConvOps`.

    Notes
    -----
    The rounding error is of the size of the direct product's, whose sums are nine times as long, but relative to the
    largest unit of a tile: the margin within which pooled units are equal is four times as wide.
    """

    derives = True

    def __init__(self, geometry: ConvGeometry, batch: int, nbytes: int, precision: Precision, xp: Any):
        self.geometry = geometry
        self._xp = xp
        self._dtype = dtype = precision.number
        self._factors = Factors(precision, native=False)
        self._tie_margin = 4 * precision.tie_margin
        self._tiles = _tiles(geometry)
        axes = zip(geometry.in_shape[:2], self._tiles, strict=True)
        self._places = [_places(size, geometry.padding, tiles) for size, tiles in axes]
        self.chunks = chunked(batch, nbytes // Arena.size(self._map_requests(1)))
        channels, outputs = geometry.in_shape[2], geometry.map_shape[2]
        self.flops = 2 * 16 * math.prod(self._tiles) * channels * outputs
        weights = [((4, 4, channels, outputs), dtype), ((max(channels, 9) * outputs,), dtype)]
        self.requests = self._map_requests(self.chunks[0][1]) + weights
        self.nbytes = Arena.size(self.requests)
        self.derived = weights[:1]
        transform = np.kron(G, G).astype(dtype)
        self._to_u, self._from_u = xp.asarray(transform), xp.asarray(np.ascontiguousarray(transform.T))

    def _map_requests(self, samples: int) -> list[tuple[tuple[int, ...], Any]]:
        (rows, columns), channels, outputs = self._tiles, self.geometry.in_shape[2], self.geometry.map_shape[2]
        return [
            ((2, 2, samples, rows + 1, columns + 1, channels), self._dtype),
            ((2, samples, rows, columns + 1, channels), self._dtype),
            ((4, samples, rows, columns, channels), self._dtype),
            ((4, samples, rows, columns, outputs), self._dtype),
            ((2, 2, samples, rows, columns, outputs), self._dtype),
            ((samples if self.geometry.pooling == "max" else 0, rows, columns, outputs), np.bool_),
        ]

    def bind(self, arena: Arena, derived: Sequence[Any]) -> None:
        """Take views of the arena, and the array of `derived`."""
        (self._u,) = derived
        # inputs d by parities, a row of B^T d, a row of V, a row of the products M, tiles Y; dL/dU, less than that
        self._d, self._r, self._v, self._m, self._y, self._mask, self._du, self._spare = arena.views(self.requests)

    def refresh(self, weight: Any) -> None:
        """Take up a weight (3, 3, C, K): make ``U = G w G^T``."""
        if self.derives:
            self._xp.matmul(self._to_u, weight.reshape(9, -1), out=self._u.reshape(16, -1))

    def product(self, s: Any, out: Any, m: int) -> Any:
        """Return ``w * s`` before pooling, for `pool` or `gather`.

        Returns
        -------
        array of shape (2, 2, m, tiles down, tiles across, K)
            Tiles in scratch; without pooling they are in `out` as well, put together.
        """
        xp, products, y, u = self._xp, self._m[:, :m], self._y[:, :, :m], self._u
        self._split(s, m)
        for a in range(4):
            v = self._row_of_v(a, m)
            for b in range(4):
                self._factors.product(_matrix(v[b]), u[a, b], _matrix(products[b]))
            columns = y[a] if a < 2 else products[::3]  # of M A: in the place of the outer two products in the end
            xp.add(products[0], products[1], out=columns[0])
            columns[0] += products[2]
            xp.subtract(products[3], products[2], out=columns[1])
            columns[1] += products[1]
            if a in (1, 2):
                y[0] += columns
            if a == 2:
                y[1] -= columns
            if a == 3:
                y[1] += columns
        if self.geometry.pooling == "none":
            for tiles, units in self._pairs(y, out):
                units[...] = tiles
        return y

    def topdown(self, s: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``weight^T * U(s)`` into `out` (m, H, W, C), the weight being that of the last `refresh`."""
        v, d, u = self._v[:, :m], self._d[:, :, :m], self._u
        self._unpool(s, winners, m)
        d[...] = 0
        for a, (first, second, sign) in enumerate(INPUTS):
            for b, product in enumerate(self._row_of_dm(a, m)):
                self._factors.product(_matrix(product), u[a, b].T, _matrix(v[b]))
            row = self._joined(m)
            place = self._line(first, m)
            place += row
            place = self._line(second, m)
            if sign > 0:
                place += row
            else:
                place -= row
        for axis, (even, odd) in enumerate(self._places):
            last = max(even[1].stop, odd[1].stop) - 1  # what no tile sees has no part in anything
            out[(slice(None),) * (axis + 1) + (slice(last, None),)] = 0
        for inputs, here in self._by_parity(out, m):
            here[...] = inputs

    def add_gradient(self, below: Any, s: Any, winners: Any, gradient: Any) -> None:
        """Add ``corr(below, U(s))`` over all chunks to `gradient` (3, 3, C, K)."""
        one = self._spare[: self._du[0, 0].size].reshape(self._du[0, 0].shape)  # of the 16
        for part, m in self.chunks:
            self._split(below[part], m)
            self._unpool(s[part], part_of(winners, part), m)
            for a in range(4):
                v = self._row_of_v(a, m)
                for b, product in enumerate(self._row_of_dm(a, m)):
                    out = self._du[a, b] if part.start == 0 else one
                    self._factors.product(_matrix(v[b]).T, _matrix(product), out)
                    if part.start > 0:
                        self._du[a, b] += out
        self._add_transformed(gradient.reshape(9, -1))

    def _add_transformed(self, gradient: Any) -> None:
        """Add ``G^T dU G`` to `gradient` (9, C * K), as many columns at once as there is scratch for."""
        du, size = self._du.reshape(16, -1), len(self._spare) // 9
        for start in range(0, gradient.shape[1], size):
            columns = du[:, start : start + size]
            out = self._spare[: 9 * columns.shape[1]].reshape(9, -1)
            gradient[:, start : start + size] += self._xp.matmul(self._from_u, columns, out=out)

    def pool(self, u: Any, bias: Any, out: Any, winners: Any, m: int) -> None:
        """Write ``P(u + bias)`` into `out` and its winners into `winners`; `u` is what `product` returned."""
        if self.geometry.pooling == "max":
            max_pool(_units(u), out, winners, self._mask[:m], self._tie_margin)
        elif self.geometry.pooling == "average":
            average_pool(_units(u), out)
        out += bias

    def gather(self, u: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``G(u)`` into `out`: max-pooling replaced by reading `u` at `winners`; `u` is overwritten."""
        if self.geometry.pooling == "max":
            max_gather(_units(u), winners, out, self._mask[:m])
        elif self.geometry.pooling == "average":
            average_pool(_units(u), out)

    def _unpool(self, s: Any, winners: Any, m: int) -> None:
        """Write the tiles dY of ``U(s)``."""
        y = self._y[:, :, :m]
        if self.geometry.pooling == "max":
            max_scatter(s, winners, _units(y), self._mask[:m])
        elif self.geometry.pooling == "average":
            average_scatter(s, _units(y))
        else:
            y[:, :, :, -1] = 0  # half a tile, perhaps
            y[:, :, :, :, -1] = 0
            for tiles, units in self._pairs(y, s):
                tiles[...] = units

    def _pairs(self, y: Any, whole: Any) -> Iterator[tuple[Any, Any]]:
        """Yield pairs of views: one place in all tiles, and the same units in a map (m, Ho, Wo, K)."""
        for dy in (0, 1):
            for dx in (0, 1):
                units = whole[:, dy::2, dx::2]
                yield y[dy, dx][:, : units.shape[1], : units.shape[2]], units

    def _split(self, s: Any, m: int) -> None:
        """Write the padded `s` (m, H, W, C), divided by the parities of row and column."""
        self._d[:, :, :m] = 0
        for inputs, here in self._by_parity(s, m):
            inputs[...] = here

    def _by_parity(self, s: Any, m: int) -> Iterator[tuple[Any, Any]]:
        """Yield pairs of views: inputs of one parity in scratch, and the same in a map (m, H, W, C)."""
        for i, rows in enumerate(self._places[0]):
            for j, columns in enumerate(self._places[1]):
                yield self._d[i, j, :m, rows[0], columns[0]], s[:, rows[1], columns[1]]

    def _line(self, number: int, m: int) -> Any:
        """Return row `number` (0 to 3) of what every tile sees, shape (2, m, tiles down, tiles across + 1, C)."""
        start = number // 2
        return self._d[number % 2, :, :m, start : start + self._tiles[0]]

    def _row_of_v(self, a: int, m: int) -> Any:
        """Return row a of ``V = B^T d B``, shape (4, m, tiles down, tiles across, C)."""
        row, v, width = self._r[:, :m], self._v[:, :m], self._tiles[1]
        first, second, sign = INPUTS[a]
        self._sum(self._line(first, m), self._line(second, m), sign, row)
        for b, (first, second, sign) in enumerate(INPUTS):
            x, y = (row[i % 2, :, :, i // 2 : i // 2 + width] for i in (first, second))
            self._sum(x, y, sign, v[b])
        return v

    def _sum(self, x: Any, y: Any, sign: int, out: Any) -> None:
        if sign > 0:
            self._xp.add(x, y, out=out)
        else:
            self._xp.subtract(x, y, out=out)

    def _row_of_dm(self, a: int, m: int) -> list[Any]:
        """Return row a of ``dM = A dY A^T``, four arrays (m, tiles down, tiles across, K)."""
        y, products = self._y[:, :, :m], self._m[:, :m]
        if a in (0, 3):
            first, last = y[a // 3]
        else:
            first, last = products[0], products[3]
            self._sum(y[0], y[1], 1 if a == 1 else -1, products[::3])
        self._sum(first, last, 1, products[1])
        self._sum(first, last, -1, products[2])
        return [first, products[1], products[2], last]

    def _joined(self, m: int) -> Any:
        """Return the transpose of the columns of B applied to the row of V in scratch, which is overwritten."""
        row, v = self._r[:, :m], self._v[:, :m]
        near, far = row[:, :, :, :-1], row[:, :, :, 1:]
        row[:, :, :, -1] = 0
        self._sum(v[1], v[2], -1, near[1])
        near[1] -= v[3]
        v[1] += v[2]
        v[1] -= v[0]
        near[0] = v[0]
        far[0] += v[1]
        far[1] += v[3]
        return row


def _tiles(geometry: ConvGeometry) -> tuple[int, int]:
    """Return the tiles down and across: the windows, or without pooling enough for the whole map."""
    odd = 1 if geometry.pooling == "none" else 0
    return (geometry.map_shape[0] + odd) // 2, (geometry.map_shape[1] + odd) // 2


def _units(y: Any) -> list[Any]:
    """Return the units at each offset of the windows."""
    return [y[0, 0], y[0, 1], y[1, 0], y[1, 1]]


def _matrix(array: Any) -> Any:
    return array.reshape(-1, array.shape[-1])


def _places(size: int, padding: int, tiles: int) -> list[tuple[slice, slice]]:
    """Return for both parities of padded places where an axis of `size` is among them, and where on the axis itself.

    `tiles` tiles see ``2 * tiles + 2`` padded places.
    """
    pairs = []
    for parity in (0, 1):
        first = (parity - padding) % 2
        start = (first + padding) // 2
        count = min(len(range(first, size, 2)), tiles + 1 - start)
        pairs.append((slice(start, start + count), slice(first, first + 2 * count, 2)))
    return pairs
