"""The commands that report on a configuration, not on a run: check, memory, info, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cupyep.cli.help import SectionedCommand
from cupyep.cli.shared import (
    choice,
    chosen_config,
    complete_recipe,
    config_options,
    is_given,
    json_option,
    plugin_option,
    recipe_option,
    write_json,
)
from cupyep.cli.types import Numbers
from cupyep.commands import gradient_check
from cupyep.commands import memory as planning
from cupyep.commands.system import rank_report, system_report
from cupyep.errors import require
from cupyep.memory.plan import KINDS
from cupyep.parallel import join
from cupyep.parallel.planning import LATENCY_US, LINK_GB, MOST
from cupyep.recipes import recipe_names, recipe_summary, recipe_text
from cupyep.training.config import OPTIONS
from cupyep.training.options import checked

CHECK_EXAMPLES = """\b
Examples:
  cupyep check --arch vgg5 --dataset digits --image-size 16     a minute, on bundled images
  cupyep check --arch vgg11 --width 0.125 --aug le --kappa 0.5  with local errors
  cupyep check --recipe vgg11-le-cifar10 --width 0.125          at a recipe's beta, kappa, gain
"""


CHECK_COMMON = ("recipe", "arch", "width", "dataset", "image_size", "feedback", "beta", "aug", "kappa")


@click.command(cls=SectionedCommand, common=(*CHECK_COMMON, "device", "json_path"), epilog=CHECK_EXAMPLES)
@config_options((name for name in gradient_check.CHECK_OPTIONS if name != "beta"), gradient_check.CHECK_DEFAULTS)
@recipe_option(
    "Take network, data, nudge and signals that are not given from a recipe; the phases settle as said here."
)
@click.option(
    "--beta",
    "--betas",
    "beta",
    type=Numbers(),
    help=f"{OPTIONS['beta'].metadata['text'].partition(';')[0]}, or several, such as 0.5,0.05, for a table each.  "
    f"[default: {gradient_check.CHECK_DEFAULTS['beta']}]",
)
@json_option("the table")
def check(recipe: str | None, beta: list[float] | None, json_path: Path | None, given: dict[str, Any]) -> None:
    """Compare EP's gradient with BPTT's.

    Layer by layer, from the same settled free state, for the nudge form asked for and the other one. In tf32, float16
    and bfloat16 with BPTT in float64 and with EP in float32 ("to float32"), each settled on from the free state of
    float32; "from zeros" is the cosine to float32 where that precision has found its free state by itself.
    """
    betas = [checked(OPTIONS["beta"], number, "--beta") for number in beta or ()]
    given |= {"beta": betas[0]} if betas else {}
    config = chosen_config(given, recipe, gradient_check.CHECK_DEFAULTS, gradient_check.recipe_options)
    report = gradient_check.check_gradient(config, betas, report=click.echo)
    click.echo(report.table())
    write_json(report, json_path)


MEMORY_EXAMPLES = """\b
Examples:
  cupyep memory --arch vgg12 --batch-size 128 --steps 10,50,250 --device-kind gpu
  cupyep memory --arch vgg12 --micro-batch 32 --precision float16 --device-kind gpu
  cupyep memory --arch vgg5 --width 0.25 --batch-size 32 --steps 2,8 --measure    is the plan right?
  cupyep memory --arch vgg7 --steps 2 --ranks 64 --link 50,10 --step-ms 12       what would 64 cards do?
"""
MOST_NUMBERS = 20


MEMORY_COMMON = ("arch", "width", "dataset", "batch_size", "micro_batch", "precision", "device")


@click.command(cls=SectionedCommand, common=(*MEMORY_COMMON, "device_kind", "steps", "measure"), epilog=MEMORY_EXAMPLES)
@config_options(planning.MEMORY_OPTIONS)
@click.option(
    "--steps",
    type=Numbers(),
    default="10,50,250",
    show_default=True,
    help="Numbers of steps T: free steps of EP, unrolled steps of BPTT.",
)
@choice(
    "--device-kind",
    among=KINDS,
    text="Plan for a cpu or a gpu (one with 50 MB of L2 cache), there or not.  [default: that of --device]",
)
@click.option("--measure", is_flag=True, help="Also do one step each on the device, and compare.")
@click.option(
    "--ranks",
    type=click.IntRange(2, MOST),
    help="Also plan up to so many ranks, --batch-size images each: which part of a step is work.  [default: none]",
)
@click.option(
    "--link",
    type=Numbers(),
    help=f"GB/s of the slowest link between ranks, each way; 50,10: both.  [default: {LINK_GB:g}]",
)
@click.option("--latency-us", type=float, help=f"Time of an empty message between ranks.  [default: {LATENCY_US:g}]")
@click.option(
    "--step-ms", type=float, help="Time of a step of one rank.  [default: EP with the first of --steps, measured here]"
)
@json_option("the tables")
def memory(
    steps: list[float],
    device_kind: str | None,
    measure: bool,
    ranks: int | None,
    link: list[float] | None,
    latency_us: float | None,
    step_ms: float | None,
    json_path: Path | None,
    given: dict[str, Any],
) -> None:
    """Plan the peak memory of EP, BPTT and BP.

    By purpose, in bytes that a step with optimizer takes, without taking any: the arrays of all phases are laid out on
    paper by the code that lays them out for a step. EP takes the same for every T, BPTT more for every step.

    With --ranks also how much of N cores, cards or machines a training uses, with as large a batch on every rank (a
    rank) or one shared out (in all), and up to how many it is 80 %; see docs/scaling.md.
    """
    whole = all(number.is_integer() for number in steps)  # inf and nan are none
    right = whole and len(steps) <= MOST_NUMBERS and all(1 <= number <= planning.MOST_STEPS for number in steps)
    require(right, f"--steps must be up to {MOST_NUMBERS} integers from 1 to {planning.MOST_STEPS}")
    alone = {"--link": link, "--latency-us": latency_us, "--step-ms": step_ms}
    odd = next((name for name, value in alone.items() if value is not None and ranks is None), None)
    require(odd is None, f"{odd} needs --ranks")
    config = chosen_config(given)
    plan = None
    if ranks is not None:
        latency_us = LATENCY_US if latency_us is None else latency_us
        plan = planning.rank_plan(config, int(steps[0]), ranks, link or [LINK_GB], latency_us, step_ms)
    report = planning.memory_report(config, [int(number) for number in steps], device_kind, measure, click.echo)
    report.ranks = plan
    click.echo(report.text())
    write_json(report, json_path)


INFO_EXAMPLES = """\b
Examples:
  cupyep info                                                        device, libraries, data folder
  cupyep info --arch vgg12 --batch-size 128 --device-kind gpu        layers, products, planned memory
  cupyep info --arch vgg7 --algorithm bptt --nudged-steps 20
"""


INFO_COMMON = ("data_dir", "arch", "width", "dataset", "algorithm", "batch_size", "precision", "device")


@click.command(cls=SectionedCommand, common=(*INFO_COMMON, "device_kind"), epilog=INFO_EXAMPLES)
@config_options(("data_dir", "algorithm", *planning.MEMORY_OPTIONS))
@choice("--device-kind", among=KINDS, text="Plan for a cpu or a gpu, there or not.  [default: that of --device]")
def info(device_kind: str | None, given: dict[str, Any]) -> None:
    """Show this machine, or a network.

    The machine: device, libraries, data folder; started by mpirun, a line a process. With any option of a network: its
    layers with their shapes, its parameters, its products, and the planned peak memory of a training step by purpose
    (see cupyep memory).
    """
    if not given.keys() - {"data_dir", "device"} and device_kind is None:
        ranks, name = join(), given.get("device", "auto")
        if ranks.size > 1:
            lines = ranks.gather(rank_report(ranks, name))
        else:
            lines = [f"{word:<14} {value}" for word, value in system_report(given.get("data_dir"), name)]
        click.echo("\n".join(lines))
        return
    require("data_dir" not in given, "--data-dir says nothing of a network; give it alone")
    require(given.keys() - {"device"} != {"plugin"}, "--plugin says nothing by itself; give --arch, too")
    config = chosen_config(given)
    click.echo(planning.network_report(config, device_kind))


RECIPES_EXAMPLES = """\b
Examples:
  cupyep recipes                                   all of them, with their sources
  cupyep recipes vgg7-kd-cifar10                   every setting, and where it is from
  cupyep recipes vgg7-kd-cifar10 > mine.toml       a recipe to change: cupyep train --recipe mine.toml
  cupyep recipes mine.toml                         is it valid?
"""


@click.command(epilog=RECIPES_EXAMPLES)
@click.argument("recipe", required=False, metavar="[NAME|FILE]", shell_complete=complete_recipe)
@plugin_option("that registers what the recipe names")
def recipes(recipe: str | None) -> None:
    """Show the recipes, or one of them.

    NAME is a recipe of the package, FILE a TOML file of your own; it is checked, and printed as it is. Each setting is
    marked [paper], published in the source named at the top, or [own], this project's choice.
    """
    if recipe is None:
        require(not is_given("plugin"), "--plugin is for one recipe: give its FILE, too")
        names = recipe_names()
        width = max(map(len, names))
        for name in names:
            click.echo(f"{name:<{width}}  {recipe_summary(name)}")
        return
    chosen_config({}, recipe)
    click.echo(recipe_text(recipe), nl=False)
