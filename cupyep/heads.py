"""Heads: a linear map of one layer's state, and a loss. The readout, local errors and distillation are all heads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.backend.device import Device
from cupyep.errors import require
from cupyep.kernels.buffers import Buffers
from cupyep.kernels.columns import output_size
from cupyep.kernels.pooling import average_pool, average_scatter
from cupyep.losses import CrossEntropy, SquaredError


class LossTerm:
    """A loss of one layer's state, as the nudge and the energy see it. `Head` is one; a user's own can be anything.

    Attributes
    ----------
    layer : int
        The layer it looks at, counted from 1.
    """

    layer: int

    def loss(self, state: Any, target: Any) -> Any:
        """Return the loss a sample, shape (B,), of `state` (B, *shape)."""
        raise NotImplementedError

    def add_force(self, state: Any, target: Any, scale: Any, force: Any) -> None:
        """Add ``scale * dloss/dstate`` to `force`.

        Parameters
        ----------
        state, force : arrays of shape (B, *shape)
        target : array with B rows, or None
        scale : array of shape (B,)
            ``-beta * kappa`` of each sample.
        """
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """Return learned parameters by name; empty for a fixed map."""
        return {}

    def add_parameter_gradient(self, state: Any, target: Any, scale: Any, gradients: dict[str, Any]) -> None:
        """Add ``sum over the batch of scale * dloss/dparameter`` to each array in `gradients`."""


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
            self.inner_shape = (shape[0] // self.pool, shape[1] // self.pool, shape[2])
        else:
            self.inner_shape = self.shape
        self.weight: Any = None
        self.bias: Any = None
        self._buffers: Buffers | None = None

    def initialize(self, generator: np.random.Generator, gain: float, device: Device, dtype: Any) -> None:
        """Draw the map; see Notes of the class."""
        self._buffers = Buffers(device.xp, dtype)
        if self.identity:
            return
        dim = math.prod(self.inner_shape)
        self.weight = device.asarray(
            (generator.standard_normal((dim, self.classes)) * gain / math.sqrt(dim)).astype(dtype)
        )
        if self.has_bias:
            self.bias = device.asarray(np.zeros(self.classes, dtype))

    def _flat(self, state: Any) -> Any:
        if self.pool:
            pooled = self._buffers.get("pooled", (len(state), *self.inner_shape), state.dtype)
            average_pool(state, self.pool, pooled)
            state = pooled
        return state.reshape(len(state), -1)

    def output(self, state: Any) -> Any:
        """Return z, shape (B, classes): logits, or the state itself for the identity. Valid until the next call."""
        flat = self._flat(state)
        if self.identity:
            return flat
        z = self._buffers.get("z", (len(state), self.classes), state.dtype)
        array_module(state).matmul(flat, self.weight, out=z)
        if self.bias is not None:
            z += self.bias
        return z

    def loss(self, state: Any, target: Any) -> Any:
        return self.criterion.value(self.output(state), target)

    def _scaled_error(self, state: Any, target: Any, scale: Any) -> Any:
        z = self.output(state)
        error = self._buffers.get("error", z.shape, state.dtype)
        column = self._buffers.get("column", (len(state), 1), state.dtype)
        self.criterion.gradient(z, target, error, column)
        error *= scale[:, None]
        return error

    def add_force(self, state: Any, target: Any, scale: Any, force: Any) -> None:
        error = self._scaled_error(state, target, scale)
        if self.identity:
            force += error.reshape(force.shape)
            return
        back = self._buffers.get("back", (len(state), math.prod(self.inner_shape)), state.dtype)
        array_module(state).matmul(error, self.weight.T, out=back)
        back = back.reshape(len(state), *self.inner_shape)
        if self.pool:
            spread = self._buffers.get("spread", force.shape, state.dtype)
            average_scatter(back, self.pool, spread)
            back = spread
        force += back

    def parameters(self) -> dict[str, Any]:
        if not self.learned:
            return {}
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def add_parameter_gradient(self, state: Any, target: Any, scale: Any, gradients: dict[str, Any]) -> None:
        error = self._scaled_error(state, target, scale)
        gradients["weight"] += self._flat(state).T @ error
        if self.bias is not None:
            gradients["bias"] += error.sum(axis=0)


def accuracy_count(z: Any, labels: Any) -> Any:
    """Return how many rows of `z` (N, classes) have their maximum at `labels` (N,), as a 0-d array."""
    return (z.argmax(axis=-1) == labels).sum()
