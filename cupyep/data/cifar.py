"""CIFAR-10 and CIFAR-100: binary or python batches, in a folder or in the original tar.gz (or tar, tgz).

A python batch is a pickle, which is never unpickled but read by `cupyep.data.pickles`. An archive is read in memory;
nothing is ever extracted. Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import functools
import io
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupyep.data.files import check_labels, check_length, find_file, read_bounded
from cupyep.data.pickles import Array, load_pickle
from cupyep.data.sources import Arrays, Layout, Source
from cupyep.errors import DataError, one_line

SLACK = 16 << 20  # bytes granted to a pickle or an archive beside its pixels
MEMBERS = 64  # the original archives hold at most ten


@dataclass(frozen=True)
class Form:
    """Names of the files of one data set in one of its two forms; `labels` is a byte offset or a dictionary key."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int | str


FORMS = {
    "cifar10": (
        Form(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            ("test_batch.bin",),
            0,
        ),
        Form(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            ("test_batch",),
            "labels",
        ),
    ),
    "cifar100": (
        Form("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",), 1),
        Form("cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "fine_labels"),
    ),
}


def layouts(source: Source, folder: Path) -> list[Layout]:
    """Return the places below `folder` where the batches may lie, the quickest to read first."""
    found = []
    for form in FORMS[source.name]:
        outer = folder / form.archive.removesuffix(".tar.gz")  # some unpack an archive into a folder called like it
        for place in (folder / form.folder, folder / form.folder / form.folder, outer / form.folder, folder):
            files = tuple(place / name for name in form.train + form.test)
            found.append(Layout(files, functools.partial(_read_folder, source, form, place)))
    for form in FORMS[source.name]:
        stem = form.archive.removesuffix(".tar.gz")
        archives = (find_file(folder, stem + end) for end in (".tar", ".tgz"))
        archive = next((path for path in archives if path.is_file()), folder / form.archive)
        found.append(Layout((archive,), functools.partial(_read_archive, source, form, archive)))
    return found


def _pickle_limit(pixels: int) -> int:
    # Python 3 writes the bytes of a protocol-2 pickle as latin-1 text in UTF-8: up to two bytes for one.
    return 2 * pixels + SLACK


def _read_folder(source: Source, form: Form, place: Path) -> tuple[Arrays, Arrays]:
    limit = _pickle_limit(math.prod(source.shape) * max(source.train_count, source.test_count))
    return _read(source, form, lambda name: read_bounded(place / name, limit), f"{place}/")


def _read_archive(source: Source, form: Form, archive: Path) -> tuple[Arrays, Arrays]:
    limit = _pickle_limit(math.prod(source.shape) * (source.train_count + source.test_count))
    content = read_bounded(archive, limit)
    members = _tar_members(content, archive, form.folder)

    def member(name: str) -> memoryview:
        if name not in members:
            raise DataError(f"{archive}: has no member {form.folder}/{name}; get the original archive again")
        return members[name]

    return _read(source, form, member, f"{archive}: {form.folder}/")


def _tar_members(content: bytes, archive: Path, folder: str) -> dict[str, memoryview]:
    """Return the regular files of `folder` in the tar `content`, as views into it; refuse any odd member."""
    view, members, count = memoryview(content), {}, 0
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for info in tar:
                count += 1
                if count > MEMBERS or not (info.isdir() or (info.isreg() and not info.issparse())):
                    raise DataError(f"{archive}: holds links, devices or too many members; get the original archive")
                if info.isreg() and info.name.removeprefix("./").startswith(f"{folder}/"):
                    data = view[info.offset_data : info.offset_data + info.size]
                    check_length(data, info.size, f"{archive}: {info.name}")
                    members[info.name.removeprefix("./").removeprefix(f"{folder}/")] = data
    except DataError:
        raise
    except Exception as error:  # tarfile raises many types on damaged files, RecursionError and IndexError among them
        raise DataError(f"{archive}: is not a readable tar archive ({one_line(error)}); get it again") from error
    return members


def _read(
    source: Source, form: Form, content: Callable[[str], bytes | memoryview], prefix: str
) -> tuple[Arrays, Arrays]:
    def split(names: tuple[str, ...], count: int) -> Arrays:
        images, labels = np.empty((count, *source.shape), np.uint8), np.empty(count, np.int64)
        size = count // len(names)
        for k, name in enumerate(names):
            rows = slice(k * size, (k + 1) * size)
            decode = _decode_binary if isinstance(form.labels, int) else _decode_python
            pixels, labels[rows] = decode(source, form, content(name), size, prefix + name)
            check_labels(labels[rows], len(source.classes), prefix + name)
            _to_channels_last(pixels, images[rows])
        return images, labels

    return split(form.train, source.train_count), split(form.test, source.test_count)


def _to_channels_last(pixels: np.ndarray, out: np.ndarray) -> None:
    """Write rows of C planes of H W bytes into `out` (N, H, W, C)."""
    count, height, width, channels = out.shape
    planes = pixels.reshape(count, channels, height, width)
    for channel in range(channels):  # plane by plane: twice as fast as one transposing copy
        out[..., channel] = planes[:, channel]


def _decode_binary(
    source: Source, form: Form, content: bytes | memoryview, count: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    head = 1 + form.labels  # CIFAR-100 has the coarse label before the fine one
    record = head + math.prod(source.shape)
    check_length(content, count * record, where)
    records = np.frombuffer(content, np.uint8).reshape(count, record)
    return records[:, head:], records[:, form.labels]


def _decode_python(
    source: Source, form: Form, content: bytes | memoryview, count: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    batch = load_pickle(content, where)
    if not isinstance(batch, dict):
        raise DataError(f"{where}: is not a CIFAR batch (no dictionary); get the original file")
    batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    data = batch.get("data")
    pixels = data.array if isinstance(data, Array) else None
    labels = batch.get(form.labels)
    shape = (count, math.prod(source.shape))
    if pixels is None or pixels.shape != shape:
        found = "none" if pixels is None else pixels.shape
        raise DataError(
            f"{where}: 'data' should be a uint8 array of shape {shape}, found {found}; get the original file"
        )
    if not isinstance(labels, list) or len(labels) != count or not all(type(label) is int for label in labels):
        raise DataError(f"{where}: '{form.labels}' should be a list of {count} integers; get the original file")
    return pixels, np.array(labels).clip(-1, 1 << 30)  # clipped: a huge integer stays a wrong label, not an overflow
