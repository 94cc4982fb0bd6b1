"""Figures of reports: courses over epochs, values over layers, values over an option. matplotlib, without a display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.commands.plots.style import COLOURS, MARKERS, plain_axes
from cupyep.experiments.design import Results

AXES = {
    "train_loss": "training loss, nats",
    "train_accuracy": "training accuracy",
    "test_loss": "test loss, nats",
    "test_accuracy": "test accuracy",
    "nudge_response": "nudge response, mean $|s_+ - s_-|$",
    "gradient_norm": "norm of the gradient",
    "activity": "activity, mean $|s|$",
}


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "linestyle": "-" if number < len(COLOURS) else "--",
    }


def band(axis: Any, x: Sequence[float], courses: np.ndarray, label: str, number: int) -> None:
    """Draw the mean of `courses` (seeds, points) and the range between the seeds."""
    style = _style(number)
    axis.plot(x, courses.mean(axis=0), label=label, **style)
    if len(courses) > 1:
        axis.fill_between(x, courses.min(axis=0), courses.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)


def courses(*names: str, chance: bool = True) -> Callable[[Results], Any]:
    """Return a function that draws the courses `names` over the epochs, a line a row, a band over the seeds."""

    def draw(results: Results) -> Any:
        figure, axes = plain_axes(len(names))
        for axis, name in zip(axes, names, strict=True):
            for number, row in enumerate(results.rows):
                found = [cell[name] for cell in results.of(row.key) if "failed" not in cell]
                if found:
                    epochs = min(map(len, found))
                    values = np.array([course[:epochs] for course in found])
                    band(axis, range(1, epochs + 1), values, row.label, number)
            axis.set(xlabel="epoch", ylabel=AXES[name])
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
        return figure

    return draw


def over_layers(*names: str) -> Callable[[Results], Any]:
    """Return a function that draws per-layer values of the last epoch, log scale, a line a row."""

    def draw(results: Results) -> Any:
        figure, axes = plain_axes(len(names))
        for axis, name in zip(axes, names, strict=True):
            for number, row in enumerate(results.rows):
                found = [cell[name][-1] for cell in results.of(row.key) if "failed" not in cell and cell[name][-1]]
                if found:
                    values = np.maximum(np.array(found), 1e-30)
                    band(axis, range(1, values.shape[1] + 1), values, row.label, number)
            axis.set(xlabel="layer (1 sees the image)", ylabel=AXES[name], yscale="log")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
        return figure

    return draw


def against(
    option: str, label: str, lines: Mapping[str, Sequence[str]], values: Mapping[str, Callable], log: bool = True
) -> Callable[[Results], Any]:
    """Return a function that draws `values` over an option of the rows.

    Parameters
    ----------
    option, label : str
        Option of `TrainConfig` on the x axis, and its label.
    lines : mapping
        Legend -> keys of the rows that one line joins.
    values : mapping
        Label of the y axis, one axes each -> function from a cell to a number.
    log : bool
        Logarithmic x axis.
    """

    def draw(results: Results) -> Any:
        rows = {row.key: row for row in results.rows}
        figure, axes = plain_axes(len(values))
        for axis, (title, value) in zip(axes, values.items(), strict=True):
            for number, (legend, keys) in enumerate(lines.items()):
                points = [(rows[key].options.get(option), results.values(key, value)) for key in keys]
                points = [(x, y) for x, y in points if x is not None and len(y)]
                if points:
                    x, y = zip(*points, strict=True)
                    means = [v.mean() for v in y]
                    spread = [[m - v.min() for m, v in zip(means, y, strict=True)],
                              [v.max() - m for m, v in zip(means, y, strict=True)]]  # fmt: skip
                    axis.errorbar(x, means, yerr=spread, label=legend, capsize=3, **_style(number))
            axis.set(xlabel=label, ylabel=title, xscale="log" if log else "linear")
        axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
        return figure

    return draw
