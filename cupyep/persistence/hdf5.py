"""HDF5 files that can be trusted not to crash, hang or fill the memory: written with a checksum, read with distrust.

The HDF5 library believes what a file says of itself: one wrong bit in text of variable length makes it loop for ever,
others make it crash, allocate without bound or open other files. So what cupyep writes is *sealed*: the first 512
bytes, which HDF5 leaves to the user, hold the SHA-256 of the rest, and damage is found before HDF5 sees the file. A
file without a seal, as other programs write it, is first walked through by another process (`hdf5_probe`). What a
sound file may hold is checked here before it is read: only numbers and text of bounded size, in this very file.

A seal finds damage; it is no signature, and whoever means harm can make one.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from cupyep.errors import CheckpointError, DataError

SEAL_BYTES = 512  # the smallest user block that HDF5 knows
SIGNATURE = b"\x89HDF\r\n\x1a\n"
SEAL_TEXT = b"cupyep HDF5 file, sha256 of what follows this block: "
ATTRIBUTE_BYTES = 1 << 20
CHUNK_BYTES = 256 << 20
COMPRESSION = 1032  # the most that deflate can do
PROBE = Path(__file__).with_name("hdf5_probe.py")
PROBE_SECONDS = 60
AHEAD = 2  # batches of `Rows` kept: the one that is asked for, perhaps in parts, and the next
# Files are written whole and renamed, so HDF5's own lock guards nothing; some network file systems have none.
LOCKING = False
#: What h5py raises on a damaged or foreign file, one way or another.
ERRORS = (OSError, KeyError, RuntimeError, TypeError, ValueError)
#: Error numbers that say nothing of a file's content.
ELSEWHERE = {
    errno.EAGAIN: "another program has locked it; close it there",
    errno.EACCES: "no permission, or another program has locked it",
    errno.EPERM: "no permission",
    **dict.fromkeys(
        (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS),
        "its file system has no locks; set HDF5_USE_FILE_LOCKING=FALSE in the environment",
    ),
}


def create(path: str | Path | BinaryIO) -> h5py.File:
    """Return a new file, open for writing; to be closed and then sealed."""
    # From this version of HDF5's format on, attributes may be larger than 64 KiB.
    return h5py.File(path, "w", libver=("v108", "v108"), userblock_size=SEAL_BYTES, locking=LOCKING)


def seal(path: str | Path) -> None:
    """Write the checksum into the closed file at `path`, durably.

    Raises
    ------
    DataError
        If the file has no room for it: one that `create` did not make needs a user block of 512 bytes or more.
    """
    with open(path, "rb+") as file:
        head = file.read(SEAL_BYTES)
        if len(head) < SEAL_BYTES or head.startswith(SIGNATURE):
            raise DataError(f"'{path}' has no room for a seal; make it by h5py.File(path, 'w', userblock_size=512)")
        _seal(file)
        file.flush()
        os.fsync(file.fileno())


def _seal(file: BinaryIO) -> None:
    file.seek(SEAL_BYTES)
    text = SEAL_TEXT + checksum(file).encode() + b"\n"
    file.seek(0)
    file.write(text.ljust(SEAL_BYTES, b"\0"))


def image(fill: Callable[[h5py.File], None]) -> memoryview:
    """Return the bytes of a sealed file with what `fill` puts into it.

    It is made in memory: on a full disk, HDF5 fails late, more than once, and not only by exceptions.
    """
    content = io.BytesIO()
    with create(content) as file:
        fill(file)
    _seal(content)
    return content.getbuffer()


def open_file(path: str | Path) -> h5py.File:
    """Open the file at `path` for reading, once its seal holds or, without one, another process survived it.

    Raises
    ------
    OSError
        If it is not HDF5, is damaged, or is more than the HDF5 library can bear.
    """
    if not _is_sealed(path):
        if not h5py.is_hdf5(path):
            raise OSError("no HDF5 signature")
        _probe(path)
    return h5py.File(path, "r", locking=LOCKING)


def blame(error: Exception, content: str = "truncated or damaged") -> str:
    """Return in a few words why a file cannot be read, given one of `ERRORS`: what is in the way, else `content`."""
    return ELSEWHERE.get(error.errno or 0, content) if isinstance(error, OSError) else content


def _is_sealed(path: str | Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(SEAL_BYTES)
        if not head.startswith(SEAL_TEXT):
            return False
        if head[len(SEAL_TEXT) :].split(b"\n")[0] != checksum(file).encode():
            raise OSError(
                "its checksum is not that of its content: damaged, cut, or edited without cupyep.persistence.hdf5.seal"
            )
    return True


def checksum(file: BinaryIO) -> str:
    """Return the SHA-256 of the rest of `file`, as text."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _probe(path: str | Path) -> None:
    # The search path is handed over: a module in the working folder must not be taken for one of ours.
    start = "import sys; sys.path[:] = sys.argv[3:]; import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", start, str(PROBE), os.path.abspath(path), *filter(None, sys.path)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # its threads would count as memory
    try:
        result = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"the HDF5 library does not come to an end with it in {PROBE_SECONDS} seconds") from error
    if result.returncode < 0:
        raise OSError(f"the HDF5 library crashes on it (signal {-result.returncode})")
    if result.returncode > 0:
        last = result.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise OSError(last or f"exit code {result.returncode}")


def attribute(item: h5py.Group | h5py.Dataset, name: str) -> Any:
    """Return an attribute: None if there is none, text as `str` (or an array of them), numbers as NumPy's.

    `TypeError` or `ValueError` if it is neither text nor numbers, or larger than `ATTRIBUTE_BYTES`.
    """
    if name not in item.attrs:
        return None
    found = item.attrs.get_id(name)
    kind = found.get_type()
    if kind.get_class() not in (h5py.h5t.STRING, h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        raise TypeError(f"attribute '{name}' is neither text nor numbers")
    if found.get_space().get_simple_extent_npoints() * max(1, kind.get_size()) > ATTRIBUTE_BYTES:
        raise ValueError(f"attribute '{name}' is larger than {ATTRIBUTE_BYTES} bytes")
    value = item.attrs[name]
    if kind.get_class() != h5py.h5t.STRING or isinstance(value, (str, h5py.Empty)):
        return value
    texts = [text.decode() if isinstance(text, bytes) else text for text in np.ravel(value).tolist()]
    return np.array(texts, object).reshape(value.shape) if isinstance(value, np.ndarray) else texts[0]


def check_format(file: h5py.File, path: Path, kind: str, version: int) -> None:
    """Raise `CheckpointError` unless the file at `path` is of the format ``cupyep-KIND``, and of a version."""
    form, found = attribute(file, "format"), attribute(file, "version")
    if not isinstance(form, str) or form != f"cupyep-{kind}":
        what = form if isinstance(form, str) else "something else"
        raise CheckpointError(f"'{path}' is an HDF5 file but not a cupyep {kind} (it is {what})")
    if not isinstance(found, np.integer) or found != version:
        raise CheckpointError(f"{kind} '{path}' has version {found}; this cupyep reads version {version}")


def find(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset | None:
    """Return what lies at `name` below `group`, or None; links are not followed, least of all into other files."""
    item = group
    for part in name.split("/"):
        if not isinstance(item, h5py.Group) or not isinstance(item.get(part, getlink=True), h5py.HardLink):
            return None
        item = item[part]
    return item


def find_array(group: h5py.Group, name: str, *, compressed: bool = False) -> h5py.Dataset | None:
    """Return the array at `name` below `group`, or None if there is none that lies, complete, in this very file.

    If its values may be `compressed`, an array can be a thousand times as large as the file, and has to be read in
    parts. `ValueError` if the file holds less than the array's shape promises, or a chunk of it is larger than
    `CHUNK_BYTES`.
    """
    array = find(group, name)
    if not isinstance(array, h5py.Dataset) or array.external or array.is_virtual or array.shape is None:
        return None
    created = array.id.get_create_plist()
    filters = [created.get_filter(number)[0] for number in range(created.get_nfilters())]
    compressors = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_LZF}
    harmless = {h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
    allowed = harmless | compressors if compressed else harmless
    if not set(filters) <= allowed or sum(code in compressors for code in filters) > 1:
        raise ValueError(f"array '{name}' is stored through filters that are not read here")
    stored = min(array.id.get_storage_size(), os.path.getsize(array.file.filename))
    promised = math.prod(array.shape) * array.dtype.itemsize  # array.nbytes may overflow
    if promised > stored * (COMPRESSION if set(filters) & compressors else 1):
        raise ValueError(f"array '{name}' promises {promised} bytes, the file holds {stored}")
    if array.chunks and math.prod(array.chunks) * array.dtype.itemsize > CHUNK_BYTES:
        raise ValueError(f"array '{name}' is stored in chunks of more than {CHUNK_BYTES} bytes")
    return array


class Rows:
    """Rows of an HDF5 array (V, N, ...) too large for memory, read before they are asked for.

    They are counted through: row n of view v is number ``v N + n``.
    """

    def __init__(self, array: h5py.Dataset):
        self._array, self._shape, self._dtype = array, array.shape, array.dtype
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque(maxlen=AHEAD)
        # HDF5 takes milliseconds to pick a hundred rows, so those that lie in the file as they are come straight from
        # there; a type that NumPy has not just so, and whatever is stored in chunks, does not.
        plain = array.id.get_type() == h5py.h5t.py_create(array.dtype) and hasattr(os, "pread")
        self._offset = array.id.get_offset() if plain else None
        self._file = -1 if self._offset is None else array.file.id.get_vfd_handle()

    def expect(self, numbers: np.ndarray) -> None:
        """Begin to read some rows, in a thread; those of all but the last two calls are forgotten."""
        numbers = np.unique(numbers)
        if any(np.array_equal(numbers, known) for known, _ in self._ahead):
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "teacher")
        self._ahead.append((numbers, self._reader.submit(self._read, numbers)))

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Return some rows, as stored, in any order and as often as wanted; waits for those that are being read."""
        for known, rows in self._ahead:
            places = np.searchsorted(known, numbers).clip(0, len(known) - 1)
            if np.array_equal(known[places], numbers):
                return rows.result()[places]
        distinct, places = np.unique(numbers, return_inverse=True)
        return self._read(distinct)[places]

    def _read(self, numbers: np.ndarray) -> np.ndarray:
        """Return rows of increasing numbers."""
        count, shape = self._shape[1], self._shape[2:]
        rows = np.empty((len(numbers), *shape), self._dtype)
        if self._offset is None:
            view, row = np.divmod(numbers, count)
            for code in np.unique(view):
                rows[view == code] = self._array[int(code), row[view == code]]
            return rows
        size = rows[0].nbytes
        for number, row in zip(numbers.tolist(), rows.reshape(len(rows), -1), strict=True):
            content = os.pread(self._file, size, self._offset + number * size)
            if len(content) < size:
                raise OSError("the file ends within its rows")
            row[...] = np.frombuffer(content, self._dtype)
        return rows

    def close(self) -> None:
        """End the thread."""
        self._ahead.clear()
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
