"""Recipes: TOML files with the options of ``cupyep train``, one for each published or reproduced result.

The first line of a file is a comment that says what it is and where it is from. Every option has a mark behind it:
``[paper]``, published in the source that the head of the file names, or ``[own]``, this project's own choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cupyep.errors import ConfigurationError, nearest
from cupyep.files import expanded, read_text
from cupyep.training.config import OPTIONS, WRITTEN, make_config, read_toml
from cupyep.training.options import missing

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, VGG-5 before VGG-11."""
    names = [path.name.removesuffix(".toml") for path in FOLDER.glob("*.toml")]
    return sorted(names, key=lambda name: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name)])


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of the recipe called `recipe`, or of the user's own file ``*.toml``.

    `ConfigurationError` if it is neither.
    """
    names = recipe_names()
    if str(recipe) in names:
        return FOLDER / f"{recipe}.toml"
    path = expanded(recipe)
    if path.is_file():
        return path
    raise ConfigurationError(f"no recipe and no file '{recipe}'{nearest(str(recipe), names)} (see cupyep recipes)")


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Return the options of a recipe by name, their values checked one by one; see `find_recipe` for the errors.

    The config.toml of a run holds every option. Those that had no effect in it are no settings, and those that have the
    value which follows from the others will follow again.
    """
    values = read_toml(find_recipe(recipe))
    if not recipe_text(recipe).startswith(WRITTEN):
        return values
    case = {name: spec.default for name, spec in OPTIONS.items()} | values
    idle = {name for name in values if missing(OPTIONS[name], case) or _follows(name, values)}
    return {name: value for name, value in values.items() if name not in idle}


def _follows(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether an option without a default of its own has the value that others give it."""
    others = {other: value for other, value in values.items() if other != name}
    return OPTIONS[name].default is None and getattr(make_config(others), name) == values[name]


def recipe_text(recipe: str | Path) -> str:
    """Return the text of a recipe, comments included; see `find_recipe` for the errors."""
    path = find_recipe(recipe)
    try:
        return read_text(path, 1 << 15)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read '{path}': {error}") from error


def recipe_summary(recipe: str | Path) -> str:
    """Return the first line of a recipe: what it is, and its source."""
    return recipe_text(recipe).partition("\n")[0].removeprefix("#").strip()
