#!/usr/bin/env python3
"""Write the table of results in README.md and docs/results.md from the results.json files below docs/results."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import click

from cupyep.cli.shared import OneLineErrors
from cupyep.commands.memory import blank_learner
from cupyep.errors import ConfigurationError, require
from cupyep.experiments import EXPERIMENTS, Experiment, Results, load_results
from cupyep.experiments.cells import UNTRAINED
from cupyep.experiments.design import SEEN, seen
from cupyep.experiments.details import markdown_table
from cupyep.experiments.findings import COLUMNS, at
from cupyep.experiments.report import OPEN, table
from cupyep.experiments.runner import RESULTS
from cupyep.files import write_file
from cupyep.learning.operations import Operations
from cupyep.memory.plan import BlankDevice
from cupyep.training.config import TrainConfig, make_config

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTE = "<!-- Made by tools/results.py from docs/results; do not edit. -->"
HEADLINES = ("vgg7-kd-cifar10", "vgg11-kd-cifar100", "vgg12-kd-cifar100")
BEST = ("best-cifar10", "resnet9-cifar10", "best-cifar100")  # headlines of medium scale
IMAGES = 50_000  # training images of CIFAR-10 and CIFAR-100
RATE = 100e12  # operations a second
SCALES = {"full": "full size", "medium": "medium scale", "small": "small scale"}
REST = ("longer", "as_trained")
ROOT = Path(__file__).resolve().parents[1]

Found = dict[str, tuple[Results, dict[str, Any]]]


def collect(folder: Path) -> dict[str, Found]:
    """Return experiment -> scale -> (results, what results.json says besides), for what has been committed."""
    found: dict[str, Found] = {name: {} for name in EXPERIMENTS}
    for name, experiment in EXPERIMENTS.items():
        for scale in experiment.scales:
            place = folder / f"{name}-{scale}"
            if (place / RESULTS).is_file():
                found[name][scale] = load_results(experiment, place)
                different = {
                    seen(cell["options"]) for cell in found[name][scale][0].cells.values() if "options" in cell
                }
                told = f"{place}: its rows differ in {', '.join(SEEN)}; measure them alike, or make two experiments"
                require(len(different) < 2, told)
    return found


def readme_table(found: dict[str, Found]) -> str:
    """Return the table of README.md: the headline rows beside the published figures, and where they are at rest.

    It shows medium scale where there is a report of it, else small scale, never both, and full size where there is
    any. Rows of which nothing is published and nothing measured are left out.
    """
    best = [name for name in BEST if "medium" in found[name]]
    size = "medium" if best or any("medium" in found[name] for name in HEADLINES) else "small"
    names, lines = [*best, *HEADLINES], []
    shown = ["full", size] if any("full" in found[name] for name in names) else [size]
    for name in names:
        experiment = EXPERIMENTS[name]
        scales = [scale for scale in (size, "full") if scale in experiment.scales]
        rows = {row.key: row for scale in scales for row in experiment.at(scale).rows}  # in the order of what we have
        for row in rows.values():
            published = row.published.get(COLUMNS["accuracy"].title)
            ours = [_accuracy(experiment, scale, found[name], row.key) for scale in shown]
            if set(ours) <= {"-"} or (published is None and set(ours) <= {OPEN, "-"}):
                continue  # nothing to compare
            label = f"{experiment.title.partition(',')[0]}: {row.label}"
            told = "-" if published is None else f"{published:g}"
            lines.append([label, told, *ours, _rest(found[name], size, row.key)])
    heads = ["test accuracy, %", "published", *(SCALES[scale] for scale in shown), "at rest (as trained)"]
    reports = [f"[`{name}`](docs/results/{name}-{size}/REPORT.md)" for name in names if size in found[name]]
    return f"{NOTE}\n\n{markdown_table(heads, lines)}\n\nReports, with all settings: {', '.join(reports)}."


def _accuracy(experiment: Experiment, scale: str, measured: Found, key: str) -> str:
    if scale not in experiment.scales or key not in {row.key for row in experiment.at(scale).rows}:
        return "-"
    if scale not in measured or not len(values := measured[scale][0].values(key, COLUMNS["accuracy"].value)):
        return OPEN
    return f"{values.mean():.1f}"


def _rest(measured: Found, scale: str, key: str) -> str:
    """Return the accuracy at rest, and in brackets as trained, of the images that it was measured on."""
    if scale not in measured:
        return "-"
    longer, trained = (measured[scale][0].mean(key, at("probes", -1, "rest", n, times=100)) for n in REST)
    return f"{longer:.1f} ({trained:.1f})" if math.isfinite(longer) else "-"


def _finding(experiment: Experiment, scale: str, measured: tuple[Results, dict[str, Any]] | None) -> str:
    if measured is None or not measured[0].complete:
        return f"| `{experiment.name}` | {scale} | {OPEN} |"
    return (
        f"| [`{experiment.name}`](results/{experiment.name}-{scale}/REPORT.md) | {scale} | "
        f"{experiment.verdict(measured[0])} |"
    )


def _findings(found: dict[str, Found]) -> str:
    """Return the table with a verdict an experiment and scale."""
    lines = ["| experiment | scale | what was found |", "| --- | --- | --- |"]
    for name, experiment in EXPERIMENTS.items():
        lines += [_finding(experiment, scale, found[name].get(scale)) for scale in experiment.scales]
    return "\n".join(lines)


def results_page(found: dict[str, Found]) -> str:
    """Return docs/results.md: what was found, then every experiment with its claim, tables and verdicts."""
    parts = [
        "# Results",
        NOTE,
        "Each section is an experiment; its command writes the report that the section links to. `small` runs for "
        "minutes on two CPU cores, with narrow networks and few images: it shows which setting is better, not how good "
        "it can get. `medium` runs for hours there, with all images as they are (`--estimate` tells how many, "
        "`--status` how far it is). `full` is the paper's size. What is open there names the operations of the "
        "products of all its trainings and "
        f"the hours that they take at {RATE / 1e12:g} TFLOP/s; `python tools/benchmark.py --device cuda` tells the "
        "rate of a card (`gemm_gflops`) and which fraction of it is reached. Rates of that order ask for `--precision "
        "tf32` or `float16`.",
        _findings(found),
    ]
    for name, experiment in EXPERIMENTS.items():
        parts += [f"## {name}: {experiment.title}", experiment.claim]
        for scale in experiment.scales:
            measured = found[name].get(scale)
            if measured is None:
                parts.append(
                    f"**{scale}**: {OPEN}; `cupyep reproduce {name} --scale {scale}`{_cost(experiment, scale)}"
                )
                continue
            results, about = measured
            verdict = experiment.verdict(results) if results.complete else "Open: not every cell is measured yet."
            parts += [
                f"**{scale}** ([report](results/{name}-{scale}/REPORT.md), `{about['command']}`, {about['date']})",
                table(experiment, results),
                verdict,
            ]
    return "\n\n".join(parts) + "\n"


def _cost(experiment: Experiment, scale: str) -> str:
    if scale != "full" or experiment.measure in UNTRAINED:
        return ""
    count = training_operations(experiment)
    return f"; {count / 1e15:.0f} PFLOP, {count / RATE / 3600:.1f} hours"


def training_operations(experiment: Experiment) -> int:
    """Return the operations of the products of all trainings of an experiment at full scale, teachers included.

    At most so many where a tolerance ends phases early; evaluation is not counted.
    """
    full = experiment.at("full")
    return full.seeds * IMAGES * sum(_operations_of_an_image(make_config(row.options)) for row in full.rows)


def _operations_of_an_image(config: TrainConfig) -> int:
    """Return the operations that all epochs of a run and its teacher's spend on a training image."""
    learner = blank_learner(
        dataclasses.replace(config, aug="none", teacher=None, teacher_features=False), BlankDevice("gpu")
    )
    count = Operations(learner.network, 1)
    teacher = config.teacher_epochs * count.bp_step() if config.aug == "kd" else 0
    return config.epochs * count.step(learner) + teacher


def with_table(readme: str, lines: str) -> str:
    """Return the text of README.md with the table put between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    require(bool(begin and end), f"README.md lacks the lines '{BEGIN}' and '{END}'")
    return f"{before}{BEGIN}\n{lines}\n{END}{after}"


@click.command(cls=OneLineErrors)
@click.option("--check", is_flag=True, help="Change nothing; fail if a file is not what it would become.")
def main(check: bool) -> None:
    """Write the table of results in README.md, and docs/results.md."""
    found = collect(ROOT / "docs" / "results")
    readme = ROOT / "README.md"
    wanted = {
        readme: with_table(readme.read_text(encoding="utf-8"), readme_table(found)),
        ROOT / "docs" / "results.md": results_page(found),
    }
    for path, text in wanted.items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            raise ConfigurationError(f"{path.relative_to(ROOT)} is not up to date; run: python tools/results.py")
        write_file(path, text.encode())
        click.echo(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
