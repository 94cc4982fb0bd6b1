"""`cupyep info`."""

from __future__ import annotations

import click

from cupyep.cli.shared import config_options
from cupyep.training.system import system_report


@click.command()
@config_options(("data_dir",))
def info(data_dir: str | None) -> None:
    """Show device, libraries, data folder."""
    for name, value in system_report(data_dir):
        click.echo(f"{name:<14} {value}")
