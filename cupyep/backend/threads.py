"""Parts of a batch in threads of this process, each with one BLAS thread.

Samples never talk to each other while they settle. So a batch is cut into parts of a fixed size, each part goes through
all its phases in one thread, and what comes of the parts is added in their order: the same bits for any number of
threads. NumPy gives the interpreter lock back within its operations, and so do the products of BLAS.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from threadpoolctl import ThreadpoolController

from cupyep.errors import integer, require

VARIABLE, OMP_VARIABLE = "CUPYEP_THREADS", "OMP_NUM_THREADS"
# Samples that a thread takes at a time. Not by the number of threads: results do not depend on it. By measurement
# (docs/performance.md) a step takes as long with 16 to 128; fewer leave more cores something to do.
PART = 32
CGROUP = Path("/sys/fs/cgroup")
_here = threading.local()  # of each thread: whose work it does, and its number among those that do
_chosen: int | None = None
_sharers = 1


def set_threads(threads: int | None) -> None:
    """Set how many threads work on the parts of a batch; results do not depend on it.

    Parameters
    ----------
    threads : int or None
        At least 1; None for the default: ``CUPYEP_THREADS``, else ``OMP_NUM_THREADS``, else `available_cpus`.

    Raises
    ------
    ConfigurationError
        If `threads` is not a positive integer.
    """
    global _chosen  # noqa: PLW0603
    _chosen = None if threads is None else integer("threads", threads)


def get_threads() -> int:
    """Return how many threads work on the parts of a batch.

    Raises
    ------
    ConfigurationError
        If ``CUPYEP_THREADS`` is not a positive integer.
    """
    if _chosen is not None:
        return _chosen
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        others = os.environ.get(OMP_VARIABLE, "").partition(",")[0].strip()  # a list is of nested levels
        own = max(1, available_cpus() // _sharers)
        return max(1, int(others)) if others.isascii() and others.isdigit() else own
    require(text.isascii() and text.isdigit() and int(text) > 0, f"{VARIABLE} must be a positive integer, not '{text}'")
    return int(text)


def share_cpus(processes: int) -> None:
    """Say how many processes of a training share the CPUs of this one: by default each takes its share of them."""
    global _sharers  # noqa: PLW0603
    _sharers = processes


@functools.cache
def available_cpus() -> int:
    """Return the CPUs that this process may use: its affinity, and the quota of its control group, rounded up."""
    cpus = len(own_cpus())
    return max(1, min(cpus, _quota(CGROUP) or cpus))


def own_cpus() -> set[int]:
    """Return the numbers of the CPUs that this process is bound to; of all where a system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _quota(root: Path) -> int | None:
    """Return the CPUs that the control group mounted at `root` grants, version 2 or 1; None for all."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, (root / "cpu.max").read_text().split())  # of "max" there is no integer
        return -(-quota // period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((root / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return -(-quota // period) if quota > 0 else None
    return None


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


_limiting = threading.Lock()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let BLAS use one thread within this scope: many small products in several threads of its own collapse.

    The limit is the process's, and only the thread that set it can lift it. So whoever comes while it is set neither
    sets nor lifts it.
    """
    if not _limiting.acquire(blocking=False):
        yield
        return
    try:
        with _blas().limit(limits=1):
            yield
    finally:
        _limiting.release()


def number_for(owner: Any) -> int:
    """Return the number of this thread among those that do parts of the work of `owner`; 0 if it does none."""
    return _here.number if works_for(owner) else 0


def works_for(owner: Any) -> bool:
    """Return whether this thread does a part of the work of `owner`, whose lock another one holds."""
    return getattr(_here, "owner", None) is owner


class Turns:
    """Lets threads do something in the order of the parts that they have in hand, one stage after the other."""

    def __init__(self) -> None:
        self._next: collections.Counter[int] = collections.Counter()  # by stage
        self._failed = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, part: int, stage: int = 0) -> Iterator[None]:
        """Wait until all parts before `part` have had their turn at a stage; let the next one have it afterwards."""
        with self._changed:
            self._changed.wait_for(lambda: self._next[stage] == part or self._failed)
            if self._failed:
                raise _Abandoned
        yield
        with self._changed:
            self._next[stage] += 1
            self._changed.notify_all()

    def fail(self) -> None:
        """Send away all that wait."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class _Abandoned(Exception):
    """Another part failed."""


def run_parts(owner: Any, count: int, work: Callable[[int, Turns], Any], most: int | None = None) -> list[Any]:
    """Return ``[work(0, turns), work(1, turns), ...]``, done by up to `get_threads` threads, this one among them.

    Each begins the first part that nobody has begun. In a thread that does a part already they are done one after the
    other. `most` limits the threads.

    Raises
    ------
    BaseException
        What the first of the parts that failed raised, after all threads have stopped.
    """
    most, turns = most or count, Turns()
    threads = 1 if getattr(_here, "owner", None) is not None else min(get_threads(), count, most)
    if threads == 1:
        return [work(part, turns) for part in range(count)]
    parts, results = itertools.count(), [None] * count
    errors: dict[int, BaseException] = {}

    def take_parts(number: int) -> None:
        _here.owner, _here.number, part = owner, number, -1
        try:
            while not errors and (part := next(parts)) < count:
                results[part] = work(part, turns)
        except _Abandoned:
            pass
        except BaseException as error:
            errors[part] = error
            turns.fail()
        finally:
            _here.owner, _here.number = None, 0

    others = []
    try:
        for number in range(1, threads):  # in a context of its own, with the error states of NumPy that hold here
            others.append(_pool().submit(contextvars.copy_context().run, take_parts, number))
        take_parts(0)
    except BaseException as error:  # no more threads can be started, or Ctrl-C: those that run must end first
        errors[-1] = error
        turns.fail()
    while not_done := [other for other in others if not other.done()]:
        try:
            wait(not_done)
        except KeyboardInterrupt as error:  # their memory is in use until they are done
            errors[-1] = error
            turns.fail()
    for other in others:
        other.result()
    if errors:
        raise errors[min(errors)]
    return results


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1024, "cupyep")  # which starts a thread where none is idle


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay behind
