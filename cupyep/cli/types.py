"""Types of the values of options and arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from cupyep.errors import choose, require
from cupyep.files import expanded


class Names(click.ParamType):
    """One of some names, or a text that `check` lets pass; a wrong one is answered with the nearest."""

    name = "name"

    def __init__(self, what: str, names: tuple[str, ...], check: Callable[[str, str], Any] | None = None):
        self.what = what
        self.names = names
        self.check = check

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names)}{'|TEXT' if self.check else ''}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if self.check is None:
            return choose(self.what, value, self.names)
        self.check(value, self.what)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names if name.startswith(incomplete)]


class Numbers(click.ParamType):
    """A number, or several with commas between them."""

    name = "number[,number...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            return self.fail(
                f"'{value}' is neither a number nor numbers with commas between them: 0.1 or 0.1,0.01", param, ctx
            )


class IntegerOr(click.ParamType):
    """An integer, or a word that stands for one."""

    def __init__(self, word: str):
        self.name, self.word = f"integer or {word}", word

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"INTEGER|{self.word}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return value if value == self.word else click.INT.convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(self.word)] if self.word.startswith(incomplete) else []


class FilePath(click.Path):
    """A path, as `Path`; ``~`` is the home also where no shell sees it (``--run-dir=~/x``, Windows)."""

    def __init__(self, **how: Any):
        super().__init__(path_type=Path, **how)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        found: Any = super().convert(expanded(value), param, ctx)  # click's annotation knows no `path_type`
        return found


class NewFile(FilePath):
    """The path of a file to be written, in a folder that is there; a link stands for what it leads to."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path, name = super().convert(value, param, ctx), param.opts[0] if param else self.name
        path = path.resolve() if path.is_symlink() else path
        require(path.parent.is_dir(), f"{name}: there is no folder '{path.parent}'")
        require(not path.is_dir(), f"{name}: '{path}' is a folder, not a file")
        regular = path.is_file() or not path.exists()  # a device would be replaced by a file
        require(regular and str(path) != "-", f"{name}: '{path}' is not the name of a file")
        return path


class NewJson(NewFile):
    """As `NewFile`, or ``-``; other endings than .json and .jsonl are refused: what follows may be no file to write."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if str(value) == "-":
            return Path(value)
        path, name = super().convert(value, param, ctx), param.opts[0] if param else self.name
        right = path.suffix in (".json", ".jsonl")
        require(right, f"{name}: a file to write ends in .json or .jsonl (got '{path}'); without one, put {name} last")
        return path
