"""`cupyep check`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from cupyep.cli.recipes import complete_recipe
from cupyep.cli.shared import FilePath, Numbers, SectionedCommand, chosen_config, config_options, given_options
from cupyep.commands import gradient_check
from cupyep.errors import require
from cupyep.training.config import require_used

EXAMPLES = """\b
Examples:
  cupyep check --arch vgg5 --dataset digits --image-size 16     a minute, on bundled images
  cupyep check --arch vgg11 --width 0.125 --aug le --kappa 0.5  with local errors
  cupyep check --recipe vgg11-le-cifar10 --width 0.125          at a recipe's beta, kappa, gain
"""


@click.command(cls=SectionedCommand, epilog=EXAMPLES)
@config_options(gradient_check.CHECK_OPTIONS, gradient_check.CHECK_DEFAULTS)
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    shell_complete=complete_recipe,
    help="Take network, data, nudge and signals that are not given from a recipe; the phases settle as said here.",
)
@click.option(
    "--betas",
    type=Numbers(),
    help="Several strengths of the nudge, a table each, such as 0.5,0.05.  [default: the one of --beta]",
)
@click.option("--json", "json_path", type=FilePath(), help="Also write the table to this file.")
def check(recipe: str | None, betas: list[float] | None, json_path: Path | None, **options: Any) -> None:
    """Compare EP's gradient with BPTT's.

    Layer by layer, from the same settled free state, for the nudge form asked for and the other one. In tf32, float16
    and bfloat16 with BPTT in float64 and with EP in float32 ("to float32"), each settled on from the free state of
    float32; "from zeros" is the cosine to float32 where that precision has found its free state by itself.
    """
    require(
        betas is None or all(beta > 0 and math.isfinite(beta) for beta in betas),
        "--betas must be positive numbers with commas between them",
    )
    if json_path is not None:
        require(json_path.parent.is_dir(), f"--json: there is no folder '{json_path.parent}'")
        require(not json_path.is_dir(), f"--json: '{json_path}' is a folder, not a file")
    given = given_options(options)
    config = chosen_config(given, recipe, gradient_check.CHECK_DEFAULTS, gradient_check.recipe_options)
    if betas is not None:
        require("beta" not in given, "--betas takes the place of --beta: give one of them")
        require_used({"beta": betas}, vars(config), where="--betas: ")
    report = gradient_check.check_gradient(config, betas or (), report=click.echo)
    click.echo(report.table())
    if json_path is not None:
        report.write_json(json_path)
        click.echo(f"written to {json_path}")
