"""Heads: a linear map of one layer's state, and a loss. The readout, local errors and distillation are all heads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from cupyep.backend import array_module
from cupyep.backend.cuda import identity
from cupyep.backend.device import Device, add_gemm, gemm
from cupyep.backend.precision import Precision, get_precision
from cupyep.errors import DivergenceError, is_integer, require, shown
from cupyep.losses import CrossEntropy, SquaredError
from cupyep.ops import update
from cupyep.ops.columns import output_size
from cupyep.ops.factors import Factors
from cupyep.ops.head import SOURCE, CudaHeadOps, HeadOps

# A map in float16 is multiplied by this, and errors are divided by it: an error, scaled as the deviations are (see
# `Precision.scale`), may then be 4096 times as large as the weight of its loss, not 64 times; logits of teachers are.
UP = 64.0


class LossTerm:
    """A loss of one layer's state, as the nudge and the energy see it. `Head` is one; a user's own can be anything.

    Attributes
    ----------
    layer : int
        The layer it looks at, counted from 1.
    view : tuple
        What `put_force` takes of the layer's state: pooled over windows of that size, or whole (None); of that type,
        or of the one to compute in (None).
    nbytes : int
        Bytes of what `refresh` makes.
    map_size : int
        Numbers that `put_force` reads however few samples it is for.
    """

    layer: int
    view: tuple[int | None, Any] = (None, None)
    nbytes = 0
    map_size = 0

    def prepare(self, precision: Precision) -> None:
        """Learn the precision of the products of nudged phases; called by the network."""

    def refresh(self) -> None:
        """Take up the current parameters; called at the start of every nudged phase."""

    def put_force(self, seen: Any, target: Any, scale: Any, force: Any, scratch: Any, add: bool) -> None:
        """Write ``scale * dloss/dstate`` into `force`, or add it, at a `view` of the state; the rest as `add_force`."""
        if not add:
            force[...] = 0
        self.add_force(seen, target, scale, force, scratch)

    def loss(self, state: Any, target: Any) -> Any:
        """Return the loss a sample, shape (B,), of `state` (B, *shape)."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(state, target)")

    def scratch_size(self, samples: int) -> int:
        """Return the elements of scratch that `add_force` wants for a batch."""
        return 0

    def add_force(self, state: Any, target: Any, scale: Any, force: Any, scratch: Any = None) -> None:
        """Add ``scale * dloss/dstate`` to `force`.

        Parameters
        ----------
        state, force : arrays of shape (B, *shape)
        target : array with B rows, or None
        scale : array of shape (B,)
            ``-beta * kappa`` of each sample.
        scratch : array of shape (scratch_size(B),), optional
            Of the type of `force`; what it needs is allocated otherwise.
        """
        raise NotImplementedError(f"{type(self).__name__} must define add_force(state, target, scale, force, scratch)")

    def capture_key(self) -> tuple[Any, ...] | None:
        """Return all that `add_force` depends on besides its arguments: settings, and addresses of arrays.

        Two calls with equal keys must do the same operations on the same arrays: then they may be captured in a CUDA
        graph and replayed without calling `add_force` again. None forbids it.
        """
        return None

    def parameters(self) -> dict[str, Any]:
        """Return learned parameters by name; empty for a fixed map."""
        return {}

    def gradient_scratch_size(self, samples: int) -> int:
        """Return the elements of scratch that `add_parameter_gradient` wants for a batch."""
        return 0

    def add_parameter_gradient(
        self, state: Any, target: Any, scale: Any, gradients: dict[str, Any], scratch: Any = None
    ) -> None:
        """Add ``sum over the batch of scale * dloss/dparameter`` to each array in `gradients`.

        `scratch` is as that of `add_force`, of ``gradient_scratch_size(B)`` elements.
        """


class Nudge(NamedTuple):
    """One summand ``weight * term.loss(s^layer, target)`` of the loss that nudges."""

    term: LossTerm
    weight: float
    target: Any


class Head(LossTerm):
    """``loss(A pool(s) + b, target)``.

    Parameters
    ----------
    layer : int
        Layer n of the state s^n, counted from 1.
    shape : tuple of int
        Shape of s^n without the batch axis.
    loss : CrossEntropy or SquaredError
    classes : int
        Length of the output; ignored for the identity map.
    identity : bool
        The state itself is the output (squared error with the output layer as a state).
    bias : bool
    learned : bool
        Whether the map is among the trained parameters.
    pool : int, optional
        Average the state over non-overlapping ``pool x pool`` windows first.

    Notes
    -----
    A fixed random map is drawn from N(0, gain^2 / dim), dim the length of the (pooled) state.

    In a nudged phase, iteration by iteration, a network in halves takes state, map and error as halves into products
    that are added up in float32. What is computed once a step (outputs, losses, the derivative of the map) is not.
    """

    def __init__(
        self,
        layer: int,
        shape: tuple[int, ...],
        loss: CrossEntropy | SquaredError,
        classes: int = 0,
        *,
        identity: bool = False,
        bias: bool = False,
        learned: bool = False,
        pool: int | None = None,
    ):
        self.layer = layer
        self.criterion = loss
        self.classes = classes
        self.learned = learned
        self.has_bias = bias
        self.identity = identity
        self.shape = tuple(shape)
        self.pool = pool if pool and pool > 1 and len(shape) == 3 else None
        if self.pool:
            size = output_size(min(shape[:2]), self.pool, self.pool, 0)
            require(size > 0, f"a pooled signal needs pool <= {min(shape[:2])} on layer {layer}, not {self.pool}")
            self.inner_shape: tuple[int, ...] = (shape[0] // self.pool, shape[1] // self.pool, shape[2])
        else:
            self.inner_shape = self.shape
        self.weight: Any = None
        self.bias: Any = None
        self._device: Device | None = None
        self._dtype: Any = None
        self._ops: HeadOps = HeadOps()
        self._is_gpu = self._needs_back = self._adds_products = False
        self._matrix: Any = None  # the map as a factor

    def initialize(self, generator: np.random.Generator, gain: float, device: Device, dtype: Any) -> None:
        """Draw the map; see Notes of the class."""
        self.attach(device, dtype)
        if self.identity:
            return
        dim = math.prod(self.inner_shape)
        self.weight = device.drawn(
            lambda shape: generator.standard_normal(shape) * gain / math.sqrt(dim), (dim, self.classes), dtype
        )
        if self.has_bias:
            self.bias = device.asarray(np.zeros(self.classes, dtype))

    def attach(self, device: Device, dtype: Any) -> None:
        """Learn where and in what type to compute; the map is not there yet."""
        self._device, self._dtype = device, np.dtype(dtype)
        self._is_gpu, self._adds_products = device.is_gpu, device.adds_products
        self._needs_back = bool(self.pool) or not (self.identity or device.adds_products)
        if device.is_gpu:
            self._ops = CudaHeadOps(device.launcher(SOURCE), device.launcher(update.SOURCE))
        self.prepare(get_precision(self._dtype.name))

    def prepare(self, precision: Precision) -> None:
        self._factors = Factors(precision, self._is_gpu)
        self._up = UP if precision.name == "float16" else 1.0
        self._matrix = None
        if not self.identity and type(self).add_force is Head.add_force:  # a subclass may do something else there
            self.view = (self.pool, precision.stored)
        self.map_size = 0 if self.identity else math.prod(self.inner_shape) * self.classes
        self.nbytes = self.map_size * self._factors.dtype.itemsize if self._halves else 0

    @property
    def _halves(self) -> bool:
        return self.view[1] is not None and self.view[1] != self._dtype

    def refresh(self) -> None:
        if not self._halves:
            self._matrix = self.weight
            return
        if self._matrix is None:
            self._matrix = array_module(self.weight).empty(self.weight.shape, self._factors.dtype)
        self._factors.take_up(self.weight, self._matrix)
        if self._up != 1.0:
            self._matrix *= self._up

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_ops"} | {"_matrix": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _ops=HeadOps())
        if self._device is not None:
            precision = self._factors.precision
            self.attach(self._device, self._dtype)
            self.prepare(precision)

    def scratch_size(self, samples: int) -> int:
        dim, errors = math.prod(self.inner_shape), samples * self.classes
        if not self._halves:
            return self._parts_size(samples, self._needs_back)
        return samples * (dim if self._needs_back or self._factors.widens else 0) + 2 * errors + samples

    def gradient_scratch_size(self, samples: int) -> int:
        if not self.learned:
            return 0
        product = 0 if self._adds_products else math.prod(self.inner_shape) * self.classes
        return self._parts_size(samples, bool(self.pool)) + product

    def _parts_size(self, samples: int, back: bool) -> int:
        dim = math.prod(self.inner_shape)
        return samples * ((dim if self.identity else self.classes) + 1 + (dim if back else 0))

    def _parts(self, state: Any, scratch: Any, back: bool) -> tuple[Any, Any, Any]:
        """Return scratch for the outputs z, one column, and, flat, the pooled state or the force on it (or nothing)."""
        samples, dim = len(state), math.prod(self.inner_shape)
        if scratch is None:
            scratch = array_module(state).empty(self._parts_size(samples, back), self._dtype)
        width = dim if self.identity else self.classes
        start = samples * dim if back else 0
        end = start + samples * width
        z, column = scratch[start:end], scratch[end : end + samples]
        return z.reshape(samples, width), column.reshape(samples, 1), scratch[:start]

    def _flat(self, state: Any, back: Any) -> Any:
        """Return the (pooled) state as rows."""
        if self.pool:
            pooled = back.reshape(len(state), *self.inner_shape)
            self._ops.pool(state, self.pool, pooled)
            state = pooled
        return state.reshape(len(state), -1)

    def output(self, state: Any) -> Any:
        """Return z, shape (B, classes): logits, or the state itself for the identity."""
        if self.identity:
            return state.reshape(len(state), -1)
        z, _, back = self._parts(state, None, bool(self.pool))
        gemm(self._flat(state, back), self.weight, out=z)
        if self.bias is not None:
            z += self.bias
        return z

    def loss(self, state: Any, target: Any) -> Any:
        z = self.output(state)
        return self.criterion.value(z, target.reshape(z.shape))

    def put_force(self, seen: Any, target: Any, scale: Any, force: Any, scratch: Any, add: bool) -> None:
        if self.view == (None, None):
            super().put_force(seen, target, scale, force, scratch, add)
            return
        factors, samples = self._factors, len(seen)
        back = scratch[: samples * math.prod(self.inner_shape) if self._needs_back or factors.widens else 0]
        rest = scratch[back.size :]
        z, rest = rest[: samples * self.classes].reshape(samples, -1), rest[samples * self.classes :]
        column, rest = rest[:samples].reshape(samples, 1), rest[samples:]
        flat = seen.reshape(samples, -1)
        if factors.widens:
            flat = back.reshape(flat.shape)
            flat[...] = seen.reshape(flat.shape)
        gemm(flat, self._matrix, out=z)
        error = rest[: z.size].view(self.view[1])[: z.size].reshape(z.shape) if self._halves else z
        into = error if self._halves else None
        self._ops.scaled_error(self.criterion, z, self.bias, target, scale, column, into, 1 / self._up)
        if factors.widens:
            z[...] = error
            error = z
        self._send(error, self._matrix, force, back, add)

    def _send(self, error: Any, matrix: Any, force: Any, back: Any, add: bool) -> None:
        """Write ``error matrix^T``, spread over the windows, into `force`, or add it; `back` is scratch."""
        rows: Any = back.reshape(len(force), -1) if back.size else None
        if self.pool:
            gemm(error, matrix.T, out=rows)
            self._ops.spread(rows.reshape(-1, *self.inner_shape), self.pool, force, add)
        elif add:
            add_gemm(error, matrix.T, force.reshape(len(force), -1), rows)
        else:
            gemm(error, matrix.T, out=force.reshape(len(force), -1))

    def _scaled_error(self, state: Any, target: Any, scale: Any, parts: tuple[Any, Any, Any]) -> Any:
        z, column, back = parts
        if self.identity:
            z[...] = state.reshape(z.shape)
        else:
            gemm(self._flat(state, back), self.weight, out=z)
        self._ops.scaled_error(self.criterion, z, self.bias, target.reshape(z.shape), scale, column)
        return z

    def add_force(self, state: Any, target: Any, scale: Any, force: Any, scratch: Any = None) -> None:
        parts = self._parts(state, scratch, self._needs_back)
        error, back = self._scaled_error(state, target, scale, parts), parts[2]
        if self.identity:
            force += error.reshape(force.shape)
        else:
            self._send(error, self.weight, force, back, add=True)

    def capture_key(self) -> tuple[Any, ...] | None:
        if type(self) is not Head:  # a subclass may do something else, and must say itself on what that depends
            return None
        arrays = [identity(array) for array in (self.weight, self.bias, self._matrix) if array is not None]
        return (self.criterion.name, self.criterion.temperature, self.identity, self.pool, *arrays)

    def parameters(self) -> dict[str, Any]:
        if not self.learned:
            return {}
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def add_parameter_gradient(
        self, state: Any, target: Any, scale: Any, gradients: dict[str, Any], scratch: Any = None
    ) -> None:
        samples, product = len(state), None
        if scratch is None:
            scratch = array_module(state).empty(self.gradient_scratch_size(samples), self._dtype)
        parts = self._parts(state, scratch, bool(self.pool))
        error = self._scaled_error(state, target, scale, parts)
        flat = parts[2].reshape(samples, -1) if self.pool else state.reshape(samples, -1)
        if not self._adds_products:
            start = self._parts_size(samples, bool(self.pool))
            product = scratch[start : start + self.weight.size].reshape(self.weight.shape)
        add_gemm(flat.T, error, gradients["weight"], product)
        if self.bias is not None:
            gradients["bias"] += error.sum(axis=0)


def readout_window(pool: int | str | None, shape: tuple[int, ...]) -> int | None:
    """Return the side of the windows that a readout averages a state of `shape` over, None for no averages.

    `ConfigurationError` if there is no map, it is smaller than the windows, or not square where all of it is to be
    averaged.
    """
    if pool is None or (is_integer(pool) and pool == 1):
        return None
    require(len(shape) == 3, f"readout_pool {shown(pool)} needs a map as the last state, which is of shape {shape}")
    if not isinstance(pool, str) or pool != "global":
        rule = f"'global', None or an integer from 1 to {min(shape[:2])}, the side of the last map"
        right = not isinstance(pool, str) and is_integer(pool) and 1 <= pool <= min(shape[:2])
        require(right, f"readout_pool must be {rule}, not {shown(pool)}")
        return int(pool)
    require(shape[0] == shape[1], f"readout_pool 'global' needs a square last map, not {shape[0]}x{shape[1]}")
    return shape[0] if shape[0] > 1 else None


def accuracy_count(z: Any, labels: Any) -> Any:
    """Return how many rows of `z` (N, classes) are finite and have their maximum at `labels` (N,), as a 0-d array."""
    finite = array_module(z).isfinite(z).all(axis=-1)  # the maximum of a row with NaN would be at the first of them
    return ((z.argmax(axis=-1) == labels) & finite).sum()


def ranked(scores: np.ndarray) -> np.ndarray:
    """Return the classes of each row of `scores` (N, classes) in falling order, of equals the first one first.

    `DivergenceError` if a row is not finite: it would have the first class.
    """
    finite = np.isfinite(scores).all(axis=1)
    if not finite.all():
        raise DivergenceError(
            f"image {finite.argmin()}: its scores are NaN or infinite, the network does not settle on it; lower the "
            "feedback, the gain or the steps, or look at the parameters"
        )
    return np.argsort(-scores, axis=1, kind="stable")
