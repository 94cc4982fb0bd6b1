"""`cupyep memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cupyep.backend.blank import KINDS
from cupyep.cli.shared import FilePath, Names, Numbers, SectionedCommand, chosen_config, config_options, given_options
from cupyep.commands import memory as planning
from cupyep.errors import require

EXAMPLES = """\b
Examples:
  cupyep memory --arch vgg12 --batch-size 128 --steps 10,50,250 --device-kind gpu
  cupyep memory --arch vgg12 --micro-batch 32 --precision float16 --device-kind gpu
  cupyep memory --arch vgg5 --width 0.25 --batch-size 32 --steps 2,8 --measure    is the plan right?
"""
MOST_NUMBERS = 20


@click.command(cls=SectionedCommand, epilog=EXAMPLES)
@config_options(planning.MEMORY_OPTIONS)
@click.option(
    "--steps",
    type=Numbers(),
    default="10,50,250",
    show_default=True,
    help="Numbers of steps T: free steps of EP, unrolled steps of BPTT.",
)
@click.option(
    "--device-kind",
    type=Names("--device-kind", KINDS),
    help="Plan for a cpu or a gpu (one with 50 MB of L2 cache), there or not.  [default: that of --device]",
)
@click.option("--measure", is_flag=True, help="Also do one step each on the device, and compare.")
@click.option("--json", "json_path", type=FilePath(), help="Also write the tables to this file.")
def memory(steps: list[float], device_kind: str | None, measure: bool, json_path: Path | None, **options: Any) -> None:
    """Plan the peak memory of EP, BPTT and BP.

    By purpose, in bytes that a step with optimizer takes, without taking any: the arrays of all phases are laid out on
    paper by the code that lays them out for a step. EP takes the same for every T, BPTT more for every step.
    """
    whole = all(number == int(number) for number in steps)
    right = whole and len(steps) <= MOST_NUMBERS and all(1 <= number <= planning.MOST_STEPS for number in steps)
    require(right, f"--steps must be up to {MOST_NUMBERS} integers from 1 to {planning.MOST_STEPS}")
    if json_path is not None:
        require(json_path.parent.is_dir(), f"--json: there is no folder '{json_path.parent}'")
        require(not json_path.is_dir(), f"--json: '{json_path}' is a folder, not a file")
    given = given_options(options)
    config = chosen_config(given)
    report = planning.memory_report(config, [int(number) for number in steps], device_kind, measure, click.echo)
    click.echo(report.text())
    if json_path is not None:
        report.write_json(json_path)
        click.echo(f"written to {json_path}")
