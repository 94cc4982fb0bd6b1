"""What an experiment is: a claim, rows of settings, seeds, and what is made of the figures of every cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.training.config import TrainConfig

SCALES = ("small", "full")


@dataclass(frozen=True)
class Row:
    """One line of a table: a setting that is measured once a seed.

    Attributes
    ----------
    key : str
        Name of its folders and of its entries in results.json.
    label : str
        What a reader sees.
    options : mapping
        Options that differ from the experiment's `base` (those of `TrainConfig`, or of the measurement).
    published : mapping
        Column -> published figure; `source` says where.
    source : str
    """

    key: str
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Cell:
    """One row with one seed: what a measurement gets.

    Attributes
    ----------
    row : Row
    seed : int
    options : dict
        Base, row and seed together.
    out : Path
        The report folder.
    report : callable
        Takes lines that say what is going on.
    quiet : bool
    deadline : callable
        Raises `OutOfTime` when the time is used up; asked after every batch of a training, too.
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
        """Where the measurement may keep what it needs to go on later; made when first used."""
        return self.out / "work" / self.place


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes
    ----------
    title : str
    value : callable
        Takes what a cell measured and returns a number, or None where it has none.
    form : str
        Format of mean and standard deviation.
    """

    title: str
    value: Callable[[Mapping[str, Any]], float | None]
    form: str = ".3f"


#: Options that say which images are seen, how and how often: rows of one table share them.
SEEN = ("dataset", "image_size", "limit_train", "limit_test", "epochs", "crop", "flip")


def seen(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the values of `SEEN` in the options of a cell, those that are not given by their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    return tuple(options.get(name, defaults[name]) for name in SEEN)


class Results:
    """What was measured: cells by row and seed, read from results.json.

    Parameters
    ----------
    rows : sequence of Row
    cells : mapping
        ``"row/seed"`` -> what the cell measured.
    seeds : int
        How many seeds were asked for.
    """

    def __init__(self, rows: Sequence[Row], cells: Mapping[str, Mapping[str, Any]], seeds: int):
        self.rows = list(rows)
        self.cells = dict(cells)
        self.seeds = seeds

    def of(self, key: str) -> list[Mapping[str, Any]]:
        """Return the measured cells of a row, by seed."""
        return [self.cells[name] for seed in range(self.seeds) if (name := cell_name(key, seed)) in self.cells]

    def values(self, key: str, value: Callable[[Mapping[str, Any]], float | None]) -> np.ndarray:
        """Return `value` of every measured cell of a row, those without one left out."""
        found = (value(cell) for cell in self.of(key))
        return np.array([number for number in found if number is not None], float)

    def mean(self, key: str, value: Callable[[Mapping[str, Any]], float | None]) -> float:
        """Return the mean over the seeds, NaN where nothing was measured."""
        values = self.values(key, value)
        return float(values.mean()) if len(values) else float("nan")

    @property
    def complete(self) -> bool:
        """Whether every cell was measured."""
        return len(self.cells) == len(self.rows) * self.seeds


def cell_name(key: str, seed: int) -> str:
    return f"{key}/{seed}"


@dataclass(frozen=True)
class Experiment:
    """A claim of the paper, or of this project, and how it is put to the test.

    Attributes
    ----------
    name, title : str
    claim : str
        In a sentence or two, with its source.
    setting : mapping of str to str
        Scale -> what is trained on what, for the reader.
    base : mapping of str to mapping
        Scale -> options that all rows share.
    rows : mapping of str to sequence of Row
        Scale -> rows.
    seeds : mapping of str to int
        Scale -> number of seeds where none is asked for.
    measure : callable
        Takes a `Cell`, returns plain numbers, texts and lists.
    columns : sequence of Column
    figures : mapping
        File name -> function that draws `Results` and returns a figure.
    verdict : callable
        `Results` -> one sentence.
    remarks : str
        What the reader should know besides; Markdown.
    """

    name: str
    title: str
    claim: str
    setting: Mapping[str, str]
    base: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, Sequence[Row]]
    seeds: Mapping[str, int]
    measure: Callable[[Cell], dict[str, Any]]
    columns: Sequence[Column]
    figures: Mapping[str, Callable[[Results], Any]]
    verdict: Callable[[Results], str]
    remarks: str = ""
