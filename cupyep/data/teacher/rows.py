"""Rows of an array in a file that is too large for memory, read before they are asked for."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import h5py
import numpy as np

AHEAD = 2  # batches kept: the one that is asked for, perhaps in parts, and the next


class Rows:
    """Rows of an HDF5 array (V, N, ...), counted through: row n of view v is number ``v N + n``.

    Parameters
    ----------
    array : h5py.Dataset
    """

    def __init__(self, array: h5py.Dataset):
        self._array, self._shape, self._dtype = array, array.shape, array.dtype
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque(maxlen=AHEAD)
        # HDF5 takes milliseconds to pick a hundred rows, so those that lie in the file as they are come straight from
        # there; a type that NumPy has not just so, and whatever is stored in chunks, does not.
        plain = array.id.get_type() == h5py.h5t.py_create(array.dtype) and hasattr(os, "pread")
        self._offset = array.id.get_offset() if plain else None
        self._file = None if self._offset is None else array.file.id.get_vfd_handle()

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
