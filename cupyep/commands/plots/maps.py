"""Maps: a value a layer over the epochs, filters of the first layer, the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.commands.plots.style import (
    AMOUNTS,
    LAYER,
    LAYERS,
    entitle,
    integer_ticks,
    label_decades,
    new_figure,
    whole_decades,
)

NUMBERED_EPOCHS = 8  # so many epochs leave room for a number in every cell
DECADES = 6  # a logarithmic scale shows no more below its largest value
NAMED_CLASSES = 20
FILTERS = 16  # side by side over the epochs
PERCENT: dict[str, Any] = {"vmin": 0.0, "vmax": 100.0}  # the colours of a scale that is not logarithmic
BETWEEN = (0.8, 0.87, 0.95)  # the colour between filters, which none of a grey one has


def over_epochs(
    maps: dict[str, np.ndarray],
    epochs: Sequence[int],
    label: str,
    title: str,
    log: bool = False,
    readout: bool = False,
    nodes: Sequence[str] = (),
) -> Any:
    """Return the figure of values a layer over the epochs, a panel a map: its title -> array (epochs, layers).

    The colours go from 0 to 100 percent, or with `log` from the largest value down to at most six decades below it;
    `label` says what they are, with its unit. The last row may be the `readout`'s; `nodes` are the rows' names where
    these are no layers of a chain.
    """
    layers = max(values.shape[1] for values in maps.values())
    figure = new_figure(5.2 * len(maps) + 0.6, 1.5 + 0.24 * max(layers, 5))
    axes = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    scale = log_scale(np.concatenate([v.ravel() for v in maps.values()])) if log else PERCENT
    for axis, (name, values) in zip(axes, maps.items(), strict=True):
        image = draw_map(axis, values, epochs, log, scale)
        axis.set(xlabel="epoch", title=name)
    axes[0].set_ylabel("node" if nodes else LAYER)
    if nodes:
        names = [*nodes, "readout"][:layers]
        axes[0].set_yticks(range(1, layers + 1), names)
    elif readout:
        axes[0].set_yticks([*axes[0].get_yticks()[:-1], layers], [*map(str, axes[0].get_yticks()[:-1]), "readout"])
    below = log and any((values < scale["norm"].vmin).any() for values in maps.values())
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, extend="min" if below else "neither")
    bar.set_label(label)
    if log:
        label_decades(bar.ax.yaxis)
        bar.ax.minorticks_off()
    entitle(figure, title)
    return figure


def log_scale(values: np.ndarray) -> dict[str, Any]:
    """Return the logarithmic colours of `values`, whole decades, as `draw_map` takes them."""
    from matplotlib.colors import LogNorm

    low, high = whole_decades(values)
    return {"norm": LogNorm(max(low, high * 10.0**-DECADES), high)}


def draw_map(axis: Any, values: np.ndarray, epochs: Sequence[int], log: bool, scale: dict[str, Any]) -> Any:
    """Draw values, (epochs, layers), into an axis, layer 1 at the bottom; return the image."""
    first, last, layers = epochs[0], epochs[-1], values.shape[1]
    shown = np.ma.masked_invalid(values.T)
    extent = (first - 0.5, last + 0.5, 0.5, layers + 0.5)
    image = axis.imshow(
        shown, aspect="auto", origin="lower", extent=extent, interpolation="nearest", cmap=LAYERS, **scale
    )
    axis.set_facecolor("0.85")
    integer_ticks(axis.xaxis)
    axis.set_yticks(range(1, layers + 1, 1 if layers <= 20 else 2))
    if len(epochs) <= NUMBERED_EPOCHS:
        for (epoch, layer), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = image.norm(value) < 0.6
                text = f"{value:.2g}" if log else f"{value:.0f}"
                axis.text(
                    epochs[epoch], layer + 1, text, ha="center", va="center", fontsize=7, color="w" if dark else "k"
                )
    return image


def filters(weight: np.ndarray, title: str) -> Any:
    """Return the figure of the first layer's filters, (kh, kw, C, K): colours for three channels, else their mean.

    Every filter has its own scale; grey is zero.
    """
    count = weight.shape[-1]
    columns = max(4, math.ceil(math.sqrt(count * 2)))
    rows = math.ceil(count / columns)
    side = max(0.5, 5.0 / columns)
    figure = new_figure(side * columns, side * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for number, axis in enumerate(grid.ravel()):
        axis.set_axis_off()
        if number < count:
            axis.imshow(_tile(weight[..., number]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    entitle(figure, title)
    return figure


def filters_by_epoch(filters: Mapping[int, np.ndarray], title: str) -> Any:
    """Return the figure of filters of the first layer, (kh, kw, C, K) by epoch: a row an epoch, a column a filter.

    At most `FILTERS` of them, evenly chosen. A filter has one scale for all epochs, so that it is seen to grow; colours
    as in `filters`. On the right, how far all filters have moved since the first row, relative to their norm there.
    """
    weights = np.stack(list(filters.values()))
    epochs, height, width, _, count = weights.shape
    chosen = np.unique(np.linspace(0, count - 1, min(count, FILTERS)).round().astype(int))
    mosaic = np.empty((epochs * (height + 1) - 1, len(chosen) * (width + 1) - 1, 3))
    mosaic[...] = BETWEEN
    for column, number in enumerate(chosen):
        strip = _tile(weights[..., number].reshape(epochs * height, width, -1)).reshape(epochs, height, width, -1)
        for row, tile in enumerate(strip):
            mosaic[row * (height + 1) :, column * (width + 1) :][:height, :width] = tile
    figure = new_figure(1.0 + 0.5 * max(len(chosen), 8), 1.0 + 0.5 * epochs)
    axis = figure.subplots()
    axis.imshow(mosaic, interpolation="nearest", vmin=0, vmax=1)
    rows = np.arange(epochs) * (height + 1) + (height - 1) / 2
    axis.set_yticks(rows, map(str, filters))
    start = np.linalg.norm(weights[0]) or 1.0
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        moved = np.linalg.norm(weight - weights[0]) / start
        axis.text(mosaic.shape[1] + 0.5, row, f"moved {moved:.1%}", va="center", fontsize="small")
    axis.set_xticks(np.arange(len(chosen)) * (width + 1) + (width - 1) / 2, map(str, chosen + 1))
    axis.set(xlabel=f"filter (of {count})", ylabel="epoch")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    entitle(figure, title)
    return figure


def _tile(filter_: np.ndarray) -> np.ndarray:
    shown = filter_ if filter_.shape[-1] == 3 else filter_.mean(axis=-1)
    return 0.5 + 0.5 * shown / (np.abs(shown).max() or 1.0)


def confusion(matrix: np.ndarray, classes: Sequence[str], title: str) -> Any:
    """Return the figure of a confusion matrix, rows (true classes) in percent.

    Parameters
    ----------
    matrix : ndarray of int, shape (classes, classes)
        Samples of the true class (row) taken for a class (column).
    """
    from matplotlib.colors import PowerNorm

    share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= NAMED_CLASSES
    size = 1.6 + 0.42 * len(classes) if named else 6.4
    figure = new_figure(size + 1.0, size)
    axis = figure.subplots()
    image = axis.imshow(share, cmap=AMOUNTS, norm=PowerNorm(0.5, 0, 100))  # small confusions are to be seen, too
    if named:
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(classes)), classes)
        for (row, column), value in np.ndenumerate(share):
            text = f"{value:.0f}"
            if text != "0":
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color="w" if value < 35 else "k")
    axis.set(xlabel="taken for", ylabel="true class", title=title)
    axis.title.set_fontsize("medium")
    figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03).set_label("% of the true class")
    return figure
