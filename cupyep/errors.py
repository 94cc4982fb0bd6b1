"""The exceptions and warnings that a user can meet. Every message is one line that names the remedy."""

from __future__ import annotations

import contextlib
import difflib
import math
import numbers
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

MESSAGE_LENGTH = 1000
SHOWN_LENGTH = 60
LARGEST = 2**63 - 1  # what an array can count


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
    """States, scores, gradients, parameters or the loss are not finite, or the loss stays far above its start."""


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


def outside() -> int:
    """Return the `stacklevel` with which a warning of the caller shows the line that called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("cupyep."):
        frame, level = frame.f_back, level + 1
    return level


@contextlib.contextmanager
def reporting(kind: type[CupyepError], what: str) -> Iterator[None]:
    """Turn an `OSError` into an error of `kind` that says `what` could not be done, and why."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}") from error


@contextlib.contextmanager
def needing(what: str, kind: type[CupyepError] = ConfigurationError) -> Iterator[None]:
    """Turn an `ImportError` into an error of `kind` that says `what` is missing, and how to get it."""
    try:
        yield
    except ImportError:
        raise kind(what) from None


@contextlib.contextmanager
def foreign_code(what: str, kind: type[CupyepError] = CupyepError) -> Iterator[None]:
    """Turn whatever code that is not ours raises into one line of `kind` that begins with `what`."""
    try:
        yield
    except (CupyepError, MemoryError):
        raise
    except Exception as error:  # such code raises anything
        raise kind(f"{what}: {one_line(error, 300)}") from error


def printable(text: str) -> str:
    """Return `text` on one line, cut at `MESSAGE_LENGTH`: names out of files may hold line ends and control codes."""
    text = " ".join(text.split())
    text = text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to `name`, or ``""``."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def few(names: Iterable[Any], most: int) -> str:
    """Return the first `most` of some names with commas between them, and how many more there are."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def choose(what: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`, else raise `ConfigurationError` that lists them."""
    known = list(known)
    if not isinstance(name, str) or name not in known:
        name = name if isinstance(name, str) else shown(name)
        raise ConfigurationError(f"unknown {what} '{name}'{nearest(name, known)} (choose from {', '.join(known)})")
    return name


def require(condition: bool, message: str) -> None:
    """Raise `ConfigurationError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigurationError(message)


def shown(value: Any) -> str:
    """Return a wrong value for a message: of an array type and shape alone, of what has no short text its type."""
    kind = type(value).__name__
    if getattr(value, "shape", ()) != () and not isinstance(value, type):
        return f"an array ({kind}) of shape {value.shape}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more digits than Python prints, lists in lists in lists
        return f"a huge {kind}"
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}... ({kind})"


def wrong(name: str, rule: str, value: Any) -> ConfigurationError:
    """Return the error of an argument that breaks its rule; only then is the value looked at, which may take long."""
    return ConfigurationError(f"{name} must be {rule}, not {shown(value)}")


def is_integer(value: Any) -> bool:
    """Return whether `value` is an integer of Python or NumPy; booleans are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(name: str, value: Any, least: int = 1, most: float = LARGEST) -> int:
    """Return the argument `name` as an integer from `least` to `most`, else raise `ConfigurationError`."""
    rule = "a positive integer" if least == 1 else f"an integer of at least {least}"
    rule = rule if most >= LARGEST else f"an integer from {least} to {most}"
    if not (is_integer(value) and least <= value <= most):
        raise wrong(name, rule, value)
    return int(value)


def seed(name: str, value: Any) -> int:
    """Return what NumPy takes as a seed: an integer of at least 0, however large."""
    return integer(name, value, 0, math.inf)


def is_number(value: Any) -> bool:
    """Return whether `value` is a number of Python or NumPy that a float can hold; booleans are none."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and isinstance(float(value), float)
    except OverflowError:
        return False


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """Return the argument `name` as a float, ``low <= value <= high`` and ``above < value < below``.

    Raises
    ------
    ConfigurationError
        If it is not, is no number, or is infinite where that is not allowed.
    """
    right = is_number(value) and (infinite or math.isfinite(value)) and low <= value <= high
    right = right and (above < value or above == -math.inf) and (value < below or below == math.inf)
    if not right:
        words = (("above", above), ("at least", low), ("at most", high), ("below", below))
        rule = " and ".join(f"{word} {limit:g}" for word, limit in words if math.isfinite(limit))
        raise wrong(name, rule or "a finite number", value)
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Return the argument `name` as a bool; it is True or False, also NumPy's."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise wrong(name, "True or False", value)
    return bool(value)


def instance(name: str, value: Any, kind: type, what: str = "") -> Any:
    """Return the argument `name`, which must be of the class `kind`, called `what`."""
    if not isinstance(value, kind):
        raise wrong(name, what or f"of class {kind.__name__}", value)
    return value


def items(name: str, value: Any, kind: type = object, what: str = "") -> list[Any]:
    """Return the argument `name`, a sequence of objects of the class `kind`, as a list; a text is none."""
    rule = f"a sequence{f' of {what or kind.__name__}' if kind is not object else ''}"
    single = isinstance(value, (str, bytes, Mapping)) or getattr(value, "shape", None) == ()
    if single or not isinstance(value, Iterable):
        raise wrong(name, rule, value)
    found = list(value)
    for item in found:
        if not isinstance(item, kind):
            raise ConfigurationError(f"{name} must be {rule}; it holds {shown(item)}")
    return found


def shape(name: str, value: Any, axes: str = "") -> tuple[int, ...]:
    """Return the argument `name` as a shape of positive integers, with just the `axes`, as "H, W, C", if given."""
    found = items(name, value)
    if len(found) != (len(axes.split(",")) if axes else max(1, len(found))):
        raise wrong(name, f"({axes or 'n, ...'})", value)
    return tuple(integer(f"each of {name}", n) for n in found)


def path(name: str, value: Any) -> Path:
    """Return the argument `name` as a path; it is a text or a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise wrong(name, "a path", value)
    return Path(value)


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return ``Type: message`` of `error` on one line of at most about `limit` characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[:limit] + "..."
