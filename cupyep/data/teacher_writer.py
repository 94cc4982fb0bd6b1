"""Writing a teacher file: streamed, checked, and in its place only when complete."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cupyep import errors
from cupyep.batch import as_array, is_dtype
from cupyep.data.dataset import VIEWS, Dataset
from cupyep.data.teacher import DTYPES, FORMAT, SPLITS, VERSION, views_problem
from cupyep.errors import LARGEST, TeacherError, instance, integer, items, one_line, shown
from cupyep.files import temporary_path
from cupyep.persistence import hdf5

HEAD_BYTES = 1 << 17  # what a file has besides its numbers, at most


class TeacherWriter:
    """Write a teacher file batch by batch; the file appears, complete, when the ``with`` block ends without error.

    Parameters
    ----------
    path : path
        An existing file is replaced at the end, not before.
    dataset : Dataset
        Gives the data set's name, the class names, and each split's size and labels.
    teacher : str
        What made the logits; free text.
    views : sequence of str, default ("identity", "hflip")
        Must contain "identity".
    features : mapping of str to (H, W, C), optional
        Shape of the activations stored for each layer.
    dtype : {"float32", "float16"}

    Attributes
    ----------
    accuracy : dict of str to float
        Per split, from 0 to 1, identity view; filled by `finish`.

    Raises
    ------
    ConfigurationError
        If an argument is of a wrong kind.
    TeacherError
        If a batch does not fit, values are not finite, or rows are missing at the end.
    """

    def __init__(
        self,
        path: str | Path,
        dataset: Dataset,
        teacher: str,
        views: Sequence[str] = VIEWS,
        features: Mapping[str, tuple[int, ...]] | None = None,
        dtype: Any = np.float32,
    ):
        self.path = errors.path("path", path)
        self.views = tuple(items("views", views, str))
        features = {} if features is None else instance("features", features, Mapping, "a mapping of shapes by layer")
        self.features = {
            layer: errors.shape(f"features of {layer}", size, "H, W, C") for layer, size in features.items()
        }
        instance("dataset", dataset, Dataset)
        instance("teacher", teacher, str, "a text")
        self.accuracy: dict[str, float] = {}
        self._check(not views_problem(self.views), views_problem(self.views))
        self._check(is_dtype(dtype, DTYPES), f"dtype is {shown(dtype)}: choose from {', '.join(DTYPES)}")
        named = all(isinstance(name, str) and name and "/" not in name and name != "." for name in self.features)
        self._check(named, "layer names must not hold '/'")
        self._temporary = temporary_path(self.path)
        self._labels = {name: dataset.split(name).labels for name in SPLITS}
        self._written = {name: np.zeros((len(self.views), len(y)), bool) for name, y in self._labels.items()}
        self._right = {name: np.zeros(len(y), bool) for name, y in self._labels.items()}  # of the identity view
        dtype = np.dtype(dtype)
        with self._disk():
            self._find_room(len(dataset.classes), dtype)
            self._file = hdf5.create(self._temporary)
        try:
            with self._disk():
                self._lay_out(dataset, teacher, dtype)
        except BaseException:
            self.abort()
            raise

    def _find_room(self, classes: int, dtype: np.dtype) -> None:
        """Raise `OSError` where the file would not fit: on a full disk HDF5 fails late, and not only by exceptions."""
        values = classes + sum(map(math.prod, self.features.values()))
        total = sum(written.size * values * dtype.itemsize + written[0].size * 16 for written in self._written.values())
        try:
            with open(self._temporary, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, total + HEAD_BYTES)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _lay_out(self, dataset: Dataset, teacher: str, dtype: np.dtype) -> None:
        self._file.attrs.update(format=FORMAT, version=VERSION, dataset=dataset.name, teacher=teacher)
        self._file.attrs.update(classes=list(dataset.classes), views=list(self.views))
        for name, written in self._written.items():
            split, group = dataset.split(name), self._file.create_group(name)
            group["labels"] = split.labels
            if split.index[-1] >= len(split):  # else row n is sample n
                group["index"] = split.index
            group.create_dataset("logits", (*written.shape, len(dataset.classes)), dtype)
            for layer, shape in self.features.items():
                group.create_dataset(f"features/{layer}", (*written.shape, *shape), dtype)

    def __enter__(self) -> TeacherWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    def write(
        self,
        split_name: str,
        view_name: str,
        start: int,
        logits: np.ndarray,
        features: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Store a batch: row i belongs to sample ``start + i`` of the data set's split.

        Parameters
        ----------
        split_name : {"train", "test"}
        view_name : str
            One of the writer's views.
        start : int
        logits : ndarray, shape (B, classes), on the host
        features : mapping of str to ndarray (B, H, W, C)
            Exactly the layers announced.
        """
        features = {} if features is None else instance("features", features, Mapping, "a mapping of arrays by layer")
        for what, name, known in (("split", split_name, SPLITS), ("view", view_name, self.views)):
            right = isinstance(name, str) and name in known
            self._check(right, f"unknown {what} {shown(name)} (choose from {', '.join(known)})")
        start = integer("start", start, -LARGEST)  # its range is told with the rows
        logits = as_array("logits", logits)
        self._check(
            logits.ndim == 2 and logits.dtype.kind in "fiu", f"logits must be numbers (B, classes), not {shown(logits)}"
        )
        self._check(
            features.keys() == self.features.keys(),
            f"features given: {sorted(features, key=str)}, announced: {sorted(self.features)}",
        )
        view, written = self.views.index(view_name), self._written[split_name]
        rows = slice(start, start + len(logits))
        where = f"{split_name} rows {rows.start}..{rows.stop - 1}"
        self._check(0 <= start < rows.stop <= written.shape[1], f"{where}: outside 0..{written.shape[1] - 1}")
        group = self._file[split_name]
        with self._disk():
            stored = self._store(group["logits"], view, rows, logits, f"{where}: logits")
            for layer, values in features.items():
                self._store(group[f"features/{layer}"], view, rows, values, f"{where}: features of {layer}")
        written[view, rows] = True
        if view_name == "identity":
            self._right[split_name][rows] = stored.argmax(axis=1) == self._labels[split_name][rows]

    def _store(self, target: h5py.Dataset, view: int, rows: slice, values: np.ndarray, where: str) -> np.ndarray:
        shape = (rows.stop - rows.start, *target.shape[2:])
        values = as_array(where, values)
        self._check(values.dtype.kind in "fiu", f"{where} are {values.dtype}, not numbers")
        self._check(values.shape == shape, f"{where} have shape {values.shape}, expected {shape}")
        with np.errstate(over="ignore"):  # an overflow of float16 becomes infinite, which the next line reports
            values = values.astype(target.dtype)
        self._check(bool(np.isfinite(values).all()), f"{where} are not all finite as {target.dtype.name}")
        target[view, rows] = values
        return values

    def finish(self) -> None:
        """Check that every row was written, store the accuracies, and put the file in its place."""
        try:
            for name, written in self._written.items():
                for view, row in np.argwhere(~written)[:1]:
                    count = written.size - written.sum()
                    self._check(
                        False, f"{count} rows of {name} were never written, the first: {self.views[view]} {row}"
                    )
                self.accuracy[name] = float(self._right[name].mean())
                self._file[name].attrs["accuracy"] = self.accuracy[name]
            with self._disk():
                self._file.close()
                hdf5.seal(self._temporary)
                os.replace(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Give up: remove the temporary file; nothing appears at `path`."""
        with contextlib.suppress(OSError, RuntimeError):  # e.g. a full disk: what cannot be flushed is removed anyway
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _check(self, condition: bool, problem: str) -> None:
        if not condition:
            raise TeacherError(f"cannot write teacher file {self.path}: {problem}")

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TeacherError(f"cannot write teacher file {self.path}: {one_line(error)}") from error
