"""Recipes: TOML files with the options of ``cupyep train`` for one published or reproduced result each."""

from __future__ import annotations

from pathlib import Path

from cupyep.errors import ConfigurationError, nearest

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of the recipe called `recipe`, or of the user's own file ``*.toml``.

    Raises
    ------
    ConfigurationError
        If it is neither.
    """
    names = recipe_names()
    if str(recipe) in names:
        return FOLDER / f"{recipe}.toml"
    if Path(recipe).is_file():
        return Path(recipe)
    hint = nearest(str(recipe), names)
    raise ConfigurationError(f"no recipe and no file '{recipe}'{hint} (recipes: {', '.join(names)})")
