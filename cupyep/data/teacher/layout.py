"""What writer and reader of a teacher file agree on.

Row n of a split belongs to sample n of the data set in canonical order, unless the group holds ``index`` (N,): then row
i belongs to sample ``index[i]``, increasing. A file made from some samples only has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import h5py

from cupyep.data.dataset import VIEWS

FORMAT, VERSION = "cupyep-teacher", 1
SPLITS = ("train", "test")
DTYPES = ("float32", "float16")
BLOCK_BYTES = 16 << 20  # larger arrays are gone through in blocks of about this size


def views_problem(views: Sequence[str]) -> str:
    """Return what is wrong with `views`, or an empty text."""
    if set(views) <= set(VIEWS) and "identity" in views and len(set(views)) == len(views):
        return ""
    return f"views are {', '.join(map(str, views))}: expected identity, or identity and hflip"


def blocks(array: h5py.Dataset) -> Iterator[slice]:
    """Cut axis 1 of `array` into slices of about `BLOCK_BYTES`."""
    views, count = array.shape[:2]
    step = max(1, BLOCK_BYTES // max(1, array.nbytes // max(1, count)))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
