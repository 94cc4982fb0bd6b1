"""The exceptions and warnings that a user can meet. Every message is one line that names the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MESSAGE_LENGTH = 1000


class CupyepError(Exception):
    """Base of all errors raised on purpose by cupyep; the command line exits with code 1."""

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))


class ConfigurationError(CupyepError, ValueError):
    """An argument or option is out of range or unknown; the command line exits with code 2."""


class DeviceError(CupyepError, RuntimeError):
    """The device asked for cannot be used; the message says why."""


class DataError(CupyepError, ValueError):
    """A data set is missing, truncated or not what its format promises."""


class TeacherError(CupyepError, ValueError):
    """A teacher file is malformed or belongs to other data."""


class CheckpointError(CupyepError, ValueError):
    """A run directory or checkpoint is malformed, foreign or in the way."""


class DivergenceError(CupyepError, ArithmeticError):
    """States, gradients, parameters or the loss stopped being finite, or the loss stays far above its start."""


class Interrupted(CupyepError):
    """A signal, or output that nobody reads, stopped a run, which was saved; exit code 128 + signal.

    Parameters
    ----------
    message : str
    number : int
        Of the signal.
    """

    def __init__(self, message: str = "interrupted", number: int = 2):
        super().__init__(message)
        self.number = number


class OutOfTime(Interrupted):
    """The minutes that were given are used up; what is done is kept."""


class ConvergenceWarning(UserWarning):
    """A settle phase ended above its tolerance; the message names the layer and the knob to turn."""


class PrecisionWarning(UserWarning):
    """A number format and another setting do not go well together; the message says why, and what to change."""


class GraphWarning(UserWarning):
    """Work could not be captured in a CUDA graph; it is done by plain launches, slower and with the same results."""


def printable(text: str) -> str:
    """Return `text` on one line, cut at `MESSAGE_LENGTH`: names out of files may hold line ends and control codes."""
    text = " ".join(text.split())
    text = text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, or ``""``."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`, else raise `ConfigurationError` that lists them."""
    known = list(known)
    if name not in known:
        raise ConfigurationError(f"unknown {what} '{name}'{nearest(str(name), known)} (choose from {', '.join(known)})")
    return name


def require(condition: bool, message: str) -> None:
    """Raise `ConfigurationError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigurationError(message)
