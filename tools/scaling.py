#!/usr/bin/env python3
"""How much of N cores, cards or machines does a training use?

Threads of one process are measured; ranks are planned, from the time of a step and the bytes that it sends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import numpy as np

from cupyep.backend import Device, get_device
from cupyep.backend.threads import set_threads
from cupyep.cli.shared import OneLineErrors, chosen_config, config_options
from cupyep.cli.types import Numbers
from cupyep.commands.memory import MEMORY_OPTIONS, blank_learner, noise
from cupyep.errors import require
from cupyep.parallel import Communicator, join

EXAMPLES = """\b
Examples:
  scaling.py --arch vgg7 --batch-size 128 --step-ms 12 --link 50,10     a step that was measured on a card
  scaling.py --arch vgg5 --width 0.25 --batch-size 16                   measured here, in one process
  scaling.py --arch vgg7 --width 0.5 --batch-size 128 --each-threads 1,2,4    threads, in turn
  mpirun -n 2 python tools/scaling.py --arch vgg5 --width 0.25 --batch-size 16    and the sum over two
"""
MOST = 1024
ENOUGH = 0.8
REPEATS = 7
ROUNDS = 4
OPTIONS = ("algorithm", "beta", "free_steps", "gain", *MEMORY_OPTIONS)


def reduction_s(nbytes: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Return the seconds of a ring that sums `nbytes` over `ranks`: what each sends, and the steps it waits for.

    Parameters
    ----------
    bandwidth : float
        Bytes a second of the slowest link, in each direction.
    latency : float
        Seconds of a message.
    """
    return 2 * (ranks - 1) / ranks * nbytes / bandwidth + 2 * math.ceil(math.log2(ranks)) * latency


def efficiency(step_s: float, reduction: float) -> float:
    """Return which part of a step is work, where nothing of its reduction is hidden behind it."""
    return step_s / (step_s + reduction)


def last_enough(step_s: Callable[[int], float], reduction: Callable[[int], float]) -> int:
    """Return the largest number of ranks, of 1 to `MOST`, up to which the efficiency is `ENOUGH`."""
    bad = (n for n in range(2, MOST + 1) if efficiency(step_s(n), reduction(n)) < ENOUGH)
    return next(bad, MOST + 1) - 1


def table(step_s: float, nbytes: int, links: Sequence[float], latency: float) -> list[str]:
    """Return lines: for 1, 2, 4, ... ranks the efficiency over each link, for as large a batch a rank and in all."""
    heads = [f"{link:g} GB/s, {batch}" for link in links for batch in ("a rank", "in all")]
    lines = [f"{'ranks':>8}" + "".join(f"{head:>20}" for head in heads)]
    steps = (lambda n: step_s, lambda n: step_s / n)
    reductions = [lambda n, link=link: reduction_s(nbytes, n, link * 1e9, latency) for link in links]
    cases = [(step, reduction) for reduction in reductions for step in steps]
    for n in (1 << k for k in range(int(math.log2(MOST)) + 1)):
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


def thread_table(works: dict[str, Callable[[], Any]], threads: Sequence[int], samples: int) -> list[str]:
    """Return lines: images/s and efficiency of each work by numbers of threads, the best of rounds taken in turn."""
    best = {name: dict.fromkeys(threads, math.inf) for name in works}
    for name, work in works.items():
        for count in [*threads[:1], *threads * ROUNDS]:  # the first one warms up
            set_threads(count)
            begin = time.perf_counter()
            work()
            best[name][count] = min(best[name][count], time.perf_counter() - begin)
    lines = [f"{'threads':>8}" + "".join(f"{name + ', images/s':>26}{'efficiency':>12}" for name in works)]
    for count in threads:
        line = f"{count:>8}"
        for name in works:
            speed = samples / best[name][count]
            share = best[name][threads[0]] * threads[0] / best[name][count] / count
            line += f"{speed:>26.1f}{share:>12.1%}"
        lines.append(line)
    return lines


@click.command(cls=OneLineErrors, epilog=EXAMPLES)
@config_options(OPTIONS)
@click.option("--step-ms", type=float, help="Time of a step of one rank; measured here unless given.")
@click.option("--link", type=Numbers(), default="50", show_default=True, help="GB/s of the slowest link, each way.")
@click.option(
    "--each-threads", type=Numbers(), help="Measure with these numbers of threads in place of planning ranks."
)
@click.option("--latency-us", type=float, default=5.0, show_default=True, help="Time of an empty message.")
def main(
    step_ms: float | None,
    link: list[float],
    latency_us: float,
    each_threads: list[float] | None,
    given: dict[str, Any],
) -> None:
    """Measure a step and the sum of its gradients, and plan up to 1,024 ranks.

    --batch-size is what one rank takes. Each efficiency is that of a step whose reduction is hidden behind nothing:
    with as large a batch on every rank (a rank), or one batch shared out, a step on n ranks taking an n-th (in all).
    Started by mpirun, the sum over the ranks there is measured, too.
    """
    require(min(link) > 0 and latency_us >= 0, "--link must be above 0 and --latency-us at least 0")
    require(step_ms is None or step_ms > 0, "--step-ms must be above 0")
    config, ranks = chosen_config(given), join()
    device = get_device(ranks.own_device(config.device), config.scratch_mb)
    ranks.use(device)
    learner = blank_learner(config, device)
    batch = noise(learner.network, config.batch_size)
    if each_threads is not None:
        require(all(count >= 1 and count == int(count) for count in each_threads), "--each-threads are integers from 1")
        works = {config.algorithm: lambda: learner.step(batch), "evaluation": lambda: learner.evaluate(batch)}
        click.echo(f"{config.arch}, width {config.width:g}, batch {config.batch_size}, {device.name}")
        click.echo("\n".join(thread_table(works, [int(count) for count in each_threads], config.batch_size)))
        return
    packed = learner.step(batch).gradients.packed
    text = f"{config.arch}, width {config.width:g}, {config.algorithm}, batch {config.batch_size} a rank, {device.name}"
    click.echo(f"{text}: {packed.nbytes / 1e6:.2f} MB of gradients a step")
    if step_ms is None:
        step_ms = 1e3 * median_s(lambda: learner.step(batch), ranks, device)
        click.echo(f"step {step_ms:.2f} ms (median of {REPEATS}, the slowest of {ranks.size} ranks)")
    if ranks.size > 1:
        seconds = median_s(lambda: ranks.sum(packed), ranks, device)
        told = median_s(lambda: ranks.any(False, False), ranks, device)
        sent = 2 * (ranks.size - 1) / ranks.size * packed.nbytes
        click.echo(
            f"sum over {ranks.size} ranks {1e3 * seconds:.2f} ms ({sent / seconds / 1e9:.2f} GB/s), a decision "
            f"{1e6 * told:.0f} us: efficiency {efficiency(step_ms / 1e3, seconds + 2 * told):.1%}"
        )
    click.echo("\n".join(table(step_ms / 1e3, packed.nbytes, link, latency_us / 1e6)))


if __name__ == "__main__":
    main(prog_name="scaling.py")
