"""Where data sets lie, and where what is made of them is kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cupyep import errors
from cupyep.files import expanded


def data_directory(data_dir: str | Path | None = None) -> Path:
    """Return the folder of data files: the argument, else ``CUPYEP_DATA``, else the user's cache folder.

    The cache folder is ``$XDG_CACHE_HOME/cupyep``, or ``~/.cache/cupyep``.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cupyep"
    return _at_home(data_dir or os.environ.get("CUPYEP_DATA") or cache, "data folder", "--data-dir or CUPYEP_DATA")


def cache_directory() -> Path:
    """Return the folder of what can be made again, teachers above all: ``CUPYEP_CACHE``, else the platform's place.

    That is ``cupyep`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, on macOS in ``~/Library/Caches``, on Windows in
    ``%LOCALAPPDATA%``.
    """
    base = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local"}
    place = os.environ.get("XDG_CACHE_HOME") or base.get(sys.platform, "~/.cache")
    folder = os.environ.get("CUPYEP_CACHE") or Path(place) / "cupyep"
    return _at_home(folder, "cache folder", "CUPYEP_CACHE")


def _at_home(folder: str | Path, what: str, remedy: str) -> Path:
    try:
        return expanded(folder)
    except errors.ConfigurationError as error:
        raise errors.ConfigurationError(f"{what} {error}; by {remedy}") from error
