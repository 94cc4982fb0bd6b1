"""Data sets: images as uint8 or floats, labels, per-channel statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyep import errors
from cupyep.data.arrays import HELD, PAD_SHARE, gathered, parts_of_arrays
from cupyep.data.files import check_labels
from cupyep.data.images import channel_statistics
from cupyep.data.selection import balanced, check_limits, stratified
from cupyep.data.stored import StoredImages, chosen
from cupyep.errors import DataError, choose, flag, instance, integer, is_integer, items, require, shown
from cupyep.showing import Shown

VIEWS = ("identity", "hflip")
"""The views of an image; a batch and a teacher file number them by their place here."""
SPLITS = ("train", "validation", "test")
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
    images: Any
    labels: np.ndarray
    index: Any = None  # an array from `__post_init__` on
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
        cls,
        x: Any,
        y: Any,
        test: tuple[Any, Any] | None = None,
        classes: Sequence[str] | None = None,
        validation: int | tuple[Any, Any] | None = None,
        *,
        test_fraction: float = 0.2,
        seed: int = 0,
        name: str = "arrays",
        flip: bool = False,
        pad: int | None = None,
        channels_first: bool = False,
        limit_train: int | None = None,
        limit_test: int | None = None,
    ) -> Dataset:
        """Return a data set of images of your own.

        Parameters
        ----------
        x : array of shape (N, H, W, C) or (N, H, W)
            Of NumPy, of CuPy or of anything with DLPack. uint8 images are kept as they are and divided by 255; others
            are taken as float32 in whatever units they have. Either way networks see them minus the mean, divided by
            the standard deviation of their channel, over the training part. A memory-mapped array is read batch by
            batch.
        y : sequence of N labels
            Integers that count from 0, or names of classes.
        test : (x, y), optional
            The test part; else `test_fraction` of the images are drawn by `seed`, of each class its share.
        classes : sequence of str, optional
            Names in the order of the labels; default the labels themselves, names sorted.
        validation : int or (x, y), optional
            The validation part, or how many training images to draw for it by `seed`, of each class its share.
        name : str
            Kept in checkpoints and teacher files.
        flip : bool
            Whether a mirrored image keeps its class.
        pad : int, optional
            Pixels by which a random crop may shift an image; default an eighth of the shorter side.
        channels_first : bool
            Whether x is (N, C, H, W), as in PyTorch.
        limit_train, limit_test : int, optional
            See `cupyep.data.load_dataset`.

        Raises
        ------
        ConfigurationError, DataError
            In one line, if an argument is no array, or arrays do not fit together.
        """
        instance("name", name, str, "a text")
        errors.seed("seed", seed)
        names, train, tested, held = parts_of_arrays(
            x, y, test, classes, validation, test_fraction, seed, name, channels_first
        )
        limits = (limit_train, limit_test)
        count: Any = validation if held is None else len(held)  # a pair has become rows
        check_limits(name, len(train[1]), len(tested[1]), *limits, count)
        if held is None and count is not None:
            held = stratified(train[1], int(count), seed, HELD)
        pad = max(1, min(train[0].shape[1:3]) // PAD_SHARE) if pad is None else pad
        return assembled(name, names, Split("train", *train), Split("test", *tested), held, limits, flip, pad)

    @classmethod
    def from_torch(cls, samples: Any, test: Any = None, **options: Any) -> Dataset:
        """Return the samples of map-style PyTorch data sets, all read once.

        Parameters
        ----------
        samples, test : torch.utils.data.Dataset, or anything with ``len`` and whole numbers as indices
            Of pairs (image, label). An image is a PIL picture, a tensor (C, H, W) or (H, W), or a NumPy array
            (H, W, C); all have one size. What a transformation draws at random is drawn once.
        **options
            Those of `from_arrays`. `classes` are by default those that the data set names, as torchvision's do.

        Raises
        ------
        ConfigurationError, DataError
            As `from_arrays`; also if a data set has no length.
        """
        named = getattr(samples, "classes", None)
        if named is not None and not isinstance(named, (str, bytes)):
            options.setdefault("classes", [str(item) for item in named])
        if test is not None:
            options["test"] = gathered("test", test)
        return cls.from_arrays(*gathered("samples", samples), **options)

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


def assembled(
    name: str,
    classes: tuple[str, ...],
    train: Split,
    test: Split,
    held: np.ndarray | None,
    limits: tuple[int | None, int | None],
    flip: bool,
    pad: int,
) -> Dataset:
    """Return the data set of two whole parts: rows `held` of `train` validate, `limits` take of what is left."""
    mean, std = channel_statistics(train.images)
    validation = None if held is None else train.select(held, "validation")
    if held is not None:
        train = train.select(np.setdiff1d(np.arange(len(train)), held, assume_unique=True))
    train, test = (part if n is None else part.balanced(n) for part, n in zip((train, test), limits, strict=True))
    return Dataset(name, classes, train, test, mean, std, flip, pad, validation)
