"""Reading a teacher file: every way in which it can be wrong is one line that names the file and the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from cupyep import errors
from cupyep.data.dataset import VIEWS, Dataset
from cupyep.data.teacher.layout import DTYPES, FORMAT, SPLITS, VERSION, blocks, views_problem
from cupyep.data.teacher.rows import Rows
from cupyep.errors import TeacherError, choose, instance, one_line, require, shown
from cupyep.persistence import hdf5

MEMORY_LIMIT = 256 << 20  # bytes; logits of a split below this are kept in memory, a GPU's too: 1 % of a small one's
ROUNDING = 0.005  # by which a stored accuracy may be off: ties, logits rounded to halves
FEWEST = 200  # samples from which an accuracy is told from chance
MOST_SAMPLES = 1 << 26  # of a split; labels are read whole
# How models, by the endings of their files, become teacher files.
MODELS = {
    ".onnx": "--onnx {}",
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin", ".safetensors"), "--torch PACKAGE.MODULE:FACTORY --weights {}"),
}
AGAIN = "make the file again with tools/export_teacher_logits.py"


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
        self._rows: dict[str, Rows] = {}  # of arrays that are not
        self._index: dict[str, np.ndarray] = {}  # canonical index of each row, where that is not the row's number
        if not self.path.is_file():
            raise TeacherError(f"teacher file {self.path} does not exist; make it with tools/export_teacher_logits.py")
        if option := MODELS.get(self.path.suffix.lower()):
            raise TeacherError(
                f"'{self.path}' is a model, no teacher file; make one of it by: python tools/export_teacher_logits.py "
                f"--dataset NAME {option.format(self.path)} --output teacher.h5"
            )
        with self._disk():
            self._file = hdf5.open_file(self.path)
        try:
            with self._disk():
                self._read_header()
                layers = [self._read_split(name) for name in SPLITS]
            self._check(layers[0] == layers[1], f"features of train {layers[0]} and test {layers[1]} differ; {AGAIN}")
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
        found = hdf5.attribute(self._file, "format")
        self._check(isinstance(found, str) and found == FORMAT, f"is not a cupyep teacher file; {AGAIN}")
        version = hdf5.attribute(self._file, "version")
        self._check(
            isinstance(version, np.integer) and version == VERSION,
            f"has version {version}, this cupyep reads version {VERSION}; update cupyep or {AGAIN}",
        )
        self.dataset, self.teacher = self._text("dataset"), self._text("teacher")
        self.classes, self.views = self._names("classes"), self._names("views")
        self._check(not views_problem(self.views), f"{views_problem(self.views)}; {AGAIN}")

    def _text(self, name: str) -> str:
        value = hdf5.attribute(self._file, name)
        self._check(isinstance(value, str), f"attribute '{name}' is missing or not text; {AGAIN}")
        return value

    def _names(self, name: str) -> tuple[str, ...]:
        values = hdf5.attribute(self._file, name)
        values = tuple(values) if isinstance(values, np.ndarray) and values.ndim == 1 else ()
        self._check(
            bool(values) and all(isinstance(value, str) for value in values),
            f"attribute '{name}' is missing or not a list of names; {AGAIN}",
        )
        return values

    def _read_split(self, name: str) -> dict[str, tuple[int, ...]]:
        """Check one group; return the shapes of its features."""
        group = hdf5.find(self._file, name)
        self._check(isinstance(group, h5py.Group), f"has no group '{name}'; {AGAIN}")
        labels, logits = self._array(f"{name}/labels"), self._array(f"{name}/logits")
        integers = labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) <= MOST_SAMPLES
        self._check(integers, f"{name}/labels is not a list of integers; {AGAIN}")
        shape = (len(self.views), len(labels), len(self.classes))
        self._check_values(logits, f"{name}/logits", shape)
        if "index" in group:
            self._index[name] = self._read_index(name, len(labels))
        accuracy = hdf5.attribute(group, "accuracy")
        self._check(
            isinstance(accuracy, np.floating) and 0 <= accuracy <= 1,
            f"{name}: attribute 'accuracy' is {accuracy}, expected a number from 0 to 1; {AGAIN}",
        )
        layers = {}
        features = hdf5.find(group, "features")
        for layer in features if isinstance(features, h5py.Group) else ():
            features = self._array(f"{name}/features/{layer}")
            self._check(features.ndim == 5, f"{name}/features/{layer} has {features.ndim} axes, expected 5; {AGAIN}")
            self._check_values(features, f"{name}/features/{layer}", (*shape[:2], *features.shape[2:]))
            layers[layer] = features.shape[2:]
        return layers

    def _array(self, name: str) -> h5py.Dataset:
        array = hdf5.find_array(self._file, name, compressed=True)
        self._check(array is not None, f"has no array '{name}'; {AGAIN}")
        return array

    def _check_values(self, array: h5py.Dataset, name: str, shape: tuple[int, ...]) -> None:
        self._check(array.dtype.name in DTYPES, f"{name} is {array.dtype}, expected {' or '.join(DTYPES)}; {AGAIN}")
        self._check(
            array.shape == shape,
            f"{name} has shape {array.shape}, expected {shape} (views, labels, classes); {AGAIN}",
        )

    def _read_index(self, name: str, count: int) -> np.ndarray:
        array = self._array(f"{name}/index")
        fits = array.shape == (count,) and array.dtype.kind in "iu"
        index = array[...].astype(np.int64) if fits else np.zeros(0, np.int64)
        fits = fits and bool((index >= 0).all() and (np.diff(index) > 0).all())
        self._check(fits, f"{name}/index is not {count} increasing numbers from 0 on; {AGAIN}")
        return index

    def check(self, dataset: Dataset) -> None:
        """Raise `TeacherError` unless the file is a finite teacher of just these samples, in this order.

        Its accuracies are counted anew; one that contradicts the file's own is refused.
        """
        instance("dataset", dataset, Dataset)
        remedy = f"make one for {dataset.name} with tools/export_teacher_logits.py"
        self._check(
            self.dataset == dataset.name, f"is a teacher for data set {self.dataset}, not {dataset.name}; {remedy}"
        )
        self._check_classes(dataset, remedy)
        for name in SPLITS:
            with self._disk():
                self._check_labels(dataset, name, remedy)
                self._check_logits(name)

    def _check_classes(self, dataset: Dataset, remedy: str) -> None:
        ours, theirs = dataset.classes, self.classes
        self._check(
            len(ours) == len(theirs), f"has {len(theirs)} classes, data set {dataset.name} has {len(ours)}; {remedy}"
        )
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            self._check(a == b, f"calls class {i} '{a}', data set {dataset.name} calls it '{b}'; {remedy}")

    def _check_labels(self, dataset: Dataset, name: str, remedy: str) -> None:
        split, labels = dataset.split(name), self._file[f"{name}/labels"][...]
        rows, found = self._find(name, split.index)
        covered = self._index.get(name, np.arange(len(labels)))
        self._check(
            bool(found.all()) and len(covered) > 0 and covered[-1] < split.total,
            f"covers {len(labels)} {name} samples of data set {dataset.name}, which has {split.total} "
            f"and of which {len(split)} are used, {int((~found).sum())} of these not in the file; {remedy}",
        )
        wrong = np.flatnonzero(labels[rows] != split.labels)
        if wrong.size:
            first = int(wrong[0])
            self._check(
                False,
                f"{wrong.size} of {len(split)} {name} labels disagree with data set {dataset.name} (first: sample "
                f"{split.index[first]} has {labels[rows[first]]}, not {split.labels[first]}); it was made from other "
                f"data or in another order, {remedy}",
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
        right = np.zeros(len(self.views))
        for rows in blocks(logits):
            values = logits[:, rows]
            right += (values.argmax(axis=2) == labels[rows]).sum(axis=1)
            finite = np.isfinite(values).all(axis=2)
            if not finite.all():
                view, row = (int(i[0]) for i in np.nonzero(~finite))
                sample = rows.start + row
                self._check(
                    False, f"{name}/logits of sample {sample}, view {self.views[view]}, are not finite; {AGAIN}"
                )
        self.measured[name] = dict(zip(self.views, (right / len(labels)).tolist(), strict=True))
        stored, found = self.accuracy(name), self.measured[name]["identity"]
        self._check(
            abs(stored - found) <= ROUNDING,
            f"says that its {name} accuracy is {stored:.2%}, but its logits have {found:.2%} on its labels: one of "
            f"them is in another order or of another teacher; {AGAIN}",
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
        rows, view = self._found(name, index, view)
        for code in np.unique(view):
            rows = np.where(view == code, rows + self._place_of_view(int(code)) * self._file[name].shape[1], rows)
        return rows

    def feature(self, layer: str, split_name: str, index: np.ndarray, view: np.ndarray | int) -> np.ndarray:
        """Return the teacher's activations of one layer, float32 (B, H, W, C); arguments as for `logits`."""
        name = self._feature(layer, split_name)
        values = self._taken(name, self._places(name, index, view)).astype(np.float32)
        self._check(bool(np.isfinite(values).all()), f"{name} holds values that are not finite; {AGAIN}")
        return values

    def _feature(self, layer: str, split_name: str) -> str:
        known = ", ".join(self.feature_layers) or "no layer"
        found = isinstance(layer, str) and layer in self.feature_layers
        self._check(found, f"has no features of layer {shown(layer)} (it has {known}); {AGAIN}")
        return f"{choose('split', split_name, SPLITS)}/features/{layer}"

    def _found(self, name: str, index: np.ndarray, view: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of some samples in each view, and a view each."""
        split, index, view = name.partition("/")[0], _integers("index", index), _integers("view", view)
        require(index.ndim == 1, f"index must be a vector of integers, not {shown(index)}")
        require(view.shape in ((), index.shape), f"view must be one integer or as many as index, not {shown(view)}")
        count, (places, found) = self.count(split), self._find(split, index)
        covered = self._index.get(split, [0, count - 1])
        self._check(
            bool(found.all()), f"{name} covers {count} of the samples {covered[0]}..{covered[-1]}, others are asked for"
        )
        return places, np.broadcast_to(view, index.shape)

    def _rows_of(self, name: str) -> Rows:
        if name not in self._rows:
            with self._disk():
                self._rows[name] = Rows(self._file[name])
        return self._rows[name]

    def _taken(self, name: str, places: np.ndarray) -> np.ndarray:
        rows = self._rows_of(name)
        with self._disk():
            return rows.take(places)

    def _place_of_view(self, code: int) -> int:
        name = VIEWS[code] if 0 <= code < len(VIEWS) else f"number {code}"
        self._check(
            name in self.views, f"has no view '{name}': export it again with both views, or train with --no-flip"
        )
        return self.views.index(name)

    def _check(self, condition: bool, problem: str) -> None:
        if not condition:
            raise TeacherError(f"teacher file {self.path}: {problem}")

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn whatever h5py raises on a damaged file into one line."""
        try:
            yield
        except TeacherError:
            raise
        except hdf5.ERRORS as error:
            why = hdf5.blame(error, f"is not HDF5, truncated or damaged ({one_line(error)}); {AGAIN}")
            raise TeacherError(f"teacher file {self.path}: {why}") from error


def _integers(name: str, value: np.ndarray | int) -> np.ndarray:
    """Return integers of Python or NumPy as an array."""
    value = (
        np.asarray(value)
        if isinstance(value, (list, tuple, int, np.integer)) and not isinstance(value, bool)
        else value
    )
    right = isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size > 0
    require(right, f"{name} must be one or more integers, not {shown(value)}")
    return value
