"""What learning takes of memory: EP against BPTT over the number of steps, planned, and measured where it is little."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cupyep.backend import get_device
from cupyep.commands.memory import memory_report
from cupyep.commands.plots.style import line_style, plain_axes
from cupyep.experiments.design import Cell, Column, Experiment, Results, Row
from cupyep.experiments.signals import PAPER
from cupyep.training.config import make_config

STEPS = (10, 50, 250)  # T
DEPTHS = (5, 7, 9, 11, 12)


def memory_cell(cell: Cell) -> dict[str, Any]:
    """Plan a step of each algorithm for a GPU; that of a narrowed network for the device at hand, and measure it."""
    config = make_config(cell.options)
    narrow = config.width < 1
    kind = None if narrow or get_device(config.device).is_gpu else "gpu"
    report = memory_report(config, STEPS, kind, measure=narrow, report=cell.report)
    found: dict[str, Any] = {"planned": {}, "measured": {}}
    for row in report.rows:
        found["planned"].setdefault(row.algorithm, []).append(row.total)
        if row.measured is not None:
            found["measured"].setdefault(row.algorithm, []).append(row.measured)
    return found


def megabytes(algorithm: str, place: int = -1) -> Callable[[Mapping[str, Any]], float]:
    """Return what a step was planned to take, in 10^6 bytes, for the T at a place of `STEPS`."""
    return lambda cell: cell["planned"][algorithm][place] / 1e6


def ratio(cell: Mapping[str, Any]) -> float:
    """Return BPTT's memory in terms of EP's, for the largest T."""
    return cell["planned"]["bptt"][-1] / cell["planned"]["ep"][-1]


def deviation(cell: Mapping[str, Any]) -> float | None:
    """Return by how much any plan differs from its measurement at most, in percent; None where none was made."""
    differences = [
        abs(planned / measured - 1)
        for algorithm, values in cell["measured"].items()
        for planned, measured in zip(cell["planned"][algorithm], values, strict=True)
    ]
    return 100 * max(differences) if differences else None


def draw_peaks(results: Results) -> Any:
    """Draw the peak over T on logarithmic axes: a colour a network, lines planned, marks measured."""
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
    axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    return figure


def _verdict(results: Results) -> str:
    values = {name: {row.key: results.mean(row.key, f) for row in results.rows} for name, f in VALUES.items()}
    flat = all(len(set(cell["planned"]["ep"])) == 1 for row in results.rows for cell in results.of(row.key))
    ratios, deviations = values["ratio"].values(), [d for d in values["deviation"].values() if not math.isnan(d)]
    deepest = results.rows[-1]
    parts = [
        f"EP takes {'the same for every T' if flat else 'more for larger T'}, {values['ep'][deepest.key]:.0f} MB in "
        f"{deepest.label}; BPTT over {STEPS[-1]} steps {min(ratios):.1f} to {max(ratios):.1f} times as much."
    ]
    if deviations:
        parts.append(f"Plans and measurements differ by at most {max(deviations):.1f} %.")
    return " ".join(parts)


VALUES = {"ep": megabytes("ep"), "ratio": ratio, "deviation": deviation}
FIGURES_OF_THE_PAPER = {"EP, MB": 1431, f"BPTT, T = {STEPS[-1]}, MB": 25954}


def _rows(full: bool) -> tuple[Row, ...]:
    return tuple(
        Row(
            f"vgg{depth}",
            f"VGG-{depth}",
            {"arch": f"vgg{depth}"},
            FIGURES_OF_THE_PAPER if full and depth == 12 else {},
            PAPER if full and depth == 12 else "",
        )
        for depth in DEPTHS
    )


SHARED = {"dataset": "cifar10", "schedule": "synchronous", "nudged_steps": 2, "feedback": 1.0}

MEMORY = Experiment(
    name="memory",
    title="peak memory of EP and BPTT over the number of steps",
    claim=f"EP needs far less memory than BPTT, which stores every step ({PAPER}); here EP's does not depend on the "
    "number of steps at all.",
    setting={
        "small": "VGG-5 to VGG-12 of 16 to 64 channels, 16 x 16 pixels, batch 16, Adam, float32 unless the command "
        "says otherwise: planned for the device at hand, and measured by doing one step of each.",
        "full": "VGG-5 to VGG-12 at full width, 32 x 32 pixels, batch 128, Adam, float32 unless the command says "
        "otherwise: planned for a GPU; nothing is done, so nothing is measured.",
    },
    base={
        "small": {**SHARED, "width": 0.125, "image_size": 16, "batch_size": 16},
        "full": {**SHARED, "batch_size": 128},
    },
    rows={"small": _rows(False), "full": _rows(True)},
    seeds={"small": 1, "full": 1},
    measure=memory_cell,
    columns=(
        Column("EP, MB", megabytes("ep"), ".1f"),
        *(Column(f"BPTT, T = {t}, MB", megabytes("bptt", n), ".1f") for n, t in enumerate(STEPS)),
        Column("BP, MB", megabytes("bp"), ".1f"),
        Column(f"BPTT / EP, T = {STEPS[-1]}", ratio, ".1f"),
        Column("plan off by at most, %", deviation, ".1f"),
    ),
    figures={"peaks": draw_peaks},
    verdict=_verdict,
    remarks="A step with its optimizer, synchronous updates, deviation form, both nudged phases at once; MB are 10^6 "
    "bytes. The channel widths of the published network are not public, so its figures are of another network; BPTT "
    "here keeps state, drive and pooling winners of every step. On the CPU the allocations of Python and NumPy are "
    "measured. `cupyep memory` does this for any network.",
)
