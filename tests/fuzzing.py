"""Damage, and the one contract of every reader: whatever a file holds, only the package's own errors come out of it.

A test describes what to read; `explore` does so for many damaged files and fails on any other exception, a warning, an
error of more than one line, a changed or new file, too much memory or too much time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cupyep.errors import CupyepError

MEMORY = 64 << 20  # bytes that one reading may take
SECONDS = 20  # that it may take; a loop in Python ends then, one in C code ends the test run


def amounts(fast, slow):
    """Parametrize a test with the number of its examples: few always, many where slow tests run."""
    return pytest.mark.parametrize("amount", [fast, pytest.param(slow, marks=pytest.mark.slow)])


def explore(strategy, amount, prepare, read, **limits):
    """Call `prepare` with an example and then `read` under the contract, `amount` times; return (accepted, refused).

    Few examples are the same in every run. Many are new ones each time; ``--hypothesis-seed=N`` repeats them.
    """
    counts = [0, 0]

    @settings(
        max_examples=amount,
        derandomize=amount < 100,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example):
        prepare(example)
        counts[refused(read, **limits)] += 1

    run()
    return tuple(counts)


def refused(read, memory=MEMORY, folder=None, kind=CupyepError):
    """Call `read` under the contract; return whether it was refused by an error of ours."""
    before = contents(folder)
    with time_limit(SECONDS), traced_memory() as peak:
        try:
            read()
            result = False
        except kind as error:
            text, result = str(error), True
    if result:
        assert text.isprintable(), repr(text)
        assert 0 < len(text) <= 1003
    assert peak() < memory, f"{peak() >> 20} MiB were taken"
    assert contents(folder) == before
    return result


def contents(folder):
    """Return every path below `folder` with its size and time of change."""
    if folder is None:
        return None
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in Path(folder).rglob("*"))


@contextlib.contextmanager
def traced_memory():
    """Yield a function that returns the largest memory taken within the block, in bytes."""
    tracemalloc.start()
    start, peak = tracemalloc.get_traced_memory()[0], []
    try:
        yield lambda: peak[0]
        peak.append(tracemalloc.get_traced_memory()[1] - start)
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def time_limit(seconds):
    """End what takes longer."""

    def end(*_):
        raise TimeoutError(f"more than {seconds} s")

    old = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def in_child(body, seconds=SECONDS):
    """Call `body` in a child process; return "ok", the name of the signal that ended it, or how it failed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            body()
            text = "ok"
        except BaseException as error:  # of whatever kind: the parent tells
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode(errors="replace")[:500])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else text


# --- damage --------------------------------------------------------------------------------------------------------

ODD_NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 60, (1 << 64) - 1]


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change: at `place`, `gone` bytes are replaced by `new`."""

    place: int
    gone: int
    new: bytes


def apply(content, edits):
    """Return `content` with every one of `edits` done, each at its place modulo the length."""
    content = bytearray(content)
    for edit in edits:
        place = edit.place % (len(content) + 1)
        content[place : place + edit.gone] = edit.new
    return bytes(content)


def numbers():
    """Numbers of 1 to 8 bytes in either order, mostly those that sizes go wrong with."""

    def encode(value, width, order):
        return (value % (1 << 8 * width)).to_bytes(width, order)

    value = st.sampled_from(ODD_NUMBERS) | st.integers(0, 300)
    return st.builds(encode, value, st.sampled_from([1, 2, 4, 8]), st.sampled_from(["little", "big"]))


def edits(length, head=600):
    """Lists of edits of a file of `length` bytes; every second one falls into its first `head` bytes."""
    place = st.integers(0, max(0, min(head, length) - 1)) | st.integers(0, max(0, length - 1))
    overwritten = st.builds(
        lambda p, new: Edit(p, len(new), new), place, numbers() | st.binary(min_size=1, max_size=16)
    )
    inserted = st.builds(lambda p, new: Edit(p, 0, new), place, st.binary(min_size=1, max_size=40))
    deleted = st.builds(lambda p, n: Edit(p, n, b""), place, st.integers(1, 600))
    cut = st.builds(lambda p: Edit(p, length, b""), place)
    return st.lists(st.one_of(overwritten, overwritten, overwritten, inserted, deleted, cut), min_size=1, max_size=6)


def damaged(content, head=600):
    """Strategy: `content` with some edits, or bytes of no file at all, behind its first ones."""
    scratch = st.builds(lambda n, rest: content[:n] + rest, st.sampled_from([0, 4, 8, 16]), st.binary(max_size=300))
    changed = edits(len(content), head).map(lambda list_: apply(content, list_))
    return st.one_of(changed, changed, changed, scratch)
