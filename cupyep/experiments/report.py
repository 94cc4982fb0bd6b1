"""REPORT.md and its figures, made from results.json and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cupyep.commands.plots.style import save
from cupyep.errors import few
from cupyep.experiments.design import Column, Experiment, Results, Row, cell_name
from cupyep.experiments.details import details, markdown_table, mean_and_deviation
from cupyep.files import write_file

REPORT = "REPORT.md"
OPEN = "open"
SHOWN = 12  # names of cells that are open


def write_report(experiment: Experiment, results: Results, about: Mapping[str, Any], out: str | Path) -> Path:
    """Write REPORT.md and the figures into `out`; `about` are the entries of results.json besides the cells.

    Returns
    -------
    Path
        Of REPORT.md.
    """
    path = Path(out) / REPORT
    for name, draw in experiment.figures.items() if results.cells else ():
        save(draw(results), path.with_name(name))
    write_file(path, report_text(experiment, results, about).encode())
    return path


def report_text(experiment: Experiment, results: Results, about: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    scale, failed = about["scale"], _failures(results)
    verdict = experiment.verdict(results) if results.complete else f"{open_text(results).capitalize()}."
    parts = [
        f"# {experiment.name}: {experiment.title}",
        f"**Claim.** {experiment.claim}",
        f"**Setting ({scale}).** {experiment.at(scale).setting}",
        table(experiment, results),
        f"**Verdict.** {verdict}",
        "\n\n".join(f"![{name}]({name}.png)" for name in experiment.figures) if results.cells else "",
        "\n".join(["Runs that ended early:", "", *failed]) if failed else "",
        *(details(results) if scale != "small" and results.cells else ()),
        experiment.remarks,
        _circumstances(results, about),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def open_text(results: Results) -> str:
    """Return which cells are not measured yet."""
    names = [cell_name(row.key, seed) for seed in range(results.seeds) for row in results.rows]
    left = [name for name in names if name not in results.cells]
    return f"open: {len(left)} of {len(names)} cells are not measured yet ({few(left, SHOWN)})"


def table(experiment: Experiment, results: Results) -> str:
    """Return the table of all rows: mean and standard deviation over the seeds, published figures beside them."""
    columns = list(experiment.columns)
    published = any(row.published for row in results.rows)
    heads, lines = ["", *(column.title for column in columns), *(["published"] if published else [])], []
    for row in results.rows:
        cells = [_mean_and_deviation(results, row, column) for column in columns]
        if published:
            cells.append(_published(row))
        lines.append([row.label, *cells])
    return markdown_table(heads, lines)


def _mean_and_deviation(results: Results, row: Row, column: Column) -> str:
    values = results.values(row.key, column.value)
    if not len(values):
        cells = results.of(row.key)
        return "failed" if any("failed" in cell for cell in cells) else "-" if cells else OPEN
    return mean_and_deviation(values, column.form)


def _published(row: Row) -> str:
    figures = ", ".join(f"{value:g} ({title})" for title, value in row.published.items())
    return f"{figures}, {row.source}" if figures else "-"


def _failures(results: Results) -> list[str]:
    return [
        f"- {row.label}, seed {cell['options']['seed']}: {cell['failed']}"
        for row in results.rows
        for cell in results.of(row.key)
        if "failed" in cell
    ]


def _circumstances(results: Results, about: Mapping[str, Any]) -> str:
    system = about.get("system", {})
    minutes = math.fsum(cell["minutes"] for cell in results.cells.values())
    on_gpu = not (system.get("gpu", "none").startswith("none") or system.get("device") == "cpu")
    where = system["gpu"] if on_gpu else "CPU"
    seeds = f"± is the standard deviation over {results.seeds} seeds." if results.seeds > 1 else "One seed."
    versions = f"cupyep {system.get('cupyep')}, NumPy {system.get('numpy')}, Python {system.get('python')}"
    dates = sorted({cell.get("date", about.get("date", "")) for cell in results.cells.values()})
    when = f"on {dates[0]}" if len(dates) == 1 else f"from {dates[0]} to {dates[-1]}" if dates else ""
    return (
        f"---\n\nMade by `{about.get('command', '')}` {when}; {where}, {minutes:.0f} minutes of "
        f"training and measuring in all ({system.get('threads', '')}); {versions}. {seeds} All figures are in "
        "results.json."
    )
