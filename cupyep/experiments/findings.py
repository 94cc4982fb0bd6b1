"""What is read out of measured cells: the columns of tables, and verdicts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from cupyep.errors import choose
from cupyep.experiments.cells import FORMS, STEPS
from cupyep.experiments.design import Column, Results, Row, Value

TARGET = 0.35  # test accuracy whose cost is asked for
FAILED = {"loss": math.inf, "accuracy": 0.0}  # what verdicts take a row for that has no such figure
Cell = Mapping[str, Any]


def at(*path: str | int, times: float = 1.0) -> Value:
    """Return the function that follows `path` into a cell, to a number that it multiplies, or to the lowest of a list.

    It returns None where there is none: in a cell that failed, of layers that have no cosine.
    """

    def value(cell: Cell) -> float | None:
        found: Any = cell
        for step in path:
            try:
                found = found[step]
            except (KeyError, IndexError):
                return None
        if isinstance(found, list):
            found = min((number for number in found if number is not None), default=None)
        return None if found is None else found * times

    return value


def first_over_last_layer(cell: Cell) -> float | None:
    """Return the first layer's nudge response after the last epoch, over that of the last layer."""
    last = at("nudge_response", -1, -1)(cell)
    return cell["nudge_response"][-1][0] / last if last else None


def epochs_to_target(cell: Cell) -> int | None:
    """Return the first epoch after which the test accuracy was `TARGET` or more, None if none was."""
    course = cell.get("test_accuracy", [])
    return next((epoch for epoch, accuracy in enumerate(course, 1) if accuracy >= TARGET), None)


def minutes_to_target(cell: Cell) -> float | None:
    epoch = epochs_to_target(cell)
    return None if epoch is None else cell["elapsed_minutes"][epoch - 1]


def operations_to_target(cell: Cell) -> float | None:
    """Return the operations of all products until `TARGET` was reached, in units of 10^12."""
    epoch = epochs_to_target(cell)
    return None if epoch is None else math.fsum(probe["operations"] for probe in cell["probes"][:epoch]) / 1e12


def bptt_over_ep(cell: Cell) -> float:
    """Return what was planned for BPTT in terms of EP's, for the largest T."""
    return cell["planned"]["bptt"][-1] / cell["planned"]["ep"][-1]


def plan_off(cell: Cell) -> float | None:
    """Return by how much any plan differs from its measurement at most, in percent; None where none was made."""
    measured = [value for values in cell["measured"].values() for value in values]
    planned = [value for algorithm in cell["measured"] for value in cell["planned"][algorithm]]
    return max((100 * abs(p / m - 1) for p, m in zip(planned, measured, strict=True)), default=None)


#: What an experiment's file may name as a column.
COLUMNS: dict[str, Column] = {
    "loss": Column("training loss", at("train_loss", -1)),
    "accuracy": Column("test accuracy, %", at("test_accuracy", -1, times=100), ".1f"),
    "minutes": Column("minutes", at("minutes"), ".1f"),
    "free_residual": Column("free residual", at("free_residual"), ".1e"),
    "response": Column("response, first / last layer", first_over_last_layer, ".1e"),
    "cosine_bptt": Column("lowest cosine with BPTT", at("probes", -1, "bptt")),
    "cosine_bptt_trained": Column("lowest cosine with BPTT, trained", at("probes", -1, "bptt")),
    "cosine_bp": Column("lowest cosine with BP", at("probes", -1, "bp")),
    "fidelity_deviation": Column("lowest cosine, deviation", at("deviation", "cosine"), ".4f"),
    "fidelity_classical": Column("lowest cosine, classical", at("classical", "cosine")),
    "epochs_to_target": Column(f"epochs to {TARGET:.0%}", epochs_to_target, ".1f"),
    "minutes_to_target": Column("minutes", minutes_to_target, ".2f"),
    "operations_to_target": Column("10^12 operations", operations_to_target, ".2f"),
    "ep_mb": Column("EP, MB", at("planned", "ep", -1, times=1e-6), ".1f"),
    "bptt_10_mb": Column("BPTT, T = 10, MB", at("planned", "bptt", 0, times=1e-6), ".1f"),
    "bptt_50_mb": Column("BPTT, T = 50, MB", at("planned", "bptt", 1, times=1e-6), ".1f"),
    "bptt_250_mb": Column("BPTT, T = 250, MB", at("planned", "bptt", 2, times=1e-6), ".1f"),
    "bp_mb": Column("BP, MB", at("planned", "bp", -1, times=1e-6), ".1f"),
    "bptt_over_ep": Column(f"BPTT / EP, T = {STEPS[-1]}", bptt_over_ep, ".1f"),
    "plan_off": Column("plan off by at most, %", plan_off, ".1f"),
}


class Finding:
    """A row as verdicts see it: means of columns as attributes; its label, and that up to and after its last comma."""

    def __init__(self, results: Results, row: Row):
        self.results, self.row, self.label = results, row, row.label
        self.head, _, self.tail = row.label.rpartition(", ")

    def __getattr__(self, column: str) -> float:
        value = self.results.mean(self.row.key, COLUMNS[choose("column", column, COLUMNS)].value)
        return FAILED.get(column, value) if math.isnan(value) else value

    @property
    def spread(self) -> float:
        """Standard deviation of the test accuracy over the seeds."""
        values = self.results.values(self.row.key, COLUMNS["accuracy"].value)
        return float(values.std(ddof=1)) if len(values) > 1 else 0.0

    @property
    def precision(self) -> str:
        """Number format that the cells were measured in."""
        formats = (cell["options"].get("precision") for cell in self.results.of(self.row.key) if "options" in cell)
        return next(formats, None) or "float32"


class _Pick:
    """Looked up by a pattern, gives the first row of those whose whole key it matches, by a rank."""

    def __init__(self, rows: Mapping[str, Finding], rank: Callable[[Finding], float]):
        self.rows, self.rank = rows, rank

    def __getitem__(self, pattern: str) -> Finding:
        return min((row for key, row in self.rows.items() if re.fullmatch(pattern, key)), key=self.rank)


class _Fields(dict):
    """What a verdict's template may name: what is given, and the words that are made of the results."""

    def __missing__(self, name: str) -> str:
        return WORDS[choose("word", name, WORDS)](self["rows"])


def verdict(template: str, results: Results) -> str:
    """Return the verdict on complete results.

    Parameters
    ----------
    template : str
        As `str.format` takes it. ``{rows[KEY].loss:.2f}`` is a column of a row (see `Finding`);
        ``{lowest[PATTERN].label}`` is that of the row with the lowest training loss of those whose key the regular
        expression matches, likewise ``highest``, and ``best`` and ``worst`` by test accuracy; any other name is one of
        `WORDS`.
    """
    rows = {row.key: Finding(results, row) for row in results.rows}
    ranks: dict[str, Callable[[Finding], float]] = {
        "lowest": lambda row: row.loss,
        "highest": lambda row: -row.loss,
        "best": lambda row: -row.accuracy,
        "worst": lambda row: row.accuracy,
    }
    return template.format_map(_Fields({name: _Pick(rows, rank) for name, rank in ranks.items()}, rows=rows))


Rows = Mapping[str, Finding]


def _stuck(rows: Rows) -> str:
    return "stays at chance" if abs(rows["none"].loss - math.log(10)) < 0.1 else "moves"


def _reaches(rows: Rows) -> str:
    bp, best = rows["vgg11-bp"], _Pick(rows, lambda row: -row.accuracy)["vgg11-.*(1|3)"]
    return "reaches" if best.accuracy >= bp.accuracy - max(bp.spread, 1.0) else "does not reach"


def _as_good(rows: Rows) -> str:
    pairs = [(row, rows[key.replace("deviation", "classical")]) for key, row in rows.items() if "deviation" in key]
    better = all(deviation.loss <= classical.loss + 0.02 for deviation, classical in pairs)
    return "at least as good as" if better else "not always as good as"


def _caution(rows: Rows) -> str:
    chance = 1.0 if rows["kd"].row.options["dataset"] == "cifar100" else 10.0
    near = max(row.accuracy for row in rows.values()) < 2 * chance
    return f"Nothing gets far from chance ({chance:.0f} %) here, so this is no ranking: " if near else ""


def _fidelity_verdict(rows: Rows) -> str:
    parts = []
    for beta in dict.fromkeys(row.row.options["beta"] for row in rows.values()):
        of_beta = [row for row in rows.values() if row.row.options["beta"] == beta]
        deviation, classical = (min(getattr(row, f"fidelity_{form}") for row in of_beta) for form in reversed(FORMS))
        parts.append(f"{beta:g}: {deviation:.4f} and {classical:.3f}")
    return f"Lowest cosine with BPTT of any layer and row, deviation and classical form, by beta: {'; '.join(parts)}."


def _memory_verdict(rows: Rows) -> str:
    flat = all(len(set(cell["planned"]["ep"])) == 1 for row in rows.values() for cell in row.results.of(row.row.key))
    ratios, deepest = [row.bptt_over_ep for row in rows.values()], [*rows.values()][-1]
    off = [row.plan_off for row in rows.values() if not math.isnan(row.plan_off)]
    return (
        f"EP takes {'the same for every T' if flat else 'more for larger T'}, {deepest.ep_mb:.0f} MB in "
        f"{deepest.label}; BPTT over {STEPS[-1]} steps {min(ratios):.1f} to {max(ratios):.1f} times as much."
    ) + (f" Plans and measurements differ by at most {max(off):.1f} %." if off else "")


def _cost_verdict(rows: Rows) -> str:
    minutes = {row.label: row.minutes_to_target for row in rows.values()}
    missed = [label for label, value in minutes.items() if math.isnan(value)]
    if len(missed) == len(minutes):
        return f"None reaches {TARGET:.0%} here."
    ranked = sorted((label for label in minutes if label not in missed), key=lambda label: minutes[label])
    tail = f"; not reached by {', '.join(missed)}" if missed else ""
    order = "; ".join(f"{label}: {minutes[label]:.2f}" for label in ranked)
    return f"Minutes to {TARGET:.0%} test accuracy, fastest first: {order}{tail}."


def _beside(rows: Rows) -> str:
    """Return every row with its accuracy, and how that and the time are beside those of BP of the same network."""
    parts = []
    for key, row in rows.items():
        bp = rows.get(row.row.beside)
        failed = row.accuracy == FAILED["accuracy"]
        text = f"{row.label}: {'failed' if failed else f'{row.accuracy:.2f} %'}"
        if not failed and bp is not None and key != bp.row.key:
            text += (
                f" ({row.accuracy - bp.accuracy:+.2f} points from BP, in {row.minutes / bp.minutes:.1f} times its time)"
            )
        parts.append(text)
    return "; ".join(parts) + "."


WORDS: dict[str, Callable[[Rows], str]] = {
    "converges": lambda rows: "converges" if rows["ep"].accuracy > 45 else "does not reach 45 %",
    "stuck": _stuck,
    "reaches": _reaches,
    "as_good": _as_good,
    "caution": _caution,
    "beside": _beside,
    "fidelity": _fidelity_verdict,
    "memory": _memory_verdict,
    "cost": _cost_verdict,
}
