"""The run directory: config.toml, metrics.jsonl, checkpoint.h5, best.h5.

An epoch is committed in this order: its line in metrics.jsonl, best.h5 if it was the best, checkpoint.h5. A run that
dies in between is resumed from the last checkpoint; what metrics.jsonl holds beyond it is dropped and the epoch done
again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cupyep._version import __version__
from cupyep.errors import CheckpointError, ConfigurationError, require
from cupyep.training.checkpoint import Checkpoint, can_write, load_checkpoint, replacing, save_checkpoint
from cupyep.training.config import TrainConfig, make_config, read_toml

CONFIG, METRICS, CHECKPOINT, BEST = "config.toml", "metrics.jsonl", "checkpoint.h5", "best.h5"
CHECKPOINT_FILES = {"last": CHECKPOINT, "best": BEST}


class RunDirectory:
    """One run's files; made by `create` or `open`.

    Attributes
    ----------
    path : Path
    config : TrainConfig
    """

    def __init__(self, path: Path, config: TrainConfig):
        self.path = path
        self.config = config

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> RunDirectory:
        """Make the folder and write config.toml.

        Raises
        ------
        CheckpointError
            If the folder holds another run or other files, or cannot be written.
        """
        path = check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            directory = cls(path, config)
            directory.write_config()
            (path / METRICS).touch()
        except OSError as error:
            raise CheckpointError(f"cannot write run directory '{path}': {error.strerror}") from error
        return directory

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Open the directory of an earlier run.

        Raises
        ------
        CheckpointError
            If there is no run at `path`.
        ConfigurationError
            If its config.toml is damaged.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"'{path}' is not a run directory: it has no {CONFIG}")
        values = read_toml(path / CONFIG)
        try:
            return cls(path, make_config(values))
        except ConfigurationError as error:
            raise ConfigurationError(f"'{path / CONFIG}': {error}") from error

    def write_config(self) -> None:
        """Write config.toml atomically."""
        with replacing(self.path / CONFIG) as temporary:
            text = f"# Written by cupyep {__version__}: every option of this run.\n{self.config.to_toml()}"
            temporary.write_text(text, encoding="utf-8")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, one an epoch; a last line that was cut off is left out.

        Raises
        ------
        CheckpointError
            If another line is not a JSON object, or the file cannot be read.
        """
        path = self.path / METRICS
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        except OSError as error:
            raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                records.append({**record, "epoch": int(record["epoch"])})
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                if number == len(lines):
                    break
                raise CheckpointError(f"'{path}' line {number} is not a record of an epoch") from error
        return records

    def commit(self, record: dict[str, Any], checkpoint: Checkpoint, is_best: bool) -> None:
        """Write one finished epoch: its metrics, best.h5 if `is_best`, then checkpoint.h5.

        Raises
        ------
        CheckpointError
            If a file cannot be written (the disk is full, for example).
        """
        try:
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write '{self.path / METRICS}': {error.strerror}") from error
        if is_best:
            save_checkpoint(self.path / BEST, checkpoint)
        save_checkpoint(self.path / CHECKPOINT, checkpoint)

    def load(self, which: str = "last") -> Checkpoint:
        """Return the checkpoint ``"last"`` or ``"best"``; see `load_checkpoint` for the errors."""
        require(which in CHECKPOINT_FILES, f"checkpoint must be one of {', '.join(CHECKPOINT_FILES)} (got '{which}')")
        return load_checkpoint(self.path / CHECKPOINT_FILES[which])

    def rewind(self) -> tuple[Checkpoint | None, float]:
        """Go back to the last checkpoint: drop the metrics of later, unfinished epochs.

        Returns
        -------
        checkpoint : Checkpoint or None
            None if the run ended before its first one; it then starts anew.
        elapsed : float
            Seconds that the finished epochs took.

        Raises
        ------
        CheckpointError
            If the checkpoint is damaged, or metrics.jsonl lacks epochs that it has done, or the folder cannot be
            written.
        """
        _require_writable(self.path)
        has_checkpoint = (self.path / CHECKPOINT).exists()
        checkpoint = self.load("last") if has_checkpoint else None
        done = checkpoint.epoch if checkpoint else 0
        records = [record for record in self.metrics() if record["epoch"] <= done]
        if [record["epoch"] for record in records] != list(range(1, done + 1)):
            raise CheckpointError(f"'{self.path / METRICS}' does not hold the epochs 1 to {done} of {CHECKPOINT}")
        with replacing(self.path / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return checkpoint, float(records[-1]["elapsed_s"]) if records else 0.0


def check_free(path: str | Path) -> Path:
    """Return `path` if a new run can be written there, else raise `CheckpointError`."""
    path = Path(path)
    if (path / CONFIG).exists() or (path / CHECKPOINT).exists():
        raise CheckpointError(f"'{path}' holds another run; continue it with --resume or choose another --run-dir")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"'{path}' exists and is not an empty folder; choose another --run-dir")
    _require_writable(path)
    return path


def _require_writable(path: Path) -> None:
    if not can_write(path):
        raise CheckpointError(f"cannot write run directory '{path}': no permission, or a file on the way to it")


def default_path(config: TrainConfig, root: str | Path = "runs") -> Path:
    """Return ``runs/<arch>-<aug>-<dataset>-seed<seed>``, with ``-2``, ``-3``, ... behind it if that is taken."""
    base = Path(root) / f"{config.arch}-{config.aug}-{config.dataset}-seed{config.seed}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path
