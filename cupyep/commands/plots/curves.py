"""Curves: how runs learn, epoch by epoch, and how phases settle, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.commands.plots.style import (
    KEY,
    LAYER,
    LAYERS,
    MOST_CURVES,
    entitle,
    integer_ticks,
    label_decades,
    line_style,
    plain_axes,
    plain_text,
    say,
    whole_decades,
)

Record = dict[str, Any]
FEW = 30  # so many epochs are still drawn with a mark each


def learning(runs: Mapping[str, Sequence[Record]], losses: Sequence[str]) -> Any:
    """Return the figure of loss and accuracy over the epochs, of the first eight runs.

    Parameters
    ----------
    runs : mapping
        Name -> records of metrics.jsonl.
    losses : sequence of str
        Loss of each run; cross-entropies are in nats.
    """
    figure, axes = plain_axes(2)
    count, runs = len(runs), dict(itertools.islice(runs.items(), MOST_CURVES))
    unit = ", nats" if set(losses) == {"cross_entropy"} else ""
    for axis, name, factor, label in zip(
        axes, ("loss", "accuracy"), (1, 100), (f"loss{unit}", "accuracy, %"), strict=True
    ):
        for number, records in enumerate(runs.values()):
            style = line_style(number)
            epochs = [record["epoch"] for record in records]
            mark = {"marker": "o", "markersize": 3} if len(epochs) <= FEW else {}
            test, train = (factor * course(records, f"{split}_{name}") for split in ("test", "train"))
            axis.plot(epochs, test, **style, **mark)
            axis.plot(epochs, train, **{**style, "linestyle": ":"}, linewidth=1.2, markerfacecolor="w", **mark)
        axis.set(xlabel="epoch", ylabel=label)
        integer_ticks(axis.xaxis)
        if max(map(len, runs.values()), default=0) < 2:
            axis.set_xlim(0.5, 1.5)
        if not any(runs.values()):
            say(axis, "no epoch is done yet")
    axes[1].set_ylim(bottom=0)
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color="0.35", linestyle=style) for style in ("-", ":")]
    axes[0].legend(lines, ["test", "training"], loc="best", **KEY)
    if len(runs) > 1:
        figure.legend(axes[1].get_lines()[::2], map(plain_text, runs), loc="outside right upper", **KEY)
    title = next(iter(runs), "") if count == 1 else "" if count == len(runs) else f"{len(runs)} of {count} runs"
    if title:
        entitle(figure, title)
    return figure


def course(records: Sequence[Record], name: str) -> np.ndarray:
    """Return a number an epoch, NaN where a record has none."""
    return np.array([record.get(name) for record in records], float)


def settling(trace: Record, title: str) -> Any:
    """Return the figure of the residual a layer against the step, free and nudged.

    Parameters
    ----------
    trace : dict
        As settling.json has it: ``epoch``, ``images``, ``schedule``, ``tolerance``, and of each phase ``steps``, the
        learner's own, and ``residual``, a list a layer for every step.
    title : str
    """
    phases = [phase for phase in ("free", "nudged") if trace.get(phase)]
    figure, axes = plain_axes(len(phases), width=4.6)
    for axis, phase in zip(axes, phases, strict=True):
        draw_settling(axis, phase, trace)
    layer_colours(figure, axes, len(trace[phases[0]]["residual"][0]), trace.get("nodes", ()))
    entitle(figure, title)
    return figure


def draw_settling(axis: Any, phase: str, trace: Record) -> None:
    """Draw one phase of `trace` into `axis`."""
    residual = np.array(trace[phase]["residual"], float)
    residual[residual <= 0] = np.nan  # a layer that does not move has no place on a logarithmic scale
    own, total, layers = trace[phase]["steps"], *residual.shape
    steps = np.arange(1, total + 1)
    for n, colour in enumerate(_colours(layers)):
        axis.plot(
            steps, residual[:, n], color=colour, linewidth=1.6, marker="o" if total <= FEW else None, markersize=3
        )
    if np.isnan(residual).all():
        say(axis, "nothing moves")
    axis.axvspan(own, total, color="0.9", zorder=0)
    axis.axvline(own, color="0.4", linewidth=1)
    unit = "sweep" if trace["schedule"] == "sweeps" else "step"
    axis.annotate(
        " had it gone on", (own, 0.98), xycoords=("data", "axes fraction"), va="top", fontsize="small", color="0.35"
    )
    tolerance = trace["tolerance"]
    if tolerance is not None:
        tolerance = np.clip(tolerance, 1e-30, 1e30)  # near the ends of float64 matplotlib draws nothing
        axis.axhline(tolerance, color="#D55E00", linestyle="--", linewidth=1)
        axis.annotate(
            "tolerance", (1, tolerance), xycoords=("axes fraction", "data"), ha="right", va="bottom",
            fontsize="small", color="#D55E00",
        )  # fmt: skip
    what = "states" if phase == "free" else "responses"
    axis.set(yscale="log", xlabel=unit, ylabel=f"RMS change in a {unit}", title=f"{phase} phase: {what}")
    axis.set(xlim=(0.5, total + 0.5), ylim=whole_decades([*residual.flat, tolerance]))
    integer_ticks(axis.xaxis)
    label_decades(axis.yaxis)


def _colours(layers: int) -> Any:
    import matplotlib

    return matplotlib.colormaps[LAYERS](np.linspace(0, 0.92, layers))


def layer_colours(figure: Any, axes: Sequence[Any], layers: int, nodes: Sequence[str] = ()) -> None:
    """Add the key of the layers' colours beside `axes`, with the names of `nodes` if they have any."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm(np.arange(0.5, layers + 1), layers)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(_colours(layers))), ax=axes, fraction=0.05, pad=0.02)
    every = 1 if layers <= 16 or nodes else 2
    bar.set_ticks(range(1, layers + 1, every), labels=nodes or [str(n) for n in range(1, layers + 1, every)])
    bar.ax.minorticks_off()
    bar.set_label("node" if nodes else LAYER)
