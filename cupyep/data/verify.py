"""Are the files what they should be? Lengths, labels, images of each class, and published MD5 sums.

Everything is read as training reads it, so that a truncated or damaged file is named by the reader's own message.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cupyep.data import digits
from cupyep.data.dataset import layouts_found
from cupyep.data.files import plain_name, read_bounded
from cupyep.data.original import check_original
from cupyep.data.sources import SOURCES, Arrays, Source
from cupyep.errors import DataError

LIMIT = 1 << 28  # bytes of a decompressed file that has a published sum; the largest has 47 MB


@dataclass(frozen=True)
class Finding:
    """What was found of one data set in one place.

    Attributes
    ----------
    name, place : str
    good : bool
    text : str
        One line: what was right, or what is wrong and what to do.
    """

    name: str
    place: str
    good: bool
    text: str


def verify(name: str, folder: Path) -> Iterator[Finding]:
    """Yield a finding for every complete set of files of the data set `name` below `folder`; nothing where none is."""
    source = SOURCES[name]
    if not source.remotes and importlib.util.find_spec("sklearn") is not None:
        yield _finding(source, "scikit-learn", lambda: digits.read(source), ())
    for layout in layouts_found(name, folder)[0] if source.remotes else ():
        yield _finding(source, str(layout.place), layout.read, layout.files)


def _finding(source: Source, place: str, read: Callable[[], tuple[Arrays, Arrays]], files: tuple[Path, ...]) -> Finding:
    try:
        arrays = read()
        check_original(source, arrays, place)
        text = f"{_counts(source)}; {_check_sums(source, files)}"
    except DataError as error:
        return Finding(source.name, place, False, str(error))
    return Finding(source.name, place, True, text)


def _counts(source: Source) -> str:
    ranges = [f"{min(c)}" if min(c) == max(c) else f"{min(c)} to {max(c)}" for c in source.per_class]
    return f"{source.train_count} + {source.test_count} images, {' + '.join(ranges)} a class"


def _check_sums(source: Source, files: tuple[Path, ...]) -> str:
    """Return what was compared; raise `DataError` for a file whose MD5 sum is not the published one."""
    published = {Path(remote.place).name: remote.md5 for remote in source.remotes} | dict(source.sums)
    compared = 0
    for file in files:
        if plain_name(file) in source.sums:  # compressed anew by some mirrors: the content counts
            wanted, found = source.sums[plain_name(file)], hashlib.md5(read_bounded(file, LIMIT)).hexdigest()
        elif file.name in published:
            wanted, found = published[file.name], md5(file)
        else:
            continue
        if found != wanted:
            raise DataError(f"{file}: MD5 sum {found}, the original has {wanted}; get the original file")
        compared += 1
    return f"MD5 sums of {compared} files as published" if compared else "no MD5 sums published for these files"


def md5(path: Path) -> str:
    """Return the MD5 sum of a file, read in pieces."""
    digest = hashlib.md5()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
