"""Files that survive: whole or not at all, never two writers in one folder, nothing left behind by killed processes."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from cupyep.errors import ConfigurationError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

LOCK, OWNER = ".lock", ".owner"
PAUSES = (0.1, 0.4, 1.0) if os.name == "nt" else ()  # seconds between attempts to rename
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
#: What a file may begin with -> its encoding. That of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def expanded(path: str | Path) -> Path:
    """Return `path` with ``~`` or ``~user`` at its beginning replaced by that home, as a shell does it.

    `ConfigurationError` if nobody knows where the home is.
    """
    try:
        return Path(path).expanduser() if str(path).startswith("~") else Path(path)
    except RuntimeError as error:
        words = "whose home that is, is not known; set HOME, or name the folder in full (./~x for a file called ~x)"
        raise ConfigurationError(f"'{path}': {words}") from error


def read_text(path: str | Path, limit: int, errors: str = "strict") -> str:
    """Return the text of a file of at most `limit` bytes; `errors` is that of `bytes.decode`.

    It is UTF-8 unless a byte order mark, as Windows' programs write it, says UTF-16 or UTF-32. `OSError` if the file
    cannot be read or is larger, `ValueError` if it is not text of that encoding.
    """
    with open(path, "rb") as file:
        # Asked for more than there is, Python would allocate it.
        content = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes")
    encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        raise ValueError(f"not text in {kind} (byte {error.start} is wrong); save it as UTF-8") from error


def temporary_path(path: Path) -> Path:
    """Return where this process keeps what becomes `path`; `remove_leftovers` knows such names."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` durably, on failure it disappears."""
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _rename(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | memoryview, keep_as: Path | None = None) -> None:
    """Write `content` to `path`, durably and as a whole; what `path` held before is then found at `keep_as`, if given.

    `path` keeps what it held if anything fails; `OSError` if the disk is full, for example.
    """
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None:
            with replacing(keep_as) as second:
                link(path, second)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write `content` as `write_file` does; numbers that are not finite, which JSON does not have, become null."""
    text = json.dumps(_finite(content), indent=indent, allow_nan=False)
    write_file(path, f"{text}\n".encode())


def read_json(path: str | Path, limit: int) -> Any:
    """Return what a JSON file of at most `limit` bytes holds; see `read_text` for the errors.

    `ValueError` also if it is not JSON, or lists are in lists so deep that nobody meant it.
    """
    try:
        return json.loads(read_text(path, limit))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    return path.name in (LOCK, OWNER) or TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path, age_s: float = 0.0) -> None:
    """Remove the temporary files that killed processes left in `folder`.

    The caller holds its lock, or takes those that nobody has written to for `age_s` seconds.
    """
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # another process has just renamed or removed it
                if time.time() - path.stat().st_mtime >= age_s:
                    path.unlink()


def can_write(folder: Path) -> bool:
    """Return whether files can be made in `folder`, or, where there is none yet, the folder itself."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


class FolderLock:
    """At most one process writes in a folder.

    The operating system drops the lock when its process ends, however it ends. On a file system without locks (some
    network file systems) a file names the owner instead; it is void when that process has ended on this machine, and
    has to be removed by hand when it was killed on another one. On Windows nothing is locked.
    """

    _owned: ClassVar[set[Path]] = set()  # by this process, where a file says so
    _one_by_one = threading.Lock()  # of its threads

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self.owner = folder / OWNER
        self._file: io.FileIO | None = None
        self._owns = False

    def acquire(self) -> str:
        """Take the lock, unless this object holds it already; return ``""``, or who else holds it."""
        if self._file is not None or self._owns or fcntl is None:
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
            with self._one_by_one:
                return self._claim()
        self._file = file
        with contextlib.suppress(OSError):  # on a full disk the holder stays nameless
            file.truncate(0)
            file.write(f"process {os.getpid()}".encode())
        return ""

    def _claim(self) -> str:
        """Make the file that names the owner, in place of one that is void; return ``""``, or who owns the folder."""
        for _ in range(2):
            try:
                with io.FileIO(self.owner, "x") as file, contextlib.suppress(OSError):
                    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            except FileExistsError:
                holder = self._holder()
                if holder:
                    return holder
                continue
            self._owns = True
            self._owned.add(self.owner.resolve())
            return ""
        return "another process"

    def _holder(self) -> str:
        """Return who owns the folder by file; an owner that has ended is removed, and ``""`` returned."""
        with contextlib.suppress(FileNotFoundError):
            text = self.owner.read_bytes()[:200].decode(errors="replace")
            word = re.fullmatch(r"process (\d+) on (.+)", text)
            if word is None or word[2] != socket.gethostname():
                return f"{text or 'another process'} (if that has ended, remove '{self.owner}')"
            if self.owner.resolve() in self._owned if int(word[1]) == os.getpid() else _is_running(int(word[1])):
                return text
            # Renamed first: of several processes that find it void, one removes it, and never a new one.
            void = self.owner.with_name(f"{OWNER}.{os.getpid()}.tmp")
            os.rename(self.owner, void)
            if void.read_bytes() != text.encode():
                with contextlib.suppress(FileExistsError):
                    os.link(void, self.owner)
            void.unlink()
        return ""

    def release(self) -> None:
        """Give the lock back if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._owns:
            self._owns = False
            self._owned.discard(self.owner.resolve())
            self.owner.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # it may be another user's
    return True
