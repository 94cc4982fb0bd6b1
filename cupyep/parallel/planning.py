"""How much of N ranks a training uses: the time of a step against that of the messages that end it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupyep.backend import Device
from cupyep.errors import require
from cupyep.parallel.communicator import Communicator

MOST = 1024
ENOUGH = 0.8
REPEATS = 7
LINK_GB, LATENCY_US = 50.0, 5.0
SMALL = 3  # messages to all of a few bytes: statistics, "show, save?", "stop?"


def check(links_gb: Sequence[float], latency_us: float, step_ms: float | None) -> None:
    """Raise ConfigurationError, by the names of options, unless there can be such links and such a step."""
    require(all(0 < link < math.inf for link in links_gb), "--link must be above 0 and finite")
    require(0 <= latency_us < math.inf, "--latency-us must be at least 0 and finite")
    require(step_ms is None or 0 < step_ms < math.inf, "--step-ms must be above 0 and finite")


def reduction_s(nbytes: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Return the seconds in which `ranks` add up `nbytes` by halving and doubling, and agree on how to go on.

    To add up, a rank exchanges a half, a quarter, ... with another one, and the same again to tell; every exchange, and
    every doubling of a small message, waits for the latency. (A ring sends as much, but waits 2 (ranks - 1) times.)

    Parameters
    ----------
    bandwidth : float
        Bytes a second of the slowest link, in each direction.
    latency : float
        Seconds of a message.
    """
    return 2 * (ranks - 1) / ranks * nbytes / bandwidth + (2 + SMALL) * math.ceil(math.log2(ranks)) * latency


def efficiency(step_s: float, reduction: float) -> float:
    """Return which part of a step is work, where nothing of its reduction is hidden behind it."""
    return step_s / (step_s + reduction)


def last_enough(step_s: Callable[[int], float], reduction: Callable[[int], float]) -> int:
    """Return the largest number of ranks, of 1 to `MOST`, up to which the efficiency is `ENOUGH`."""
    bad = (n for n in range(2, MOST + 1) if efficiency(step_s(n), reduction(n)) < ENOUGH)
    return next(bad, MOST + 1) - 1


def table(step_s: float, nbytes: int, links: Sequence[float], latency: float, most: int = MOST) -> list[str]:
    """Return lines: the efficiency of 1, 2, 4, ... `most` ranks over each link, and up to how many it is `ENOUGH`.

    Parameters
    ----------
    step_s : float
        Of one rank, without messages.
    nbytes : int
        Of its gradients.
    links : sequence of float
        GB/s. Two columns each: with as large a batch on every rank ("a rank"), or one batch shared out, a step of n
        ranks taking an n-th ("in all").
    latency : float
        Seconds.
    """
    heads = [f"{link:g} GB/s, {batch}" for link in links for batch in ("a rank", "in all")]
    lines = [f"{'ranks':>8}" + "".join(f"{head:>20}" for head in heads)]
    steps = (lambda n: step_s, lambda n: step_s / n)
    reductions = [lambda n, link=link: reduction_s(nbytes, n, link * 1e9, latency) for link in links]
    cases = [(step, reduction) for reduction in reductions for step in steps]
    for n in sorted({1 << k for k in range(most.bit_length())} | {most}):
        lines.append(f"{n:>8}" + "".join(f"{efficiency(s(n), r(n)):>20.1%}" for s, r in cases))
    ends = [last_enough(*case) for case in cases]
    shown = [f"all to {MOST}" if end == MOST else str(end) for end in ends]
    return [*lines, f"{f'{ENOUGH:.0%} to':>8}" + "".join(f"{end:>20}" for end in shown)]


def median_s(work: Callable[[], Any], ranks: Communicator, device: Device) -> float:
    """Return the median seconds of `work`, of the slowest rank each time, which all begin together."""
    times = []
    for _ in range(REPEATS + 1):  # the first one warms up
        ranks.gather(None)
        device.synchronize()
        begin = time.perf_counter()
        work()
        device.synchronize()
        times.append(max(ranks.gather(time.perf_counter() - begin)))
    return float(np.median(times[1:]))
