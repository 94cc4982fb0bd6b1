"""What a training step costs the host on a GPU, counted and timed without one: kernels, products and arrays do nothing.

Run it from anywhere, with the environment that runs the tests::

    python tests/launches.py --arch vgg7 --batch-size 128,512 --precision float16

Launch code, captures and everything else of the host run as on a GPU (see `fake_gpu`). The figures are those of a step
whose graphs have been captured: launches by the package, products, replayed graphs, CuPy's own operations on arrays,
transfers to the device, reads by the host (each waits for the device), and milliseconds that the host computes,
whatever else it has to do. These are of this machine and of the stand-in's arrays: good for comparing two versions.
pytest does not collect this file.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections import Counter
from pathlib import Path

import click
import fake_gpu as stand_in
import numpy as np
import pytest
import strict
from strict import Tape

import cupyep as ep
from cupyep.backend.device import gpu_scratch
from cupyep.cli.types import Numbers
from cupyep.memory.plan import L2_BYTES

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from parts import WARM_UP, Recorder, TrainingStep  # noqa: E402

STEPS, TIMED = 5, 25
CLASSES = 10
MAKERS = {"zeros", "zeros_like", "ones", "ones_like", "full", "arange", "ascontiguousarray", "copy"}
counts: Counter[str] = Counter()
results = {}  # of operations that a device would do: their shapes are enough


class Teacher:
    """Logits of the loader's samples."""

    def logits(self, split, index, view):
        return np.zeros((len(index), CLASSES), np.float32)


SIGNALS = {
    "none": list,
    "le": lambda: [ep.LocalError("all")],
    "kd": lambda: [ep.Distillation(Teacher(), "all", temperature=2.0)],
}


class SilentLauncher:
    """Launches nothing."""

    def launch(self, kernel, type_arguments, grid, block, arguments):
        """Do nothing: `Recorder` counts."""


class SilentGpu(stand_in.FakeGpu):
    """A `FakeGpu` as large as a real one, whose kernels do nothing."""

    def __init__(self, scratch_bytes):
        super().__init__()
        self.scratch_bytes = scratch_bytes

    def make_launcher(self, source):
        return SilentLauncher()

    def to_numpy(self, array):
        counts["reads"] += 1
        return super().to_numpy(array)

    def asarray(self, array, dtype=None):
        if not isinstance(array, strict.DeviceArray):
            counts["transfers"] += 1
            return super().asarray(array, dtype)
        if dtype is None or array.dtype == dtype:
            return array
        counts["array operations"] += Tape.current is None  # a cast
        return self.xp.empty(array.shape, dtype)


def do_nothing(operation, *operands):
    """In place of `strict.do`: note that something was launched."""
    if Tape.current is None:
        counts["array operations"] += 1


def silent_call(function, *args, **kwargs):
    """In place of `strict._call`: what has a place for its result is not computed, and nothing else twice."""
    name = getattr(function, "__name__", "")
    there = name == "ascontiguousarray" and args[0].flags.c_contiguous
    free = name in strict.VIEWS or "empty" in name or there
    counts["array operations"] += Tape.current is None and not free
    if kwargs.get("out") is not None:
        return kwargs["out"]
    compute = functools.partial(function, *strict._unwrap(args), **strict._unwrap(kwargs))
    if free or name in MAKERS:
        return strict._wrap(compute())
    key = (name, *map(_like, args), *(f"{k}={_like(value)}" for k, value in kwargs.items()))
    if key not in results:
        results[key] = strict._wrap(compute())
    return results[key]


def _like(argument):
    if isinstance(argument, (list, tuple)):
        return tuple(map(_like, argument))
    return (argument.shape, str(argument.dtype)) if isinstance(argument, strict.DeviceArray) else str(argument)


@contextlib.contextmanager
def silent_gpu(scratch_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stand_in, "FakeGpu", lambda: SilentGpu(scratch_bytes))
        gpu = stand_in.make_fake_gpu(patch)
        patch.setattr(stand_in.FakeCublas, "gemm_ex", lambda *_: counts.update(products=Tape.current is None))
        patch.setattr(strict, "do", do_nothing)
        patch.setattr(strict, "_call", silent_call)
        yield gpu


def measure(step, device):
    """Return what a step does, and its milliseconds on a CPU of the host, loader, optimizer and statistics included."""
    for _ in range(WARM_UP):
        step()
    counts.clear()
    with Recorder(device).watching() as recorder:
        for _ in range(STEPS):
            step()
    work = recorder.work
    found = {"kernels": work.kernels, "graphs": work.graphs, **counts}
    each = {name: count / STEPS for name, count in found.items()}
    each["launches"] = sum(each.get(name, 0) for name in ("kernels", "products", "graphs", "array operations"))
    times = []
    for _ in range(TIMED):
        start = time.thread_time()
        step()
        times.append(time.thread_time() - start)
    return each, 1e3 * float(np.median(times))


@click.command(context_settings={"show_default": True})
@click.option("--arch", default="vgg7")
@click.option("--batch-size", type=Numbers(), default="128,512")
@click.option("--precision", default="float16")
@click.option("--feedback", default=0.1)
@click.option("--steps", default=2, help="Sweeps of the free and of the nudged phases.")
@click.option("--aug", type=click.Choice(tuple(SIGNALS)), default="none", help="Signal at every layer.")
@click.option("--graphs/--no-graphs", default=True, help="Without, what iterations launch is counted, too.")
@click.option("--scratch-mb", type=float, help="Of a chunk.  [default: that of an H100]")
def main(arch, batch_size, precision, feedback, steps, aug, graphs, scratch_mb):
    """Count and time the host's part of a training step of EP and of BP."""
    budget = gpu_scratch(L2_BYTES) if scratch_mb is None else int(scratch_mb * 1e6)
    with silent_gpu(budget) as gpu, np.errstate(all="ignore"):
        gpu.graphs = gpu.graphs if graphs else None
        for samples in map(int, batch_size):
            net = ep.build(arch, feedback=feedback, precision=precision, device=gpu)
            how = {"free_steps": steps, "nudged_steps": steps, "schedule": "sweeps"}
            learners = {"EP": ep.EquilibriumPropagation(net, signals=SIGNALS[aug](), **how)}
            learners["BP"] = ep.Backpropagation(net, SIGNALS[aug]())
            for name, learner in learners.items():
                found, host = measure(TrainingStep(learner, samples), gpu)
                shown = ", ".join(f"{value:g} {what}" for what, value in found.items())
                click.echo(f"{name}, batch {samples}: {host:.2f} ms of the host; {shown}")


if __name__ == "__main__":
    main()
