"""`cupyep info`."""

from __future__ import annotations

from typing import Any

import click

from cupyep.backend.blank import KINDS
from cupyep.cli.shared import Names, SectionedCommand, chosen_config, config_options, given_options
from cupyep.commands.memory import MEMORY_OPTIONS, network_report
from cupyep.commands.system import system_report
from cupyep.errors import require

EXAMPLES = """\b
Examples:
  cupyep info                                                        device, libraries, data folder
  cupyep info --arch vgg12 --batch-size 128 --device-kind gpu        layers, products, planned memory
  cupyep info --arch vgg7 --algorithm bptt --nudged-steps 20
"""


@click.command(cls=SectionedCommand, epilog=EXAMPLES)
@config_options(("data_dir", "algorithm", *MEMORY_OPTIONS))
@click.option(
    "--device-kind",
    type=Names("--device-kind", KINDS),
    help="Plan for a cpu or a gpu, there or not.  [default: that of --device]",
)
def info(data_dir: str | None, device_kind: str | None, **options: Any) -> None:
    """Show this machine, or a network.

    The machine: device, libraries, data folder. With any option of a network: its layers with their shapes, its
    parameters, its products, and the planned peak memory of a training step by purpose (see cupyep memory).
    """
    given = given_options(options)
    if not given and device_kind is None:
        for name, value in system_report(data_dir):
            click.echo(f"{name:<14} {value}")
        return
    require(data_dir is None, "--data-dir says nothing of a network; give it alone")
    config = chosen_config(given)
    click.echo(network_report(config, device_kind))
