"""Where the time of a training step goes: its parts, what they launch and move, and its products alone."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from measuring import Case, Stopwatch

import cupyep as ep
from cupyep.backend.graphs import Replays
from cupyep.ops import update
from cupyep.ops.factors import Factors
from cupyep.ops.reduction import add_sum, levels
from cupyep.training.statistics import EpochStatistics, layer_names

SPLIT_IMAGES = 2048  # of the data set that the loader takes batches from
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}  # more than any cache holds
SHOWN_PRODUCTS = 12
WARM_UP = 3  # compiles kernels, captures graphs, replays them


@dataclass
class Work:
    """What was done: products, kernels of the package, replayed graphs, and the bytes of all their arguments."""

    products: int = 0
    kernels: int = 0
    graphs: int = 0
    nbytes: int = 0

    def since(self, before: Work) -> Work:
        return Work(*(a - b for a, b in zip(vars(self).values(), vars(before).values(), strict=True)))


@dataclass
class PartTimes:
    """Seconds of one part of a step, call by call: until the host went on, and until the device was done."""

    host: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)


@dataclass(frozen=True)
class Product:
    """The shape of one matrix product: ``(rows, inner) @ (inner, columns)``, `adds` to its output or writes it."""

    rows: int
    inner: int
    columns: int
    factor: np.dtype
    out: np.dtype
    transposed: tuple[bool, ...]
    adds: bool

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns

    def __str__(self) -> str:
        what = "gradient " if self.adds else ""
        return f"{what}{self.rows} x {self.inner} x {self.columns} {self.factor.name} -> {self.out.name}"


class Recorder:
    """Counts products, kernels and graphs, by looking over the shoulders of those who launch them.

    CuPy's own element-wise kernels are not seen.

    Attributes
    ----------
    work : Work
        So far.
    products : Counter
        How often each `Product` was done.
    """

    def __init__(self, device: ep.Device):
        self.device = device
        self.work = Work()
        self.products: Counter[Product] = Counter()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Recorder]:
        """Count within the context."""
        watched: list[tuple[type, str, Callable]] = [
            (Factors, "product", functools.partial(self._product, False)),
            (Factors, "add_product", functools.partial(self._product, True)),
            (Replays, "run", self._run),
        ]
        if self.device.is_gpu:
            watched.append((type(self.device.launcher(update.SOURCE)), "launch", self._launch))
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in watched]
        try:
            for (owner, name, look), (*_, method) in zip(watched, before, strict=True):
                setattr(owner, name, _looked_at(method, look))
            yield self
        finally:
            for owner, name, method in before:
                setattr(owner, name, method)

    def _product(self, adds: bool, factors: Factors, a: Any, b: Any, out: Any, *scratch: Any) -> None:
        self.work.products += 1
        self.work.nbytes += a.nbytes + b.nbytes + out.nbytes * (1 + adds)
        rows, inner = a.shape
        transposed = tuple(x.strides[0] < x.strides[1] for x in (a, b))
        product = Product(rows, inner, b.shape[1], np.dtype(a.dtype), np.dtype(out.dtype), transposed, adds)
        self.products[product] += 1

    def _launch(self, launcher: Any, kernel: str, types: Any, grid: Any, block: Any, arguments: Any) -> None:
        self.work.kernels += 1
        self.work.nbytes += sum(argument.nbytes for argument in arguments if getattr(argument, "ndim", 0))

    def _run(self, replays: Replays, name: Any, work: Any) -> None:
        self.work.graphs += replays.graphs.get(name) is not None


def _looked_at(method: Callable, look: Callable) -> Callable:
    @functools.wraps(method)
    def looked_at(*args: Any) -> Any:
        look(*args)
        return method(*args)

    return looked_at


class TrainingStep:
    """A training step as the trainer makes it: a batch of the loader, gradients, optimizer, statistics.

    Parameters
    ----------
    learner : Learner
    samples : int
        In a batch. The images are noise.
    """

    def __init__(self, learner: ep.learning.Learner, samples: int):
        network, self.device = learner.network, learner.network.device
        generator = np.random.default_rng(0)
        count = max(SPLIT_IMAGES, samples) // samples * samples

        def split(name: str) -> ep.data.Split:
            images = generator.integers(0, 256, (count, *network.input_shape), np.uint8)
            return ep.data.Split(name, images, generator.integers(0, network.classes, count))

        classes = tuple(map(str, range(network.classes)))
        data = ep.data.Dataset.from_splits("noise", classes, split("train"), split("test"), flip=True, pad=4)
        how: dict[str, Any] = {"augment": True, "shuffle": True, "generator": generator}
        self.loader = ep.Loader(data, "train", samples, self.device, network.dtype, **how)
        self.learner, self.samples = learner, samples
        self.optimizer = ep.Adam(learner.parameters())
        self.statistics = EpochStatistics(self.device, 1, layer_names(learner.parameters()))
        self._batches: Iterator[ep.Batch] = iter(())

    def next_batch(self) -> ep.Batch:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self.loader)
            batch = next(self._batches)
        return batch

    def __call__(self) -> None:
        result = self.learner.step(self.next_batch())
        self.optimizer.step(result.gradients)
        self.statistics.add(result)

    def places(self) -> dict[str, tuple[Any, str]]:
        """Return where each part of a step is called, owner and name of the method; `step` has all but three."""
        learner, within = self.learner, {}
        if isinstance(learner, ep.EquilibriumPropagation):
            gradient = "_add_classical" if learner.form == "classical" else "_add_deviation"
            within = {
                "free phase": (learner, "settle_free"),
                "loss and levels": (learner, "_figures"),
                "nudged phases": (learner.network, "settle_nudged"),
                "gradient": (learner, gradient),
            }
        elif isinstance(learner, ep.Backpropagation):
            within = {"pass up": (learner, "_forward"), "loss and levels": (learner, "_figures")}
        return {
            "loader": (self, "next_batch"),
            **within,
            "step": (learner, "step"),
            "optimizer": (self.optimizer, "step"),
            "statistics": (self.statistics, "add"),
        }

    def time_parts(self, repeats: int) -> dict[str, PartTimes]:
        """Return the times of every part, each waited for before the next one begins, and what it did."""
        for _ in range(WARM_UP):
            self()
        times = {name: PartTimes() for name in self.places()}
        with Recorder(self.device).watching() as recorder, contextlib.ExitStack() as undo:
            for name, (owner, attribute) in self.places().items():
                setattr(owner, attribute, self._timed(getattr(owner, attribute), times[name], recorder))
                undo.callback(delattr, owner, attribute)
            for _ in range(repeats):
                self()
        return times

    def _timed(self, method: Callable, times: PartTimes, recorder: Recorder) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.device.synchronize()
            before, start = Work(**vars(recorder.work)), time.perf_counter()
            result = method(*args, **kwargs)
            times.host.append(time.perf_counter() - start)
            self.device.synchronize()
            times.done.append(time.perf_counter() - start)
            times.work.append(recorder.work.since(before))
            return result

        return timed

    def products(self) -> Counter[Product]:
        """Return how often a step does each product, those in graphs too."""
        graphs, self.device.graphs = self.device.graphs, None
        try:
            with Recorder(self.device).watching() as recorder:
                self()
        finally:
            self.device.graphs = graphs
        return recorder.products


def parts_table(name: str, times: dict[str, PartTimes], step: float, samples: int) -> str:
    """Return the parts of a step as text: median times, what they launch and the bytes of its arguments."""
    head = f"\nparts of a training step, {name}: {step * 1e3:.2f} ms, {samples / step:.0f} images/s"
    lines = [head, f"  {'':<20}{'host, ms':>10}{'done, ms':>10}{'products':>10}{'kernels':>9}{'graphs':>8}{'MB':>9}"]
    for part, row in times.items():
        host, done = (1e3 * float(np.median(seconds)) for seconds in (row.host, row.done))
        work = row.work[-1]
        lines.append(
            f"  {part:<20}{host:>10.3f}{done:>10.3f}{work.products:>10}{work.kernels:>9}{work.graphs:>8}"
            f"{work.nbytes / 1e6:>9.1f}"
        )
    return "\n".join(lines)


def parts_report(times: dict[str, PartTimes]) -> dict[str, dict[str, float]]:
    """Return the same as numbers by name."""
    return {
        part: {"host_s": float(np.median(row.host)), "done_s": float(np.median(row.done)), **vars(row.work[-1])}
        for part, row in times.items()
    }


def time_products(step: TrainingStep, stopwatch: Stopwatch) -> dict[str, tuple[int, Any]]:
    """Return by name how often a step does a product and its timing, alone: the dozen that have most to do."""
    device, factors = step.device, Factors(step.learner.network.precision, step.device.is_gpu)
    counted = step.products()
    chosen = sorted(counted, key=lambda product: -product.flops * counted[product])[:SHOWN_PRODUCTS]
    cases = {str(product): Case(_alone(product, factors, device), product.flops, product.flops) for product in chosen}
    timings = stopwatch.measure(cases)
    return {str(product): (counted[product], timings[str(product)]) for product in chosen}


def _alone(product: Product, factors: Factors, device: ep.Device) -> Callable[[], Any]:
    """Return a product of noise, of the same shapes, types and layouts."""
    generator, arrays = np.random.default_rng(0), []
    shapes = ((product.rows, product.inner), (product.inner, product.columns))
    for shape, transposed in zip(shapes, product.transposed, strict=True):
        drawn = generator.standard_normal(shape[::-1] if transposed else shape, np.float32)
        array = device.asarray(drawn, product.factor)
        arrays.append(array.T if transposed else array)
    out = device.asarray(np.zeros((product.rows, product.columns)), product.out)
    a, b = arrays
    if product.adds:
        return functools.partial(factors.add_product, a, b, out, device.xp.empty_like(out))
    return functools.partial(factors.product, a, b, out)


def moving_cases(network: ep.Network, samples: int) -> dict[str, tuple[Case, int]]:
    """Return by name what only moves numbers, and how many bytes: a copy, and reductions of states of every shape."""
    device, precision = network.device, network.precision
    copy, copied = copy_case(device)
    cases = {f"copy of {copied / 2e6:.0f} MB": (copy, copied)}
    for shape in dict.fromkeys(network.state_shapes):
        s = device.xp.ones((samples, *shape), precision.stored)
        size = f"{s.size // shape[-1]} x {shape[-1]} {precision.stored.name}"
        total, shares = (device.xp.zeros(length, precision.number) for length in (shape[-1], 3))
        scratch = device.xp.empty(s.shape, precision.number)
        cases[f"sum of {size}"] = Case(functools.partial(add_sum, s, total)), s.nbytes
        cases[f"levels of {size}"] = Case(functools.partial(levels, s, 0.99, 1e-3, shares, scratch)), s.nbytes
    return cases


def moving_table(rows: dict[str, tuple[float, int]]) -> str:
    """Return seconds and bytes by name as text."""
    lines = [f"\nwhat only moves numbers\n  {'':<44}{'ms':>10}{'GB/s':>10}"]
    lines += [
        f"  {name:<44}{1e3 * seconds:>10.3f}{nbytes / seconds / 1e9:>10.0f}" for name, (seconds, nbytes) in rows.items()
    ]
    return "\n".join(lines)


def graphs_text(device: ep.Device) -> str:
    """Return whether phases are replayed as graphs, and the scratch of a chunk."""
    graphs = "none" if device.graphs is None else "a capture has failed" if device.graphs.failed else "captured"
    return f"graphs: {graphs}; scratch of a chunk: {device.scratch_bytes / 1e6:.1f} MB"


def copy_case(device: ep.Device) -> tuple[Case, int]:
    """Return a copy that no cache holds, and the bytes that it reads and writes."""
    nbytes = COPIED_BYTES["cuda" if device.is_gpu else "cpu"]
    source = device.xp.zeros(nbytes, np.uint8)
    target = device.xp.empty_like(source)

    def copy() -> None:
        target[...] = source

    return Case(copy), 2 * nbytes
