"""Signals: the first SIGINT, SIGTERM or SIGHUP asks a run to stop, the second leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from cupyep.errors import Interrupted

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Interruptions:
    """Context manager in which signals do not break off what is going on.

    Handlers belong to the main thread: in another one, signals do what they always do. A signal that is ignored when
    the context begins (SIGHUP under nohup) stays so.

    Attributes
    ----------
    received : int
        The signal that asked to stop; 0 if there was none.
    """

    def __init__(self):
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
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
        if sys.stderr.isatty():  # print must not be called while the program may be inside of it
            os.write(2, b"\nfinishing the batch and saving; once more leaves at once\n")

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come."""
        if self.received:
            raise Interrupted(number=self.received)
