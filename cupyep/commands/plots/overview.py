"""The overview of a run: loss, accuracy, residuals and responses over its epochs, and whether it settles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyep.commands.plots.curves import course
from cupyep.commands.plots.maps import draw_map, log_scale
from cupyep.commands.plots.style import (
    COLOURS,
    KEY,
    LAYER,
    entitle,
    integer_ticks,
    label_decades,
    new_figure,
    plain,
    say,
)
from cupyep.diagnostics.rules import is_settled
from cupyep.graph import node_weights

Record = dict[str, Any]


def overview(name: str, records: Sequence[Record], feedback: float) -> Any:
    """Return the figure of the records of a run's epochs, of which there is one at least."""
    figure = new_figure(9.6, 6.4)
    axes = plain(figure.subplots(2, 2))
    epochs = [record["epoch"] for record in records]
    unsettled = [record["epoch"] for record in records if is_settled(record) is False]
    for axis, what, factor, unit in zip(axes, ("loss", "accuracy"), (1, 100), ("", ", %"), strict=False):
        for colour, split in zip(COLOURS, ("test", "train", "validation"), strict=False):
            values = factor * course(records, f"{split}_{what}")
            if not np.isnan(values).all():
                axis.plot(epochs, values, color=colour, marker="o", markersize=3, label=split)
        axis.set(ylabel=f"{what}{unit}")
    if axes[0].get_lines():
        axes[0].legend(**KEY)
    _draw_residuals(axes[2], records, unsettled)
    _draw_responses(figure, axes[3], records, feedback)
    for axis in axes:
        axis.set_xlabel("epoch")
        integer_ticks(axis.xaxis)
        if len(epochs) < 2:
            axis.set_xlim(0.5, 1.5)
    settled = is_settled(records[-1])
    mark = {True: ": settled", False: ": not settled", None: ""}[settled]
    colour = COLOURS[1] if settled is False else "k"
    entitle(figure, f"{name}, epoch {epochs[-1]}{mark}", color=colour)
    return figure


def _draw_residuals(axis: Any, records: Sequence[Record], unsettled: Sequence[int]) -> None:
    """Draw the residual of the worst layer at the end of each phase; a cross is an epoch that did not settle."""
    drawn = False
    for colour, phase in zip(COLOURS[2:], ("free", "nudged"), strict=False):
        values = course(records, f"{phase}_residual")
        values[~(values > 0)] = np.nan  # what does not move has no place on a logarithmic scale
        if not np.isnan(values).all():
            epochs = [record["epoch"] for record in records]
            axis.plot(epochs, values, color=colour, marker="o", markersize=3, label=f"{phase} phase")
            drawn = True
    if not drawn:
        say(axis, "nothing settles")
        return
    if unsettled:
        axis.plot(unsettled, [0.03] * len(unsettled), "x", color=COLOURS[1], label="not settled",
                  transform=axis.get_xaxis_transform())  # fmt: skip
    axis.set(yscale="log", ylabel="residual, RMS change in a step")
    label_decades(axis.yaxis)
    axis.legend(**KEY)


def _draw_responses(figure: Any, axis: Any, records: Sequence[Record], feedback: float) -> None:
    shown = [record for record in records if record.get("nudge_response")]
    if not shown:
        say(axis, "no responses are recorded")
        return
    axis.grid(False)
    values = scaled_responses(shown, feedback)
    image = draw_map(axis, values, [record["epoch"] for record in shown], True, log_scale(values))
    axis.set_ylabel("node" if shown[-1].get("nodes") else LAYER)
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.set_label("scaled response to the nudge")
    label_decades(bar.ax.yaxis)
    bar.ax.minorticks_off()


def layer_course(records: Sequence[Record], key: str) -> np.ndarray:
    """Return what the records call `key`, (epochs, layers)."""
    return np.array([record[key] for record in records], float)


def scaled_responses(records: Sequence[Record], feedback: float) -> np.ndarray:
    """Return ``a_n`` times the mean responses, (epochs, layers)."""
    values, nodes = layer_course(records, "nudge_response"), records[-1].get("nodes")
    depths = [*nodes.values()] if nodes else range(1, values.shape[1] + 1)
    return values * np.array([node_weights(depths, record.get("feedback", feedback)) for record in records])
