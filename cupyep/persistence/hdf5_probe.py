"""Run in a process of its own, by `cupyep.persistence.hdf5`: go through an HDF5 file, to see whether that ends well.

Touches what a reader may touch: every object, every attribute, the index of every chunked array. Exit code 0, or 1 with
the reason as the last line on stderr; or the process is ended by the file.
"""

from __future__ import annotations

import contextlib
import sys

import h5py

MEMORY_BYTES = 1 << 30


def _limit_memory() -> None:
    with contextlib.suppress(ImportError):  # not everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _visit(_: str | None, item: h5py.Group | h5py.Dataset) -> None:
    for name in item.attrs:
        with contextlib.suppress(TypeError):  # of a type that NumPy does not have, which is no damage
            item.attrs[name]
    if isinstance(item, h5py.Dataset) and item.chunks:
        item.id.get_num_chunks()


if __name__ == "__main__":
    _limit_memory()
    try:
        with h5py.File(sys.argv[2], "r", locking=False) as file:
            _visit(None, file)
            file.visititems(_visit)
    except Exception as error:  # a damaged file raises nearly anything; the parent makes one line of it
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:300])
