"""Work in several processes, each with one thread, that stop and save when the one that started them is told to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from cupyep.commands.system import THREAD_VARIABLES
from cupyep.errors import CupyepError, OutOfTime
from cupyep.training.interruption import SIGNALS

_stop: Any = None  # in a process of `side_by_side`: the event that tells it to stop


def side_by_side(
    work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], jobs: int
) -> Generator[Any, None, None]:
    """Yield ``work(*arguments)`` for each of `arguments`, from `jobs` processes, in the order in which they end.

    Where the caller leaves early, by a signal for example, nothing new begins, and `check_stop` raises in the others.
    One job is this process.
    """
    if jobs == 1:
        yield from (work(*words) for words in arguments)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with _one_thread_each(), ProcessPoolExecutor(jobs, context, end_with, (os.getpid(), stop)) as pool:
        waiting = [pool.submit(work, *words) for words in arguments]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException as error:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)  # leaving the pool waits for what they save
            if isinstance(error, BrokenProcessPool):
                told = "a process was killed, for want of memory perhaps; the same command goes on, try fewer --jobs"
                raise CupyepError(told) from error
            raise


def check_stop() -> None:
    """Raise `OutOfTime` in a process of `side_by_side` that is to stop."""
    if _stop is not None and _stop.is_set():
        raise OutOfTime


def end_with(parent: int, stop: Any = None) -> None:
    """Let this process end within a second of the process `parent`, which, when killed, cannot tell it.

    With the event `stop`, signals are left to the parent, which sets it: a terminal sends them to both.
    """
    global _stop
    _stop = stop
    warnings.showwarning = lambda message, *_: print(f"Warning: {message}", file=sys.stderr, flush=True)
    if stop is not None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that start now use one thread for matrix products."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
