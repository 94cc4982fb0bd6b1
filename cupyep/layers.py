"""Edges: the map from the state below to the drive above, its adjoint and its parameter gradient.

Edge n connects s^(n-1) and s^n: ``u = w * s^(n-1) + b`` (convolution or dense map), ``d = P(u)`` (pooling). An edge
holds parameters only. Everything that depends on the batch (scratch, chunk sizes) is in the object that `prepare`
returns, made once for a batch shape and passed back to every call.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupyep.backend.device import Device, gemm
from cupyep.errors import ConfigurationError, choose, require
from cupyep.kernels.buffers import Arena
from cupyep.kernels.columns import im2col, inner_view, output_size
from cupyep.kernels.pooling import average_pool, average_scatter, max_gather, max_pool, max_scatter

POOLINGS = ("none", "max", "average")


class Edge:
    """Base of `Conv2d` and `Linear`: parameters, shapes, initialisation.

    Attributes
    ----------
    in_shape, out_shape : tuple of int
        Shapes, without the batch axis, of the state below and of the state above (after pooling).
    weight, bias : arrays
    has_winners : bool
        Whether the drive comes with max-pooling winners.
    """

    has_winners = False
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    weight: Any
    bias: Any

    def initialize(self, generator: np.random.Generator, gain: float, device: Device, dtype: Any) -> None:
        """Draw weights from N(0, gain^2 / fan_in), biases zero.

        Parameters
        ----------
        generator : numpy.random.Generator
            Host generator, so that every device gets the same weights.
        gain : float
            Positive.
        """
        require(gain > 0, f"gain must be positive, not {gain}")
        fan_in = math.prod(self.weight_shape[:-1])
        weight = generator.standard_normal(self.weight_shape) * (gain / math.sqrt(fan_in))
        self.weight = device.asarray(weight.astype(dtype))
        self.bias = device.asarray(np.zeros(self.weight_shape[-1], dtype))

    def parameters(self) -> dict[str, Any]:
        """Return ``{"weight": ..., "bias": ...}``."""
        return {"weight": self.weight, "bias": self.bias}


class Conv2d(Edge):
    """Convolution and pooling.

    Parameters
    ----------
    in_shape : (H, W, C)
    channels : int
        K, the number of output channels.
    kernel, stride, padding : int
        Square kernel; zero padding, less than `kernel`.
    pooling : {"none", "max", "average"}
    pool : int
        Edge of the non-overlapping pooling window.

    Raises
    ------
    ConfigurationError
        If a value is out of range or the map is too small for kernel and pooling.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        channels: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 1,
        pooling: str = "none",
        pool: int = 2,
    ):
        require(len(in_shape) == 3 and min(in_shape) > 0, f"Conv2d needs an input shape (H, W, C), not {in_shape}")
        require(
            channels > 0 and kernel > 0 and stride > 0 and pool > 0, "channels, kernel, stride, pool must be positive"
        )
        require(0 <= padding < kernel, f"padding must be from 0 to kernel - 1 = {kernel - 1}, not {padding}")
        self.in_shape = tuple(in_shape)
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.pooling = choose("pooling", pooling, POOLINGS)
        self.pool = 1 if pooling == "none" else pool
        self.has_winners = pooling == "max"
        height, width, self.in_channels = in_shape
        self.map_shape = (
            output_size(height, kernel, stride, padding),
            output_size(width, kernel, stride, padding),
            channels,
        )
        self.out_shape = (self.map_shape[0] // self.pool, self.map_shape[1] // self.pool, channels)
        if min(self.out_shape) < 1:
            raise ConfigurationError(
                f"a {height}x{width} map is too small for a {kernel}x{kernel} convolution (stride {stride}, padding "
                f"{padding}) with {self.pool}x{self.pool} pooling; use larger images or fewer pools"
            )
        self.weight_shape = (kernel, kernel, self.in_channels, channels)

    def __repr__(self) -> str:
        pooled = "" if self.pooling == "none" else f", {self.pooling} pool {self.pool}"
        return (
            f"Conv2d({self.in_shape} -> {self.out_shape}, kernel {self.kernel}, stride {self.stride}, "
            f"padding {self.padding}{pooled})"
        )

    def scratch(self, samples: int, dtype: Any) -> list[tuple[tuple[int, ...], Any]]:
        """Return shapes and dtypes of the scratch for `samples` samples: up, down and pooling arrays."""
        k, (h, w, c), (ho, wo, channels) = self.kernel, self.in_shape, self.map_shape
        return [
            ((samples, h + 2 * self.padding, w + 2 * self.padding, c), dtype),
            ((samples, ho, wo, k, k * c), dtype),
            ((samples, ho, wo, channels), dtype),
            ((samples, h + k - 1, w + k - 1, channels), dtype),
            ((samples, h, w, k, k * channels), dtype),
            ((samples, *self.out_shape), np.bool_),
        ]

    def prepare(self, batch: int, arena_bytes: int, dtype: Any, xp: Any) -> ConvScratch:
        """Plan the chunks for `batch` samples within `arena_bytes`; `ConvScratch.bind` then gives it memory."""
        return ConvScratch(self, batch, arena_bytes, dtype, xp)

    def refresh(self, scratch: ConvScratch) -> None:
        """Take up the current weights for the top-down product (once a settle, not once a step)."""
        flipped = self.weight[::-1, ::-1].transpose(0, 1, 3, 2)
        scratch.flipped.reshape(flipped.shape)[...] = flipped

    def _columns(self, s: Any, scratch: ConvScratch, m: int) -> Any:
        padded = scratch.padded[:m]
        inner_view(padded, self.in_shape[:2], self.padding)[...] = s
        columns = scratch.columns[:m]
        im2col(padded, self.kernel, self.stride, columns)
        return columns.reshape(-1, self.kernel * self.kernel * self.in_channels)

    def _matrix(self) -> Any:
        return self.weight.reshape(-1, self.map_shape[2])

    def _product(self, s: Any, out: Any, scratch: ConvScratch, m: int) -> Any:
        """Return ``w * s`` before pooling, written into `out` itself where there is no pooling."""
        u = out if self.pooling == "none" else scratch.map[:m]
        gemm(self._columns(s, scratch, m), self._matrix(), out=u.reshape(-1, self.map_shape[2]))
        return u

    def drive(self, s: Any, out: Any, winners: Any, scratch: ConvScratch) -> None:
        """Write ``d = P(w * s + b)`` into `out` and the pooling winners into `winners` (None without max-pooling).

        Parameters
        ----------
        s : array of shape (B, *in_shape)
        out : array of shape (B, *out_shape)
        winners : uint8 array of the shape of `out`, or None
        scratch : ConvScratch
        """
        for part, m in scratch.chunks:
            u = self._product(s[part], out[part], scratch, m)
            if self.pooling == "max":
                max_pool(u, self.pool, out[part], winners[part], scratch.mask[:m])
            elif self.pooling == "average":
                average_pool(u, self.pool, out[part])
            out[part] += self.bias  # after pooling: both poolings commute with a constant a channel

    def linear_drive(self, s: Any, out: Any, winners: Any, scratch: ConvScratch) -> None:
        """Write ``G(w * s)`` into `out`: no bias, max-pooling replaced by reading the units at given `winners`."""
        for part, m in scratch.chunks:
            u = self._product(s[part], out[part], scratch, m)
            if self.pooling == "max":
                max_gather(u, self.pool, winners[part], out[part], scratch.mask[:m])
            elif self.pooling == "average":
                average_pool(u, self.pool, out[part])

    def _unpool(self, s: Any, winners: Any, out: Any, mask: Any) -> None:
        if self.pooling == "max":
            max_scatter(s, self.pool, winners, out, mask)
        elif self.pooling == "average":
            average_scatter(s, self.pool, out)
        else:
            out[...] = s

    def topdown(self, s: Any, winners: Any, out: Any, scratch: ConvScratch) -> None:
        """Write ``w^T * U(s)``, the adjoint of `linear_drive`, into `out`.

        Parameters
        ----------
        s : array of shape (B, *out_shape)
        winners : uint8 array of shape (B, *out_shape), or None
        out : array of shape (B, *in_shape)
        """
        k, channels = self.kernel, self.map_shape[2]
        for part, m in scratch.chunks:
            padded = scratch.padded_up[:m]
            view = inner_view(padded, self.map_shape[:2], k - 1 - self.padding, self.stride)
            self._unpool(s[part], None if winners is None else winners[part], view, scratch.mask[:m])
            columns = scratch.columns_up[:m]
            im2col(padded, k, 1, columns)
            gemm(columns.reshape(-1, k * k * channels), scratch.flipped, out=out[part].reshape(-1, self.in_channels))

    def add_gradient(self, s_below: Any, s: Any, winners: Any, weight: Any, bias: Any, scratch: ConvScratch) -> None:
        """Add ``corr(s_below, U(s))``, the derivative of ``<s, d(s_below)>`` at fixed winners, to `weight` and (unless
        None) the sum of ``U(s)`` to `bias`.

        Parameters
        ----------
        s_below : array of shape (B, *in_shape)
        s : array of shape (B, *out_shape)
        weight, bias : arrays of the shapes of the parameters
        """
        channels = self.map_shape[2]
        for part, m in scratch.chunks:
            u = s[part]
            if self.pooling != "none":
                u = scratch.map[:m]
                self._unpool(s[part], None if winners is None else winners[part], u, scratch.mask[:m])
            columns = self._columns(s_below[part], scratch, m)
            gemm(columns.T, u.reshape(-1, channels), out=scratch.weight.reshape(-1, channels))
            weight += scratch.weight
        if bias is not None:
            bias += s.reshape(-1, channels).sum(axis=0)  # pooling adjoints keep the sum

    def flops(self) -> int:
        """Return the operations (multiply and add counted apart) of one product for one sample."""
        return 2 * math.prod(self.map_shape) * self.kernel**2 * self.in_channels


class ConvScratch:
    """Chunks and scratch of one `Conv2d` for one batch size.

    Samples are processed in chunks whose scratch fits the byte budget (at least one sample), so that the columns stay
    in cache; the arrays are views of an arena shared by all edges.
    """

    def __init__(self, edge: Conv2d, batch: int, arena_bytes: int, dtype: Any, xp: Any):
        one = Arena.size(edge.scratch(1, dtype))
        samples = max(1, min(batch, arena_bytes // one))
        samples = -(-batch // -(-batch // samples))  # equal chunks
        self.chunks = [
            (slice(start, min(start + samples, batch)), min(samples, batch - start))
            for start in range(0, batch, samples)
        ]
        self.requests = edge.scratch(samples, dtype)
        k = edge.kernel
        self.flipped = xp.empty((k * k * edge.map_shape[2], edge.in_channels), dtype)
        self.weight = xp.empty(edge.weight_shape, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes wanted from the arena."""
        return Arena.size(self.requests)

    def bind(self, arena: Arena) -> None:
        """Take views of the arena."""
        self.padded, self.columns, self.map, self.padded_up, self.columns_up, self.mask = arena.views(self.requests)


class Linear(Edge):
    """Dense map of the flattened state below to `units` units.

    Parameters
    ----------
    in_shape : tuple of int
    units : int
    """

    def __init__(self, in_shape: tuple[int, ...], units: int):
        require(units > 0, f"units must be positive, not {units}")
        self.in_shape = tuple(in_shape)
        self.out_shape = (units,)
        self.weight_shape = (math.prod(in_shape), units)

    def __repr__(self) -> str:
        return f"Linear({self.in_shape} -> {self.out_shape})"

    def prepare(self, batch: int, arena_bytes: int, dtype: Any, xp: Any) -> LinearScratch:
        """Return the scratch; a dense map needs none from the arena."""
        return LinearScratch(self, dtype, xp)

    def refresh(self, scratch: LinearScratch) -> None:
        """Nothing to take up: the top-down product reads the weights themselves."""

    def drive(self, s: Any, out: Any, winners: Any, scratch: LinearScratch) -> None:
        """Write ``s w + b`` into `out` (B, units)."""
        self.linear_drive(s, out, winners, scratch)
        out += self.bias

    def linear_drive(self, s: Any, out: Any, winners: Any, scratch: LinearScratch) -> None:
        """Write ``s w`` into `out` (B, units)."""
        gemm(s.reshape(len(s), -1), self.weight, out=out)

    def topdown(self, s: Any, winners: Any, out: Any, scratch: LinearScratch) -> None:
        """Write ``s w^T`` into `out` (B, *in_shape)."""
        gemm(s, self.weight.T, out=out.reshape(len(s), -1))

    def add_gradient(self, s_below: Any, s: Any, winners: Any, weight: Any, bias: Any, scratch: LinearScratch) -> None:
        """Add the derivative of ``<s, d(s_below)>`` to `weight` and (unless None) `bias`."""
        gemm(s_below.reshape(len(s), -1).T, s, out=scratch.weight)
        weight += scratch.weight
        if bias is not None:
            bias += s.sum(axis=0)

    def flops(self) -> int:
        """Return the operations of one product for one sample."""
        return 2 * math.prod(self.weight_shape)


class LinearScratch:
    """Scratch of one `Linear`: its weight gradient."""

    nbytes = 0

    def __init__(self, edge: Linear, dtype: Any, xp: Any):
        self.weight = xp.empty(edge.weight_shape, dtype)

    def bind(self, arena: Arena) -> None:
        """Nothing to take from the arena."""
