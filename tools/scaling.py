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

from cupyep.backend import get_device
from cupyep.backend.threads import set_threads
from cupyep.cli.shared import OneLineErrors, chosen_config, config_options
from cupyep.cli.types import Numbers
from cupyep.commands.memory import MEMORY_OPTIONS, blank_learner, noise
from cupyep.errors import require
from cupyep.parallel import Communicator, join, planning
from cupyep.training import sharing

EXAMPLES = """\b
Examples:
  scaling.py --arch vgg7 --batch-size 128 --step-ms 12 --link 50,10     a step that was measured on a card
  scaling.py --arch vgg5 --width 0.25 --batch-size 16                   measured here, in one process
  scaling.py --arch vgg7 --width 0.5 --batch-size 128 --each-threads 1,2,4    threads, in turn
  scaling.py --arch vgg5 --width 0.25 --batch-size 16 --simulate 8 --link 1,0.1    over links that sleep
  mpirun -n 2 python tools/scaling.py --arch vgg5 --width 0.25 --batch-size 16    and the sum over two
"""
ROUNDS = 4
OPTIONS = ("algorithm", "beta", "free_steps", "gain", *MEMORY_OPTIONS)
FEW = 2048  # bytes that are sent as they are, as MPICH does


class SlowLink(Communicator):
    """One of `size` ranks that do the same at the same time, where a message takes its time; the others are not there.

    Parameters
    ----------
    size : int
        A power of two.
    bandwidth, latency : float
        Bytes a second, and seconds of a message.
    sleep : callable
        Takes the seconds of each message.
    """

    def __init__(self, size: int, bandwidth: float, latency: float, sleep: Callable[[float], Any] = time.sleep):
        require(size > 1 and size & (size - 1) == 0, f"a simulated link is of 2, 4, 8, ... ranks, not {size}")
        self.size, self._bandwidth, self._latency, self._sleep = size, bandwidth, latency, sleep

    def _send(self, nbytes: float) -> None:
        self._sleep(self._latency + nbytes / self._bandwidth)

    def sum(self, *arrays: Any) -> None:
        for array in arrays:
            halvings = range(1, self.size.bit_length())  # to the partner's half, its quarter, ...
            sizes = [array.nbytes / 2**k for k in halvings] if array.nbytes > FEW else []
            for nbytes in [*sizes, *reversed(sizes)] or [array.nbytes for _ in halvings]:
                self._send(nbytes)
            array *= self.size

    def any(self, *flags: bool) -> tuple[bool, ...]:
        for _ in range(1, self.size.bit_length()):
            self._send(4 * len(flags))
        return super().any(*flags)

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size

    def check(self, check: Callable[[], None]) -> None:
        self.any(False)
        check()


def simulated(learner: Any, batch: Any, ranks: int, links: Sequence[float], latency: float, step_s: float) -> list[str]:
    """Return lines: what was planned for each link, and what whole steps take whose messages sleep."""
    lines = [f"{'':>8}{'planned, ms':>16}{'with sleep, ms':>16}   of a step on {ranks} ranks, a batch each"]
    for link in links:
        slow = SlowLink(ranks, link * 1e9, latency)

        def whole(slow: SlowLink = slow) -> None:
            sharing.step(learner, batch, slow)
            slow.any(False, False)
            slow.check(lambda: None)

        nbytes = learner.gradient_size * learner.network.dtype.itemsize
        planned = step_s + planning.reduction_s(nbytes, ranks, link * 1e9, latency)
        found = planning.median_s(whole, Communicator(), learner.network.device)
        lines.append(f"{f'{link:g} GB/s':>10}{1e3 * planned:>14.2f}{1e3 * found:>16.2f}")
    return lines


def thread_table(works: dict[str, Callable[[], Any]], threads: list[int], samples: int) -> list[str]:
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
@click.option(
    "--link",
    type=Numbers(),
    default=f"{planning.LINK_GB:g}",
    show_default=True,
    help="GB/s of the slowest link, each way.",
)
@click.option(
    "--each-threads", type=Numbers(), help="Measure with these numbers of threads in place of planning ranks."
)
@click.option("--simulate", type=int, help="Also do steps as one of so many ranks, whose messages sleep.")
@click.option("--latency-us", type=float, default=planning.LATENCY_US, show_default=True, help="Of an empty message.")
def main(
    step_ms: float | None,
    link: list[float],
    latency_us: float,
    each_threads: list[float] | None,
    simulate: int | None,
    given: dict[str, Any],
) -> None:
    """Measure a step and the sum of its gradients, and plan up to 1,024 ranks.

    --batch-size is what one rank takes. Each efficiency is that of a step whose reduction is hidden behind nothing:
    with as large a batch on every rank (a rank), or one batch shared out, a step on n ranks taking an n-th (in all).
    Started by mpirun, the sum over the ranks there is measured, too. cupyep memory --ranks plans without measuring.
    """
    planning.check(link, latency_us, step_ms)
    require(simulate is None or step_ms is None, "--simulate measures the step itself: leave out --step-ms")
    config, ranks = chosen_config(given), join()
    device = get_device(ranks.own_device(config.device), config.scratch_mb)
    ranks.use(device)
    learner = blank_learner(config, device)
    batch = noise(learner.network, config.batch_size)
    if each_threads is not None:
        require(all(count >= 1 and count.is_integer() for count in each_threads), "--each-threads are integers from 1")
        works = {config.algorithm: lambda: learner.step(batch), "evaluation": lambda: learner.evaluate(batch)}
        click.echo(f"{config.arch}, width {config.width:g}, batch {config.batch_size}, {device.name}")
        click.echo("\n".join(thread_table(works, [int(count) for count in each_threads], config.batch_size)))
        return
    click.echo(
        f"{config.arch}, width {config.width:g}, {config.algorithm}, batch {config.batch_size} a rank, {device.name}"
    )
    step_s, lines = rank_table(learner, batch, ranks, link, latency_us / 1e6, step_ms and step_ms / 1e3)
    click.echo("\n".join(lines))
    if simulate is not None:
        click.echo("\n".join(simulated(learner, batch, simulate, link, latency_us / 1e6, step_s)))


def rank_table(
    learner: Any, batch: Any, ranks: Communicator, links: Sequence[float], latency: float, step_s: float | None = None
) -> tuple[float, list[str]]:
    """Return the seconds of a step, measured unless given, and lines: it, its sum over ranks that are there, a plan."""
    device, packed = learner.network.device, learner.step(batch).gradients.packed
    lines = [f"{packed.nbytes / 1e6:.2f} MB of gradients a step"]
    if step_s is None:
        step_s = planning.median_s(lambda: learner.step(batch), ranks, device)
        lines.append(f"step {1e3 * step_s:.2f} ms (median of {planning.REPEATS}, the slowest of {ranks.size} ranks)")
    if ranks.size > 1:
        seconds = planning.median_s(lambda: ranks.sum(packed), ranks, device)
        told = planning.median_s(lambda: ranks.any(False, False), ranks, device)
        sent = 2 * (ranks.size - 1) / ranks.size * packed.nbytes
        lines.append(
            f"sum over {ranks.size} ranks {1e3 * seconds:.2f} ms ({sent / seconds / 1e9:.2f} GB/s), a decision "
            f"{1e6 * told:.0f} us: efficiency {planning.efficiency(step_s, seconds + planning.SMALL * told):.1%}"
        )
    return step_s, [*lines, *planning.table(step_s, packed.nbytes, links, latency)]


if __name__ == "__main__":
    main(prog_name="scaling.py")
