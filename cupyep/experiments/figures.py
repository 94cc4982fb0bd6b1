"""Figures of reports: values over epochs, over layers, over an option. matplotlib, without a display."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Any

import numpy as np

from cupyep.commands.plots.style import KEY, LAYER, MARKERS, integer_ticks, line_style, plain_axes
from cupyep.experiments.cells import FORMS, STEPS
from cupyep.experiments.design import Results
from cupyep.experiments.findings import COLUMNS

AXES = {
    "train_loss": "training loss, nats",
    "test_accuracy": "test accuracy",
    "nudge_response": "nudge response, mean $|s_+ - s_-|$",
    "gradient_norm": "norm of the gradient",
}
BESIDE = {**KEY, "loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
COSINES = {"ylim": (-0.1, 1.05)}

Panel = tuple[str, Callable[[Mapping[str, Any]], Sequence[float | None]], dict[str, Any]]


def _style(number: int) -> dict[str, Any]:
    return line_style(number) | {"marker": MARKERS[number % len(MARKERS)], "markersize": 4}


def _lines(results: Results, xlabel: str, panels: Sequence[Panel], legend: Mapping[str, Any] = BESIDE) -> Any:
    """Draw a line a row, the mean over the seeds, and the range between them.

    A panel is the label of its y axis, a function from a cell to its points (none where it has none), settings of the
    axes.
    """
    figure, axes = plain_axes(len(panels))
    for axis, (title, points, how) in zip(axes, panels, strict=True):
        for number, row in enumerate(results.rows):
            found = [values for cell in results.of(row.key) if (values := points(cell))]
            if found:
                count = min(map(len, found))
                drawn, style = np.array([course[:count] for course in found], float), _style(number)
                x = range(1, count + 1)
                axis.plot(x, drawn.mean(axis=0), label=row.label, **style)
                if len(drawn) > 1:
                    low, high = drawn.min(axis=0), drawn.max(axis=0)
                    axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.set(xlabel=xlabel, ylabel=title, **how)
        integer_ticks(axis.xaxis)
    _add_key(axes[-1], legend)
    return figure


def _add_key(axis: Any, how: Mapping[str, Any]) -> None:
    if axis.get_legend_handles_labels()[0]:  # nothing is drawn of cells that failed
        axis.legend(**how)


def courses(results: Results) -> Any:
    """Draw loss and accuracy over the epochs."""
    names = ("train_loss", "test_accuracy")
    return _lines(results, "epoch", [(AXES[name], methodcaller("get", name), {}) for name in names])


def layers(results: Results) -> Any:
    """Draw response and gradient of the layers in the last epoch, on a logarithmic axis."""

    def of(name: str) -> Callable[[Mapping[str, Any]], list[float]]:
        return lambda cell: [max(value, 1e-30) for value in cell.get(name, [[]])[-1]]

    panels = [(AXES[name], of(name), {"yscale": "log"}) for name in ("nudge_response", "gradient_norm")]
    return _lines(results, LAYER, panels)


def cosines_by_epoch(results: Results) -> Any:
    """Draw the mean cosine with BPTT of the layers below the readout over the epochs."""

    def course(cell: Mapping[str, Any]) -> list[float]:
        found = ([c for c in probe["bptt"][:-1] if c is not None] for probe in cell.get("probes", []))
        return [float(np.mean(cosines)) if cosines else np.nan for cosines in found]

    return _lines(results, "epoch", [("cosine with BPTT, mean of layers", course, COSINES)], KEY)


def cosines_by_layer(results: Results) -> Any:
    """Draw the cosine with BPTT of every layer, a panel a form."""
    panels = [
        (f"cosine with BPTT, {form} form", lambda cell, form=form: cell.get(form, {}).get("cosine"), COSINES)
        for form in FORMS
    ]
    return _lines(results, "layer (the last is the readout)", panels)


def against(results: Results, option: str, label: str, lines: Mapping[str, str], columns: Sequence[str]) -> Any:
    """Draw columns, an axes each, over an `option` of the rows, on a logarithmic axis.

    A line joins the rows whose keys match a regular expression: `lines` has it by legend.
    """
    figure, axes = plain_axes(len(columns))
    for axis, column in zip(axes, (COLUMNS[name] for name in columns), strict=True):
        for number, (legend, pattern) in enumerate(lines.items()):
            rows = [row for row in results.rows if re.fullmatch(pattern, row.key) and option in row.options]
            found = [(row.options[option], results.values(row.key, column.value)) for row in rows]
            points = [(x, v.mean(), v.mean() - v.min(), v.max() - v.mean()) for x, v in found if len(v)]
            if points:
                x, mean, below, above = zip(*points, strict=True)
                axis.errorbar(x, mean, yerr=[below, above], label=legend, capsize=3, **_style(number))
        axis.set(xlabel=label, ylabel=column.title, xscale="log")
    _add_key(axes[-1], BESIDE)
    return figure


def peaks(results: Results) -> Any:
    """Draw peak memory over T on logarithmic axes: a colour a network, lines planned, marks measured."""
    figure, (axis,) = plain_axes(1, width=7.5, height=4.5)
    for number, row in enumerate(results.rows):
        for cell in results.of(row.key):
            for algorithm, line in (("ep", "--"), ("bptt", "-")):
                style = {"color": line_style(number)["color"], "label": f"{row.label}, {algorithm.upper()}"}
                axis.plot(STEPS, [n / 1e6 for n in cell["planned"][algorithm]], linestyle=line, **style)
                marks = [n / 1e6 for n in cell["measured"].get(algorithm, [])]
                axis.plot(STEPS[: len(marks)], marks, "o", markersize=4, color=style["color"])
    axis.set(
        xlabel="T, free steps of EP and unrolled steps of BPTT", ylabel="peak memory, MB", xscale="log", yscale="log"
    )
    axis.set_xticks(STEPS, [str(t) for t in STEPS])
    axis.legend(**BESIDE)
    return figure


#: What an experiment's file may name as a figure.
KINDS: dict[str, Callable[..., Any]] = {
    "courses": courses,
    "layers": layers,
    "cosines by epoch": cosines_by_epoch,
    "cosines by layer": cosines_by_layer,
    "against": against,
    "peaks": peaks,
}
