"""What `benchmark.py` measures with: a clock, products timed between all else."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from cupyep.backend import Device, Precision
from cupyep.backend.threads import set_threads
from cupyep.ops.factors import Factors

SHORTEST = 0.05  # seconds; what takes less is called several times for one reading of the clock


@dataclass
class Case:
    """Something to time: `call`, the operations of its direct convolutions and those that it does (None: no matter)."""

    call: Callable[[], Any]
    flops: float | None = None
    done: float | None = None


@dataclass
class Timing:
    """Repeated measurements of one case.

    Attributes
    ----------
    seconds : array of shape (repeats,)
    product : array of shape (repeats,)
        Rate in FLOP/s of the large matrix product timed just before each of them.
    flops, done : float or None
        See `Case`.
    """

    seconds: np.ndarray
    product: np.ndarray
    flops: float | None = None
    done: float | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a part of the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float((high - low) / self.median)

    @property
    def rate(self) -> float | None:
        """Median rate in FLOP/s."""
        return None if self.flops is None else self.flops / self.median

    @property
    def fraction(self) -> float | None:
        """Median of the rate as a part of the product's, each taken next to the other in time.

        It counts the work, so an algorithm that does it with fewer operations may come to more than 1.
        """
        return self._part(self.flops)

    @property
    def done_fraction(self) -> float | None:
        """The same of the operations really done: how busy they keep the machine, never more than 1."""
        return self._part(self.done)

    def _part(self, flops: float | None) -> float | None:
        return None if flops is None else float(np.median(flops / self.seconds / self.product))

    def per_step(self, other: Timing, steps: int, flops: float, done: float | None = None) -> Timing:
        """Return the timing of one step, where `self` does `steps` more of them than `other`."""
        return Timing((self.seconds - other.seconds) / steps, self.product, flops, done)


class Stopwatch:
    """Times cases in rounds: before every case the product, so that both see the same state of the machine.

    Parameters
    ----------
    device : Device
    precision : Precision
        Of the product.
    size : int
        The product is of two square matrices of this size.
    repeats : int
        Number of rounds.
    shortest : float
        Seconds that one reading covers at least.
    """

    def __init__(self, device: Device, precision: Precision, size: int, repeats: int, shortest: float = SHORTEST):
        self.device, self.repeats, self.shortest = device, repeats, shortest
        generator = np.random.default_rng(0)
        factors = Factors(precision, device.is_gpu)
        a, b = (device.asarray(generator.standard_normal((size, size)), factors.dtype) for _ in range(2))
        out = device.xp.empty_like(a)
        self._product, self._flops = Case(lambda: factors.product(a, b, out)), 2.0 * size**3
        self.product_rates: list[float] = []

    def measure(self, cases: dict[Any, Case]) -> dict[Any, Timing]:
        """Return the timings of `cases` by name, after a warm-up call of each."""
        calls = {name: self._calls(case) for name, case in cases.items()}
        product_calls = self._calls(self._product)
        seconds: dict[Any, list[float]] = {name: [] for name in cases}
        rates: dict[Any, list[float]] = {name: [] for name in cases}
        for _ in range(self.repeats):
            for name, case in cases.items():
                rates[name].append(self._flops / self._read(self._product, product_calls))
                seconds[name].append(self._read(case, calls[name]))
        self.product_rates += [rate for row in rates.values() for rate in row]
        return {
            name: Timing(np.array(seconds[name]), np.array(rates[name]), case.flops, case.done)
            for name, case in cases.items()
        }

    def _calls(self, case: Case) -> int:
        # The warm-up; on a GPU the second call captures graphs and the third is the first to replay them throughout.
        first = min(self._read(case, 1) for _ in range(3 if self.device.is_gpu else 1))
        if first > 10 * self.shortest:
            return 1
        return max(1, min(1000, math.ceil(self.shortest / self._read(case, 1))))

    def _read(self, case: Case, calls: int) -> float:
        """Return the seconds of one call, as the mean of `calls`."""
        if not self.device.is_gpu:
            start = time.perf_counter()
            for _ in range(calls):
                case.call()
            return (time.perf_counter() - start) / calls
        cuda = self.device.xp.cuda
        start, end = cuda.Event(), cuda.Event()
        self.device.synchronize()
        start.record()  # graphs are launched on the current stream, the default one, and PyTorch's is the same
        for _ in range(calls):
            case.call()
        end.record()
        end.synchronize()
        return cuda.get_elapsed_time(start, end) / 1000 / calls


def limit_threads(threads: int) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which BLAS and PyTorch, where it is loaded, use `threads` threads, and cupyep from now on.

    Within its own work cupyep leaves one to BLAS.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    set_threads(threads)
    return threadpool_limits(limits=threads)
