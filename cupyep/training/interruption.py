"""Signals: the first SIGINT, SIGTERM or SIGHUP asks a run to stop, the second leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from cupyep.errors import Interrupted

# Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_reasons: list[Callable[[], None]] = []


@contextlib.contextmanager
def stopped_by(check: Callable[[], None]) -> Iterator[None]:
    """Let `check`, too, be asked wherever a signal may stop what is going on; it raises `Interrupted` to stop it."""
    _reasons.append(check)
    try:
        yield
    finally:
        _reasons.remove(check)


class Interruptions:
    """Context manager in which signals do not break off what is going on.

    Handlers belong to the main thread: in another one, signals do what they always do. A signal that is ignored when
    the context begins (SIGHUP under nohup) stays so. The signal that asked to stop is `received`; 0 if there was none.

    With `at_once` the first signal raises `Interrupted` where it comes, instead of at the next `check`: for what is
    kept piece by piece anyway.
    """

    def __init__(self, at_once: bool = False):
        self.at_once = at_once
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)  # every file in the run directory is whole at any time
        self.received = number
        if self.at_once:
            raise Interrupted(number=number)
        if sys.stderr is not None and sys.stderr.isatty():
            # Not by print: the program may be inside of it.
            with contextlib.suppress(OSError):  # the terminal may be what has gone
                os.write(2, b"\nfinishing the batch and saving; once more leaves at once\n")

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come, or another reason to stop (`stopped_by`)."""
        if self.received:
            raise Interrupted(number=self.received)
        for reason in _reasons:
            reason()
