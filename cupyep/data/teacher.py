"""The teacher file, version 1: logits of a teacher network for every sample and view of a data set, in HDF5.

Root attributes: ``format`` "cupyep-teacher", ``version`` 1, ``dataset``, ``classes`` (names), ``teacher`` (free text),
``views`` (of "identity", "hflip"). Groups ``train`` and ``test``, each with ``logits`` (V, N, C) float32 or float16,
raw (no temperature); ``labels`` (N,), the data set's own, so that a misaligned file is found out; the attribute
``accuracy`` (of the identity view, 0 to 1); optionally ``features/<layer>`` (V, N, H, W, C). Row n is sample n of the
data set in its canonical order; in a file made from some samples only, row n is sample ``index[n]``, increasing. Chunks
and compression are free; nothing may lie in another file or behind a link. What cupyep writes begins with a checksum
(`cupyep.persistence.hdf5`), which files from elsewhere need not have. Every way in which a file can be wrong is one
line that names the file and the remedy.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cupyep import errors
from cupyep.data.dataset import VIEWS, Dataset
from cupyep.errors import TeacherError, choose, instance, one_line, require, shown
from cupyep.persistence import hdf5

FORMAT, VERSION = "cupyep-teacher", 1
SPLITS = ("train", "test")
DTYPES = ("float32", "float16")
BLOCK_BYTES = 16 << 20  # larger logits are gone through in blocks of about this size
MEMORY_LIMIT = 256 << 20  # bytes; logits of a split below this are kept in memory, a GPU's too: 1 % of a small one's
ROUNDING = 0.005  # by which a stored accuracy may be off: ties, logits rounded to halves
FEWEST = 200  # samples from which an accuracy is told from chance
MOST_SAMPLES = 1 << 26  # of a split; labels are read whole
# How models, by the endings of their files, become teacher files.
MODELS = {
    ".onnx": "--onnx {}",
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin", ".safetensors"), "--torch PACKAGE.MODULE:FACTORY --weights {}"),
}
AGAIN = "make the file again with cupyep teacher"


def views_problem(views: Sequence[str]) -> str:
    """Return what is wrong with `views`, or an empty text."""
    if set(views) <= set(VIEWS) and "identity" in views and len(set(views)) == len(views):
        return ""
    return f"views are {', '.join(map(str, views))}: expected identity, or identity and hflip"


class TeacherFile:
    """Read a teacher file; the constructor checks all that can be checked without the data set.

    Parameters
    ----------
    path : path

    Attributes
    ----------
    dataset, teacher : str
    classes, views : tuple of str
    feature_layers : dict of str to (H, W, C)
    measured : dict of str to dict of str to float
        Accuracy, from 0 to 1, by split and view, counted from the logits; filled by `check`.

    Raises
    ------
    TeacherError
        If the file is missing, truncated, or not a version-1 teacher file.
    """

    def __init__(self, path: str | Path):
        self.path = errors.path("path", path)
        self.measured: dict[str, dict[str, float]] = {}
        self._memory: dict[str, np.ndarray] = {}
        self._rows: dict[str, hdf5.Rows] = {}  # of arrays that are not
        self._index: dict[str, np.ndarray] = {}  # canonical index of each row, where that is not the row's number
        if not self.path.is_file():
            raise TeacherError(f"teacher file {self.path} does not exist; make it with cupyep teacher")
        if option := MODELS.get(self.path.suffix.lower()):
            raise TeacherError(
                f"'{self.path}' is a model, no teacher file; make one of it by: cupyep teacher "
                f"--dataset NAME {option.format(shlex.quote(str(self.path)))} --output teacher.h5"
            )
        with self._disk():
            self._file = hdf5.open_file(self.path)
        try:
            with self._disk():
                self._read_header()
                layers = [self._read_split(name) for name in SPLITS]
            self._check(layers[0] == layers[1], f"features of train {layers[0]} and test {layers[1]} differ")
            self.feature_layers = layers[0]
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> tuple[type[TeacherFile], tuple[Path]]:
        return type(self), (self.path,)  # opened again

    def __enter__(self) -> TeacherFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        for rows in self._rows.values():
            rows.close()
        self._file.close()

    def _read_header(self) -> None:
        form, version = (hdf5.attribute(self._file, name) for name in ("format", "version"))
        self._check(isinstance(form, str) and form == FORMAT, "is not a cupyep teacher file")
        known = isinstance(version, np.integer) and version == VERSION
        what = f"has version {version}, this cupyep reads version {VERSION}"
        self._check(known, what, f"update cupyep or {AGAIN}")
        found = {name: hdf5.attribute(self._file, name) for name in ("dataset", "teacher", "classes", "views")}
        for name in ("dataset", "teacher"):
            self._check(isinstance(found[name], str), f"attribute '{name}' is missing or not text")
        for name in ("classes", "views"):
            right = isinstance(found[name], np.ndarray) and found[name].ndim == 1 and found[name].size > 0
            right = right and all(isinstance(value, str) for value in found[name])
            self._check(right, f"attribute '{name}' is missing or not a list of names")
        self.dataset, self.teacher = found["dataset"], found["teacher"]
        self.classes, self.views = tuple(found["classes"]), tuple(found["views"])
        self._check(not views_problem(self.views), views_problem(self.views))

    def _read_split(self, name: str) -> dict[str, tuple[int, ...]]:
        """Check one group; return the shapes of its features."""
        group: Any = hdf5.find(self._file, name)
        self._check(isinstance(group, h5py.Group), f"has no group '{name}'")
        labels, logits = self._array(f"{name}/labels"), self._array(f"{name}/logits")
        self._check(labels.ndim == 1 and labels.dtype.kind in "iu", f"{name}/labels is not a list of integers")
        number = f"{name}/labels holds {len(labels)} samples, expected 1 to {MOST_SAMPLES}"
        self._check(0 < len(labels) <= MOST_SAMPLES, number)
        shape = (len(self.views), len(labels), len(self.classes))
        self._check_values(logits, f"{name}/logits", shape)
        if "index" in group:
            self._index[name] = self._read_index(name, len(labels))
        accuracy = hdf5.attribute(group, "accuracy")
        self._check(
            isinstance(accuracy, np.floating) and bool(0 <= accuracy <= 1),
            f"{name}: attribute 'accuracy' is {accuracy}, expected a number from 0 to 1",
        )
        layers = {}
        features = hdf5.find(group, "features")
        for layer in features if isinstance(features, h5py.Group) else ():
            features = self._array(f"{name}/features/{layer}")
            self._check(features.ndim == 5, f"{name}/features/{layer} has {features.ndim} axes, expected 5")
            self._check_values(features, f"{name}/features/{layer}", (*shape[:2], *features.shape[2:]))
            layers[layer] = features.shape[2:]
        return layers

    def _array(self, name: str) -> h5py.Dataset:
        array = hdf5.find_array(self._file, name, compressed=True)
        self._check(array is not None, f"has no array '{name}'")
        return array

    def _check_values(self, array: h5py.Dataset, name: str, shape: tuple[int, ...]) -> None:
        self._check(array.dtype.name in DTYPES, f"{name} is {array.dtype}, expected {' or '.join(DTYPES)}")
        self._check(array.shape == shape, f"{name} has shape {array.shape}, expected {shape} (views, labels, classes)")

    def _read_index(self, name: str, count: int) -> np.ndarray:
        array = self._array(f"{name}/index")
        fits = array.shape == (count,) and array.dtype.kind in "iu"
        index = array[...].astype(np.int64) if fits else np.zeros(0, np.int64)
        fits = fits and bool((index >= 0).all() and (np.diff(index) > 0).all())
        self._check(fits, f"{name}/index is not {count} increasing numbers from 0 on")
        return index

    def check(self, dataset: Dataset) -> None:
        """Raise `TeacherError` unless the file is a finite teacher of just these samples, in this order.

        Its accuracies are counted anew; one that contradicts the file's own is refused.
        """
        instance("dataset", dataset, Dataset)
        mine, ours, theirs = f"data set {dataset.name}", dataset.classes, self.classes
        remedy = f"make one for {dataset.name} with cupyep teacher"
        right = self.dataset == dataset.name
        self._check(right, f"is a teacher for data set {self.dataset}, not {dataset.name}", remedy)
        self._check(len(ours) == len(theirs), f"has {len(theirs)} classes, {mine} has {len(ours)}", remedy)
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            self._check(a == b, f"calls class {i} '{a}', {mine} calls it '{b}'", remedy)
        for name in SPLITS:
            with self._disk():
                self._check_labels(dataset, name, remedy)
                self._check_logits(name)

    def _check_labels(self, dataset: Dataset, name: str, remedy: str) -> None:
        split, labels = dataset.split(name), self._file[f"{name}/labels"][...]
        rows, found = self._find(name, split.index)
        covered = self._index.get(name, np.arange(len(labels)))
        self._check(
            bool(found.all() and covered[-1] < split.total),
            f"covers {len(labels)} {name} samples of data set {dataset.name}, which has {split.total} "
            f"and of which {len(split)} are used, {int((~found).sum())} of these not in the file",
            remedy,
        )
        for first in np.flatnonzero(labels[rows] != split.labels)[:1]:
            self._check(
                False,
                f"{(labels[rows] != split.labels).sum()} of {len(split)} {name} labels disagree with data set "
                f"{dataset.name} (first: sample {split.index[first]} has {labels[rows[first]]}, not "
                f"{split.labels[first]}); it was made from other data or in another order, {remedy}",
                "",
            )

    def _find(self, name: str, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of the samples with the canonical `index`, and which of them the file has at all."""
        known, count = self._index.get(name), self.count(name)
        if known is None:
            return index, (index >= 0) & (index < count)
        rows = np.searchsorted(known, index).clip(0, count - 1)
        return rows, known[rows] == index

    def _check_logits(self, name: str) -> None:
        logits, labels = self._file[f"{name}/logits"], self._file[f"{name}/labels"][...]
        right, step = np.zeros(len(self.views)), max(1, BLOCK_BYTES * len(labels) // logits.nbytes)
        for start in range(0, len(labels), step):
            rows = slice(start, start + step)
            values = logits[:, rows]
            right += (values.argmax(axis=2) == labels[rows]).sum(axis=1)
            for view, row in np.argwhere(~np.isfinite(values).all(axis=2))[:1]:
                where = f"sample {start + row}, view {self.views[view]}"
                self._check(False, f"{name}/logits of {where}, are not finite")
        self.measured[name] = dict(zip(self.views, (right / len(labels)).tolist(), strict=True))
        stored, found = self.accuracy(name), self.measured[name]["identity"]
        self._check(
            abs(stored - found) <= ROUNDING,
            f"says that its {name} accuracy is {stored:.2%}, but its logits have {found:.2%} on its labels: one of "
            f"them is in another order or of another teacher",
        )

    def by_chance(self) -> list[str]:
        """Return the views whose training logits say no more of the labels than guessing does; `check` comes first.

        Of fewer than `FEWEST` samples nothing is said.
        """
        count, guess = self.count("train"), 1 / len(self.classes)
        most = guess + 3 * (guess * (1 - guess) / count) ** 0.5
        return [view for view, found in self.measured["train"].items() if count >= FEWEST and found <= most]

    def count(self, split_name: str) -> int:
        """Return the number of samples of a split that the file covers."""
        return self._file[f"{choose('split', split_name, SPLITS)}/logits"].shape[1]

    def accuracy(self, split_name: str) -> float:
        """Return the accuracy on a split that the file states, from 0 to 1, identity view."""
        return float(self._file[choose("split", split_name, SPLITS)].attrs["accuracy"])

    def logits(self, split_name: str, index: np.ndarray, view: np.ndarray | int) -> np.ndarray:
        """Return the raw logits of some samples.

        Parameters
        ----------
        split_name : {"train", "test"}
        index : ndarray of int, shape (B,)
            Canonical indices.
        view : ndarray of int, shape (B,), or int
            Numbers of views in `cupyep.data.VIEWS`: 0 identity, 1 hflip.

        Returns
        -------
        ndarray of float32, shape (B, classes)
        """
        table, places = self.table(split_name), self.places(split_name, index, view)
        rows = self._taken(f"{split_name}/logits", places) if table is None else table[places]
        return rows.astype(np.float32)

    def expect(self, split_name: str, index: np.ndarray, view: np.ndarray | int, layer: str | None = None) -> None:
        """Begin to read what `logits`, or `feature` of a layer, will be asked for next, where it is not in memory."""
        if layer is not None or self.table(split_name) is None:
            name = f"{split_name}/logits" if layer is None else self._feature(layer, split_name)
            self._rows_of(name).expect(self._places(name, index, view))

    def table(self, split_name: str) -> np.ndarray | None:
        """Return the logits of a split as stored, (views * rows, classes), read once; None if too large for that.

        `places` are rows of it.
        """
        name = f"{choose('split', split_name, SPLITS)}/logits"
        array = self._file[name]
        if array.nbytes < MEMORY_LIMIT and name not in self._memory:
            with self._disk():
                self._memory[name] = array[...].reshape(-1, array.shape[-1])
        return self._memory.get(name)

    def places(self, split_name: str, index: np.ndarray, view: np.ndarray | int) -> np.ndarray:
        """Return the rows of `table` that hold some samples; arguments as for `logits`."""
        return self._places(f"{split_name}/logits", index, view)

    def _places(self, name: str, index: np.ndarray, view: np.ndarray | int) -> np.ndarray:
        """Return the rows of an array, counted through all views, that hold some samples."""
        split, index, view = name.partition("/")[0], _integers("index", index), _integers("view", view)
        require(index.ndim == 1, f"index must be a vector of integers, not {shown(index)}")
        require(view.shape in ((), index.shape), f"view must be one integer or as many as index, not {shown(view)}")
        count, (rows, found) = self.count(split), self._find(split, index)
        covered = self._index.get(split, [0, count - 1])
        what = f"{name} covers {count} of the samples {covered[0]}..{covered[-1]}, others are asked for"
        self._check(bool(found.all()), what, "")
        for code in np.unique(view):
            rows = np.where(view == code, rows + self._place_of_view(int(code)) * self._file[name].shape[1], rows)
        return rows

    def feature(self, layer: str, split_name: str, index: np.ndarray, view: np.ndarray | int) -> np.ndarray:
        """Return the teacher's activations of one layer, float32 (B, H, W, C); arguments as for `logits`."""
        name = self._feature(layer, split_name)
        values = self._taken(name, self._places(name, index, view)).astype(np.float32)
        self._check(bool(np.isfinite(values).all()), f"{name} holds values that are not finite")
        return values

    def _feature(self, layer: str, split_name: str) -> str:
        known = ", ".join(self.feature_layers) or "no layer"
        found = isinstance(layer, str) and layer in self.feature_layers
        self._check(found, f"has no features of layer {shown(layer)} (it has {known})")
        return f"{choose('split', split_name, SPLITS)}/features/{layer}"

    def _rows_of(self, name: str) -> hdf5.Rows:
        if name not in self._rows:
            with self._disk():
                self._rows[name] = hdf5.Rows(self._file[name])
        return self._rows[name]

    def _taken(self, name: str, places: np.ndarray) -> np.ndarray:
        rows = self._rows_of(name)
        with self._disk():
            return rows.take(places)

    def _place_of_view(self, code: int) -> int:
        name = VIEWS[code] if 0 <= code < len(VIEWS) else f"number {code}"
        remedy = "export it again with both views, or train with --no-flip"
        self._check(name in self.views, f"has no view '{name}': {remedy}", "")
        return self.views.index(name)

    def _check(self, condition: bool, problem: str, remedy: str = AGAIN) -> None:
        if not condition:
            raise TeacherError(f"teacher file {self.path}: {problem}{remedy and '; '}{remedy}")

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn whatever h5py raises on a damaged file into one line."""
        try:
            yield
        except TeacherError:
            raise
        except hdf5.ERRORS as error:
            why = hdf5.blame(error, f"is not HDF5, truncated or damaged ({one_line(error)})")
            raise TeacherError(f"teacher file {self.path}: {why}") from error


def _integers(name: str, value: Any) -> np.ndarray:
    """Return integers of Python or NumPy as an array."""
    if isinstance(value, (list, tuple, int, np.integer)) and not isinstance(value, bool):
        value = np.asarray(value)
    right = isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size > 0
    require(right, f"{name} must be one or more integers, not {shown(value)}")
    return value
