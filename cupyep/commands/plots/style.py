"""What all figures share: matplotlib without a display, colours that everyone can tell apart, files that repeat."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.errors import ConfigurationError
from cupyep.files import write_file

# Okabe & Ito's colours: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MOST_CURVES = len(COLOURS)  # in one picture: each has a colour of its own
MARKERS = "osD^vP*X"
LAYERS = "viridis"  # layers have an order, and so have its colours, in grey as well
LAYER = "layer (1 sees the image)"  # an axis of layers
AMOUNTS = "cividis"
DPI = 110
KEY = {"fontsize": "small", "frameon": False}  # of a legend
FORMATS = {"png": ("png",), "svg": ("svg",), "both": ("png", "svg")}


def matplotlib_figure() -> Any:
    """Return matplotlib's figure class.

    `ConfigurationError` if matplotlib is missing; names the command that installs it.
    """
    # Figures are drawn without a backend, whatever a shell names: one that is not there would end the import.
    wanted = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except (ImportError, OSError) as error:
        raise ConfigurationError(f'figures need matplotlib ({error}): pip install "cupyep[plot]"') from error
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = wanted  # for whoever draws here after us
    return Figure


def new_figure(width: float, height: float) -> Any:
    """Return a figure of that size in inches, which a notebook shows though no backend draws it."""
    figure = matplotlib_figure()(figsize=(width, height), layout="constrained")
    figure._repr_png_ = partial(png, figure)
    return figure


def png(figure: Any) -> bytes:
    """Return a PNG file, of 256 colours where these are enough: a third of the size, and no difference to the eye."""
    from PIL import Image  # which matplotlib needs for its own PNG files

    content, small = io.BytesIO(), io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    image = Image.open(content).convert("RGB")
    few = image.quantize(256, dither=Image.Dither.NONE)
    difference = np.abs(np.asarray(image, int) - np.asarray(few.convert("RGB"), int)).mean()
    (few if difference < 1 else image).save(small, "PNG", optimize=True)
    return small.getvalue()


def _svg(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def plain_axes(count: int, width: float = 4.9, height: float = 3.6) -> tuple[Any, list[Any]]:
    """Return a figure with `count` axes side by side, each `width` x `height` inches."""
    figure = new_figure(width * count, height)
    return figure, plain(figure.subplots(1, count, squeeze=False))


def plain(axes: np.ndarray) -> list[Any]:
    """Return all of `axes`, with a grid and without a frame."""
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return list(axes.flat)


def say(axis: Any, text: str) -> None:
    """Write into an axis that shows nothing why that is so."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color="0.4")


def entitle(figure: Any, text: str, **how: Any) -> None:
    """Write a title over a figure, as `plain_text`."""
    figure.suptitle(plain_text(text), fontsize="medium", **how)


def plain_text(text: str) -> str:
    """Return a text, a file's name perhaps, as matplotlib shows it as it is: no mathematics, nothing undecodable."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def line_style(number: int) -> dict[str, Any]:
    """Return colour and line of the `number`-th of several things; beyond the colours the lines are broken."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}


def integer_ticks(axis: Any) -> None:
    """Put ticks at whole numbers only (epochs, layers, steps)."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def label_decades(axis: Any) -> None:
    """Label powers of ten only on a logarithmic axis (``axes.yaxis``)."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_minor_formatter(NullFormatter())


def whole_decades(values: Any) -> tuple[float, float]:
    """Return the powers of ten below and above the positive ones of `values`."""
    values = np.asarray(values, float)
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return 0.1, 1.0
    low, high = math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max()))
    return 10.0**low, 10.0 ** max(high, low + 1)


def save(figure: Any, path: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write the figure to `path` with each format's suffix and return the files; the same data give the same bytes."""
    import matplotlib

    files = [path.with_name(f"{path.name}.{name}") for name in formats]
    with matplotlib.rc_context({"svg.hashsalt": "cupyep", "svg.fonttype": "none"}):
        for file in files:
            write_file(file, png(figure) if file.suffix == ".png" else _svg(figure))
    return files
