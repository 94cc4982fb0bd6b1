"""What a learning step takes of memory, by purpose, told without allocating any of it; and how much, measured.

Network, learner and signals are made on a `BlankDevice`. The phases are laid out by the code that lays them out for a
step, and the operations of the edges say what they ask for: plan and step cannot drift apart. Tests compare the sum
with what is measured.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend.cuda import WORKSPACE_BYTES, Launcher
from cupyep.backend.device import Device, gemm, gpu_scratch
from cupyep.backend.threads import get_threads, one_blas_thread
from cupyep.batch import Batch
from cupyep.errors import choose, require
from cupyep.heads import Head
from cupyep.memory.workspace import Workspace, derived_key
from cupyep.optim import optimizer_bytes

KINDS = ("cpu", "gpu")
L2_BYTES = 50 << 20  # of an H100, H200
MOST = 1 << 56  # numbers in one array


class BlankDevice(Device):
    """What can be told of a device without having it: its arrays have shape and type, and take next to no memory.

    Its scratch is, unless given (see `Device`), what a CPU has here, or a GPU with 50 MB of L2.
    """

    def __init__(self, kind: str, scratch_mb: float | None = None):
        super().__init__("cpu", scratch_mb=scratch_mb)
        self.name = choose("device kind", kind, KINDS)
        self.is_gpu = self.adds_products = kind == "gpu"
        if self.is_gpu and scratch_mb is None:
            self.scratch_bytes = gpu_scratch(L2_BYTES)

    @classmethod
    def like(cls, device: Device) -> BlankDevice:
        """Return what stands for a real device."""
        blank = cls("gpu" if device.is_gpu else "cpu")
        blank.scratch_bytes = device.scratch_bytes
        return blank

    def use(self) -> None:
        """There is nothing to use."""

    def launcher(self, source: Path) -> Launcher:
        """Return one that is asked to launch nothing."""
        return Launcher(source, self.xp)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return a read-only array of zeros of the shape and type, all of them in one place."""
        require(math.prod(shape) < MOST, f"an array of shape {shape} is larger than any memory; lower the width")
        return np.broadcast_to(np.zeros((), dtype), shape)

    def asarray(self, array: Any, dtype: Any = None) -> Any:
        """Return such an array."""
        array = np.asarray(array)
        return self.empty(array.shape, dtype or array.dtype)

    def drawn(self, draw: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return such an array; nothing is drawn."""
        return self.empty(shape, dtype)


def plan(learner: Any, samples: int, slots: Sequence[str] | None = None) -> dict[str, int]:
    """Return the bytes that a step takes at its peak, by purpose; their sum is the plan.

    Parameters
    ----------
    learner : Learner
        On any device; on a `BlankDevice` nothing is allocated for it either.
    samples : int
        Images in a batch; on a CPU its parts are taken by as many threads as `get_threads` says.
    slots : sequence of str, optional
        Buffers that the optimizer keeps for every parameter (`SGD.slots`, `Adam.SLOTS`); None is no optimizer.
    """
    network, learned = learner.network, learner.parameters()
    is_gpu, itemsize = network.device.is_gpu, network.dtype.itemsize
    rows_of_parts = learner.parts(samples)
    lengths = sorted({rows.stop - rows.start for rows in rows_of_parts})
    workers = 1 if is_gpu else min(get_threads(), len(rows_of_parts))  # each with memory of its own
    gradients = 1 if is_gpu else 1 + min(workers, len(rows_of_parts) - 1)  # the first part's are the batch's
    # Of one image, which nobody looks at: targets are made of its label and index.
    one = Batch(None, np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.uint8))
    nudges = network.nudges(one.placed(network.device), learner.signals)
    terms, targets = [term for term, *_ in nudges], {id(target): target for *_, target in nudges}
    fixed = [term.weight for term in terms if isinstance(term, Head) and not term.learned]
    batches = sorted({rows for length in lengths for rows in learner.needs(length, nudges).batches})
    workspaces = [Workspace(network.layers, rows, network.device, network.precision) for rows in batches]
    made = [edge for edge in network.layers if not edge.parametrisation.shares]  # from what is trained
    kept = sum(edge.parametrisation.numbers(edge.weight_shape, is_gpu) for edge in made) * itemsize  # for the way back
    parts = {
        "parameters": _nbytes(learned.values()),
        "maps of signals": _nbytes(fixed),
        "teachers": _nbytes(learner.signals),
        "gradients": gradients * learner.gradient_size * itemsize,
        "optimizer": 0 if slots is None else optimizer_bytes(learned, slots, is_gpu),
        "derived weights": _nbytes(edge.weight for edge in made) + kept + _derived_weights(workspaces)
        + (_nbytes(terms) if learner.derives_maps else 0),
        "scratch of products": workers * max(workspace.nbytes for workspace in workspaces),
        "cuBLAS": WORKSPACE_BYTES if is_gpu else 0,
        "images": samples * math.prod(network.input_shape) * network.precision.stored.itemsize,
        "targets": workers * lengths[-1] * _nbytes(targets.values()),
        "temporaries": workers * _temporaries(learner, lengths[-1]),
    }  # fmt: skip
    for purpose, size in learner.needs(lengths[-1], nudges).stack(network.memory.layout).at_peak.items():
        parts[purpose] = parts.get(purpose, 0) + workers * size
    return {purpose: size for purpose, size in parts.items() if size}


def _nbytes(things: Any) -> int:
    return sum(thing.nbytes for thing in things if thing is not None)


def _temporaries(learner: Any, samples: int) -> int:
    """Return the bytes that a step takes for a moment: at most so many at a time."""
    network = learner.network
    shapes = [(samples, *shape) for shape in network.state_shapes]
    slopes = max(map(network.energy.updates.slope_bytes, shapes)) if learner.takes_slopes else 0
    last = math.prod(shapes[-1]) * network.dtype.itemsize if network.precision.half else 0
    return max(slopes, last)


def _derived_weights(workspaces: Sequence[Workspace]) -> int:
    """Return the bytes of what operations for all batch sizes make of the weights, in arrays that they share."""
    made = {derived_key(n, ops): ops.derived for workspace in workspaces for n, ops in enumerate(workspace.ops)}
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for arrays in made.values() for shape, dtype in arrays)


def peak_bytes(make: Callable[[], Callable[[], Any]], device: Device) -> int:
    """Return the peak memory in bytes of the work, a function that `make` returns, beyond what was there before.

    What is made counts, what was needed to make it does not. On the CPU it is what Python and NumPy allocated; BLAS's
    own buffers are not seen. On a GPU it is what was taken from CuPy's pools, and the workspace of cuBLAS, which all
    networks of a thread share; the code of kernels and what CUDA itself takes are not seen.
    """
    if device.is_gpu:
        small = device.xp.zeros((1, 1), np.float32)
        gemm(small, small, out=device.xp.empty_like(small))  # the workspace is there now, and is counted below
        with _follower(device.xp) as hook:
            work = make()
            hook.peak = hook.used
            work()
            device.synchronize()
        return WORKSPACE_BYTES + hook.peak
    with one_blas_thread():  # what finds the libraries of BLAS is made once a process
        pass
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work = make()
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _follower(cupy: Any) -> Any:
    """Return a hook that follows what is taken from CuPy's pools, and its peak."""

    class Follower(cupy.cuda.MemoryHook):
        """Counts blocks while it is in force; one that was taken before and is given back does not count."""

        name = "cupyep peak"

        def __init__(self) -> None:
            self.used = self.peak = 0
            self._taken: dict[int, int] = {}  # address -> bytes

        def malloc_postprocess(self, device_id: int, size: int, mem_size: int, mem_ptr: int, pmem_id: int) -> None:
            if mem_ptr:  # 0: there was no memory
                self._taken[mem_ptr] = mem_size
                self.used += mem_size
                self.peak = max(self.peak, self.used)

        def free_postprocess(self, device_id: int, mem_size: int, mem_ptr: int, pmem_id: int) -> None:
            self.used -= self._taken.pop(mem_ptr, 0)

    return Follower()
