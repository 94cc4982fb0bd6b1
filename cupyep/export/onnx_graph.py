"""A network as an ONNX graph: images in, the readout of the settled free phase out, every step written out.

The graph is made by the same schedules that settle a network (`cupyep.settling`): they call a *system*, and the
system here appends nodes instead of computing. One weight tensor serves each product both ways, Conv and
ConvTranspose, Gemm with and without a transpose. Max-pooling goes back by MaxUnpool at the indices that MaxPool gave:
the plain maximum, where the package takes the first of units that are equal but for rounding
(`Precision.tie_margin`). In such a rare window feedback goes to another unit, and scores differ by more than rounding
(seen: 7e-4 in one of ten images of a network with feedback 0.5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyep._version import __version__
from cupyep.activations import Activation, Clip, Gelu, Tanh
from cupyep.errors import ConfigurationError, choose, require
from cupyep.export.weights import torch_layout
from cupyep.layers import Conv2d, Linear
from cupyep.network import Network
from cupyep.settling import ITERATIONS, check_relaxation

OPSET, IR_VERSION = 17, 8  # of 2022: understood by every runtime in use
INPUT, OUTPUT = "images", "scores"
MOST_STEPS = 5000  # a graph of more takes gigabytes to make, and hours to load


def onnx_model(
    network: Network,
    steps: int,
    schedule: str = "synchronous",
    *,
    relaxation: float = 1.0,
    unrolled_steps: int = 0,
    mean: np.ndarray | None = None,
    std: np.ndarray | None = None,
    classes: Sequence[str] = (),
    feedforward: bool = False,
) -> Any:
    """Return the ONNX model of `network` after `steps` settling steps from zeros, as `Network.scores` computes it.

    Parameters
    ----------
    network : Network
        Of Conv2d and Linear layers and an activation of `cupyep.activations.ACTIVATIONS`; computed in float32.
    steps : int
        From 1 to `MOST_STEPS`.
    schedule : {"synchronous", "evenodd", "sweeps"}
    relaxation : float
        See `cupyep.settling.settle`.
    unrolled_steps : int
        Synchronous steps after these, as `BackpropagationThroughTime` predicts.
    mean, std : ndarray of shape (C,), optional
        With them the graph takes pixels in [0, 1] and normalises them itself, else normalised images.
    classes : sequence of str
        Kept in the model's metadata.
    feedforward : bool
        One pass upwards without feedback, as networks trained by backpropagation predict; `steps`, `schedule` and
        `relaxation` are not used.

    Returns
    -------
    onnx.ModelProto
        Input ``images`` (N, C, H, W) float32, output ``scores`` (N, classes) float32: logits, or with squared error the
        output units.

    Raises
    ------
    ConfigurationError
        If the package onnx is not installed, there are too many steps, or something in the network has no counterpart.
    """
    helper, numpy_helper = _onnx()
    within = feedforward or 1 <= steps <= steps + unrolled_steps <= MOST_STEPS
    require(
        within, f"a graph writes every step out: --steps must be from 1 to {MOST_STEPS} (got {steps + unrolled_steps})"
    )
    graph = _Graph(network, helper)
    images = graph.normalised(INPUT, mean, std)
    check_relaxation(relaxation, choose("schedule", schedule, ITERATIONS))
    graph.settle(images, 0 if feedforward else steps, schedule, relaxation)
    graph.iterate(0 if feedforward else unrolled_steps, "synchronous", 1.0)
    graph.readout()
    shape = network.input_shape if len(network.input_shape) == 1 else [network.input_shape[k] for k in (2, 0, 1)]
    proto = helper.make_graph(
        graph.used_nodes(),
        "cupyep",
        [helper.make_tensor_value_info(INPUT, 1, ["N", *shape])],  # 1: float32
        [helper.make_tensor_value_info(OUTPUT, 1, ["N", network.classes])],
        [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(proto, producer_name="cupyep", producer_version=__version__, opset_imports=opsets)
    model.ir_version = IR_VERSION
    how = {"schedule": "feedforward"}
    if not feedforward:
        how = {"schedule": schedule, "relaxation": relaxation, "steps": steps, "unrolled_steps": unrolled_steps}
    pixels = "pixels in [0, 1]" if mean is not None else "normalised images"
    properties = {"input": f"{pixels}, N x C x H x W", "settling": json.dumps(how | {"feedback": network.feedback})}
    properties["network"] = json.dumps(network.describe())
    helper.set_model_props(model, properties | {"classes": json.dumps(list(classes))})
    return model


def _onnx() -> tuple[Any, Any]:
    try:
        from onnx import helper, numpy_helper
    except ImportError:
        raise ConfigurationError('ONNX needs the package onnx: pip install "cupyep[onnx]"') from None
    return helper, numpy_helper


class _Graph:
    """A system (see `cupyep.settling`) whose states, drives and feedback are names of tensors, None for zeros."""

    drives_current = False
    relaxation = 1.0

    def __init__(self, network: Network, helper: Any):
        low, high = network.activation.low, network.activation.high
        require(low <= 0 <= high, f"activation {network.activation.name} does not start at 0; it cannot be exported")
        self.network = network
        self.helper = helper
        self.depth = network.depth
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self._constant_names: dict[tuple, str] = {}
        self.states: list[str | None] = [None] * self.depth
        self.drives: list[str | None] = [None] * self.depth
        self.topdowns: list[str | None] = [None] * self.depth
        self.winners: list[str | None] = [None] * self.depth
        for name, array in torch_layout(network).items():
            self.constants[name] = array.astype(np.float32)

    # --- nodes -----------------------------------------------------------------------------------------------------

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; return the name of its output, or a tuple of them."""
        names = [f"{kind}_{len(self.nodes)}" + (f"_{k}" if k else "") for k in range(outputs)]
        self.nodes.append(self.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else tuple(names)

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Return the name of a constant tensor; equal ones share it."""
        array = np.asarray(value, dtype)
        key = (array.dtype, array.shape, array.tobytes())
        name = self._constant_names.setdefault(key, f"constant_{len(self._constant_names)}")
        self.constants[name] = array
        return name

    def shape(self, *rest: int) -> str:
        """Return the name of the shape (N, *rest), N the number of images."""
        batch = self.node("Shape", INPUT, start=0, end=1)
        return self.node("Concat", batch, self.constant(rest, np.int64), axis=0)

    def used_nodes(self) -> list[Any]:
        """Return the nodes that the output depends on; the last steps of a schedule move states that nobody reads."""
        needed, used = {OUTPUT}, []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                used.append(node)
        self.constants = {name: array for name, array in self.constants.items() if name in needed}
        return used[::-1]

    # --- input, settling, readout ----------------------------------------------------------------------------------

    def normalised(self, images: str, mean: np.ndarray | None, std: np.ndarray | None) -> str:
        if mean is None:
            return images
        mean, std = (np.asarray(a, np.float64).reshape(1, -1, 1, 1) for a in (mean, std))
        scaled = self.node("Mul", images, self.constant(1 / std))
        return self.node("Add", scaled, self.constant(-mean / std))

    def settle(self, images: str, steps: int, schedule: str, relaxation: float) -> None:
        self.drives[0] = self._drive(1, images)
        if steps == 0:
            for n in range(1, self.depth + 1):
                self.forward(n)
                self.update(n, False)
        self.iterate(steps, schedule, relaxation)

    def iterate(self, steps: int, schedule: str, relaxation: float) -> None:
        for step in range(1, steps + 1):
            self.relaxation = 1.0 if step == steps else relaxation
            ITERATIONS[schedule](self, False, False)

    def readout(self) -> None:
        state, shape = self.states[-1], self.network.state_shapes[-1]
        if self.network.readout.identity:
            node = self.helper.make_node("Identity", [state], [OUTPUT])
        else:
            inputs = [self._flat(state, shape), "readout.weight", "readout.bias"]
            node = self.helper.make_node("Gemm", inputs, [OUTPUT], transB=1)
        self.nodes.append(node)

    # --- what the schedules call -----------------------------------------------------------------------------------

    def forward(self, n: int) -> None:
        if n > 1:
            self.drives[n - 1] = self._drive(n, self.states[n - 2] or self._zeros(n - 1))

    def backward(self, n: int) -> None:
        if n < self.depth and self.states[n] is not None:
            self.topdowns[n - 1] = self._topdown(n + 1, self.states[n])

    def update(self, n: int, measure: bool) -> None:
        total, topdown = self.drives[n - 1], self.topdowns[n - 1]
        if topdown is not None:
            if self.network.feedback != 1:
                topdown = self.node("Mul", topdown, self.constant(self.network.feedback))
            total = self.node("Add", total, topdown)
        fresh, old = self._activation(self.network.activation, total), self.states[n - 1]
        if self.relaxation != 1:  # old + omega (fresh - old)
            fresh = self.node("Mul", fresh, self.constant(self.relaxation))
            if old is not None:
                fresh = self.node("Add", fresh, self.node("Mul", old, self.constant(1 - self.relaxation)))
        self.states[n - 1] = fresh

    # --- pieces ----------------------------------------------------------------------------------------------------

    def _zeros(self, n: int) -> str:
        shape = self.network.state_shapes[n - 1]
        value = self.helper.make_tensor("value", 1, [1], [0.0])
        return self.node("ConstantOfShape", self.shape(*_channels_first(shape)), value=value)

    def _flat(self, state: str, shape: tuple[int, ...]) -> str:
        return state if len(shape) == 1 else self.node("Flatten", state)

    def _below(self, n: int) -> tuple[int, ...]:
        return self.network.state_shapes[n - 2] if n > 1 else self.network.input_shape

    def _drive(self, n: int, below: str) -> str:
        edge = self.network.layers[n - 1]
        parameters = [f"layers.{n - 1}.{name}" for name in edge.parameters()]
        if type(edge) is Linear:
            return self.node("Gemm", self._flat(below, self._below(n)), *parameters, transB=1)
        u = self.node("Conv", below, *parameters, **_window(edge))
        pool = {"kernel_shape": [edge.pool] * 2, "strides": [edge.pool] * 2}
        if edge.pooling == "average":
            return self.node("AveragePool", u, **pool)
        if edge.pooling == "none":
            return u
        pooled, self.winners[n - 1] = self.node("MaxPool", u, outputs=2, **pool)
        return pooled

    def _topdown(self, n: int, state: str) -> str:
        """Return what edge n sends down from the `state` above it."""
        edge, weight, below = self.network.layers[n - 1], f"layers.{n - 1}.weight", self._below(n)
        if type(edge) is Linear:
            down = self.node("Gemm", state, weight)
            shape = self.constant([0, *_channels_first(below)], np.int64)
            return down if len(below) == 1 else self.node("Reshape", down, shape)
        # What stride and window leave over of the map below gets nothing.
        reached = [(size - 1) * edge.stride + edge.kernel - 2 * edge.padding for size in edge.map_shape[:2]]
        spare = [size - end for size, end in zip(below[:2], reached, strict=True)]
        u = self._unpooled(n, edge, state)
        return self.node("ConvTranspose", u, weight, output_padding=spare, **_window(edge))

    def _unpooled(self, n: int, edge: Conv2d, state: str) -> str:
        height, width, channels = edge.map_shape
        pool = {"kernel_shape": [edge.pool] * 2, "strides": [edge.pool] * 2}
        if edge.pooling == "max":
            return self.node("MaxUnpool", state, self.winners[n - 1], self.shape(channels, height, width), **pool)
        if edge.pooling == "none":
            return state
        spread = self.constant(np.full((channels, 1, edge.pool, edge.pool), edge.pool**-2))
        u = self.node("ConvTranspose", state, spread, group=channels, **pool)
        spare = [height % edge.pool, width % edge.pool]
        return self.node("Pad", u, self.constant([0] * 6 + spare, np.int64)) if any(spare) else u

    def _activation(self, activation: Activation, total: str) -> str:
        if type(activation) is Clip:
            scaled = total if activation.gain == 1 else self.node("Mul", total, self.constant(activation.gain))
            ends = [self.constant(activation.low)] + [self.constant(activation.high)] * (activation.high < math.inf)
            return self.node("Clip", scaled, *ends)
        if type(activation) is Tanh:
            center, height, rate = (self.constant(v) for v in (activation.center, activation.height, activation.rate))
            bent = self.node("Tanh", self.node("Mul", self.node("Sub", total, center), rate))
            return self.node("Add", self.node("Mul", bent, height), center)
        if type(activation) is Gelu:
            cube = self.node("Mul", self.node("Mul", total, total), self.node("Mul", total, self.constant(Gelu.CUBE)))
            bent = self.node("Tanh", self.node("Mul", self.node("Add", total, cube), self.constant(Gelu.RATE)))
            half = self.node("Mul", total, self.constant(0.5))
            return self.node("Mul", half, self.node("Add", bent, self.constant(1)))
        raise ConfigurationError(f"activation {type(activation).__name__} has no counterpart in ONNX here")


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[2], shape[0], shape[1]) if len(shape) == 3 else shape


def _window(edge: Conv2d) -> dict[str, list[int]]:
    return {
        "kernel_shape": [edge.kernel] * 2,
        "strides": [edge.stride] * 2,
        "pads": [edge.padding] * 4,
    }
