"""Files that survive: whole or not at all, never two writers in one folder, nothing left behind by killed processes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

LOCK = ".lock"
PAUSES = (0.1, 0.4, 1.0) if os.name == "nt" else ()  # seconds between attempts to rename
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def read_text(path: str | Path, limit: int, errors: str = "strict") -> str:
    """Return the text (UTF-8) of a file of at most `limit` bytes; `errors` is that of `bytes.decode`.

    Raises
    ------
    OSError
        If the file cannot be read or is larger.
    UnicodeDecodeError
    """
    with open(path, "rb") as file:
        # Asked for more than there is, Python would allocate it.
        content = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes")
    return content.decode(errors=errors)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` durably, on failure it disappears."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _rename(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes, keep_as: Path | None = None) -> None:
    """Write `content` to `path`, durably and as a whole.

    Parameters
    ----------
    path : Path
        Keeps what it held if anything fails.
    content : bytes
    keep_as : Path, optional
        What `path` held before is found there afterwards.

    Raises
    ------
    OSError
        If the disk is full, for example.
    """
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None:
            with replacing(keep_as) as second:
                link(path, second)


def _rename(temporary: Path, path: Path) -> None:
    for pause in PAUSES:
        try:
            os.replace(temporary, path)
            return
        except PermissionError:  # Windows, while another program reads `path`
            time.sleep(pause)
    os.replace(temporary, path)


def link(path: Path, other: Path) -> None:
    """Make `other` the same file as `path`, or a copy of it where the file system has no links."""
    try:
        os.link(path, other)
    except OSError:  # a file system without links
        shutil.copyfile(path, other)


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, too, where the platform can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, some network file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_leftover(path: Path) -> bool:
    """Return whether `path` is a temporary file of `replacing`, or a lock."""
    return path.name == LOCK or TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`; the caller holds its lock."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            path.unlink()


def can_write(folder: Path) -> bool:
    """Return whether files can be made in `folder`, or, where there is none yet, the folder itself."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


class FolderLock:
    """At most one process writes in a folder.

    The operating system drops the lock when its process ends, however it ends. Where there are no such locks (Windows,
    some network file systems) nothing is locked.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._file: io.FileIO | None = None

    def acquire(self) -> str:
        """Take the lock, unless this object holds it already; return ``""``, or who else holds it."""
        if self._file is not None or fcntl is None:
            return ""
        file = io.FileIO(self.path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                return file.read(80).decode(errors="replace") or "another process"
        except OSError:  # a file system without locks
            file.close()
            return ""
        self._file = file
        with contextlib.suppress(OSError):  # on a full disk the holder stays nameless
            file.truncate(0)
            file.write(f"process {os.getpid()}".encode())
        return ""

    def release(self) -> None:
        """Give the lock back if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None
