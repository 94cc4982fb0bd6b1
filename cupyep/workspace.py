"""Everything that depends on the batch size: chunk plans, scratch and reusable buffers of one network's edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cupyep.activations import Activation
from cupyep.backend.device import Device
from cupyep.backend.graphs import Replayer
from cupyep.backend.precision import Precision
from cupyep.kernels import cuda_update
from cupyep.kernels.buffers import Arena, Buffers
from cupyep.kernels.cuda_update import CudaUpdateOps
from cupyep.kernels.update import UpdateOps
from cupyep.layers import Edge


class Workspace:
    """Scratch and buffers for one batch size, made once and reused by every settle of that size.

    What the operations make of the weights (mirrored, transformed) is made here and by `refresh`, which
    `Network.workspace` calls whenever it hands a workspace out: get it anew after every change of the weights.

    Parameters
    ----------
    edges : sequence of Edge
    batch : int
        Samples processed together (2N for two nudged phases in one batch).
    device : Device
    precision : Precision
    arena : Arena, optional
        Scratch memory to share with other workspaces of the same edges; a larger one is made where it is too small.
    """

    def __init__(
        self, edges: Sequence[Edge], batch: int, device: Device, precision: Precision, arena: Arena | None = None
    ):
        self.edges = edges
        self._input_ops: dict[int, Any] = {}
        self.batch = batch
        self.device = device
        self.precision = precision
        self.buffers = Buffers(device.xp, precision.number)
        self.replayer = Replayer(device.graphs)
        budget = device.scratch_bytes
        self.ops = [edge.prepare(batch, budget, precision, device) for edge in edges]
        needed = max(ops.nbytes for ops in self.ops)
        if arena is None or arena.block.nbytes < needed:
            arena = Arena(device.xp, needed)
        self.arena = arena
        for ops in self.ops:
            ops.bind(arena)
        self.refresh()

    def refresh(self) -> None:
        """Take up the current weights."""
        for edge, ops in zip(self.edges, self.ops, strict=True):
            edge.refresh(ops)
        for ops in self._input_ops.values():
            self.edges[0].refresh(ops)

    def states(self, name: str) -> list[Any]:
        """Return one buffer a layer, of shapes (batch, *shape of the layer)."""
        return [self.buffers.get((name, n), (self.batch, *edge.out_shape)) for n, edge in enumerate(self.edges, 1)]

    def one_at_a_time(self, name: str) -> list[Any]:
        """Return one array a layer as `states` does, all views of one buffer: only one of them holds data at a time."""
        sizes = [math.prod(edge.out_shape) for edge in self.edges]
        flat = self.buffers.get(name, (self.batch * max(sizes),))
        return [
            flat[: self.batch * size].reshape(self.batch, *edge.out_shape)
            for size, edge in zip(sizes, self.edges, strict=True)
        ]

    def update_ops(self, activation: Activation) -> UpdateOps:
        """Return what updates states with `activation` on this device."""
        if self.device.is_gpu and activation.code is not None:
            return CudaUpdateOps(self.device.xp, activation, self.device.launcher(cuda_update.SOURCE))
        return UpdateOps(self.device.xp, activation)

    def update_scratch(self, updates: UpdateOps) -> Any:
        """Return scratch that serves every layer's update."""
        sizes = (updates.scratch_size(self.batch, math.prod(edge.out_shape)) for edge in self.edges)
        return self.buffers.get("update scratch", (max(sizes),))

    def winners(self, name: str) -> list[Any]:
        """Return one uint8 buffer a max-pooling edge, None for the others."""
        return [
            self.buffers.get((name, n), (self.batch, *edge.out_shape), "uint8") if edge.has_winners else None
            for n, edge in enumerate(self.edges, 1)
        ]

    def input_ops(self, samples: int) -> Any:
        """Return the operations of the first edge for a batch of `samples`, which sees the input only once a phase."""
        if samples == self.batch:
            return self.ops[0]
        if samples not in self._input_ops:
            edge = self.edges[0]
            ops = edge.prepare(samples, self.arena.block.nbytes, self.precision, self.device)
            ops.bind(self.arena)
            edge.refresh(ops)
            self._input_ops[samples] = ops
        return self._input_ops[samples]
