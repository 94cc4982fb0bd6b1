"""Edges: the map from the state below to the drive above, its adjoint and its parameter gradient.

From s to a drive d: ``u = w * s + b`` (convolution or dense map), ``d = P(u)`` (pooling). An edge
holds parameters only. Everything that depends on the batch (scratch, chunk sizes) is in the object that `prepare`
returns, made once for a batch shape and passed back to every call.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupyep.backend.cuda import identity
from cupyep.backend.device import Device
from cupyep.backend.precision import Precision
from cupyep.errors import ConfigurationError, choose, flag, integer, number, shape
from cupyep.ops import winograd
from cupyep.ops.columns import output_size
from cupyep.ops.conv import ConvGeometry, ConvOps, part_of
from cupyep.ops.cuda_conv import SOURCE, CudaConvOps
from cupyep.ops.linear import LinearOps
from cupyep.ops.reduction import add_sum
from cupyep.ops.winograd import WinogradOps
from cupyep.weights import Parametrisation, Plain, get_parametrisation

POOLINGS = ("none", "max", "average")
LARGEST_WINDOW = 16  # of max-pooling: the place of a winner is one byte (`cupyep.ops.pooling`)


class Edge:
    """Base of `Conv2d`, `Linear` and `Identity`: parameters, shapes, initialisation.

    Attributes
    ----------
    in_shape, out_shape : tuple of int
        Shapes, without the batch axis, of the state below and of the state above (after pooling).
    weight, bias : arrays
        The weight is the one that multiplies; what is trained is in `parameters`.
    parametrisation : Parametrisation
        How the weight is made of what is trained.
    has_winners : bool
        Whether the drive comes with max-pooling winners.
    has_bias : bool
        Whether the bias is a parameter. Without, `bias` stays zero.
    reads_image : bool or None
        Whether its network feeds it images, so that it never has to give a top-down product; the network says so. None
        before it has one.
    arguments : tuple of str
        The names of what the class is made with; all are attributes (`cupyep.persistence.network_file`).
    """

    has_winners = False
    has_bias = True
    reads_image: bool | None = None
    arguments: tuple[str, ...] = ()
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    weight: Any
    bias: Any
    parametrisation: Parametrisation = Plain()

    def initialize(
        self, generator: np.random.Generator, gain: float, device: Device, dtype: Any, weights: str = "plain"
    ) -> None:
        """Draw weights from N(0, gain^2 / fan_in), biases zero.

        Parameters
        ----------
        generator : numpy.random.Generator
            Host generator, so that every device gets the same weights.
        gain : float
            Positive.
        weights : str
            A name of `cupyep.weights.PARAMETRISATIONS`.
        """
        gain = number("gain", gain, above=0)
        self.parametrisation = get_parametrisation(weights, self.weight_shape, gain)
        scale = (gain if self.parametrisation.shares else 1.0) / math.sqrt(math.prod(self.weight_shape[:-1]))
        drawn = device.drawn(lambda shape: generator.standard_normal(shape) * scale, self.weight_shape, dtype)
        self._trained = self.parametrisation.parameters(drawn)  # of plain weights the weight itself
        self.weight = drawn if self.parametrisation.shares else device.empty(drawn.shape, drawn.dtype)
        self.bias = device.asarray(np.zeros(self.weight_shape[-1], dtype))

    def prepare(self, batch: int, nbytes: int, precision: Precision, device: Device) -> Any:
        """Return chunks and operations for `batch` samples; their `bind` then gives them scratch, of about `nbytes`."""
        raise NotImplementedError(f"{type(self).__name__} must define prepare(batch, nbytes, precision, device)")

    def drive(self, s: Any, out: Any, winners: Any, ops: Any) -> None:
        """Write the drive d of a state `s` into `out`, and the pooling winners into `winners`, None without."""
        raise NotImplementedError(f"{type(self).__name__} must define drive(s, out, winners, ops)")

    def linear_drive(self, s: Any, out: Any, winners: Any, ops: Any) -> None:
        """Write the part of the drive that is linear in `s`, at given `winners`, into `out`."""
        raise NotImplementedError(f"{type(self).__name__} must define linear_drive(s, out, winners, ops)")

    def topdown(self, s: Any, winners: Any, out: Any, ops: Any) -> None:
        """Write the adjoint of `linear_drive`, of a state `s` above, into `out`."""
        raise NotImplementedError(f"{type(self).__name__} must define topdown(s, winners, out, ops)")

    def add_gradient(self, s_below: Any, s: Any, winners: Any, weight: Any, bias: Any, ops: Any) -> None:
        """Add the derivative of ``<s, d(s_below)>`` at fixed winners to `weight` and (unless None) `bias`."""
        raise NotImplementedError(f"{type(self).__name__} must define add_gradient(s_below, s, winners, ...)")

    def flops(self) -> int:
        """Return the operations (multiply and add counted apart) of one direct product for one sample."""
        raise NotImplementedError(f"{type(self).__name__} must define flops()")

    def make_weight(self) -> None:
        """Make the weight of its parameters, as they are now."""
        if not self.parametrisation.shares:
            self.parametrisation.forward(self._trained, self.weight)

    def refresh(self, ops: Any) -> None:
        """Let operations take up the current weight, for what is made of it once a settle and not once a step."""
        ops.refresh(self.weight)

    def pull_back(self, gradients: dict[str, Any]) -> None:
        """Turn the gradient of the weight, ``gradients["weight"]``, into those of its parameters, in place."""
        if not self.parametrisation.shares:
            self.parametrisation.pullback(gradients["weight"], self._trained, gradients)

    def capture_key(self) -> tuple[Any, ...] | None:
        """Return all that drives and top-down products depend on besides their arguments: see `LossTerm.capture_key`.

        None forbids to capture iterations of a network with this edge in CUDA graphs. A subclass of `Conv2d` or
        `Linear` may do something else than they do, and must say itself on what that depends.
        """
        return (identity(self.weight), identity(self.bias)) if type(self) in (Conv2d, Linear) else None

    def parameters(self) -> dict[str, Any]:
        """Return ``{"weight": ..., "bias": ...}``: what is trained, of standardized weights their ``gain`` as well."""
        trained = {"weight": self.weight} if self.parametrisation.shares else self._trained
        return trained | {"bias": self.bias} if self.has_bias else dict(trained)

    def parameter_shapes(self, weights: str = "plain") -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, before there are any."""
        shapes = get_parametrisation(weights, self.weight_shape).shapes(self.weight_shape)
        return shapes | ({"bias": self.weight_shape[-1:]} if self.has_bias else {})


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
        Edge of the non-overlapping pooling window; of max-pooling at most 16.
    bias : bool

    Raises
    ------
    ConfigurationError
        If a value is out of range or the map is too small for kernel and pooling.
    """

    arguments = ("in_shape", "channels", "kernel", "stride", "padding", "pooling", "pool", "has_bias")

    def __init__(
        self,
        in_shape: tuple[int, ...],
        channels: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 1,
        pooling: str = "none",
        pool: int = 2,
        bias: bool = True,
    ):
        height, width, below = self.in_shape = shape("in_shape", in_shape, "H, W, C")
        self.channels = channels = integer("channels", channels)
        self.kernel = kernel = integer("kernel", kernel)
        self.stride = stride = integer("stride", stride)
        self.padding = padding = integer("padding", padding, 0, kernel - 1)
        self.has_bias = flag("bias", bias)
        self.pooling = choose("pooling", pooling, POOLINGS)
        pool = integer("pool of max-pooling", pool, 1, LARGEST_WINDOW) if pooling == "max" else integer("pool", pool)
        self.pool = 1 if pooling == "none" else pool
        self.has_winners = pooling == "max"
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
        self.weight_shape = (kernel, kernel, below, channels)
        self.geometry = ConvGeometry(
            (height, width, below), self.map_shape, self.out_shape, kernel, stride, padding, pooling, self.pool
        )

    def __repr__(self) -> str:
        pooled = "" if self.pooling == "none" else f", {self.pooling} pool {self.pool}"
        return (
            f"Conv2d({self.in_shape} -> {self.out_shape}, kernel {self.kernel}, stride {self.stride}, "
            f"padding {self.padding}{pooled}{'' if self.has_bias else ', no bias'})"
        )

    def prepare(self, batch: int, nbytes: int, precision: Precision, device: Device) -> ConvOps | WinogradOps:
        topdown = {"has_topdown": not self.reads_image}
        if device.is_gpu:
            launcher = device.launcher(SOURCE)
            return CudaConvOps(self.geometry, batch, nbytes, precision, device.xp, launcher, **topdown)
        if m := winograd.tile_size(self.geometry, batch, precision):
            return WinogradOps(self.geometry, batch, nbytes, precision, device.xp, m)
        return ConvOps(self.geometry, batch, nbytes, precision, device.xp, **topdown)

    def drive(self, s: Any, out: Any, winners: Any, ops: ConvOps) -> None:
        """Write ``d = P(w * s + b)`` into `out` and the pooling winners into `winners` (None without max-pooling).

        Parameters
        ----------
        s : array of shape (B, *in_shape)
        out : array of shape (B, *out_shape)
        winners : uint8 array of the shape of `out`, or None
        ops : ConvOps
        """
        for part, m in ops.chunks:
            u = ops.product(s[part], out[part], m)
            ops.pool(u, self.bias, out[part], part_of(winners, part), m)

    def linear_drive(self, s: Any, out: Any, winners: Any, ops: ConvOps) -> None:
        """Write ``G(w * s)`` into `out`: no bias, max-pooling replaced by reading the units at given `winners`."""
        for part, m in ops.chunks:
            u = ops.product(s[part], out[part], m)
            ops.gather(u, part_of(winners, part), out[part], m)

    def topdown(self, s: Any, winners: Any, out: Any, ops: ConvOps) -> None:
        """Write ``w^T * U(s)``, the adjoint of `linear_drive`, into `out`.

        Parameters
        ----------
        s : array of shape (B, *out_shape)
        winners : uint8 array of shape (B, *out_shape), or None
        out : array of shape (B, *in_shape)
        """
        for part, m in ops.chunks:
            ops.topdown(s[part], part_of(winners, part), out[part], m)

    def add_gradient(self, s_below: Any, s: Any, winners: Any, weight: Any, bias: Any, ops: ConvOps) -> None:
        """Add ``corr(s_below, U(s))``, the derivative of ``<s, d(s_below)>`` at fixed winners, to `weight` and (unless
        None) the sum of ``U(s)`` to `bias`.

        Parameters
        ----------
        s_below : array of shape (B, *in_shape)
        s : array of shape (B, *out_shape)
        weight, bias : arrays of the shapes of the parameters
        """
        ops.add_gradient(s_below, s, winners, weight)
        if bias is not None:
            add_sum(s, bias)  # pooling adjoints keep the sum

    def flops(self) -> int:
        return self.geometry.flops


class Linear(Edge):
    """Dense map of the flattened state below to `units` units.

    Parameters
    ----------
    in_shape : tuple of int
    units : int
    bias : bool
    """

    arguments = ("in_shape", "units", "has_bias")

    def __init__(self, in_shape: tuple[int, ...], units: int, bias: bool = True):
        self.in_shape = shape("in_shape", in_shape)
        self.units, self.has_bias = integer("units", units), flag("bias", bias)
        self.out_shape = (self.units,)
        self.weight_shape: tuple[int, int] = (math.prod(self.in_shape), self.units)

    def __repr__(self) -> str:
        return f"Linear({self.in_shape} -> {self.out_shape}{'' if self.has_bias else ', no bias'})"

    def prepare(self, batch: int, nbytes: int, precision: Precision, device: Device) -> LinearOps:
        return LinearOps(self.weight_shape, batch, precision, device)

    def drive(self, s: Any, out: Any, winners: Any, ops: LinearOps) -> None:
        """Write ``s w + b`` into `out` (B, units)."""
        self.linear_drive(s, out, winners, ops)
        out += self.bias

    def linear_drive(self, s: Any, out: Any, winners: Any, ops: LinearOps) -> None:
        """Write ``s w`` into `out` (B, units)."""
        ops.drive(s.reshape(len(s), -1), out)

    def topdown(self, s: Any, winners: Any, out: Any, ops: LinearOps) -> None:
        """Write ``s w^T`` into `out` (B, *in_shape)."""
        ops.topdown(s, out.reshape(len(s), -1))

    def add_gradient(self, s_below: Any, s: Any, winners: Any, weight: Any, bias: Any, ops: LinearOps) -> None:
        """Add the derivative of ``<s, d(s_below)>`` to `weight` and (unless None) `bias`."""
        ops.add_gradient(s_below.reshape(len(s), -1), s, weight)
        if bias is not None:
            add_sum(s, bias)

    def flops(self) -> int:
        return 2 * math.prod(self.weight_shape)


class Identity(Edge):
    """The state below as a drive: a residual connection, without parameters.

    Parameters
    ----------
    in_shape : tuple of int
    """

    arguments = ("in_shape",)
    has_bias = False

    def __init__(self, in_shape: tuple[int, ...]):
        self.in_shape = self.out_shape = shape("in_shape", in_shape)

    def __repr__(self) -> str:
        return f"Identity({self.in_shape})"

    def initialize(
        self, generator: np.random.Generator, gain: float, device: Device, dtype: Any, weights: str = "plain"
    ) -> None:
        """There is nothing to draw."""

    def capture_key(self) -> tuple[Any, ...]:
        """Return nothing: it depends on its arguments alone."""
        return ()

    def parameters(self) -> dict[str, Any]:
        """Return no parameters."""
        return {}

    def parameter_shapes(self, weights: str = "plain") -> dict[str, tuple[int, ...]]:
        """Return no shapes."""
        return {}

    def prepare(self, batch: int, nbytes: int, precision: Precision, device: Device) -> NoOps:
        return NoOps()

    def refresh(self, ops: NoOps) -> None:
        """There is nothing to take up."""

    def drive(self, s: Any, out: Any, winners: Any, ops: NoOps) -> None:
        """Copy `s` (B, *in_shape) into `out`."""
        out[...] = s

    linear_drive = drive

    def topdown(self, s: Any, winners: Any, out: Any, ops: NoOps) -> None:
        """Copy `s` (B, *in_shape) into `out`."""
        out[...] = s

    def add_gradient(self, s_below: Any, s: Any, winners: Any, weight: Any, bias: Any, ops: NoOps) -> None:
        """There are no parameters."""

    def flops(self) -> int:
        return 0


class NoOps:
    """Operations of an edge that multiplies nothing; see `ConvOps`."""

    nbytes = flops = 0
    derived: tuple[Any, ...] = ()

    def bind(self, arena: Any, derived: Any) -> None:
        """Take no views."""
