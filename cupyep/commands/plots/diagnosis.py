"""The picture of a diagnosis: how the phases settle, how the nudge reaches the layers, which units respond."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyep.commands.plots.curves import draw_settling, layer_colours
from cupyep.commands.plots.style import COLOURS, KEY, LAYER, entitle, label_decades, new_figure, plain, whole_decades
from cupyep.diagnostics.rules import LIMITS, spans, unsettled_layers

MOST_TICKS = 20
LINE_INCHES = 0.2


def diagnosis(rows: Sequence[dict[str, Any]], trace: dict[str, Any], title: str, verdicts: Sequence[str]) -> Any:
    """Return the figure of ``Diagnosis.rows`` and a trace as settling.json has it, the verdicts below the panels."""
    words = [
        line
        for verdict in verdicts
        for line in textwrap.wrap(verdict, 115, subsequent_indent="    ", break_on_hyphens=False)
    ]
    layers, nodes = [row for row in rows if "saturated" in row], trace.get("nodes", ())
    phases = [phase for phase in ("free", "nudged") if phase in trace]
    panels = [*phases, *(["responses"] if "nudge_response" in layers[0] else []), "units"]
    rows_of_panels = -(-len(panels) // 2)
    heights = [2.9 * rows_of_panels + 0.4, 0.2 + LINE_INCHES * len(words)]
    figure = new_figure(9.6, sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    axes = plain(above.subplots(rows_of_panels, 2, squeeze=False))
    for axis in axes:
        axis.set_axisbelow(True)
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_visible(True)
        if panel in phases:
            draw_settling(axis, panel, trace)
            unsettled = unsettled_layers([row[f"{panel}_unsettled"] for row in layers])
            if unsettled:
                axis.set_title(f"{panel} phase: {spans(unsettled, nodes)} unsettled", color=COLOURS[1])
        else:
            (_draw_responses if panel == "responses" else _draw_units)(axis, layers)
            _name_layers(axis, len(layers), nodes)
    if phases:
        layer_colours(above, axes[: len(phases)], len(layers), nodes)
    entitle(figure, title)
    below.text(0.02, 0.98, "\n".join(words), va="top", fontsize="small", family="monospace")
    return figure


def _draw_responses(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    n = np.arange(1, len(layers) + 1)
    lines = {
        "response $|a_n(s_+-s_-)|$": ("response_share", "o-", COLOURS[0]),
        "gradient": ("gradient_share", "s--", COLOURS[2]),
    }
    limit = LIMITS["response"].value
    values = np.array([[row[key] for row in layers] for key, *_ in lines.values()], float)
    low, high = whole_decades([*values.ravel(), limit / 2, 1.0])
    for (label, (_, form, colour)), y in zip(lines.items(), values, strict=True):
        axis.plot(n, np.where(y > 0, y, np.nan), form, color=colour, label=label, markersize=4)
        if (y == 0).any():  # off the scale
            axis.plot(n[y == 0], [low] * (y == 0).sum(), "v", color=colour, markersize=7, clip_on=False)
    _draw_limit(axis, limit, "vanishing below")
    axis.set(yscale="log", title="what reaches the layers", ylim=(low, 10 * high))  # room for the key
    axis.set_ylabel("norm / last layer's norm")
    label_decades(axis.yaxis)
    axis.legend(loc="upper left", ncols=2, **KEY).set_in_layout(False)


def _draw_units(axis: Any, layers: Sequence[dict[str, Any]]) -> None:
    n = np.arange(1, len(layers) + 1)
    saturated, dead = (100 * np.array([row[key] for row in layers]) for key in ("saturated", "dead"))
    axis.bar(n, saturated, color=COLOURS[4], label="saturated units")
    axis.bar(n, dead, bottom=saturated, color=COLOURS[0], label="units of dead channels")
    _draw_limit(axis, 100 * LIMITS["idle"].value, "collapse above")
    axis.set(ylim=(0, 122), yticks=range(0, 101, 20), ylabel="% of the units", title="units that do not respond")
    axis.legend(loc="upper left", ncols=2, **KEY).set_in_layout(False)


def _draw_limit(axis: Any, limit: float, label: str) -> None:
    axis.axhline(limit, color="k", linestyle="--", linewidth=1)
    box = {"facecolor": "w", "alpha": 0.8, "edgecolor": "none", "pad": 1}
    axis.annotate(label, (0.99, limit), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
                  ha="right", va="bottom", fontsize="small", bbox=box)  # fmt: skip


def _name_layers(axis: Any, layers: int, nodes: Sequence[str]) -> None:
    """Write numbers, or the names of `nodes`, below the layers."""
    axis.set(xlim=(0.4, layers + 0.6), xlabel="node" if nodes else LAYER)
    if nodes:
        axis.set_xticks(range(1, layers + 1), nodes, rotation=90 if layers > 5 else 0)
    else:
        axis.set_xticks(range(1, layers + 1, 1 if layers <= MOST_TICKS else 2))
