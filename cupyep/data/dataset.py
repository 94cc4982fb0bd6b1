"""Data sets: images as uint8 or floats, labels, per-channel statistics."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyep import errors
from cupyep.data.download import fetch
from cupyep.data.files import Layout, check_labels
from cupyep.data.formats import layouts_found
from cupyep.data.images import channel_statistics, resize
from cupyep.data.selection import balanced, held_out
from cupyep.data.sources import DATASETS, SOURCES, Source, check_dataset, is_own
from cupyep.data.stored import StoredImages, chosen
from cupyep.data.verify import check_original
from cupyep.errors import DataError, choose, few, flag, instance, integer, is_integer, items, number, require, shown
from cupyep.files import expanded
from cupyep.showing import Shown

VIEWS = ("identity", "hflip")
"""The views of an image; a batch and a teacher file number them by their place here."""
SPLITS = ("train", "validation", "test")
SHOWN = 8  # names in a message
CLASSES_SHOWN = 10  # of a data set that is printed


@dataclass(frozen=True, eq=False, repr=False)
class Split(Shown):
    """One part of a data set, or some of its samples.

    Parameters
    ----------
    name : {"train", "validation", "test"}
        The validation samples are taken out of the training part and keep their numbers there.
    images : ndarray or StoredImages of uint8 or float32, shape (N, H, W, C)
    labels : ndarray of int64, shape (N,)
    index : ndarray of int64, shape (N,), optional
        Canonical index: the number of each sample in the whole training or test part, increasing; default 0 .. N - 1.
    total : int, optional
        Number of samples of that whole part; default the smallest possible.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray | None = None
    total: int = 0

    def __post_init__(self) -> None:
        choose("split", self.name, SPLITS)
        self._check_array("images", ("u1", "f4"), "uint8 or float32 (N, H, W, C)", 4)
        self._check_array("labels", ("i8",), f"int64 {self.images.shape[:1]}", 1)
        if len(self.labels) != len(self):
            raise DataError(f"split {self.name}: {len(self)} images have {len(self.labels)} labels")
        rule = f"{len(self)} increasing numbers from 0 on"
        if self.index is None:
            object.__setattr__(self, "index", np.arange(len(self)))
        self._check_array("index", "iu", rule, 1)
        index = self.index.astype(np.int64)  # first: differences of unsigned numbers are never negative
        if index.shape != self.labels.shape or index[0] < 0 or (np.diff(index) <= 0).any():
            raise DataError(f"split {self.name}: the index should be {rule}")
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "total", max(integer("total", self.total, 0), int(index[-1]) + 1))

    def _check_array(self, what: str, kinds: str | tuple[str, ...], rule: str, axes: int) -> None:
        """Raise DataError unless an attribute is a NumPy array, not empty, of one of the dtypes or kinds (a text)."""
        array = getattr(self, what)
        is_array = isinstance(array, (np.ndarray, StoredImages) if what == "images" else np.ndarray)
        right = is_array and (array.dtype.kind if isinstance(kinds, str) else array.dtype) in kinds
        if not right or array.ndim != axes or 0 in array.shape:
            found = f"{array.dtype} {array.shape}" if is_array else shown(array)
            raise DataError(f"split {self.name}: {what} should be {rule}, found {found}")

    def __len__(self) -> int:
        return len(self.images)

    def facts(self) -> dict[str, str]:
        return {self.name: f"{len(self)} images", "size": "x".join(map(str, self.images.shape[1:]))}

    def select(self, rows: np.ndarray, name: str | None = None) -> Split:
        """Return the samples in the increasing `rows`, with their canonical indices; the rest can be freed."""
        rows = np.asarray(rows) if isinstance(rows, (list, tuple)) else instance("rows", rows, np.ndarray)
        require(
            rows.ndim == 1 and rows.dtype.kind in "iu" and bool(((rows >= 0) & (rows < len(self))).all()),
            f"rows must be increasing integers from 0 to {len(self) - 1}, not {shown(rows)} of {rows.dtype}",
        )
        name = self.name if name is None else name
        return Split(name, chosen(self.images, rows), self.labels[rows], self.index[rows], self.total)

    def take(self, count: int) -> Split:
        """Return the first `count` samples; 1 <= count <= N, otherwise `ConfigurationError`."""
        return self.select(np.arange(self._checked(count)))

    def balanced(self, count: int) -> Split:
        """Return `count` samples, the first ones of each class, equally many of each; see `cupyep.data.selection`."""
        return self.select(balanced(self.labels, self._checked(count)))

    def hold_out(self, count: int, seed: int) -> tuple[Split, Split]:
        """Return (the rest, the validation split of `count` samples drawn by `seed`, equally many of each class)."""
        rows = held_out(self.labels, self._checked(count), errors.seed("seed", seed))
        rest = np.setdiff1d(np.arange(len(self)), rows, assume_unique=True)
        return self.select(rest), self.select(rows, "validation")

    def _checked(self, count: int) -> int:
        right = is_integer(count) and 1 <= count <= len(self)
        require(right, f"cannot take a count of {shown(count)} {self.name} images: choose from 1 to {len(self)}")
        return int(count)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset(Shown):
    """Images, labels and what is needed to prepare them for a network.

    Attributes
    ----------
    name : str
    classes : tuple of str
    train, test : Split
    mean, std : ndarray of float32, shape (C,)
        Statistics over all pixels of the whole training part (with the validation samples), of images divided by
        `unit`. A channel without any variation has std 1.
    flip : bool
        Whether a mirrored image keeps its class.
    pad : int
        Pixels by which a random crop may shift an image.
    validation : Split, optional
        Samples of the training part that are not in `train`, to choose epochs and options by.
    fingerprint : str
        Checksum of all images, labels and classes, where a run is to go on with just these; else empty.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: np.ndarray
    std: np.ndarray
    flip: bool = False
    pad: int = 0
    validation: Split | None = None
    fingerprint: str = ""

    def facts(self) -> dict[str, str]:
        names = ", ".join(self.classes[:CLASSES_SHOWN]) + (", ..." if len(self.classes) > CLASSES_SHOWN else "")
        splits = (split for split in (self.train, self.validation, self.test) if split is not None)
        return {
            "name": self.name,
            "images": "x".join(map(str, self.image_shape)),
            **{split.name: str(len(split)) for split in splits},
            "classes": f"{len(self.classes)} ({names})",
        }

    def __post_init__(self) -> None:
        instance("name", self.name, str, "a text")
        require(len(items("classes", self.classes, str)) > 0, "classes must not be empty")
        flag("flip", self.flip)
        integer("pad", self.pad, 0)
        instance("fingerprint", self.fingerprint, str, "a text")
        for name in ("train", "test") if self.validation is None else SPLITS:
            split = instance(name, getattr(self, name), Split)
            if split.images.dtype != self.train.images.dtype:
                kinds = f"train images are {self.train.images.dtype}, {split.name} images {split.images.dtype}"
                raise DataError(f"data set {self.name}: {kinds}; they must agree")
            if split.images.shape[1:] != self.image_shape:
                raise DataError(
                    f"data set {self.name}: train images are {self.image_shape}, {split.name} images "
                    f"{split.images.shape[1:]}; they must agree"
                )
            check_labels(split.labels, len(self.classes), f"data set {self.name}, split {split.name}")
        for name, array in (("mean", self.mean), ("std", self.std)):
            right = isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.shape == self.image_shape[2:]
            if not (right and np.isfinite(array).all() and (name == "mean" or (array > 0).all())):
                rule = f"{self.image_shape[2]} finite floats{', above 0' if name == 'std' else ''}"
                raise DataError(f"data set {self.name}: {name} should be {rule}, one a channel, found {shown(array)}")

    @classmethod
    def from_splits(
        cls, name: str, classes: tuple[str, ...], train: Split, test: Split, flip: bool = False, pad: int = 0
    ) -> Dataset:
        """Return a data set whose mean and std are those of `train`."""
        mean, std = channel_statistics(instance("train", train, Split).images)
        return cls(name, tuple(items("classes", classes, str)), train, test, mean, std, flip, pad)

    @classmethod
    def from_arrays(
        cls, x: Any, y: Any, test: Any = None, classes: Any = None, validation: Any = None, **options: Any
    ) -> Dataset:
        """Return a data set of arrays of your own; see `cupyep.data.arrays.dataset_of_arrays` for all options."""
        from cupyep.data.arrays import dataset_of_arrays  # here: it makes objects of this class

        return dataset_of_arrays(x, y, test, classes, validation, **options)

    @classmethod
    def from_torch(cls, samples: Any, test: Any = None, **options: Any) -> Dataset:
        """Return the samples of a map-style PyTorch data set; see `cupyep.data.arrays.dataset_of_samples`."""
        from cupyep.data.arrays import dataset_of_samples

        return dataset_of_samples(samples, test, **options)

    @property
    def unit(self) -> float:
        """The pixel value that a network sees as 1 before mean and std: 255 of uint8 images, 1 of floats."""
        return 255.0 if self.train.images.dtype == np.uint8 else 1.0

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.train.images.shape[1:]

    def split(self, name: str) -> Split:
        """Return the split called `name`; `ConfigurationError` if there is none."""
        split = getattr(self, choose("split", name, SPLITS))
        require(split is not None, "no validation split was held out; ask for one by --validation")
        return split


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    download: bool = True,
    image_size: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: int | None = None,
    seed: int = 0,
    test_fraction: float = 0.2,
) -> Dataset:
    """Load a data set from its original files, looking below `data_dir` and downloading what is not there.

    A user's own are loaded by ``file:PATH`` and ``folder:PATH``; see `cupyep.data.own` and `cupyep.data.folder`.

    Parameters
    ----------
    name : str
        One of `DATASETS`, or a user's own.
    data_dir : path, optional
        See `data_directory`. Accepted: the extracted folders, the original archives, or such a folder itself.
    download : bool, default True
        Whether to fetch the original archives (with checksum) when none is there.
    image_size : int, optional
        Height and width of the images: theirs divided by an integer, by averaging areas, rounded half up; or theirs
        times 2, 3 or 4, by repeating pixels. Of a folder of pictures any size, 32 by default.
    limit_train, limit_test : int, optional
        Keep so many samples only, the first ones of each class, equally many of each. `mean` and `std` stay those of
        the whole training part, so that a network can be evaluated with other limits than it was trained with.
    validation : int, optional
        Hold so many training samples out, equally many of each class, before `limit_train` is applied.
    seed : int
        Which samples are held out.
    test_fraction : float
        Share of a user's own images that are for testing, drawn by `seed`, where none are set apart.

    Raises
    ------
    ConfigurationError
        If the name, the image size or a limit is not possible.
    DataError
        If files are missing and cannot be downloaded, or are not what they should be.
    """
    check_dataset(instance("data set", name, str, "a text"), "data set")
    flag("download", download)
    errors.seed("seed", seed)
    if data_dir is not None:
        errors.path("data_dir", data_dir)
    number("test_fraction", test_fraction, above=0, below=1)
    if is_own(name):
        from cupyep.data.own import load_own  # here: it makes objects of this module

        limits = {"limit_train": limit_train, "limit_test": limit_test}
        return load_own(name, image_size, validation, seed=seed, test_fraction=test_fraction, **limits)
    source = SOURCES[name]
    check_limits(name, source.train_count, source.test_count, limit_train, limit_test, validation)
    size = _checked_size(source, image_size)
    layout = _find(source, data_directory(data_dir), download)
    arrays = layout.read()
    check_original(source, arrays, layout.place)
    train, test = (Split(s, resize(x, size), y) for s, (x, y) in zip(("train", "test"), arrays, strict=True))
    mean, std = channel_statistics(train.images)
    train, held = train.hold_out(validation, seed) if validation else (train, None)
    train = train.balanced(limit_train) if limit_train else train
    test = test.balanced(limit_test) if limit_test else test
    pad = max(1, source.pad * size // source.shape[0])
    return Dataset(name, source.classes, train, test, mean, std, source.flip, pad, held)


def data_directory(data_dir: str | Path | None = None) -> Path:
    """Return the folder of data files: the argument, else ``CUPYEP_DATA``, else the user's cache folder.

    The cache folder is ``$XDG_CACHE_HOME/cupyep``, or ``~/.cache/cupyep``.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cupyep"
    return _at_home(data_dir or os.environ.get("CUPYEP_DATA") or cache, "data folder", "--data-dir or CUPYEP_DATA")


def cache_directory() -> Path:
    """Return the folder of what can be made again, teachers above all: ``CUPYEP_CACHE``, else the platform's place.

    That is ``cupyep`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, on macOS in ``~/Library/Caches``, on Windows in
    ``%LOCALAPPDATA%``.
    """
    base = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local"}
    place = os.environ.get("XDG_CACHE_HOME") or base.get(sys.platform, "~/.cache")
    folder = os.environ.get("CUPYEP_CACHE") or Path(place) / "cupyep"
    return _at_home(folder, "cache folder", "CUPYEP_CACHE")


def _at_home(folder: str | Path, what: str, remedy: str) -> Path:
    try:
        return expanded(folder)
    except errors.ConfigurationError as error:
        raise errors.ConfigurationError(f"{what} {error}; by {remedy}") from error


def check_limits(
    name: str,
    train_count: int,
    test_count: int,
    limit_train: int | None,
    limit_test: int | None,
    validation: int | None,
) -> None:
    """Raise `ConfigurationError` unless so many images can be held out and used of so many."""
    most = train_count - 1
    require(
        validation is None or (is_integer(validation) and 1 <= validation <= most),
        f"validation is {shown(validation)}: {name} has {train_count} train images, choose from 1 to {most}",
    )
    limits = (("train", limit_train, train_count, validation or 0), ("test", limit_test, test_count, 0))
    for what, limit, count, held in limits:
        note = f", {held} of them held out" if held else ""
        require(
            limit is None or (is_integer(limit) and 1 <= limit <= count - held),
            f"limit-{what} is {shown(limit)}: {name} has {count} {what} images{note}, choose from 1 to {count - held}",
        )


def image_shape(name: str, image_size: int | None = None) -> tuple[int, int, int]:
    """Return (H, W, C) of the images that `load_dataset` would give, without looking for files."""
    source = SOURCES[choose("data set", name, DATASETS)]
    size = _checked_size(source, image_size)
    return (size, size, source.shape[2])


def _checked_size(source: Source, image_size: int | None) -> int:
    size = source.shape[0]
    if image_size is None:
        return size
    sizes = [n for n in range(2, 4 * size + 1) if size % n == 0 or n % size == 0]
    require(
        is_integer(image_size) and image_size in sizes,
        f"image-size is {shown(image_size)}: {source.name} is {size} x {size} and can become "
        f"{', '.join(map(str, sizes))}",
    )
    return image_size


def _find(source: Source, folder: Path, download: bool) -> Layout:
    """Return the first complete layout below `folder`, downloading the original archives if there is none."""
    layouts, note = layouts_found(source.name, folder)
    if not layouts:
        reason = fetch(source, folder) if download else "download not asked for"
        layouts = [] if reason else layouts_found(source.name, folder)[0]
        if not layouts:
            raise DataError(
                f"data set {source.name} not found in {folder} ({note}{reason}; {_seen(folder)}): put there "
                f"{source.accepts}, or name the folder that has it by --data-dir or CUPYEP_DATA"
            )
    return layouts[0]


def _seen(folder: Path) -> str:
    """Return what lies in `folder`, in words."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f"the folder cannot be read: {error.strerror}"
    return f"seen there: {few(names, SHOWN) or 'nothing'}"
