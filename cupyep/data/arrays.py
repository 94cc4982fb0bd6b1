"""Data sets of a user's own images: arrays of any library, images stored in files, samples of a PyTorch data set."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyep.backend import host_array
from cupyep.data.images import first_not_finite
from cupyep.data.pictures import GREY_16
from cupyep.data.selection import stratified
from cupyep.data.stored import StoredImages, chosen, joined, stored
from cupyep.errors import ConfigurationError, DataError, flag, is_integer, items, number, one_line, require, shown

PAD_SHARE = 8  # a crop may shift an image by this part of its side, as 4 of CIFAR's 32 pixels
TEST, HELD = 2, 3  # streams of draws; see `stratified`
KINDS = "uint8, other integers or floats"
Part = tuple[Any, np.ndarray]
"""Images (N, H, W, C) and labels (N,) as numbers."""
NUMBERS = ("I", "F", *GREY_16)  # modes of pictures that hold more than bytes


def parts_of_arrays(
    x: Any,
    y: Any,
    test: tuple[Any, Any] | None,
    classes: Sequence[str] | None,
    validation: int | tuple[Any, Any] | None,
    test_fraction: float,
    seed: int,
    name: str,
    channels_first: bool,
) -> tuple[tuple[str, ...], Part, Part, np.ndarray | None]:
    """Return names of the classes, the training and the test part, and the rows of the former that are to validate.

    Those that are given for it are among the training part; None where there are none. For the arguments and the
    errors see `Dataset.from_arrays`.
    """
    flag("channels_first", channels_first)
    whose, images, labels = ["train"], [_images("x", x, channels_first)], [_labels("y", y)]
    pairs: dict[str, Any] = {"test": test, "validation": None if is_integer(validation) else validation}
    for what, pair in pairs.items():
        if pair is not None:
            require(isinstance(pair, (tuple, list)) and len(pair) == 2, f"{what} must be (x, y), not {shown(pair)}")
            whose.append(what)
            images.append(_images(f"x of {what}", pair[0], channels_first))
            labels.append(_labels(f"y of {what}", pair[1]))
    numbers, names = _numbered(labels, classes)
    parts, held = dict(zip(whose, zip(images, numbers, strict=True), strict=True)), None
    for what, part in parts.items():
        _check_part(name, what, *part, images[0])
    train, tested = parts["train"], parts.get("test")
    if tested is None:
        train, tested = _divided(name, train, number("test_fraction", test_fraction, above=0, below=1), seed)
    if "validation" in parts:
        (pixels, own), count = parts["validation"], len(train[1])
        train = joined(train[0], pixels), np.concatenate([train[1], own])
        held = np.arange(count, count + len(own))
    return names, train, tested, held


def gathered(what: str, samples: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of a map-style data set, all read once."""
    right = hasattr(samples, "__len__") and hasattr(samples, "__getitem__")
    require(right, f"{what} must be a map-style data set, with a length and numbered samples, not {shown(samples)}")
    require(len(samples) > 0, f"{what} holds no samples")
    labels = []
    for n in range(len(samples)):
        try:
            image, label = samples[n]
        except (TypeError, ValueError, LookupError) as error:
            raise DataError(f"sample {n} of {what} is no pair (image, label): {one_line(error)}") from error
        pixels = _pixels(f"image {n} of {what}", image)
        if n == 0:
            images = np.empty((len(samples), *pixels.shape), pixels.dtype)
        if pixels.shape != images.shape[1:] or pixels.dtype != images.dtype:
            raise DataError(
                f"image {n} of {what} is {pixels.dtype} {pixels.shape}, image 0 {images.dtype} {images.shape[1:]}; "
                "bring them to one size and type by a transformation"
            )
        images[n] = pixels
        labels.append(label if isinstance(label, str) else _whole(f"label {n} of {what}", label))
    return images, np.array(labels)


def _whole(what: str, label: Any) -> int:
    try:
        return operator.index(label)  # an integer of Python, NumPy or a tensor of one
    except TypeError:
        raise DataError(f"{what} must be an integer or a name, not {shown(label)}") from None


def _pixels(what: str, image: Any) -> np.ndarray:
    if hasattr(image, "getbands") and image.mode not in ("L", "RGB", *NUMBERS):
        image = image.convert("RGB")
    array, is_tensor = _array(what, image), hasattr(image, "__dlpack__") and not isinstance(image, np.ndarray)
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise DataError(f"{what} has shape {array.shape}; a picture, a tensor (C, H, W) or an array (H, W, C) is read")
    return array.transpose(1, 2, 0) if is_tensor else array


def _array(what: str, value: Any) -> np.ndarray:
    try:
        return host_array(value)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        raise ConfigurationError(f"{what} cannot be taken as an array: {one_line(error)}") from error


def _images(what: str, value: Any, channels_first: bool) -> Any:
    """Return images (N, H, W, C) as uint8 or float32; a memory-mapped array is not read yet."""
    if isinstance(value, StoredImages):
        return value
    array = _array(what, value)
    if array.dtype.kind not in "uifb":
        raise DataError(f"{what} holds {array.dtype}; images are {KINDS}")
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(f"{what} has shape {array.shape}; images are (N, H, W, C), or (N, H, W) without colours")
    if channels_first and array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    elif array.ndim == 4 and array.shape[1] <= 4 < min(array.shape[2:]):
        raise DataError(f"{what} has shape {array.shape}, which looks like (N, C, H, W); give channels_first=True")
    images = stored(array.__getitem__, array.shape, array.dtype)
    return images if isinstance(array, np.memmap) else images[:]


def _labels(what: str, value: Any) -> np.ndarray:
    """Return labels as a vector of int64 or of text."""
    array = _array(what, value)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        hint = "; of one-hot rows take y.argmax(axis=1)" if array.ndim == 2 else ""
        raise DataError(f"{what} has shape {array.shape}; labels are a vector{hint}")
    if array.dtype.kind == "O" and all(isinstance(item, str) for item in array):
        array = array.astype(str)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    if array.dtype.kind not in "uibU":
        raise DataError(f"{what} holds {array.dtype}; labels are integers from 0 on, or names of classes")
    return array if array.dtype.kind == "U" else array.astype(np.int64)


def _numbered(labels: list[np.ndarray], classes: Sequence[str] | None) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Return the labels of all parts as numbers, and the names of the classes."""
    kinds = {array.dtype.kind for array in labels if len(array)}
    if len(kinds) > 1:
        raise DataError("some labels are names and some are numbers; give all of them as one or the other")
    if kinds == {"U"}:
        names = sorted(set(labels[0])) if classes is None else items("classes", classes, str)
        number_of = {name: n for n, name in enumerate(names)}
        unknown = next((name for array in labels for name in array if name not in number_of), None)
        if unknown is not None:
            raise DataError(f"label '{unknown}' is no class of the training images: {', '.join(names[:8])}")
        numbers = [np.array([number_of[name] for name in array], np.int64) for array in labels]
    else:
        numbers, most = labels, max(int(array.max(initial=-1)) for array in labels)
        least = min(int(array.min(initial=0)) for array in labels)
        if classes is None:
            present = np.bincount(labels[0][labels[0] >= 0], minlength=1)[: most + 1] > 0 if most < 10**6 else [False]
            if least < 0 or not all(present) or len(present) < most + 1:
                raise DataError(
                    f"labels run from {min(int(array.min()) for array in labels if len(array))} to {most}, and not "
                    "every class from 0 on has a training image; count from 0, or give the names of all classes as "
                    "classes"
                )
        names = [str(n) for n in range(most + 1)] if classes is None else items("classes", classes, str)
        if least < 0 or most >= len(names):
            raise DataError(f"labels run from {least} to {most}, but there are {len(names)} classes; count from 0")
    if len(set(names)) < len(names):
        raise DataError("two classes have the same name")
    if len(names) < 2:
        raise DataError(f"there is only one class, {', '.join(names) or 'or none'}; a network needs two to tell apart")
    return numbers, tuple(map(str, names))


def _check_part(name: str, what: str, images: Any, labels: np.ndarray, like: Any) -> None:
    if len(images) != len(labels):
        raise DataError(f"data set {name}, {what}: {len(images)} images, but {len(labels)} labels")
    if images.shape[1:] != like.shape[1:] or images.dtype != like.dtype:
        raise DataError(
            f"data set {name}: {what} images are {images.dtype} {images.shape[1:]}, train images {like.dtype} "
            f"{like.shape[1:]}; they must agree"
        )
    wrong = first_not_finite(images)
    if wrong is not None:
        raise DataError(f"data set {name}, {what}: image {wrong} has values that are NaN or infinite; leave it out")


def _divided(name: str, part: Part, fraction: float, seed: int) -> tuple[Part, Part]:
    """Return (the rest, a `fraction` for testing) of images and labels, at least one each."""
    (images, labels), count = part, len(part[1])
    if count < 2:
        raise DataError(f"data set {name} has one image; it takes two for a training and a test part")
    rows = stratified(labels, min(max(1, round(count * fraction)), count - 1), seed, TEST)
    rest = np.setdiff1d(np.arange(count), rows, assume_unique=True)
    return (chosen(images, rest), labels[rest]), (chosen(images, rows), labels[rows])
