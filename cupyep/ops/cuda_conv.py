"""Launch code of ``conv.cu``: the operations of `ConvOps` as CUDA kernels, with less scratch.

Padding is implicit and the unpooled map of the top-down product never exists: scratch holds the columns of one chunk
(of either direction, they are never needed together) and one map before pooling.

Tensor cores want rows of whole packs of 16 bytes. Those of the columns of an image are none (3 x 3 x 3 = 27 numbers),
so they are filled up with zeros, and so are the weight and its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend.precision import Precision
from cupyep.errors import require
from cupyep.ops.buffers import Arena, Request
from cupyep.ops.conv import ConvGeometry, ConvOps, part_of
from cupyep.ops.launch import ACCESS_BYTES, launch_map, require_type, type_name, vector_width
from cupyep.ops.reduction import add_sum

SOURCE = Path(__file__).with_name("conv.cu")
POOLING = {"none": 0, "max": 1, "average": 2}  # enum Pooling


class CudaConvOps(ConvOps):
    """`ConvOps` through the kernels of ``conv.cu``.

    Parameters
    ----------
    geometry, batch, nbytes, precision, xp
        See `ConvOps`; states, drives and columns are of the type that the precision stores.
    launcher : Launcher
        Of `SOURCE`.
    product_first : bool, optional
        Top-down map by product and then col2im instead of columns and then product. Its intermediate has
        ``k * k * C`` instead of ``k * k * K`` elements a pixel and needs `U(s)` as a map.
    has_topdown : bool
        See `ConvOps`.

    Notes
    -----
    All arrays must be C-contiguous; they are accessed 16 bytes at once where the number of channels allows. With
    halves, products that go on to a pooling or a sum (`map`, `products`) stay float32 until its result is stored.
    """

    NATIVE = True
    TILE_ROWS = 256  # of the largest tiles that cuBLAS multiplies: other numbers of rows leave tiles half empty

    def __init__(
        self,
        geometry: ConvGeometry,
        batch: int,
        nbytes: int,
        precision: Precision,
        xp: Any,
        launcher: Any,
        product_first: bool | None = None,
        has_topdown: bool = True,
    ):
        self.launcher = launcher
        super().__init__(geometry, batch, nbytes, precision, xp, product_first, has_topdown)
        self.padded = self.inputs > geometry.window
        if self.padded:
            self.requests.append(((self.inputs, geometry.map_shape[2]), precision.number))
            self.nbytes = Arena.size(self.requests)

    def _inputs(self) -> int:
        self.pack = ACCESS_BYTES // self.precision.stored.itemsize
        return -(-self.geometry.window // self.pack) * self.pack

    def _requests(self, samples: int) -> list[Request]:
        g = self.geometry  # elements a sample of the column matrices of drive and top-down product
        down = math.prod(g.map_shape[:2]) * self.inputs
        up = math.prod(g.in_shape[:2]) * g.kernel**2 * g.map_shape[2] * self.has_topdown
        require(
            max(down, up) < 2**31,
            f"the columns of one sample have {max(down, up)} elements, more than a GPU kernel can index; "
            "use smaller images or fewer channels",
        )
        stored, number = self.precision.stored.itemsize, self.precision.number.itemsize
        columns = max(down * stored, down * number * self.has_topdown if self.product_first else up * stored)
        requests: list[Request] = [((samples * columns,), np.uint8)]
        if self.geometry.pooling != "none":
            requests.append(((samples, *self.geometry.map_shape), self.precision.number))
        return requests

    def bind(self, arena: Arena, derived: Sequence[Any]) -> None:
        """Take views of the arena, and the arrays of `derived`."""
        self._take_derived(derived)
        self.weight = None  # products are added
        views = arena.views(self.requests)
        self._gradient: Any = views.pop() if self.padded else None
        self._columns, *maps = views
        self._map = maps[0].reshape(-1).view(np.uint8) if maps else None

    def _view(self, block: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return block[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def map(self, m: int) -> Any:
        """Return the scratch map before pooling for `m` samples, shape (m, Ho, Wo, K)."""
        return self._view(self._map, (m, *self.geometry.map_shape), self.precision.number)

    def products(self, m: int) -> Any:
        """Return the scratch of the product-first top-down map for `m` samples, shape (m * Ho * Wo, k * k * C)."""
        g = self.geometry
        rows = m * math.prod(g.map_shape[:2])
        return self._view(self._columns, (rows, g.kernel**2 * g.in_shape[2]), self.precision.number)

    def _checked(self, s: Any) -> str:
        """Return the CUDA name of what is stored; a kernel would write past the columns of another type."""
        if s.dtype != self.precision.stored:
            raise TypeError(f"precision {self.precision.name} stores {self.precision.stored}, not {s.dtype}")
        return type_name(s.dtype)

    def columns(self, s: Any, m: int) -> Any:
        g = self.geometry
        height, width, channels = g.in_shape
        ho, wo, _ = g.map_shape
        columns = self._view(self._columns, (m * ho * wo, self.inputs), self.precision.stored)
        if channels % self.pack:
            packs = self.inputs // self.pack
            self._launch(
                ("im2col_rows", [self._checked(s), self.pack]),
                (wo * packs, ho, m),
                (s, columns),
                (height, width, channels, g.kernel, g.stride, g.padding, ho, wo, packs),
            )
            return columns
        vec = vector_width(channels, s, columns)
        frame = [(size - 1) * g.stride + g.kernel for size in (ho, wo)]
        self._launch(
            ("im2col", [self._checked(s), vec]),
            (frame[1] * (channels // vec), frame[0], m),
            (s, columns),
            (height, width, channels // vec, g.kernel, g.stride, g.padding, ho, wo),
        )
        return columns

    def columns_up(self, s: Any, winners: Any, m: int) -> Any:
        g = self.geometry
        height, width, _ = g.in_shape
        ho, wo, channels = g.map_shape
        columns = self._view(self._columns, (m * height * width, g.kernel**2 * channels), self.precision.stored)
        require_type(np.uint8, winners)
        vec = vector_width(channels, s, winners, columns)
        self._launch(
            ("unpool_im2col", [self._checked(s), vec, POOLING[g.pooling]]),
            ((width + g.kernel - 1) * (channels // vec), height + g.kernel - 1, m),
            (s, winners, columns),
            (height, width, channels // vec, g.kernel, g.stride, g.padding, ho, wo, *g.out_shape[:2], g.pool),
        )
        return columns

    def add_gradient(self, below: Any, s: Any, winners: Any, gradient: Any) -> None:
        if not self.padded:
            super().add_gradient(below, s, winners, gradient)
            return
        for part, m in self.chunks:
            u = self.unpool(s[part], part_of(winners, part), m).reshape(-1, gradient.shape[-1])
            columns = self.columns(below[part], m)
            if part.start == 0:
                self.factors.product(columns.T, u, self._gradient)
            else:
                self.factors.add_product(columns.T, u, self._gradient, None)
        add_sum(self._gradient[: self.geometry.window].reshape(1, -1), gradient.reshape(-1))

    def pool(self, u: Any, bias: Any, out: Any, winners: Any, m: int) -> None:
        g = self.geometry
        require_type(np.uint8, winners)
        vec = vector_width(g.out_shape[2], u, bias, out, winners)
        self._launch(
            ("bias_pool", [type_name(u.dtype), type_name(out.dtype), vec, POOLING[g.pooling]]),
            self._pooled_threads(vec, m),
            (u, bias, out, winners, self.precision.number.type(self.precision.tie_margin)),
            (*g.map_shape[:2], *g.out_shape[:2], g.out_shape[2] // vec, g.pool),
        )

    def gather(self, u: Any, winners: Any, out: Any, m: int) -> None:
        g = self.geometry
        if g.pooling == "none":
            return  # `u` is `out`
        require_type(np.uint8, winners)
        vec = vector_width(g.out_shape[2], u, out, winners)
        self._launch(
            ("gather", [type_name(u.dtype), type_name(out.dtype), vec, POOLING[g.pooling]]),
            self._pooled_threads(vec, m),
            (u, winners, out),
            (*g.map_shape[:2], *g.out_shape[:2], g.out_shape[2] // vec, g.pool),
        )

    def unpool(self, s: Any, winners: Any, m: int) -> Any:
        g = self.geometry
        if g.pooling == "none":
            return s
        ho, wo, channels = g.map_shape
        u = self._view(self._map, (m, ho, wo, channels), self.precision.stored)
        require_type(np.uint8, winners)
        vec = vector_width(channels, s, winners, u)
        self._launch(
            ("unpool", [self._checked(s), vec, POOLING[g.pooling]]),
            (wo * (channels // vec), ho, m),
            (s, winners, u),
            (ho, wo, *g.out_shape[:2], channels // vec, g.pool),
        )
        return u

    def topdown(self, s: Any, winners: Any, out: Any, m: int) -> None:
        """Write ``w^T * U(s)`` into `out` (m, H, W, C), by columns of ``U(s)`` or product first."""
        self._check_topdown()
        if not self.product_first:
            columns = self.columns_up(s, winners, m)
            self.factors.product(columns, self.flipped, out.reshape(-1, self.geometry.in_shape[2]))
            return
        u, products = self.unpool(s, winners, m), self.products(m)
        outputs = self.geometry.map_shape[2]
        self.factors.product(u.reshape(-1, outputs), self.kernel.reshape(-1, outputs).T, products)
        self.col2im(products, out, m)

    def col2im(self, products: Any, out: Any, m: int) -> None:
        """Write the transpose of `columns` applied to `products` (m * Ho * Wo, k * k * C) into `out` (m, H, W, C)."""
        g = self.geometry
        height, width, channels = g.in_shape
        vec = vector_width(channels, products, out)
        self._launch(
            ("col2im", [type_name(products.dtype), type_name(out.dtype), vec]),
            (width * (channels // vec), height, m),
            (products, out),
            (height, width, channels // vec, g.kernel, g.stride, g.padding, *g.map_shape[:2]),
        )

    def _pooled_threads(self, vec: int, m: int) -> tuple[int, int, int]:
        height, width, channels = self.geometry.out_shape
        return width * (channels // vec), height, m

    def _launch(self, kernel: tuple[str, list], threads: tuple[int, int, int], arrays: tuple, sizes: tuple) -> None:
        launch_map(self.launcher, *kernel, threads, arrays, sizes)
