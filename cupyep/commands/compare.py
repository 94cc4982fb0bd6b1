"""Runs side by side: the options in which they differ, and what they came to."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupyep.diagnostics.rules import is_settled
from cupyep.errors import choose
from cupyep.files import write_file
from cupyep.training.config import OPTIONS
from cupyep.training.run_directory import RunDirectory

#: What a run came to -> how the table shows it; accuracies are those of the test images.
MEASURES = {
    "done": "{}",
    "epochs": "{}",
    "best_accuracy": "{:.2%}",
    "best_epoch": "{}",
    "last_accuracy": "{:.2%}",
    "train_loss": "{:.4f}",
    "test_loss": "{:.4f}",
    "minutes": "{:.1f}",
    "settled": "{}",
}
LARGEST_FIRST = ("best_accuracy", "last_accuracy")
COLUMNS = (*MEASURES, *(name for name in OPTIONS if name not in MEASURES))
SHOWN = 24  # characters of a value in the table


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns."""

    options: list[str]  # options that differ between the runs, in the order of ``--help-all``
    # a run each: ``run`` (its name), ``path``, all options, and `MEASURES`, None where there is nothing to say
    rows: list[dict[str, Any]]

    def sorted(self, column: str) -> Comparison:
        """Return the same by a column: the best accuracy first, the least of everything else; unknown values last."""
        choose("column", column, COLUMNS)
        known = [row for row in self.rows if row[column] is not None]
        known.sort(key=lambda row: _rank(row[column]), reverse=column in LARGEST_FIRST)
        return Comparison(self.options, known + [row for row in self.rows if row[column] is None])

    def lines(self) -> list[str]:
        """Return the table as lines of text, columns aligned."""
        names = ("run", *self.options, *MEASURES)
        table = [names, *([_text(name, row[name]) for name in names] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
                for line in table]  # fmt: skip

    def write_csv(self, path: Path) -> None:
        """Write the table, numbers as metrics.jsonl has them (accuracies are fractions), what is not known empty."""
        names = ("run", "path", *self.options, *MEASURES)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([names, *([_plain(row[name]) for name in names] for row in self.rows)])
        write_file(path, text.getvalue().encode(errors="backslashreplace"))


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare the runs in some directories, finished or not.

    `CheckpointError` or `ConfigurationError` if there is no run at a path, or its files are damaged.
    """
    runs = [RunDirectory.open(path) for path in paths]
    names = run_names(paths)
    rows = [
        {**vars(run.config), **measures(run.metrics()), "epochs": run.config.epochs, "run": name, "path": str(run.path)}
        for name, run in zip(names, runs, strict=True)
    ]
    values = {name: {json.dumps(row[name]) for row in rows} for name in COLUMNS}
    return Comparison([name for name in OPTIONS if name not in MEASURES and len(values[name]) > 1], rows)


def measures(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the `MEASURES` but for ``epochs``, which no record knows, of the records of a run."""
    last = records[-1] if records else {}
    best = best_record(records) or {}
    return {
        "done": last.get("epoch", 0),
        "best_accuracy": best.get("test_accuracy"),
        "best_epoch": best.get("epoch"),
        "last_accuracy": last.get("test_accuracy"),
        "train_loss": last.get("train_loss"),
        "test_loss": last.get("test_loss"),
        "minutes": None if last.get("elapsed_s") is None else last["elapsed_s"] / 60,
        "settled": is_settled(last),
    }


def best_record(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the record of the epoch that best.h5 is of: chosen by validation images where there are some."""
    split = "test" if any(r.get("validation_accuracy") is None for r in records) else "validation"
    judged = [record for record in records if record.get(f"{split}_accuracy") is not None]
    return max(judged, key=lambda record: record[f"{split}_accuracy"], default=None)  # the first of equals


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return a short name a run, different ones for different paths."""
    names = [path.resolve().name for path in paths]
    longer = [f"{path.resolve().parent.name}-{path.resolve().name}" for path in paths]
    names = [longer[k] if names.count(name) > 1 else name for k, name in enumerate(names)]
    return [name if names.count(name) == 1 else f"{name}-{k + 1}" for k, name in enumerate(names)]


def _rank(value: Any) -> tuple[bool, Any]:
    """Return what values of a column are sorted by: numbers before texts and lists of numbers."""
    return (False, value) if isinstance(value, (int, float)) else (True, str(value))


def _plain(value: Any) -> Any:
    """Return a value as a cell of a CSV file, and as one writes it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _text(name: str, value: Any) -> str:
    if name in MEASURES:
        words = {None: "-", True: "yes", False: "no"}
        return words[value] if value is None or name == "settled" else MEASURES[name].format(value)
    text = "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(_plain(value))
    return text if name == "run" or len(text) <= SHOWN else f"{text[:SHOWN]}..."
