"""What ``cupyep memory`` and ``cupyep info --arch`` tell: the memory of a step by purpose, planned and measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.backend import Device, get_device
from cupyep.batch import Batch
from cupyep.data import ImageFormat
from cupyep.data.loading import image_shape
from cupyep.data.sources import SOURCES, is_own
from cupyep.errors import require
from cupyep.files import write_json
from cupyep.learning import Learner
from cupyep.learning.operations import Operations
from cupyep.memory.plan import BlankDevice, peak_bytes, plan
from cupyep.network import Network
from cupyep.parallel import Communicator, planning
from cupyep.training.build import (
    build_dataset,
    build_learner,
    build_network,
    build_optimizer,
    make_signals,
    optimizer_slots,
)
from cupyep.training.config import TrainConfig, make_config

#: The options that a step's memory depends on.
MEMORY_OPTIONS = (
    "arch", "width", "activation", "weights", "readout_pool", "pooling", "loss", "feedback", "dataset", "image_size",
    "nudged_steps", "schedule", "tolerance", "scheme", "nudge", "aug", "signal_layers", "kappa", "signal_loss",
    "signal_pool", "learned_maps", "batch_size", "micro_batch", "optimizer", "momentum", "device", "scratch_mb",
    "precision", "exact", "plugin",
)  # fmt: skip
NAMES = {"ep": "EP", "bptt": "BPTT", "bp": "BP"}
MOST_STEPS, MOST_SAMPLES = 10_000, 1 << 16  # a plan lists every step unrolled and every chunk of a batch


@dataclass
class StepMemory:
    """The memory of one step, in bytes: planned, by purpose, and measured at the peak of one that was done."""

    algorithm: str  # "ep", "bptt", "bp"
    steps: int | None  # T: free steps of EP, unrolled steps of BPTT
    planned: dict[str, int]
    measured: int | None = None

    @property
    def total(self) -> int:
        """Bytes planned in all."""
        return sum(self.planned.values())

    @property
    def label(self) -> str:
        name = NAMES[self.algorithm]
        return name if self.steps is None else f"{name}, T = {self.steps}"


@dataclass
class RankPlan:
    """What ranks of this kind would do: each takes a batch, and all add up their gradients."""

    ranks: int
    step_s: float
    step: str  # which one, and whether it was measured
    nbytes: int
    links_gb: list[float]  # GB/s
    latency_s: float

    def text(self) -> str:
        """Return a table of efficiencies."""
        what = f"{self.nbytes / 1e6:.2f} MB of gradients, {1e3 * self.step_s:.2f} ms a step ({self.step})"
        lines = planning.table(self.step_s, self.nbytes, self.links_gb, self.latency_s, self.ranks)
        return "\n".join([f"{what}: part of a step that is work", *lines])


@dataclass
class MemoryReport:
    """Steps of EP for every T, of BPTT for every T, and of BP, of one network on a device, the real or a blank one."""

    config: TrainConfig
    device: Device
    rows: list[StepMemory] = field(default_factory=list)
    ranks: RankPlan | None = None

    def text(self) -> str:
        """Return a table of the purposes, one of the totals and, if they were planned, one of ranks."""
        columns = {row.label if row.algorithm == "bptt" else NAMES[row.algorithm]: row.planned for row in self.rows}
        return "\n\n".join(
            [self._head(), purposes(columns), self._totals(), *([] if self.ranks is None else [self.ranks.text()])]
        )

    def _head(self) -> str:
        config = self.config
        return (
            f"{config.arch}, width {config.width:g}, {batch_text(config)}, {config.precision}, {config.schedule}, "
            f"{config.optimizer}, {kind_of(self.device).upper()}; MB are 10^6 bytes"
        )

    def _totals(self) -> str:
        least = min(row.total for row in self.rows if row.algorithm == "ep")
        measured = any(row.measured for row in self.rows)
        heads = ["planned, MB", "of EP", *(["measured, MB", "planned - measured"] if measured else [])]
        lines = [f"{'':<16}" + "".join(f"{head:>20}" for head in heads)]
        for row in self.rows:
            cells = [f"{row.total / 1e6:.1f}", f"{row.total / least:.2f}"]
            if row.measured:
                cells += [f"{row.measured / 1e6:.1f}", f"{row.total / row.measured - 1:+.1%}"]
            lines.append(f"{row.label:<16}" + "".join(f"{cell:>20}" for cell in cells))
        return "\n".join(lines)

    def write_json(self, path: str | Path) -> None:
        """Write ``{"options", "device_kind", "steps": [{"algorithm", "steps", "planned", "planned_bytes", ...}]}``."""
        content = {
            "options": {name: getattr(self.config, name) for name in MEMORY_OPTIONS},
            "device_kind": kind_of(self.device),
            "steps": [
                {
                    "algorithm": row.algorithm,
                    "steps": row.steps,
                    "planned": row.planned,
                    "planned_bytes": row.total,
                    "measured_bytes": row.measured,
                }
                for row in self.rows
            ],
        }
        if self.ranks is not None:
            content["ranks"] = dataclasses.asdict(self.ranks)
        write_json(Path(path), content, indent=1)


def purposes(columns: dict[str, dict[str, int]]) -> str:
    """Return a table of bytes by purpose: a line a purpose, a column each of `columns`, and their sums."""
    names = list(dict.fromkeys(name for sizes in columns.values() for name in sizes))
    width = max(map(len, [*names, "total"])) + 2
    lines = [f"{'MB':<{width}}" + "".join(f"{title:>16}" for title in columns)]
    for name in names:
        cells = (f"{sizes[name] / 1e6:.1f}" if name in sizes else "-" for sizes in columns.values())
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells))
    sums = "".join(f"{sum(sizes.values()) / 1e6:>16.1f}" for sizes in columns.values())
    return "\n".join([*lines, f"{'total':<{width}}{sums}"])


def memory_report(
    config: TrainConfig,
    steps: Sequence[int],
    kind: str | None = None,
    measure: bool = False,
    report: Callable[[str], None] = print,
) -> MemoryReport:
    """Plan a step of every algorithm, for every T of `steps`, from 1 to `MOST_STEPS`; with `measure` also do one each.

    Of `config` the `MEMORY_OPTIONS` are used; the `kind` of device to plan for, "cpu" or "gpu", is its own if not
    given. Measuring takes that memory and the time; `report` gets a line before every measurement.
    """
    require(len(steps) > 0 and all(1 <= t <= MOST_STEPS for t in steps), f"steps T must be from 1 to {MOST_STEPS}")
    device = device_of(config, kind)
    there = not isinstance(device, BlankDevice)
    require(
        there or not measure, f"--measure needs the device itself, which is no {kind} here; leave --device-kind out"
    )
    result = MemoryReport(config, device)
    cases = [(algorithm, t) for algorithm in ("ep", "bptt") for t in steps] + [("bp", None)]
    for algorithm, t in cases:
        row = StepMemory(algorithm, t, planned_step(_of(config, algorithm, t), device))
        if measure:
            report(f"measuring {row.label} ...")
            row.measured = measured_step(_of(config, algorithm, t), device)
        result.rows.append(row)
    return result


def rank_plan(
    config: TrainConfig, steps: int, ranks: int, links_gb: Sequence[float], latency_us: float, step_ms: float | None
) -> RankPlan:
    """Plan several ranks, each with the batch of `config`.

    Parameters
    ----------
    config : TrainConfig
        `MEMORY_OPTIONS` are used.
    steps : int
        Free steps of the EP step that is measured on the device.
    ranks : int
        From 2 to `planning.MOST`.
    links_gb : sequence of float
        Gigabytes a second of the slowest link, each way: one or several to compare.
    latency_us : float
        Microseconds of a message.
    step_ms : float, optional
        Milliseconds of a step, where it was measured elsewhere.
    """
    require(2 <= ranks <= planning.MOST, f"--ranks must be from 2 to {planning.MOST}")
    planning.check(links_gb, latency_us, step_ms)
    config, step = _of(config, "ep", steps), "as given"
    blank, step_s = blank_learner(config, BlankDevice("cpu")), (step_ms or 0.0) / 1e3
    if step_ms is None:
        device = get_device(config.device, config.scratch_mb)
        learner = blank_learner(config, device)
        batch, step = noise(learner.network, config.batch_size), f"EP, T = {steps}, measured on {device.name}"
        step_s = planning.median_s(lambda: learner.step(batch), Communicator(), device)
    nbytes = blank.gradient_size * blank.network.dtype.itemsize
    return RankPlan(ranks, step_s, step, nbytes, list(links_gb), latency_us / 1e6)


def kind_of(device: Device) -> str:
    """Return one of `cupyep.memory.plan.KINDS`."""
    return "gpu" if device.is_gpu else "cpu"


def batch_text(config: TrainConfig) -> str:
    """Return in words how many images are processed together."""
    return f"batch {config.batch_size}" + (f" in parts of {config.micro_batch}" if config.micro_batch else "")


def device_of(config: TrainConfig, kind: str | None) -> Device:
    """Return the device of `config`, or one of another kind, blank."""
    device = get_device(config.device, config.scratch_mb)
    return device if kind in (None, kind_of(device)) else BlankDevice(kind, config.scratch_mb)


def _of(config: TrainConfig, algorithm: str, steps: int | None) -> TrainConfig:
    """Return the configuration of a step with T steps."""
    changes = {"ep": {"free_steps": steps}, "bptt": {"free_steps": 1, "nudged_steps": steps}, "bp": {}}[algorithm]
    return make_config(vars(config), {"algorithm": algorithm}, changes)


def planned_step(config: TrainConfig, device: Device) -> dict[str, int]:
    """Return the bytes of a step of ``config.algorithm`` by purpose, on a device like `device`."""
    require(config.batch_size <= MOST_SAMPLES, f"a plan is of at most {MOST_SAMPLES} images, not {config.batch_size}")
    return plan(blank_learner(config, BlankDevice.like(device)), config.batch_size, optimizer_slots(config))


def measured_step(config: TrainConfig, device: Device) -> int:
    """Return the peak bytes of a step of ``config.algorithm`` on noise, network and optimizer included."""

    def make() -> Callable[[], None]:
        learner = blank_learner(config, device)
        optimizer, batch = build_optimizer(config, learner.parameters()), noise(learner.network, config.batch_size)
        return lambda: optimizer.step(learner.step(batch).gradients)

    return peak_bytes(make, device)


def blank_learner(config: TrainConfig, device: Device) -> Learner:
    """Return the untrained network of `config` with its learner and signals, which need no files."""
    if is_own(config.dataset):
        images = ImageFormat.of(build_dataset(config))
    else:
        source = SOURCES[config.dataset]
        shape = image_shape(config.dataset, config.image_size)
        images = ImageFormat(source.name, source.classes, shape, np.zeros(shape[2:]), np.ones(shape[2:]))
    network = build_network(config, images, device)
    require(not config.teacher_features, "the memory of --teacher-features depends on the teacher")
    signals = make_signals(config, network, _BlankTeacher(network.classes))
    return build_learner(config, network, signals, np.random.default_rng(config.seed))


def noise(network: Network, samples: int) -> Batch:
    """Return a batch of normal random images with labels."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((samples, *network.input_shape), np.float32)
    labels, views = generator.integers(0, network.classes, samples), np.zeros(samples, np.uint8)
    return Batch(network.device.asarray(images, network.precision.stored), labels, np.arange(samples), views, True)


class _BlankTeacher:
    """Knows nothing, of any sample."""

    def __init__(self, classes: int):
        self.classes = classes

    def logits(self, split: str, index: Any, view: Any) -> np.ndarray:
        return np.zeros((len(index), self.classes), np.float32)


def network_report(config: TrainConfig, kind: str | None = None) -> str:
    """Return layers, parameters and products of a network, and the planned memory of a step of ``config.algorithm``."""
    device = device_of(config, kind)
    parts = planned_step(config, device)
    network = blank_learner(config, BlankDevice.like(device)).network
    count = sum(math.prod(array.shape) for array in network.parameters().values())
    operations = Operations(network, config.batch_size)
    lines = [
        repr(network),
        f"parameters     {count}",
        f"products       {operations.settle_step() / 1e9:.2f} GFLOP an iteration for {config.batch_size} images (two "
        f"an edge), {operations.first / 1e9:.2f} GFLOP once a phase (edges from the image)",
        "",
        f"a step of {NAMES[config.algorithm]}, {batch_text(config)}, {config.optimizer}, planned "
        f"for a {kind_of(device).upper()}; MB are 10^6 bytes",
    ]
    return "\n".join([*lines, purposes({"planned": parts})])
