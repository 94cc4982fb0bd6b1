"""What a learning step takes of memory, by purpose, told without allocating any of it.

Network, learner and signals are made on a `BlankDevice`. The phases are laid out by the code that lays them out for a
step, and the operations of the edges say what they ask for: plan and step cannot drift apart. Tests compare the sum
with what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.backend.cuda import WORKSPACE_BYTES
from cupyep.batch import Batch
from cupyep.heads import Head
from cupyep.learning import EquilibriumPropagation, Learner
from cupyep.learning.gradients import packed_size
from cupyep.memory.workspace import Workspace, derived_key
from cupyep.optim import optimizer_bytes
from cupyep.phases import Nudge


def plan(learner: Learner, samples: int, slots: Sequence[str] | None = None) -> dict[str, int]:
    """Return the bytes that a step takes at its peak, by purpose; their sum is the plan.

    Parameters
    ----------
    learner : Learner
        On any device; on a `BlankDevice` nothing is allocated for it either.
    samples : int
        Images in a batch.
    slots : sequence of str, optional
        Buffers that the optimizer keeps for every parameter (`SGD.slots`, `Adam.SLOTS`); None is no optimizer.
    """
    network = learner.network
    lengths = sorted({rows.stop - rows.start for rows in learner.parts(samples)})  # of micro-batches
    nudges = network.nudges(blank_batch().placed(network.device), learner.signals)
    needs = learner.needs(lengths[-1], nudges)
    batches = sorted({rows for length in lengths for rows in learner.needs(length, nudges).batches})
    workspaces = [Workspace(network.layers, rows, network.device, network.precision) for rows in batches]
    learned = learner.parameters()
    parts = {
        "parameters": _nbytes(learned),
        "maps of signals": _nbytes(_fixed_maps(nudges)),
        "teachers": sum(signal.nbytes for signal in learner.signals),
        "gradients": packed_size({path: array.shape for path, array in learned.items()}) * network.dtype.itemsize,
        "optimizer": 0 if slots is None else optimizer_bytes(learned, slots, network.device.is_gpu),
        "derived weights": _effective_weights(network) + _derived_weights(workspaces) + _derived_maps(learner, nudges),
        "scratch of products": max(workspace.nbytes for workspace in workspaces),
        "cuBLAS": WORKSPACE_BYTES if network.device.is_gpu else 0,
        "images": samples * math.prod(network.input_shape) * network.precision.stored.itemsize,
        "targets": lengths[-1] * sum(target.nbytes for target in _targets(nudges)),
        "temporaries": _temporaries(learner, lengths[-1]),
    }
    for purpose, size in needs.stack(network.memory.layout).at_peak.items():
        parts[purpose] = parts.get(purpose, 0) + size
    return {purpose: size for purpose, size in parts.items() if size}


def blank_batch() -> Batch:
    """Return a batch of one image, which nobody looks at: targets are made of its label and index."""
    return Batch(None, np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.uint8))


def _nbytes(arrays: Mapping[str, Any]) -> int:
    return sum(array.nbytes for array in arrays.values())


def _fixed_maps(nudges: Sequence[Nudge]) -> dict[str, Any]:
    """Return the maps of heads that are not among the parameters."""
    heads = [term for term, *_ in nudges if isinstance(term, Head) and not term.learned]
    return {f"layer{head.layer}.{n}": head.weight for n, head in enumerate(heads) if head.weight is not None}


def _derived_maps(learner: Learner, nudges: Sequence[Nudge]) -> int:
    """Return the bytes of what heads make of their maps in nudged phases."""
    return sum(term.nbytes for term, *_ in nudges) if isinstance(learner, EquilibriumPropagation) else 0


def _temporaries(learner: Learner, samples: int) -> int:
    """Return the bytes that a step takes for a moment: at most so many at a time."""
    network = learner.network
    shapes = [(samples, *shape) for shape in network.state_shapes] if learner.takes_slopes else []
    slopes = max((network.activation.slope_bytes(shape) for shape in shapes), default=0)
    last = samples * math.prod(network.state_shapes[-1]) * network.dtype.itemsize if network.precision.half else 0
    return max(slopes, last)


def _targets(nudges: Sequence[Nudge]) -> list[Any]:
    """Return the different targets; several terms may have one."""
    return list({id(target): target for *_, target in nudges if target is not None}.values())


def _effective_weights(network: Any) -> int:
    """Return the bytes of weights that are not themselves trained, and of what is kept for their pullback."""
    made = [edge for edge in network.layers if not edge.parametrisation.shares]
    kept = sum(edge.parametrisation.numbers(edge.weight_shape, network.device.is_gpu) for edge in made)
    return sum(edge.weight.nbytes for edge in made) + kept * network.dtype.itemsize


def _derived_weights(workspaces: Sequence[Workspace]) -> int:
    """Return the bytes of what operations for all batch sizes make of the weights, in arrays that they share."""
    made = {}
    for workspace in workspaces:
        for n, ops in enumerate(workspace.ops):
            sizes = (math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in ops.derived)
            made[derived_key(n, ops)] = sum(sizes)
    return sum(made.values())
