"""A network as an ONNX graph: images in, the readout of the settled free phase out, every step written out.

The graph is written from the same programs that settle a network (`cupyep.program`): where a phase computes, a node is
appended. One weight tensor serves each product both ways, Conv and
ConvTranspose, Gemm with and without a transpose. Max-pooling goes back by MaxUnpool at the indices that MaxPool gave:
the plain maximum, where the package takes the first of units that are equal but for rounding
(`Precision.tie_margin`). In such a rare window feedback goes to another unit, and scores differ by more than rounding
(seen: 7e-4 in one of ten images of a network with feedback 0.5).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyep._version import __version__
from cupyep.activations import Clip, Gelu, Tanh
from cupyep.errors import ConfigurationError, needing, require
from cupyep.export.weights import torch_layout
from cupyep.layers import Conv2d, Identity
from cupyep.network import Network
from cupyep.program import Drive, Program, Update, Value, make_program
from cupyep.settling import check_relaxation

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
    with needing('ONNX needs the package onnx: pip install "cupyep[onnx]"'):
        from onnx import helper, numpy_helper
    within = feedforward or 1 <= steps <= steps + unrolled_steps <= MOST_STEPS
    require(
        within, f"a graph writes every step out: --steps must be from 1 to {MOST_STEPS} (got {steps + unrolled_steps})"
    )
    graph = _Graph(network, helper)
    program = make_program(network.graph, schedule, warm=False, image=True)
    check_relaxation(relaxation, schedule)
    graph.take_images(mean, std)
    if feedforward:
        graph.rise()
    else:
        graph.settle(program, steps, relaxation)
        graph.settle(make_program(network.graph, "synchronous", warm=False, image=True), unrolled_steps, 1.0)
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
    how: dict[str, Any] = {"schedule": "feedforward"}
    if not feedforward:
        how = {"schedule": schedule, "relaxation": relaxation, "steps": steps, "unrolled_steps": unrolled_steps}
    pixels = "pixels in [0, 1]" if mean is not None else "normalised images"
    properties = {"input": f"{pixels}, N x C x H x W", "settling": json.dumps(how | {"feedback": network.feedback})}
    properties["network"] = json.dumps(network.describe())
    helper.set_model_props(model, properties | {"classes": json.dumps(list(classes))})
    return model


class _Graph:
    """Executes programs; states and the values between products and updates are names of tensors, empty for zeros."""

    def __init__(self, network: Network, helper: Any):
        low, high = network.activation.low, network.activation.high
        require(low <= 0 <= high, f"activation {network.activation.name} does not start at 0; it cannot be exported")
        self.network = network
        self.helper = helper
        self.edges = network.layers
        self.below, self.above = network.graph.below, network.graph.above
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self._constant_names: dict[tuple, str] = {}
        self.states = [""] * (network.depth + 1)  # the first is the image
        self.values: dict[Value | None, str] = {}
        self.winners = [""] * len(self.edges)
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

    def take_images(self, mean: np.ndarray | None, std: np.ndarray | None) -> None:
        """Write the images, normalised if `mean` and `std` are given, and what they drive: the same at every step."""
        self.states[0] = INPUT
        if mean is not None:
            mean, std = (np.asarray(a, np.float64).reshape(1, -1, 1, 1) for a in (mean, std))
            scaled = self.node("Mul", INPUT, self.constant(1 / std))
            self.states[0] = self.node("Add", scaled, self.constant(-mean / std))
        for c in self.network.graph.out_of[0]:
            self.values[Value("constant", self.above[c])] = self._drive(c)

    def rise(self) -> None:
        """Write one pass upwards, in topological order."""
        for node, into in enumerate(self.network.graph.into[1:], 1):
            drives = [self._drive(c) for c in into]
            self.states[node] = self._activation(functools.reduce(self._sum, drives))

    def settle(self, program: Program, steps: int, relaxation: float) -> None:
        for step in range(1, steps + 1):
            for instruction in program.body:
                if isinstance(instruction, Update):
                    self._update(instruction, 1.0 if step == steps else relaxation)
                else:
                    self._product(instruction)

    def readout(self) -> None:
        state, readout = self.states[-1], self.network.readout
        if readout.identity:
            node = self.helper.make_node("Identity", [state], [OUTPUT])
        else:
            if readout.pool:
                state = self.node("AveragePool", state, **_pool(readout.pool))
            inputs = [self._flat(state, readout.inner_shape), "readout.weight", "readout.bias"]
            node = self.helper.make_node("Gemm", inputs, [OUTPUT], transB=1)
        self.nodes.append(node)

    # --- instructions ----------------------------------------------------------------------------------------------

    def _product(self, instruction: Any) -> None:
        connection, out = instruction.connection, instruction.out
        fresh = self._drive(connection) if isinstance(instruction, Drive) else self._topdown(connection)
        self.values[out] = self._sum(self.values.get(out, ""), fresh) if instruction.add else fresh

    def _update(self, update: Update, relaxation: float) -> None:
        n = update.node
        total = self._sum(self.values.get(update.drive, ""), self.values.get(update.topdown, ""))
        fresh, old = self._activation(total), self.states[n]
        if relaxation != 1:  # old + omega (fresh - old)
            fresh = self.node("Mul", fresh, self.constant(relaxation))
            if old:
                fresh = self.node("Add", fresh, self.node("Mul", old, self.constant(1 - relaxation)))
        self.states[n] = fresh
        if update.keep is not None:
            self.values[Value("kept", n)] = self.values.get(update.keep, "")

    def _sum(self, one: str, other: str) -> str:
        return self.node("Add", one, other) if one and other else one or other

    # --- pieces ----------------------------------------------------------------------------------------------------

    def _zeros(self, node: int) -> str:
        shape = self.network.state_shapes[node - 1]
        value = self.helper.make_tensor("value", 1, [1], [0.0])
        return self.node("ConstantOfShape", self.shape(*_channels_first(shape)), value=value)

    def _flat(self, state: str, shape: tuple[int, ...]) -> str:
        return state if len(shape) == 1 else self.node("Flatten", state)

    def _shape_below(self, c: int) -> tuple[int, ...]:
        return self.network.state_shapes[self.below[c] - 1] if self.below[c] else self.network.input_shape

    def _drive(self, c: int) -> str:
        edge, below = self.edges[c], self.states[self.below[c]] or self._zeros(self.below[c])
        if isinstance(edge, Identity):
            return below
        parameters = [f"layers.{c}.weight", *[f"layers.{c}.bias"] * edge.has_bias]
        if isinstance(edge, Conv2d):
            return self._pooled(c, edge, self.node("Conv", below, *parameters, **_window(edge)))
        return self.node("Gemm", self._flat(below, self._shape_below(c)), *parameters, transB=1)

    def _pooled(self, c: int, edge: Conv2d, u: str) -> str:
        if edge.pooling == "average":
            return self.node("AveragePool", u, **_pool(edge.pool))
        if edge.pooling == "max":
            u, self.winners[c] = self.node("MaxPool", u, outputs=2, **_pool(edge.pool))
        return u

    def _topdown(self, c: int) -> str:
        """Return what a connection sends down from the state above it, with its weight; empty for nothing."""
        state, ratio = self.states[self.above[c]], self.network.energy.ratios[c]
        down = self._adjoint(c, state) if state else ""
        return self.node("Mul", down, self.constant(ratio)) if down and ratio != 1 else down

    def _adjoint(self, c: int, state: str) -> str:
        edge, weight, below = self.edges[c], f"layers.{c}.weight", self._shape_below(c)
        if isinstance(edge, Identity):
            return state
        if isinstance(edge, Conv2d):  # what stride and window leave over of the map below gets nothing
            reached = [(size - 1) * edge.stride + edge.kernel - 2 * edge.padding for size in edge.map_shape[:2]]
            spare = [size - end for size, end in zip(below[:2], reached, strict=True)]
            u = self._unpooled(c, edge, state)
            return self.node("ConvTranspose", u, weight, output_padding=spare, **_window(edge))
        down = self.node("Gemm", state, weight)
        shape = self.constant([0, *_channels_first(below)], np.int64)
        return down if len(below) == 1 else self.node("Reshape", down, shape)

    def _unpooled(self, c: int, edge: Conv2d, state: str) -> str:
        height, width, channels = edge.map_shape
        pool = _pool(edge.pool)
        if edge.pooling == "max":
            return self.node("MaxUnpool", state, self.winners[c], self.shape(channels, height, width), **pool)
        if edge.pooling == "none":
            return state
        spread = self.constant(np.full((channels, 1, edge.pool, edge.pool), edge.pool**-2))
        u = self.node("ConvTranspose", state, spread, group=channels, **pool)
        spare = [height % edge.pool, width % edge.pool]
        return self.node("Pad", u, self.constant([0] * 6 + spare, np.int64)) if any(spare) else u

    def _activation(self, total: str) -> str:
        activation = self.network.activation
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


def _pool(side: int) -> dict[str, Any]:
    return {"kernel_shape": [side] * 2, "strides": [side] * 2}


def _window(edge: Conv2d) -> dict[str, Any]:
    return {"kernel_shape": [edge.kernel] * 2, "strides": [edge.stride] * 2, "pads": [edge.padding] * 4}
