"""Fetching the original archives, with their published checksums, by pooch (extra ``download``)."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cupyep.data.sources import Source
from cupyep.errors import one_line
from cupyep.files import can_write


def fetch(source: Source, folder: Path) -> str:
    """Download the files of `source` that `folder` lacks; return ``""``, or in one line why that failed."""
    try:
        import pooch
    except ImportError:
        return 'no download: pooch is not installed, pip install "cupyep[download]"'
    if not can_write(folder):
        return f"no download into {folder}: no permission, or a file on the way to it"
    for remote in source.remotes:
        target = folder / remote.place
        new = [path for path in (target.parent, *target.parent.parents) if not path.exists()]
        try:
            pooch.retrieve(remote.url, f"md5:{remote.md5}", fname=target.name, path=target.parent, progressbar=True)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            for path in new:  # made for nothing, the innermost first
                with contextlib.suppress(OSError):  # not made, or not empty
                    path.rmdir()
            if isinstance(error, OSError):
                return f"download of {remote.url} failed: {_reason(error)}"
            # pooch's answer to a wrong checksum; it has deleted the file
            return f"download of {remote.url} discarded: its MD5 sum is not the published {remote.md5}"
    return ""


def _reason(error: OSError) -> str:
    """Return why there was no download; requests puts all that it tried into its text."""
    unreachable = type(error).__name__ in ("ConnectionError", "ConnectTimeout", "ReadTimeout")
    return "the host cannot be reached" if unreachable else one_line(error)
