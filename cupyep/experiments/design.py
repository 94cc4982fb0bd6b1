"""What an experiment is: a claim, rows of settings, seeds, and what is made of the figures of every cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.errors import require
from cupyep.training.config import MACHINE, OPTIONS

SCALES = ("small", "medium", "full")
#: Options that say which images are seen, how and how often: rows of one table share them.
SEEN = tuple(name for name, spec in OPTIONS.items() if spec.metadata["group"] == "Data" and name not in MACHINE)
SEEN += ("epochs",)
WORK = "work"  # folder of a report folder with a folder a cell, of its run

Value = Callable[[Mapping[str, Any]], float | None]  # of what a cell measured; None where it has none


@dataclass(frozen=True)
class Row:
    """One line of a table: a setting that is measured once a seed.

    `key` names its folders and its entries in results.json, `label` is what a reader sees, `options` are those of
    `TrainConfig` but for the seed, `published` holds figures by column, and `source` says where. `beside` is the key of
    the row of BP that it is compared with, and `tuning` says how its learning rate was found.
    """

    key: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    beside: str = ""
    tuning: str = ""


@dataclass(frozen=True)
class Cell:
    """One row with one seed: what a measurement gets.

    `options` are those of row and command, and the seed; `out` is the report folder; `report` takes lines that say what
    is going on; `deadline` raises `OutOfTime` when the time is used up, and is asked after every batch of a training.
    """

    row: Row
    seed: int
    options: dict[str, Any]
    out: Path
    report: Callable[[str], None]
    quiet: bool
    deadline: Callable[[], None]

    @property
    def name(self) -> str:
        """What it is called in results.json."""
        return cell_name(self.row.key, self.seed)

    @property
    def place(self) -> str:
        """What its files are called."""
        return f"{self.row.key}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the measurement keeps what it needs to go on later; made when first used.

        Of a training it is the run directory; one of ``cupyep train`` with the same options may be put there.
        """
        return self.out / WORK / self.place


@dataclass(frozen=True)
class Column:
    """A column of the table: its title, what it shows of a cell, and the format of mean and standard deviation."""

    title: str
    value: Value
    form: str = ".3f"


def seen(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the values of `SEEN` in the options of a cell, those that are not given by their defaults."""
    return tuple(options.get(name, OPTIONS[name].default) for name in SEEN)


def cell_name(key: str, seed: int) -> str:
    return f"{key}/{seed}"


class Results:
    """What was measured: `cells` holds it by ``"row/seed"``, as results.json does; `seeds` were asked for."""

    def __init__(self, rows: Sequence[Row], cells: Mapping[str, Mapping[str, Any]], seeds: int):
        self.rows = list(rows)
        self.cells = dict(cells)
        self.seeds = seeds

    def of(self, key: str) -> list[Mapping[str, Any]]:
        """Return the measured cells of a row, by seed."""
        return [self.cells[name] for seed in range(self.seeds) if (name := cell_name(key, seed)) in self.cells]

    def values(self, key: str, value: Value) -> np.ndarray:
        """Return `value` of every measured cell of a row, those without one left out."""
        found = (value(cell) for cell in self.of(key))
        return np.array([number for number in found if number is not None], float)

    def mean(self, key: str, value: Value) -> float:
        """Return the mean over the seeds, NaN where nothing was measured."""
        values = self.values(key, value)
        return float(values.mean()) if len(values) else float("nan")

    @property
    def complete(self) -> bool:
        """Whether every cell was measured."""
        return len(self.cells) == len(self.rows) * self.seeds


@dataclass(frozen=True)
class Scale:
    """An experiment at one size: its setting for the reader, its rows, and the seeds where no number is asked for."""

    setting: str
    rows: Sequence[Row]
    seeds: int


@dataclass(frozen=True)
class Experiment:
    """A claim of the paper, or of this project, and how it is put to the test.

    `measure` takes a `Cell` and returns plain numbers, texts and lists; of `Results`, each of `figures` (file name ->
    function) draws a figure and `verdict` makes a sentence. `claim` names its source, `remarks` is Markdown.
    """

    name: str
    title: str
    claim: str
    scales: Mapping[str, Scale]
    measure: Callable[[Cell], dict[str, Any]]
    columns: Sequence[Column]
    figures: Mapping[str, Callable[[Results], Any]]
    verdict: Callable[[Results], str]
    remarks: str = ""

    def at(self, scale: str) -> Scale:
        """Return the experiment at a scale; `ConfigurationError` if it has none of that name."""
        require(
            scale in self.scales, f"experiment '{self.name}' has no scale '{scale}', only {' and '.join(self.scales)}"
        )
        return self.scales[scale]
