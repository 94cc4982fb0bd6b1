"""A user's own data set by the name ``file:PATH`` or ``folder:PATH``: arrays in a .npz or HDF5 file, or pictures.

A file holds ``x`` (N, H, W, C) or (N, H, W) and ``y`` (N,), perhaps also ``x_val``, ``y_val``, ``x_test``, ``y_test``
and ``classes``, the names of the classes; ``x_train`` and ``y_train`` are other names of ``x`` and ``y``. Nothing
pickled is read, for a pickle can run code. Large arrays stay in the file, and are read batch by batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cupyep.data.dataset import Dataset
from cupyep.data.files import ARRAY_ERRORS
from cupyep.data.folder import DEFAULT_SIZE, pictures_file
from cupyep.data.images import add_to_digest
from cupyep.data.sources import short_name
from cupyep.data.stored import StoredImages, stored
from cupyep.errors import ConfigurationError, DataError, integer, one_line, require
from cupyep.files import expanded
from cupyep.persistence import hdf5

ALIASES = {"x_train": "x", "y_train": "y"}
NAMES = ("x", "y", "x_val", "y_val", "x_test", "y_test", "classes")
ENDINGS = (".npz", ".h5", ".hdf5")
MADE_BY = "make one by np.savez(path, x=images, y=labels)"


def load_own(name: str, image_size: int | None, validation: int | None, **options: Any) -> Dataset:
    """Return the data set ``file:PATH`` or ``folder:PATH``; the arguments are those of `cupyep.data.load_dataset`."""
    kind, _, text = name.partition(":")
    path = expanded(text)
    if kind == "folder":
        size = DEFAULT_SIZE if image_size is None else integer("image-size", image_size)
        arrays = read_arrays(pictures_file(path, size))
    else:
        require(image_size is None, "image-size is for pictures and named data sets; images of a file stay as they are")
        arrays = read_arrays(path)
    try:
        dataset = _dataset(short_name(name), arrays, validation, options)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    digest = hashlib.sha256()
    for own in sorted(arrays):
        digest.update(own.encode())
        add_to_digest(digest, arrays[own])
    return dataclasses.replace(dataset, fingerprint=digest.hexdigest())


def _dataset(name: str, arrays: dict[str, Any], validation: int | None, options: dict[str, Any]) -> Dataset:
    parts: dict[str, Any] = {}
    for end in ("", "_val", "_test"):
        pair = (f"x{end}", f"y{end}")
        lacking = [what for what in pair if what not in arrays]
        if lacking and (end == "" or len(lacking) < 2):
            raise DataError(f"holds no {lacking[0]}, but {', '.join(sorted(arrays)) or 'nothing'}; {MADE_BY}")
        parts[end] = None if lacking else tuple(arrays[what] for what in pair)
    (x, y), held = parts[""], parts["_val"]
    require(held is None or validation is None, f"{name} has a validation part of its own; leave out --validation")
    classes = [str(item) for item in np.ravel(arrays["classes"])] if "classes" in arrays else None
    held = validation if held is None else held
    return Dataset.from_arrays(x, y, parts["_test"], classes, held, name=name, flip=True, **options)


def read_arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of a data set in the file at `path` by their `NAMES`; large images as `StoredImages`.

    `ConfigurationError` if the name ends neither in .npz nor in .h5; `DataError` if the file is missing, damaged, or
    holds objects.
    """
    ending = path.suffix.lower()
    if path.is_dir():
        raise ConfigurationError(f"{path} is a folder: for one with pictures, use --dataset folder:{path}")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if ending not in ENDINGS:
        raise ConfigurationError(
            f"{path} ends in '{ending}': a file of images is one of {', '.join(ENDINGS)}; {MADE_BY}"
        )
    try:
        found = _npz(path) if ending == ".npz" else _h5(path)
    except DataError:
        raise
    except ARRAY_ERRORS as error:
        raise DataError(f"{path}: is not a readable {ending} file ({one_line(error)}); {MADE_BY}") from error
    arrays = {ALIASES.get(name, name): array for name, array in found.items()}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise DataError(f"{path}: {name} holds objects, which could run code; save it as numbers, or names as text")
    return arrays


def _npz(path: Path) -> dict[str, Any]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if ALIASES.get(name, name) in NAMES:
                arrays[name] = _member(path, archive, info)
    return arrays


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """Return an array of an archive; large images that are not compressed stay there."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read(file)
        head = file.tell()
    if dtype.hasobject:
        raise DataError(
            f"{path}: {info.filename} holds pickled objects, which could run code; save it as numbers, or names as text"
        )
    if info.compress_type == zipfile.ZIP_STORED and not is_fortran and len(shape) in (3, 4):
        if head + math.prod(shape) * dtype.itemsize != info.file_size:
            raise DataError(f"{path}: {info.filename} is truncated or damaged; {MADE_BY}")
        images = _in_place(path, _start(path, info) + head, shape, dtype)
        if images.is_large:
            return images
    with archive.open(info) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _start(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where the content of a member begins: behind a header, a name and what is extra."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        return info.header_offset + 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2))


def _in_place(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> StoredImages:
    """Return the images that begin at the byte `start` of a file.

    They are read and not mapped: what a system maps around a page that is asked for counts as memory, too, and is many
    times as much where images are asked for in random order.
    """
    size = math.prod(shape[1:]) * dtype.itemsize

    def read(rows: Any) -> np.ndarray:
        numbers = np.arange(*rows.indices(shape[0])) if isinstance(rows, slice) else rows
        found = np.empty((len(numbers), *shape[1:]), dtype)
        flat = found.reshape(-1).view(np.uint8)
        ends = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]  # of runs of neighbours
        with open(path, "rb", buffering=0) as file:
            for first, last in itertools.pairwise(ends if len(numbers) else []):
                part = flat[first * size : last * size]
                file.seek(start + int(numbers[first]) * size)
                if file.readinto(part.data) != len(part):
                    raise DataError(f"{path}: became shorter while it was read")
        return found

    return stored(read, shape, dtype)


def _h5(path: Path) -> dict[str, Any]:
    file, arrays = hdf5.open_file(path), {}
    for name in (*NAMES, *ALIASES):
        array = hdf5.find_array(file, name, compressed=True)
        if array is None:
            if name == "classes" and (text := hdf5.attribute(file, name)) is not None:
                arrays[name] = np.array(text).astype(str)
        elif h5py.check_string_dtype(array.dtype) is not None:
            arrays[name] = array.asstr()[...].astype(str)
        else:
            arrays[name] = _of_h5(array)
    return arrays


def _of_h5(array: h5py.Dataset) -> Any:
    if len(array.shape) not in (3, 4):
        return array[...]

    def read(rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            return array[rows]
        unique, places = np.unique(rows, return_inverse=True)  # HDF5 reads increasing rows only
        return array[unique][places]

    images = stored(read, array.shape, array.dtype)
    return images if images.is_large else array[...]
