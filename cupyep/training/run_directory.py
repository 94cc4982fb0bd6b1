"""The run directory: config.toml, metrics.jsonl, settling.json, checkpoint.h5, checkpoint.previous.h5, best.h5.

An epoch is committed in this order: its line in metrics.jsonl, best.h5 if it was the best, checkpoint.h5. A run that
dies in between is resumed from the last checkpoint; what metrics.jsonl holds beyond it is dropped and done again.
checkpoint.previous.h5 is the last checkpoint but one that stood between two epochs: the way back when checkpoint.h5 is
damaged. Every file is replaced as a whole, and only one process at a time writes in the folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cupyep._version import __version__
from cupyep.data.sources import short_name
from cupyep.diagnostics.checkup import check_trace
from cupyep.errors import CheckpointError, ConfigurationError, choose, is_number, reporting
from cupyep.files import FolderLock, can_write, is_leftover, read_json, read_text, remove_leftovers, write_file
from cupyep.models import slug
from cupyep.persistence.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cupyep.training.config import WRITTEN, TrainConfig, make_config, read_toml

CONFIG, METRICS, SETTLING = "config.toml", "metrics.jsonl", "settling.json"
METRICS_BYTES = 1 << 28  # at most
COURSES = [f"{split}_{what}" for split in ("train", "validation", "test") for what in ("loss", "accuracy")]
COURSES += ["elapsed_s"]
CHECKPOINT, PREVIOUS, BEST = "checkpoint.h5", "checkpoint.previous.h5", "best.h5"
CHECKPOINT_FILES = {"last": CHECKPOINT, "previous": PREVIOUS, "best": BEST}


class RunDirectory:
    """One run's files; made by `create` or `open`."""

    def __init__(self, path: Path, config: TrainConfig):
        self.path = path
        self.config = config
        self._lock = FolderLock(path)
        self._worth_keeping = False  # whether checkpoint.h5 would do as checkpoint.previous.h5

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> RunDirectory:
        """Make the folder and write config.toml; `CheckpointError` if it holds other files, or cannot be written."""
        path = check_free(path)
        with reporting(CheckpointError, f"cannot write run directory '{path}'"):
            path.mkdir(parents=True, exist_ok=True)  # empty, it may be there; the lock decides between several
            directory = cls(path, config)
            with directory.locked():
                check_free(path)  # again: another process may have come first
                write_file(path / METRICS, b"")
                directory.write_config()
        return directory

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Open the directory of an earlier run.

        `CheckpointError` if there is no run at `path`, `ConfigurationError` if its config.toml is damaged.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"'{path}' is not a run directory: it has no {CONFIG}")
        values = read_toml(path / CONFIG)
        try:
            return cls(path, make_config(values))
        except ConfigurationError as error:
            raise ConfigurationError(f"'{path / CONFIG}': {error}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here; see `lock`."""
        self.lock()
        try:
            yield
        finally:
            self.unlock()

    def lock(self) -> None:
        """Keep other processes from writing here until `unlock`; nothing happens if this object holds the lock.

        `CheckpointError` if another process writes here.
        """
        with reporting(CheckpointError, f"cannot write run directory '{self.path}'"):
            holder = self._lock.acquire()
        if holder:
            raise CheckpointError(f"'{self.path}' is in use by {holder}; wait for it or choose another folder")

    def unlock(self) -> None:
        """Let other processes write here."""
        self._lock.release()

    def write_config(self) -> None:
        """Write config.toml."""
        text = f"{WRITTEN} {__version__}: every option of this run.\n{self.config.to_toml()}"
        self._write(CONFIG, text)

    def _write(self, name: str, text: str) -> None:
        with reporting(CheckpointError, f"cannot write '{self.path / name}'"):
            write_file(self.path / name, text.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, one an epoch; a last line that was cut off is left out.

        `CheckpointError` if another line is not a JSON object, or the file cannot be read.
        """
        path, lines = self.path / METRICS, self._read_metrics().splitlines()
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(_record(line))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                if number == len(lines):
                    break
                raise CheckpointError(
                    f"'{path}' line {number} is not a record of an epoch; restore that line, or start a new run"
                ) from error
        return records

    def _read_metrics(self) -> str:
        path = self.path / METRICS
        with reporting(CheckpointError, f"cannot read '{path}'"):
            return read_text(path, METRICS_BYTES, errors="replace") if path.is_file() else ""

    def commit(self, record: dict[str, Any], checkpoint: Checkpoint, is_best: bool) -> None:
        """Write one finished epoch: its metrics, best.h5 if `is_best`, then checkpoint.h5.

        `CheckpointError` if a file cannot be written (the disk is full, for example); the others are whole.
        """
        self._write(METRICS, self._read_metrics() + _line(record))
        if is_best:
            save_checkpoint(self.path / BEST, checkpoint)
        self.save(checkpoint)

    def write_settling(self, trace: dict[str, Any]) -> None:
        """Write settling.json: how the phases of the last epoch settled (`cupyep.diagnostics.checkup`)."""
        self._write(SETTLING, json.dumps(trace, allow_nan=False) + "\n")

    def settling(self) -> dict[str, Any] | None:
        """Return what settling.json holds, None if there is none; `CheckpointError` if it is damaged."""
        path = self.path / SETTLING
        try:
            return check_trace(read_json(path, METRICS_BYTES)) if path.is_file() else None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"'{path}' is damaged, no record of settling ({error}); remove it") from error

    def save(self, checkpoint: Checkpoint) -> None:
        """Write checkpoint.h5; the old one becomes checkpoint.previous.h5 if it stood between two epochs."""
        keep_as = self.path / PREVIOUS if self._worth_keeping else None
        save_checkpoint(self.path / CHECKPOINT, checkpoint, keep_as)
        self._worth_keeping = checkpoint.batch == 0

    def load(self, which: str = "last") -> Checkpoint:
        """Return the checkpoint ``"last"``, ``"previous"`` or ``"best"``; see `load_checkpoint` for the errors."""
        choose("checkpoint", which, CHECKPOINT_FILES)
        try:
            return load_checkpoint(self.path / CHECKPOINT_FILES[which])
        except CheckpointError as error:
            there = [name for name, file in CHECKPOINT_FILES.items() if name != which and (self.path / file).is_file()]
            hint = f"; there is --checkpoint {' or '.join(there)}" if there else ""
            raise CheckpointError(f"{error}{hint}") from error

    def epoch_start(self) -> tuple[Path, Checkpoint]:
        """Return path and content of the last checkpoint that stood between two epochs."""
        path = self.path / (CHECKPOINT if self._worth_keeping else PREVIOUS)
        return path, load_checkpoint(path)

    def rewind(self, check: Callable[[Path, Checkpoint], None]) -> tuple[Path, Checkpoint | None, str]:
        """Go back to the last checkpoint; the caller holds the lock.

        Drops the metrics of epochs that it has not done, and what killed processes left behind. `check` takes path and
        checkpoint, and raises `CheckpointError` if it does not belong to this run.

        Returns the path of the checkpoint, checkpoint.previous.h5 if checkpoint.h5 is of no use; its content, None if
        the run ended before its first checkpoint; and what is wrong with checkpoint.h5, or an empty text.
        `CheckpointError` if no checkpoint is of use, metrics.jsonl lacks epochs that it has done, or the folder cannot
        be written.
        """
        _require_writable(self.path)
        path, checkpoint, problem = self._last_of_use(check)
        done = checkpoint.epoch if checkpoint else 0
        records = self.metrics()
        if records and checkpoint is None:
            raise CheckpointError(f"'{self.path}' has no {CHECKPOINT} to go on from, though epochs have been done")
        records = [record for record in records if record["epoch"] <= done]
        if len(records) != done or any(record["epoch"] != n for n, record in enumerate(records, start=1)):
            raise CheckpointError(f"'{self.path / METRICS}' does not hold the epochs 1 to {done} of {CHECKPOINT}")
        remove_leftovers(self.path)
        self._write(METRICS, "".join(map(_line, records)))
        self._worth_keeping = checkpoint is not None and checkpoint.batch == 0 and not problem
        return path, checkpoint, problem

    def _last_of_use(self, check: Callable[[Path, Checkpoint], None]) -> tuple[Path, Checkpoint | None, str]:
        paths = [self.path / name for name in (CHECKPOINT, PREVIOUS)]
        problems = []
        for path in paths:
            try:
                checkpoint = load_checkpoint(path)
                check(path, checkpoint)
            except CheckpointError as error:
                problems.append(error)
            else:
                return path, checkpoint, str(problems[0]) if problems else ""
        for path, problem in zip(paths, problems, strict=True):
            if path.exists():
                raise CheckpointError(f"{problem}; there is no other to go on from, start a new run") from problem
        return paths[0], None, ""


def check_free(path: str | Path) -> Path:
    """Return `path` if a new run can be written there, else raise `CheckpointError`."""
    path = Path(path)
    if (path / CONFIG).exists():
        raise CheckpointError(f"'{path}' holds another run; resume that or choose another folder")
    if (path / CHECKPOINT).exists():
        raise CheckpointError(
            f"'{path}' holds a {CHECKPOINT} without its {CONFIG}; bring that back or choose another folder"
        )
    if path.exists() and (not path.is_dir() or not all(map(is_leftover, path.iterdir()))):
        raise CheckpointError(f"'{path}' exists and is not an empty folder; choose another one")
    _require_writable(path)
    return path


def _record(line: str) -> dict[str, Any]:
    record = json.loads(line)
    if type(record["epoch"]) is not int:
        raise TypeError("an epoch is an integer")
    if not all(is_number(record[name]) for name in COURSES if record.get(name) is not None):
        raise TypeError("courses are numbers")
    return record


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _require_writable(path: Path) -> None:
    if not can_write(path):
        raise CheckpointError(f"cannot write run directory '{path}': no permission, or a file on the way to it")


def default_path(config: TrainConfig, root: str | Path = "runs") -> Path:
    """Return ``runs/<arch>-<aug>-<dataset>-seed<seed>``, with ``-2``, ``-3``, ... behind it if that is taken."""
    return next(path for path in _numbered(config, root) if not path.exists())


def claim_path(config: TrainConfig, root: str | Path = "runs") -> Path:
    """Make the folder that `default_path` names and return it; of several processes each gets one of its own."""
    for path in _numbered(config, root):
        with reporting(CheckpointError, f"cannot write run directory '{path}'"), contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            break
    return path


def _numbered(config: TrainConfig, root: str | Path) -> Iterator[Path]:
    base = Path(root) / f"{slug(config.arch)}-{config.aug}-{slug(short_name(config.dataset))}-seed{config.seed}"
    yield base
    yield from (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))
