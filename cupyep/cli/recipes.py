"""`cupyep recipes`."""

from __future__ import annotations

import click

from cupyep.cli.shared import chosen_config
from cupyep.recipes import recipe_names, recipe_summary, recipe_text

EXAMPLES = """\b
Examples:
  cupyep recipes                                   all of them, with their sources
  cupyep recipes vgg7-kd-cifar10                   every setting, and where it is from
  cupyep recipes vgg7-kd-cifar10 > mine.toml       a recipe to change: cupyep train --recipe mine.toml
  cupyep recipes mine.toml                         is it valid?
"""


def complete_recipe(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the recipes that begin with `incomplete`, for the shell."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


@click.command(epilog=EXAMPLES)
@click.argument("recipe", required=False, metavar="[NAME|FILE]", shell_complete=complete_recipe)
def recipes(recipe: str | None) -> None:
    """Show the recipes, or one of them.

    NAME is a recipe of the package, FILE a TOML file of your own; it is checked, and printed as it is. Each setting is
    marked [paper], published in the source named at the top, or [own], this project's choice.
    """
    if recipe is None:
        names = recipe_names()
        width = max(map(len, names))
        for name in names:
            click.echo(f"{name:<{width}}  {recipe_summary(name)}")
        return
    chosen_config({}, recipe)
    click.echo(recipe_text(recipe), nl=False)
