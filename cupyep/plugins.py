"""Code of the user's own, imported because its name was given, and for no other reason."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cupyep.errors import ConfigurationError, CupyepError, one_line


@contextlib.contextmanager
def foreign_code(what: str, kind: type[CupyepError] = CupyepError) -> Iterator[None]:
    """Turn whatever code that is not ours raises into one line of `kind` that begins with `what`."""
    try:
        yield
    except (CupyepError, MemoryError):
        raise
    except Exception as error:  # such code raises anything
        raise kind(f"{what}: {one_line(error, 300)}") from error


@contextlib.contextmanager
def working_folder() -> Iterator[None]:
    """Let modules be found in the folder where the command was started."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def imported(name: str, what: str, attribute: str | None = None) -> Any:
    """Return the module ``package.module``, or an attribute of it; a message calls it `what`.

    Raises
    ------
    ConfigurationError
        If there is no such module or attribute.
    """
    try:
        module = importlib.import_module(name)
        return module if attribute is None else getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        text = f"{what}: {one_line(error)}; run from the folder that holds {name.split('.')[0]}"
        raise ConfigurationError(text) from error


def is_module_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))
