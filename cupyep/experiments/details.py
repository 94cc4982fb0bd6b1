"""What reports say besides at medium and full scale: rates, each row beside BP, layers, failures, time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cupyep.data.sources import SOURCES
from cupyep.diagnostics.checkup import PROBE_IMAGES
from cupyep.experiments.design import SEEN, Results, Row, Value, cell_name
from cupyep.experiments.findings import COLUMNS
from cupyep.models import architecture, default_gain
from cupyep.training.config import OPTIONS, make_config
from cupyep.training.results import LONGER

#: Options that two runs share which begin with the same weights and see the same batches, the feedback by its gain.
START = (*(name for name, spec in OPTIONS.items() if spec.metadata["group"] == "Network"), *SEEN, "batch_size")
#: Of a probe (see `cells.cosines`) -> what its line is called, and its format.
LAYERS = {
    "response": ("response", ".1e"),
    "bp_trained": ("cosine with BP, as trained", ".3f"),
    "bp": ("cosine with BP, settled", ".3f"),
}
CHANCE = 1.5  # times chance: what has learnt nothing worth speaking of
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


def details(results: Results) -> list[str]:
    """Return sections in Markdown, those that the results have something for."""
    sections = {
        "How the learning rates were found": _rates(results.rows),
        "Beside BP of the same network": _beside(results),
        "Settled for longer": _rest(results),
        "Layer by layer after the last epoch": _layers(results),
        "What collapsed, or did not settle": _findings(results),
        "Time": _times(results),
    }
    return [f"**{title}.** {text}" for title, text in sections.items() if text]


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table, its first column to the left and the others to the right."""
    rule = "| --- |" + " ---: |" * (len(heads) - 1)
    return "\n".join([_line(heads), rule, *map(_line, lines)])


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def mean_and_deviation(values: Sequence[float] | np.ndarray, form: str) -> str:
    """Return the mean of some values, of more than one also the standard deviation; of none a dash."""
    if not len(values):
        return "-"
    mean = format(float(np.mean(values)), form)
    return mean if len(values) < 2 else f"{mean} ± {format(float(np.std(values, ddof=1)), form.lstrip('+'))}"


def _rates(rows: Sequence[Row]) -> str:
    """Return the optimizer and rate of rows, and how they were found, those that say the same in one line."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        config = make_config(row.options)
        rate = np.array2string(np.asarray(config.learning_rate), separator=", ")
        found.setdefault((f"{config.optimizer} {rate}", row.tuning or "not said"), []).append(row.label)
    if not any(row.tuning for row in rows):
        return ""
    texts = {text for _, text in found}
    lines = [f"- {'; '.join(labels)}: {rate}" + (f". {text}" if len(texts) > 1 else "") for (rate, text), labels
             in found.items()]  # fmt: skip
    return "\n\n".join([*texts, "\n".join(lines)] if len(texts) == 1 else ["", "\n".join(lines)])


def _beside(results: Results) -> str:
    rows = {row.key: row for row in results.rows}
    lines = [
        _beside_line(row, rows[row.beside], pairs)
        for row in results.rows
        if row.beside not in ("", row.key) and (pairs := _pairs(results, row))
    ]
    if not lines:
        return ""
    heads = ("", "same start", "accuracy, points", "training loss", "time / BP's", "images/s, BP's / its")
    told = (
        "Differences of cells of the same seed: the same images in the same order with the same augmentation, and, "
        "where it says so, the same initial weights and batches. Times include evaluation; images/s are those of the "
        "fastest epoch of each, which other work on the machine slows least."
    )
    return f"{told}\n\n{markdown_table(heads, lines)}"


def _pairs(results: Results, row: Row) -> list[Pair]:
    """Return the cells of a row and of BP with the same seed, where both were measured to the end."""
    names = ((cell_name(row.key, seed), cell_name(row.beside, seed)) for seed in range(results.seeds))
    found = ((results.cells.get(own, {}), results.cells.get(bp, {})) for own, bp in names)
    return [pair for pair in found if all("test_accuracy" in cell for cell in pair)]


def _beside_line(row: Row, bp: Row, pairs: Sequence[Pair]) -> list[str]:
    accuracy, loss = (_differences(COLUMNS[name].value, pairs) for name in ("accuracy", "loss"))
    rated = [pair for pair in pairs if all(cell.get("rates") for cell in pair)]
    return [
        row.label,
        _same_start(row, bp),
        mean_and_deviation(accuracy, "+.2f"),
        mean_and_deviation(loss, "+.3f"),
        mean_and_deviation([own["minutes"] / other["minutes"] for own, other in pairs], ".2f"),
        mean_and_deviation([max(o["rates"]) / max(own["rates"]) for own, o in rated], ".2f"),
    ]


def _differences(value: Value, pairs: Sequence[Pair]) -> list[float]:
    """Return by how much the figure of a row is above that of BP, for the pairs that have both."""
    found = ((value(own), value(other)) for own, other in pairs)
    return [own - other for own, other in found if own is not None and other is not None]


def _same_start(row: Row, bp: Row) -> str:
    ours, theirs = _start(row), _start(bp)
    other = [name.replace("_", " ") for name in ours if ours[name] != theirs[name]]
    return f"no: other {', '.join(other)}" if other else "yes"


def _start(row: Row) -> dict[str, Any]:
    config = make_config(row.options)
    start = {name: getattr(config, name) for name in START if name != "feedback"}
    if config.gain is None:
        start["gain"] = default_gain(config.activation, config.feedback, architecture(config.arch).gains)
    return start


def _rest(results: Results) -> str:
    lines = []
    for row in results.rows:
        probes = [cell["probes"][-1] for cell in results.of(row.key) if cell.get("probes")]
        if found := [probe["rest"] for probe in probes if "rest" in probe]:
            columns = [[100 * each[name] for each in found] for name in ("as_trained", "longer")]
            lines.append([row.label, str(found[0]["images"]), *(mean_and_deviation(c, ".1f") for c in columns)])
    told = (
        f"Accuracy after as many iterations as in training, and after {LONGER} times as many: a network that was at "
        "rest classifies alike."
    )
    heads = ("", "test images", "as trained, %", f"{LONGER} times as long, %")
    return f"{told}\n\n{markdown_table(heads, lines)}" if lines else ""


def _layers(results: Results) -> str:
    """Return a table for all rows whose weights are called the same: means over the seeds."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row in results.rows:
        probes = [cell["probes"][-1] for cell in results.of(row.key) if cell.get("probes")]
        for probe in probes[:1]:
            if weights := probe.get("weights"):
                tables.setdefault(tuple(weights), []).extend(_layer_lines(row, probes))
    if not tables:
        return ""
    told = (
        f"Of {PROBE_IMAGES} training images: the response is mean |s+ - s-| of the layer that the weight leads to; the "
        "cosines are those of EP's gradient without signals, after the steps that training takes and from a well "
        "settled state."
    )
    return "\n\n".join([told, *(markdown_table(["", *weights], lines) for weights, lines in tables.items())])


def _layer_lines(row: Row, probes: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for name, (title, form) in LAYERS.items():
        columns = zip(*(probe[name] for probe in probes), strict=True)
        known = ([value for value in column if value is not None] for column in columns)
        yield [f"{row.label}, {title}", *(format(float(np.mean(v)), form) if v else "-" for v in known)]


def _findings(results: Results) -> str:
    looked = [(row, cell) for row in results.rows for cell in results.of(row.key) if "findings" in cell]
    if not looked:
        return ""
    lines = [
        f"- {row.label}, seed {cell['options']['seed']}: {text}"
        for row, cell in looked
        for text in (*_at_chance(cell), *map(partial(_finding, len(cell["test_accuracy"])), cell["findings"]))
    ]
    return (
        "By the last accuracy and the checkup after every epoch:\n\n" + "\n".join(lines)
        if lines
        else "Nothing: all are above chance, and no checkup found anything."
    )


def _at_chance(cell: Mapping[str, Any]) -> list[str]:
    """Return that a cell ends at no more than `CHANCE` times chance, where that is known."""
    accuracy, source = cell["test_accuracy"][-1], SOURCES.get(cell["options"]["dataset"])
    if source is None or accuracy > CHANCE / len(source.classes):
        return []
    return [f"ends near chance ({accuracy:.1%} of {len(source.classes)} classes)"]


def _finding(epochs: int, found: Mapping[str, Any]) -> str:
    when = f"in {found['epochs']} of {epochs} epochs, at last in epoch {found['last']}"
    return f"{found['signature']} {when}: {found['message']}"


def _times(results: Results) -> str:
    heads = ("", "hours", "images/s, median epoch", "images/s, fastest epoch", "threads")
    lines = [
        [
            row.label + (f", seed {cell['options']['seed']}" if results.seeds > 1 else ""),
            f"{cell['minutes'] / 60:.2f}",
            f"{statistics.median(cell['rates']):.0f}",
            f"{max(cell['rates']):.0f}",
            str(cell["threads"] or "not recorded"),
        ]
        for row in results.rows
        for cell in results.of(row.key)
        if cell.get("rates")
    ]
    told = "Hours are those of training and evaluation, whatever else the machine did."
    return f"{told}\n\n{markdown_table(heads, lines)}" if lines else ""
