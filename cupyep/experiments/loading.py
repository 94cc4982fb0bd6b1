"""Reads experiments from the TOML files of this folder.

A file holds the experiment's `title`, `claim`, `order` (its place in lists, else the last), `measure` (a name of
`cells.MEASURES`), `columns` (of `findings.COLUMNS`), `verdict` (see `findings.verdict`), `remarks`, and the tables

- ``[figures]``: file name -> arguments of its function in `figures.KINDS`, of that name or called `kind`;
- ``[options]``: options of ``cupyep train`` (underscores for dashes) that all rows share;
- ``[rows]``: key -> `label`, options, and `published` figures (column -> figure) with their `source`;
- ``[small]``, ``[medium]``, ``[full]``, one a scale that it has: `setting` (for the reader), `seeds`, options, and
  ``rows`` that add to those of the same keys; or `only`, the keys of the rows that this scale has.

A scale or a row may name the row `beside` it, that of BP of the same network, with which reports compare it, and say
under `tuning` how its learning rate was found, which they print: rates that pilot runs compared, over how many epochs.
What a row does not say is its scale's.

A scale or a row may `use` a table of ``shared.toml`` or a recipe. Of an option that is given more than once the last
counts: used by the scale, shared by all rows, the scale's own, used by the row, the row's own. In `setting`, ``{text}``
is the text of what the scale uses, ``{epochs}`` and the like are options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from cupyep.errors import ConfigurationError, choose
from cupyep.experiments.cells import MEASURES
from cupyep.experiments.design import SCALES, Experiment, Row, Scale
from cupyep.experiments.figures import KINDS
from cupyep.experiments.findings import COLUMNS, verdict
from cupyep.files import read_text
from cupyep.recipes import find_recipe
from cupyep.training.config import read_toml, tomllib

FOLDER, SHARED = Path(__file__).parent, "shared"
KEYS = ("title", "claim", "order", "measure", "columns", "verdict", "remarks", "figures", "options", "rows", *SCALES)
OF_A_ROW = ("label", "published", "source", "beside", "tuning")  # besides options
ABOUT = (*OF_A_ROW, "use", "text", "setting", "seeds", "rows", "only")


def load_experiments(folder: Path = FOLDER) -> dict[str, Experiment]:
    """Return the experiments of a folder by name, in their order."""
    read = {path.stem: _read(path) for path in sorted(folder.glob("*.toml")) if path.stem != SHARED}
    names = sorted(read, key=lambda name: read[name].get("order", math.inf))
    return {name: load_experiment(name, read[name]) for name in names}


def load_experiment(name: str, content: Mapping[str, Any]) -> Experiment:
    """Return the experiment that the `content` of a file describes.

    Raises
    ------
    ConfigurationError
        If it lacks an entry, or names one, a column, figure or measurement that there is not.
    """
    try:
        for key in content:
            choose("entry", key, KEYS)
        figures = {file: dict(how) for file, how in content["figures"].items()}
        kinds = {file: choose("figure", how.pop("kind", file), KINDS) for file, how in figures.items()}
        return Experiment(
            name=name,
            title=content["title"],
            claim=content["claim"],
            scales={scale: _scale(content, content[scale]) for scale in SCALES if scale in content},
            measure=MEASURES[choose("measurement", content["measure"], MEASURES)],
            columns=[COLUMNS[choose("column", column, COLUMNS)] for column in content["columns"]],
            figures={file: partial(KINDS[kinds[file]], **how) for file, how in figures.items()},
            verdict=partial(verdict, content["verdict"]),
            remarks=content.get("remarks", ""),
        )
    except KeyError as error:
        raise ConfigurationError(f"experiment '{name}': its file lacks {error}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"experiment '{name}': {error}") from error


def _scale(content: Mapping[str, Any], scale: Mapping[str, Any]) -> Scale:
    base = {**_used(scale.get("use")), **_options(content.get("options", {})), **_own(scale)}
    shared, own = content.get("rows", {}), scale.get("rows", {})
    keys = scale.get("only", {**shared, **own})
    about = {name: scale[name] for name in ("beside", "tuning") if name in scale}
    rows = [_row(key, base, about, shared.get(key, {}), own.get(key, {})) for key in keys]
    for row in rows:
        choose("row", row.beside or row.key, [row.key for row in rows])
    text = _shared().get(scale.get("use", ""), {}).get("text", "")
    return Scale(scale["setting"].replace("{text}", text).format(**base), rows, scale["seeds"])


def _row(key: str, base: Mapping[str, Any], *tables: Mapping[str, Any]) -> Row:
    options, about = dict(base), {}
    for table in tables:
        options.update(_options(table))
        about.update({name: table[name] for name in OF_A_ROW if name in table})
    return Row(key, about.pop("label"), options, **about)


def _options(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in a table, those of what it uses first."""
    return {**_used(table.get("use")), **_own(table)}


def _own(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in ABOUT}


@cache
def _used(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    return _options(_shared()[name]) if name in _shared() else read_toml(find_recipe(name))


@cache
def _shared() -> dict[str, Any]:
    return _read(FOLDER / f"{SHARED}.toml")


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(read_text(path, 1 << 16))
