"""What a run shows while it goes on: lines and bars for people, or one JSON object a line for programs.

Everything shown is an event with a name, a text and values. People see the text, on stdout (warnings on stderr); where
stderr is a terminal a bar tells how far an epoch is, elsewhere a plain line now and then does. Programs get the values.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from cupyep.batch import shared_out
from cupyep.errors import Interrupted

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a notebook without ipywidgets, which gets lines in place of bars
    from tqdm.auto import tqdm

DETAILS = ("note", "start", "estimate", "progress", "checkpoint", "epoch")  # not shown when quiet
# New numbers come this often, because the device is waited for each time: on a bar, and as lines of a log.
BAR_S, LINE_S = 0.5, 30.0
SIGPIPE = 13
NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)  # where bars are widgets


def write_line(text: str, file: Any = None) -> None:
    """Write a line to stdout (or `file`), past any bar.

    Raises
    ------
    Interrupted
        If nobody reads it any more: ``cupyep train | head``, a terminal that was closed.
    """
    file = file or sys.stdout
    if file is None:  # a program without a console
        return
    try:
        tqdm.write(text, file=file)
        file.flush()
    except OSError as error:
        silence(file)
        raise Interrupted(f"cannot write the output: {error.strerror}", SIGPIPE) from error


def silence(file: Any) -> None:
    """Send to nowhere what a stream that broke still holds, or Python fails again when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


class Bar(tqdm):
    """A bar on stderr; where its terminal has gone, the work goes on without it."""

    def display(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().display(*args, **kwargs)
        except OSError:
            silence(self.fp)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class Display:
    """Shows events as text.

    Parameters
    ----------
    quiet : bool
        Nothing on the way: no bars, no line but the result, and warnings.
    write : callable
        Takes each line that is not a warning.
    subject : str
        Whose events these are, where there are several; its text begins with it.

    Attributes
    ----------
    advises : bool
        Whether who reads it gave the options of `cupyep train`, and may be told to choose others.
    """

    advises = False

    def __init__(self, quiet: bool = False, write: Callable[[str], None] = write_line, subject: str = ""):
        self.quiet = quiet
        self.write = write
        self.subject = subject

    def about(self, subject: str) -> Display:
        """Return a display like this for the events of `subject`."""
        other = copy.copy(self)
        other.subject = subject
        return other

    def show(self, event: str, text: str = "", **values: Any) -> None:
        """Show an event.

        Parameters
        ----------
        event : str
            ``note``, ``warning``, ``start``, ``estimate``, ``progress``, ``checkpoint``, ``epoch``, ``end``.
        text : str
            What a person reads; nothing if empty.
        **values
            What a program gets, ready for JSON.
        """
        if not (self.quiet and event in DETAILS):
            self._emit(event, text, values)

    def _emit(self, event: str, text: str, values: dict[str, Any]) -> None:
        if not text:
            return
        if self.subject:
            text = f"{self.subject}: {text}"
        if event == "warning":
            write_line(f"Warning: {text}", sys.stderr)
        else:
            self.write(text)

    def _has_bars(self) -> bool:
        return not self.quiet and (NOTEBOOK or (sys.stderr is not None and sys.stderr.isatty()))

    @contextlib.contextmanager
    def progress(self, title: str, total: int, done: int = 0, **values: Any) -> Iterator[Progress]:
        """Yield a `Progress` through `total` images, `done` of them before; `values` go with its events."""
        name = f"{self.subject}, {title}" if self.subject else title
        options = {"desc": name, "unit": " images", "leave": False, "disable": not self._has_bars()}
        with Bar(total=total, initial=done, **options) as bar:
            yield Progress(self, bar, title, total, done, values)

    def over(self, batches: Any, title: str) -> Iterator[Any]:
        """Yield the batches of a `Loader` with a bar."""
        with self.progress(title, len(batches.split)) as progress:
            for batch in batches:
                yield batch
                progress.advance(shared_out(batch)[1])


class JsonDisplay(Display):
    """Shows events as one JSON object a line: ``event``, ``time`` (UTC), ``subject`` if there is one, and the values.

    An event without values carries its ``text``.
    """

    def _emit(self, event: str, text: str, values: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        head = {"event": event, "time": now, **({"subject": self.subject} if self.subject else {})}
        self.write(json.dumps({**head, **({"text": text} if text and not values else {}), **values}, allow_nan=False))

    def _has_bars(self) -> bool:
        return False


class Progress:
    """How far an epoch is: `done` of `total` images; the `values` go with every event."""

    def __init__(self, display: Display, bar: tqdm, title: str, total: int, done: int, values: dict[str, Any]):
        self.display, self.bar, self.title, self.values = display, bar, title, values
        self.total, self.done, self._before = total, done, done
        self._begin = self._shown = time.monotonic()

    def advance(self, count: int) -> None:
        """Note that `count` more images are done."""
        self.done += count
        self.bar.update(count)

    def is_due(self) -> bool:
        """Return whether it is time for `show`."""
        return time.monotonic() - self._shown >= (LINE_S if self.bar.disable else BAR_S)

    def show(self, text: str, **numbers: Any) -> None:
        """Show the numbers so far: on the bar, or as an event ``progress``."""
        self._shown = time.monotonic()
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        rate = (self.done - self._before) / max(self._shown - self._begin, 1e-9)
        left = (self.total - self.done) / rate if rate else None
        line = f"{self.title}  {self.done / self.total:4.0%}  {text}  {rate:.0f} images/s  {clock(left)} left"
        self.display.show("progress", line, **self.values, images=self.done, of=self.total, images_per_s=rate,
                          left_s=left, **numbers)  # fmt: skip


def clock(seconds: float | None) -> str:
    """Return a duration as ``12:05`` or ``3:12:05``."""
    return "?" if seconds is None else tqdm.format_interval(seconds)


def progress_text(means: dict[str, Any]) -> str:
    """Return the means of an epoch so far in short."""
    text = f"loss {means['loss']:.3f}, acc {means['accuracy']:.1%}"
    return text if means["free_residual"] is None else f"{text}, residual {means['free_residual']:.1e}"


def epoch_text(record: dict[str, Any], epochs: int, left_s: float) -> str:
    """Return the line that sums up an epoch, of `epochs`; `left_s` is how many seconds the rest will take."""
    splits = [split for split in ("train", "validation", "test") if record[f"{split}_loss"] is not None]
    losses = [f"{s} loss {record[f'{s}_loss']:.4f}  acc {record[f'{s}_accuracy']:6.2%}" for s in splits]
    residual = [] if record["free_residual"] is None else [f"residual {record['free_residual']:.1e}"]
    number = f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}"
    left = [f"{clock(left_s)} left"] if record["epoch"] < epochs else []
    return "  ".join([number, *losses, *residual, f"{record['images_per_s']:.0f} images/s", *left])


#: The displays by name, as the option ``--log-format`` takes them.
DISPLAYS: dict[str, type[Display]] = {"text": Display, "json": JsonDisplay}
