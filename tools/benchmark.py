#!/usr/bin/env python3
"""Measure how fast and how lean networks settle and learn on this machine, against its own matrix product."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import platform
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from gate import BETA, check_results, learner, torch_reference
from measuring import SHORTEST, Case, Stopwatch, Timing, limit_threads
from parts import (
    TrainingStep,
    graphs_text,
    moving_cases,
    moving_table,
    parts_report,
    parts_table,
    time_products,
)
from scaling import rank_table, thread_table

import cupyep as ep
from cupyep import files
from cupyep.backend import PRECISIONS
from cupyep.backend.threads import available_cpus, get_threads, set_threads
from cupyep.cli.shared import OneLineErrors
from cupyep.cli.types import Names, NewFile, Numbers
from cupyep.commands.memory import noise
from cupyep.commands.system import system_report
from cupyep.learning.operations import Operations
from cupyep.memory.plan import peak_bytes
from cupyep.models import architecture
from cupyep.parallel import join
from cupyep.parallel.planning import LATENCY_US
from cupyep.settling import SCHEDULES

EXAMPLES = """\b
Examples:
  benchmark.py --arch vgg5 --width 0.25 --batch-size 8
  benchmark.py --arch vgg5 --batch-size 8 --threads 1 --against torch --json vgg5.json
  benchmark.py --arch vgg7 --batch-size 128 --scaling --against torch     threads 1, 2, 4, ..., and a plan of ranks
  benchmark.py --arch vgg7 --batch-size 128 --parts --feedback 0.1 --schedule sweeps --free-steps 2 --nudged-steps 2
"""
LINKS_GB = (50.0, 10.0)  # between ranks
WEAK_FEEDBACK, SWEEPS = 0.1, 2
RESIDUAL = 1e-4
CHECK_EVERY = 5
PATHS: dict[str, dict[str, Any]] = {
    "synchronous": {"schedule": "synchronous"},
    "evenodd": {"schedule": "evenodd"},
    "relaxed": {"schedule": "evenodd", "relaxation": 1.6},
}
MOST_STEPS = 300  # given to a phase to reach that residual
SETTLE_STEPS = 8  # between which a step is timed
MEMORY_STEPS = (2, 4, 8)
PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}  # a GPU is not filled by less


@dataclass
class Run:
    """What all parts of the benchmark share; `report` is what ``--json`` writes."""

    options: dict[str, Any]
    network: ep.Network
    batch: ep.Batch
    stopwatch: Stopwatch
    reference: Any = None
    report: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def operations(self) -> Operations:
        return Operations(self.network, len(self.batch))

    def counts(self, count: Callable[..., int], *how: Any) -> tuple[int, int]:
        """Return the operations of direct convolutions, and those done: what `count` makes of them with `how`."""
        return count(self.operations, *how), count(Operations(self.network, len(self.batch), done=True), *how)

    def build(self, **changes: Any) -> ep.Network:
        return ep.build(**{**self.network.config, **changes}, device=self.network.device)


def build_run(options: dict[str, Any]) -> Run:
    """Return the run that the command line asks for, its inputs standard normal noise."""
    names = ("arch", "width", "feedback", "precision", "device")
    options = {**options, "device": join().own_device(options["device"])}
    network = ep.build(**{name: options[name] for name in names}, input_shape=(options["image_size"],) * 2 + (3,))
    quick, device = options["quick"], network.device
    size = 256 if quick else PRODUCT_SIZE["cuda" if device.is_gpu else "cpu"]
    stopwatch = Stopwatch(device, network.precision, size, options["repeats"], 0 if quick else SHORTEST)
    reference = None
    if options["against"] == "torch":
        reference = torch_reference().TorchReference(network, "cuda" if device.is_gpu else "cpu")
    return Run(options, network, noise(network, options["batch_size"]), stopwatch, reference)


# ------------------------------------------------------------------------------------------------- what is timed


def time_edges(run: Run) -> dict[str, Timing]:
    """Time the products of every edge with all that belongs to them: columns, bias, pooling and its adjoint."""
    network = run.network
    workspace = network.memory.workspace(len(run.batch))
    state = network.settle(run.batch.images, steps=3, schedule="synchronous")
    up, down = ([network.device.xp.empty_like(s) for s in state.layers] for _ in range(2))
    cases = {}
    graph, nodes = network.graph, [run.batch.images, *state.layers]
    for c, (edge, n, m) in enumerate(zip(network.layers, graph.below, graph.above, strict=True)):
        name = f"edge {m}" if graph.is_chain else f"{graph.connections[c].below} to {graph.connections[c].above}"
        winners, ops, flops = state.winners[c], workspace.ops[c], run.counts(lambda count, c: count.edges[c], c)
        # The drive finds the winners, of the same states, that are there already.
        cases[f"{name} drive"] = Case(functools.partial(edge.drive, nodes[n], up[m - 1], winners, ops), *flops)
        if n:
            call = functools.partial(edge.topdown, nodes[m], winners, down[n - 1], ops)
            cases[f"{name} topdown"] = Case(call, *flops)
    return run.stopwatch.measure(cases)


def plainly(device: ep.Device, work: Callable[..., Any], **how: Any) -> None:
    """Do `work` without replaying graphs."""
    graphs, device.graphs = device.graphs, None
    try:
        work(**how)
    finally:
        device.graphs = graphs


def time_steps(run: Run, phases: dict[str, Callable[..., Any]]) -> dict[str, Timing]:
    """Time one step of each phase, a function of ``steps``, as the difference of a long and a short one."""
    cases = {
        (name, steps): Case(functools.partial(settle, steps=steps))
        for name, settle in phases.items()
        for steps in (1, 1 + SETTLE_STEPS)
    }
    timings, (flops, done) = run.stopwatch.measure(cases), run.counts(Operations.settle_step)
    return {
        name: timings[name, 1 + SETTLE_STEPS].per_step(
            timings[name, 1], SETTLE_STEPS, flops, None if name == "torch" else done
        )
        for name in phases
    }


def time_settle_steps(run: Run) -> dict[str, Timing]:
    """Time one step of every schedule."""
    network, reference = run.network, run.reference
    phases: dict[str, Callable[..., Any]] = {}
    for schedule in SCHEDULES:
        phases[schedule] = functools.partial(network.settle_free, run.batch, schedule=schedule)
        if network.device.graphs is not None:
            phases[f"{schedule}, plain launches"] = functools.partial(plainly, network.device, phases[schedule])
    if reference is not None:
        x, zeros = reference.images(run.batch.images), reference.zeros(len(run.batch))
        phases["torch"] = lambda steps: reference.settle(x, zeros, steps)
    rows = {f"settle step, {name}": timing for name, timing in time_steps(run, phases).items()}
    step = rows["settle step, synchronous"]
    run.report |= {
        "settle_step_s": step.median,
        "settle_fraction_of_gemm": step.fraction,
        "settle_done_fraction_of_gemm": step.done_fraction,
    }
    if (plain := rows.get("settle step, synchronous, plain launches")) is not None:
        run.report["settle_step_plain_launches_s"] = plain.median
    if reference is not None:
        run.report["settle_step_speedup_vs_torch"] = rows["settle step, torch"].median / step.median
    return rows


def time_scratch(run: Run) -> dict[str, Timing]:
    """Time one synchronous step with other budgets for what a chunk of a batch needs."""
    device, usual = run.network.device, run.network.device.scratch_bytes
    phases: dict[str, Callable[..., Any]] = {}
    for budget in run.options["scratch_mb"]:
        device.scratch_bytes = int(budget * 1e6)
        network = run.build()
        network.memory.workspace(len(run.batch))  # which plans its chunks
        phases[f"{budget:g} MB"] = functools.partial(network.settle_free, run.batch, schedule="synchronous")
    device.scratch_bytes = usual
    rows = time_steps(run, phases)
    run.report["settle_step_s_by_scratch_mb"] = {name.removesuffix(" MB"): row.median for name, row in rows.items()}
    return rows


def time_learning(run: Run) -> dict[str, Timing]:
    """Time whole steps of EP, BPTT and BP, without the optimizer."""
    network, batch = run.network, run.batch
    free, nudged, schedule = (run.options[name] for name in ("free_steps", "nudged_steps", "schedule"))
    cases = {
        f"EP step, {form}": Case(
            functools.partial(learner(network, free, nudged, form, schedule).step, batch),
            *run.counts(Operations.ep_step, free, nudged, form, schedule),
        )
        for form in ("classical", "deviation")
    }
    bptt = ep.BackpropagationThroughTime(network, free, nudged, schedule=schedule, relaxation=1.0)
    cases["BPTT step"] = Case(functools.partial(bptt.step, batch), *run.counts(Operations.bptt_step, free, nudged))
    cases["BP step"] = Case(functools.partial(ep.Backpropagation(network).step, batch), *run.counts(Operations.bp_step))
    if run.reference is not None:
        arguments = (run.reference.images(batch.images), run.reference.labels(batch.labels), BETA, free, nudged)
        cases["EP step, torch"] = Case(functools.partial(run.reference.ep_step, *arguments))
    rows = run.stopwatch.measure(cases)
    own = rows["EP step, classical"].median
    run.report |= {
        "ep_step_s": own,
        "ep_step_deviation_s": rows["EP step, deviation"].median,
        "bptt_step_s": rows["BPTT step"].median,
        "bp_step_s": rows["BP step"].median,
        "images_per_s": len(batch) / own,
        "ep_over_bp": own / rows["BP step"].median,
        "ep_step_speedup_vs_torch": None if run.reference is None else rows["EP step, torch"].median / own,
    }
    return rows


def time_weak_feedback(run: Run) -> dict[str, Timing]:
    """Time EP at weak feedback, where a few sweeps settle, against BP of the same network."""
    network, batch = run.build(feedback=WEAK_FEEDBACK), run.batch
    cases = {
        f"EP step, {form}, {SWEEPS} + {nudged}": Case(
            functools.partial(learner(network, SWEEPS, nudged, form, "sweeps").step, batch),
            *run.counts(Operations.ep_step, SWEEPS, nudged, form, "sweeps"),
        )
        for form, nudged in (("deviation", SWEEPS), ("deviation", 1), ("tangent", SWEEPS))
    }
    cases["BP step"] = Case(functools.partial(ep.Backpropagation(network).step, batch), *run.counts(Operations.bp_step))
    rows = run.stopwatch.measure(cases)
    names = ("weak_ep_over_bp", "weak_ep_one_nudged_sweep_over_bp", "weak_tangent_over_bp")
    run.report |= {name: rows[case].median / rows["BP step"].median for name, case in zip(names, rows, strict=False)}
    return rows


def time_to_residual(run: Run) -> dict[str, Timing]:
    """Time free phases until no layer of any sample moves by more; those that never get there are only named."""
    cases, steps, network = {}, {}, run.network
    most = 30 if run.options["quick"] else MOST_STEPS
    shared: dict[str, Any] = {"steps": most, "tolerance": RESIDUAL, "check_every": CHECK_EVERY}
    for name, how in PATHS.items():
        stats = network.settle_free(run.batch, **shared, **how).stats
        steps[name] = stats.steps if stats.converged else None
        if stats.converged:
            cases[name] = Case(functools.partial(network.settle_free, run.batch, **shared, **how))
        else:
            click.echo(f"\nresidual {RESIDUAL:g} is not reached in {most} steps, {name}")
    if run.reference is not None and steps["synchronous"]:
        # The reference takes the same path, and is not made to look at its residual.
        x, zeros = run.reference.images(run.batch.images), run.reference.zeros(len(run.batch))
        steps["torch"] = steps["synchronous"]
        cases["torch"] = Case(functools.partial(run.reference.settle, x, zeros, steps["torch"]))
    timings = run.stopwatch.measure(cases)
    for name, count in steps.items():
        run.report[f"{name}_steps_to_residual"] = count
        run.report[f"{name}_to_residual_s"] = timings[name].median if name in timings else None
    return {f"{name}, {steps[name]} steps": timing for name, timing in timings.items()}


def training_steps(run: Run, network: ep.Network) -> dict[str, TrainingStep]:
    """Return the steps that ``--parts`` times, warm: their chunks are planned."""
    free, nudged, schedule = (run.options[name] for name in ("free_steps", "nudged_steps", "schedule"))
    learners = {
        f"EP {free} + {nudged}, {schedule}": learner(network, free, nudged, "deviation", schedule),
        "BP": ep.Backpropagation(network),
    }
    steps = {name: TrainingStep(made, len(run.batch)) for name, made in learners.items()}
    for step in steps.values():
        step()
    return steps


def measure_parts(run: Run) -> None:
    """Print where the time of a training step of EP and of BP goes, what the machine can do, and the products alone."""
    network, samples, device = run.network, len(run.batch), run.network.device
    steps, usual = training_steps(run, network), device.scratch_bytes
    others: dict[str, TrainingStep] = {}
    for budget in run.options["scratch_mb"]:
        device.scratch_bytes = int(budget * 1e6)
        others |= {f"{name}, {budget:g} MB": step for name, step in training_steps(run, run.build()).items()}
    device.scratch_bytes = usual
    moving = moving_cases(network, samples)
    cases = {name: case for name, (case, _) in moving.items()}
    timings = run.stopwatch.measure(cases | {name: Case(step) for name, step in (steps | others).items()})
    for name, step in steps.items():
        times = step.time_parts(run.options["repeats"])
        click.echo(parts_table(name, times, timings[name].median, samples))
        run.report |= {name: {"step_s": timings[name].median, "parts": parts_report(times)}}
    click.echo(f"\n{graphs_text(device)}")
    if others:
        click.echo(table("training step by the scratch of a chunk", {name: timings[name] for name in others}))
        run.report["step_s_by_scratch_mb"] = {name: timings[name].median for name in others}
    moved = {name: (timings[name].median, nbytes) for name, (_, nbytes) in moving.items()}
    click.echo(moving_table(moved))
    run.report["bytes_per_s"] = {name: nbytes / seconds for name, (seconds, nbytes) in moved.items()}
    for name, step in steps.items():
        counted = time_products(step, run.stopwatch)
        rows = {f"{count} x {product}": timing for product, (count, timing) in counted.items()}
        click.echo(table(f"products of a step of {name}, alone (times a step x rows x inner x columns)", rows))
        run.report[name]["products_s"] = {product: row.median for product, row in rows.items()}


def measure_scaling(run: Run) -> None:
    """Print what threads of this process give, PyTorch's beside them; what ranks do, those here and those planned."""
    free, nudged, schedule = (run.options[name] for name in ("free_steps", "nudged_steps", "schedule"))
    network, batch, reference, ranks = run.network, run.batch, run.reference, join()
    ranks.use(network.device)
    own = learner(network, free, nudged, "classical", schedule)
    works: dict[str, Callable[[], Any]] = {"EP": functools.partial(own.step, batch)}
    works["BP"] = functools.partial(ep.Backpropagation(network).step, batch)
    if reference is not None:
        arguments = (reference.images(batch.images), reference.labels(batch.labels), BETA, free, nudged)

        def theirs() -> None:
            sys.modules["torch"].set_num_threads(get_threads())
            reference.ep_step(*arguments)

        works["EP, torch"] = theirs
    if ranks.size == 1 and not network.device.is_gpu:
        most = run.options["threads"] or available_cpus()
        counts = sorted({1 << k for k in range(most.bit_length())} | {most})
        click.echo("\n" + "\n".join(thread_table(works, counts, len(batch))))
        set_threads(run.options["threads"])
    click.echo("\n" + "\n".join(rank_table(own, batch, ranks, LINKS_GB, LATENCY_US / 1e6)[1]))


def measure_memory(run: Run) -> list[tuple[str, int, int]]:
    """Return (algorithm, steps, peak bytes): EP with T free steps, BPTT with K unrolled ones, networks included."""
    rows = []
    for name, make in (
        ("EP, T", lambda network, steps: learner(network, steps, 2, "deviation")),
        ("BPTT, K", lambda network, steps: ep.BackpropagationThroughTime(network, 2, steps, schedule="synchronous")),
    ):
        for steps in MEMORY_STEPS:

            def prepare(make: Any = make, steps: int = steps) -> Callable[[], Any]:
                return functools.partial(make(run.build(), steps).step, run.batch)

            rows.append((name, steps, peak_bytes(prepare, run.network.device)))
    peaks = [peak for name, _, peak in rows if name == "BPTT, K"]
    run.report["peak_memory_bytes"] = max(peak for name, _, peak in rows if name == "EP, T")
    run.report["bptt_bytes_per_step"] = (peaks[-1] - peaks[0]) / (MEMORY_STEPS[-1] - MEMORY_STEPS[0])
    return rows


# -------------------------------------------------------------------------------------------------------- output


def table(title: str, rows: dict[str, Timing], compared: str | None = None) -> str:
    """Return the rows as text; with `compared`, also how long each takes in terms of that one."""
    lines = [f"\n{title}", f"  {'':<44}{'ms':>10}{'spread':>8}{'GFLOP/s':>10}{'of product':>12}{'done':>8}"]
    if compared:
        lines[1] += f"{'of ' + compared:>16}"
    for name, row in rows.items():
        rate = "" if row.rate is None else f"{row.rate / 1e9:.1f}"
        fraction, done = ("" if part is None else f"{part:.0%}" for part in (row.fraction, row.done_fraction))
        lines.append(f"  {name:<44}{row.median * 1e3:>10.2f}{row.spread:>8.0%}{rate:>10}{fraction:>12}{done:>8}")
        if compared:
            lines[-1] += f"{row.median / rows[compared].median:>16.2f}"
    return "\n".join(lines)


def memory_table(rows: list[tuple[str, int, int]]) -> str:
    lines = [f"  {name} = {steps:<28}{peak / 1e6:>10.1f}" for name, steps, peak in rows]
    return "\n".join(["\npeak memory, MB", *lines])


def write_json(path: Path, run: Run) -> None:
    """Write the report, with what it was measured by, as one object."""
    libraries = ["numpy", *(["torch"] if run.reference is not None else [])]
    content = {
        **run.report,
        "gemm_gflops": float(np.median(run.stopwatch.product_rates)) / 1e9,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"cupyep": ep.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in libraries},
        "system": dict(system_report()),
        "options": run.options,
    }
    files.write_json(path, content, indent=1)


def measure_all(run: Run) -> None:
    """Print the tables of edges, settling, learning and memory."""
    network, options = run.network, run.options
    steps = f"T = {options['free_steps']}, K = {options['nudged_steps']}, {options['schedule']}"
    click.echo(table("edges", time_edges(run)))
    click.echo(table("settle", time_settle_steps(run)))
    if options["scratch_mb"]:
        usual = f"{network.device.scratch_bytes / 1e6:.1f} MB"
        click.echo(table(f"settle step by the scratch of a chunk (above: {usual})", time_scratch(run)))
    click.echo(table(f"learning, {steps}", time_learning(run), "BP step"))
    weak = time_weak_feedback(run)
    click.echo(table(f"learning, feedback {WEAK_FEEDBACK}, sweeps, free + nudged", weak, "BP step"))
    if settled := time_to_residual(run):
        click.echo(table(f"free phase to residual {RESIDUAL:g}", settled))
    click.echo(memory_table(measure_memory(run)))


def measure(options: dict[str, Any]) -> Run:
    """Run all parts, print their tables and return the figures."""
    for name, value in (*system_report(), ("--threads", options["threads"] or "as the libraries choose")):
        click.echo(f"{name:<14} {value}")
    run = build_run(options)
    network, (flops, done) = run.network, (count / 1e9 for count in run.counts(Operations.settle_step))
    click.echo(f"\n{network!r}\nbatch {len(run.batch)}, {flops:.2f} GFLOP a settle step by direct convolution")
    click.echo(
        f"{done:.2f} GFLOP of products done; below, 'of product' is the rate of the work, 'done' of what is done"
    )
    check_results(network.device, None if run.reference is None else torch_reference())
    click.echo("results checked: EP's gradient against BPTT's" + (", PyTorch's against EP's" if run.reference else ""))
    if options["scaling"]:
        measure_scaling(run)
        return run
    if options["parts"]:
        measure_parts(run)
    else:
        measure_all(run)
    rates = np.array(run.stopwatch.product_rates) / 1e9
    low, high = np.percentile(rates, [25, 75])
    click.echo(f"\nproduct of this run: {np.median(rates):.1f} GFLOP/s, quartiles {low:.1f} and {high:.1f}")
    for name in ("settle_step_speedup_vs_torch", "ep_step_speedup_vs_torch"):
        if run.report.get(name) is not None:
            click.echo(f"{name:<30} {run.report[name]:.2f}")
    if options["quick"]:
        click.echo("--quick: the figures above mean nothing")
    return run


POSITIVE = click.IntRange(1)


@click.command(cls=OneLineErrors, epilog=EXAMPLES, context_settings={"show_default": True})
@click.option("--arch", type=Names("--arch", ep.ARCHITECTURES, architecture), default="vgg5")
@click.option("--width", default=1.0, help="Channel multiplier.")
@click.option("--image-size", type=POSITIVE, default=32, help="Pixels a side.")
@click.option("--batch-size", type=POSITIVE, default=8)
@click.option("--precision", type=Names("--precision", PRECISIONS), default="float32")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=POSITIVE, help="Threads of cupyep, of BLAS and of PyTorch.  [default: theirs]")
@click.option("--free-steps", type=POSITIVE, default=20)
@click.option("--nudged-steps", type=POSITIVE, default=5)
@click.option("--feedback", default=1.0, help="Weight lambda of the top-down input.")
@click.option("--schedule", type=Names("--schedule", SCHEDULES), default="synchronous", help="Of EP and BPTT steps.")
@click.option("--scratch-mb", type=Numbers(), help="Time steps with so many MB for a chunk of the batch too: 8,16,32.")
@click.option("--repeats", type=POSITIVE, default=5)
@click.option("--parts", is_flag=True, help="Only tell where the time of a training step goes.")
@click.option("--scaling", is_flag=True, help="Only tell what threads and ranks give (tools/scaling.py tells more).")
@click.option("--against", type=Names("--against", ("torch",)), help="Time a reference in PyTorch too.")
@click.option("--json", "json_path", type=NewFile(), help="Also write the figures to this file.")
@click.option("--quick", is_flag=True, help="Only show that everything runs: one repeat, a small product.")
def main(json_path: Path | None, threads: int | None, **options: Any) -> None:
    """Time products, settle steps and learning steps on random images, and measure peak memory.

    The rate of a large matrix product, timed between all else, says what the machine can do at that moment.
    """
    ep.errors.require(
        not options["scaling"] or (json_path is None and not options["parts"]),
        "--scaling takes no --json and no --parts",
    )
    if options["against"] is not None:
        told = "--against torch is for --schedule synchronous, the reference's only one"
        ep.errors.require(options["schedule"] == "synchronous", told)
        torch_reference()
    options["scratch_mb"] = options["scratch_mb"] or []
    ep.errors.require(all(0 < budget < 1e6 for budget in options["scratch_mb"]), "--scratch-mb takes numbers above 0")
    if options["quick"]:
        options["repeats"] = 1
    with limit_threads(threads) if threads else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ep.ConvergenceWarning)  # phases end unsettled here, which the table says
        run = measure({**options, "threads": threads})
        if json_path is not None:
            write_json(json_path, run)


if __name__ == "__main__":
    main()
