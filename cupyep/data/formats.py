"""The original files of the data sets: under which names and where they may lie, and how each format is read.

CIFAR's binary batches are plain bytes, and checked as such, as IDX files are (`cupyep.data.idx`). A pickle can run
code, and a damaged MATLAB file can make SciPy crash, hang or fill the memory: of CIFAR python batches and of SVHN only
the original files are opened, told by their published MD5 sums, and even then a pickle finds nothing but NumPy's
arrays. Archives are read in memory; nothing is ever extracted.

Sources: https://www.cs.toronto.edu/~kriz/cifar.html, http://ufldl.stanford.edu/housenumbers/
"""

from __future__ import annotations

import io
import math
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.data import idx
from cupyep.data.files import Arrays, Layout, check_labels, check_length, check_sum, find_file, plain_name, read_bounded
from cupyep.data.sources import SOURCES, Source
from cupyep.errors import DataError, needing, one_line

Content = bytes | memoryview

SLACK = 16 << 20  # bytes granted to a file beside its pixels
MEMBERS = 64  # the original archives hold at most ten
BRIGHTEST = 16  # the images of scikit-learn count ink from 0 to 16


def layouts_found(name: str, folder: Path) -> tuple[list[Layout], str]:
    """Return the complete layouts of a data set below `folder`, the quickest to read first, and, where there is none, a
    note about a file that is missing from an incomplete one."""
    found, note = [], ""
    for layout in LAYOUTS[name](SOURCES[name], folder):
        missing = [file for file in layout.files if not file.is_file()]
        if not missing:
            found.append(layout)
        elif len(missing) < len(layout.files) and not note:
            note = f"{missing[0]} is missing; "
    return found, "" if found else note


def _bytes(source: Source, count: int) -> int:
    return math.prod(source.shape) * count


# --- CIFAR-10 and CIFAR-100: binary or python batches, in a folder or in the original archive -----------------------


@dataclass(frozen=True)
class Form:
    """One of the two versions of a CIFAR data set; `labels` is the place of a byte or the key of a dictionary.

    Of the binary version, `head` bytes lie before the pixels of an image.
    """

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int | str
    head: int = 1


BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")
FORMS = {
    "cifar10": (
        Form("cifar-10-batches-bin", "cifar-10-binary", tuple(f"{n}.bin" for n in BATCHES), ("test_batch.bin",), 0),
        Form("cifar-10-batches-py", "cifar-10-python", BATCHES, ("test_batch",), "labels"),
    ),
    "cifar100": (
        Form("cifar-100-binary", "cifar-100-binary", ("train.bin",), ("test.bin",), 1, 2),  # after the coarse label
        Form("cifar-100-python", "cifar-100-python", ("train",), ("test",), "fine_labels"),
    ),
    "cifar100-coarse": (
        Form("cifar-100-binary", "cifar-100-binary", ("train.bin",), ("test.bin",), 0, 2),
        Form("cifar-100-python", "cifar-100-python", ("train",), ("test",), "coarse_labels"),
    ),
}


def _cifar(source: Source, folder: Path) -> Iterator[Layout]:
    for form in FORMS[source.name]:
        # Some unpack an archive into a folder called like it.
        for outer in (form.folder, f"{form.folder}/{form.folder}", f"{form.archive}/{form.folder}", "."):
            files = tuple(folder / outer / name for name in form.train + form.test)
            yield Layout(folder / outer, files, partial(_read_cifar, source, form, folder / outer))
    for form in FORMS[source.name]:
        unusual = (find_file(folder, form.archive + end) for end in (".tar", ".tgz"))
        archive = next((path for path in unusual if path.is_file()), folder / f"{form.archive}.tar.gz")
        yield Layout(archive, (archive,), partial(_read_cifar, source, form, archive))


def _read_cifar(source: Source, form: Form, place: Path) -> tuple[Arrays, Arrays]:
    """Return the images in the folder or archive at `place`."""
    limit = _bytes(source, source.train_count + source.test_count) + SLACK
    members = _tar_members(read_bounded(place, limit), place, form.folder) if place.is_file() else None
    prefix = f"{place}/" if members is None else f"{place}: {form.folder}/"

    def content(name: str) -> Content:
        if members is None:
            return read_bounded(place / name, limit)
        if name not in members:
            raise DataError(f"{place}: has no member {form.folder}/{name}; get the original archive again")
        return members[name]

    def split(names: tuple[str, ...], count: int) -> Arrays:
        images, labels = np.empty((count, *source.shape), np.uint8), np.empty(count, np.int64)
        size, key = count // len(names), form.labels
        height, width, channels = source.shape
        decode = partial(_decode_binary, form.head, key) if isinstance(key, int) else partial(_decode_python, key)
        for k, name in enumerate(names):
            rows = slice(k * size, (k + 1) * size)
            pixels, labels[rows] = decode(source, content(name), size, prefix + name)
            check_labels(labels[rows], len(source.classes), prefix + name)
            planes = pixels.reshape(size, channels, height, width)
            for channel in range(channels):  # plane by plane: twice as fast as one transposing copy
                images[rows, ..., channel] = planes[:, channel]
        return images, labels

    return split(form.train, source.train_count), split(form.test, source.test_count)


def _tar_members(content: bytes, archive: Path, folder: str) -> dict[str, memoryview]:
    """Return the regular files of `folder` in the tar `content`, as views into it; refuse any odd member."""
    view, members, count = memoryview(content), {}, 0
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for info in tar:
                count += 1
                if count > MEMBERS or not (info.isdir() or (info.isreg() and not info.issparse())):
                    raise DataError(f"{archive}: holds links, devices or too many members; get the original archive")
                name = info.name.removeprefix("./")
                if info.isreg() and name.startswith(f"{folder}/"):
                    data = view[info.offset_data : info.offset_data + info.size]
                    check_length(data, info.size, f"{archive}: {info.name}")
                    members[name.removeprefix(f"{folder}/")] = data
    except DataError:
        raise
    except Exception as error:  # tarfile raises many types on damaged files, RecursionError and IndexError among them
        raise DataError(f"{archive}: is not a readable tar archive ({one_line(error)}); get it again") from error
    return members


def _decode_binary(head: int, labels: int, source: Source, content: Content, count: int, where: str) -> Arrays:
    record = head + _bytes(source, 1)
    check_length(content, count * record, where)
    records = np.frombuffer(content, np.uint8).reshape(count, record)
    return records[:, head:], records[:, labels]


def _decode_python(labels: str, source: Source, content: Content, count: int, where: str) -> Arrays:
    remedy = "a pickle can run code, so no other is read: get the original file or the binary version"
    check_sum(content, source.sums[Path(where).name], where, remedy)
    batch = BatchUnpickler(io.BytesIO(content), encoding="latin1").load()
    return batch["data"], batch[labels]


class BatchUnpickler(pickle.Unpickler):
    """Unpickles uint8 arrays, lists and texts; whatever else a file names is a `DataError`."""

    # What Python 2 called it; only an array itself knows where NumPy keeps it today.
    NAMED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return what is called `name` in `module`, if a CIFAR batch needs it."""
        if (module, name) not in self.NAMED:
            raise DataError(f"a pickle asks for {module}.{name}, which no CIFAR file needs; get the original file")
        return self.NAMED[module, name]


# --- SVHN: two MATLAB files with X (32, 32, 3, N) uint8 and y (N, 1), where 10 means digit 0 ------------------------


def _svhn(source: Source, folder: Path) -> Iterator[Layout]:
    for name in ("svhn", "SVHN", "."):
        parts = ("train", "extra", "test") if source.name == "svhn-extra" else ("train", "test")
        files = tuple(find_file(folder / name, f"{part}_32x32.mat") for part in parts)
        yield Layout(folder / name, files, partial(_read_svhn, source, files))


def _read_svhn(source: Source, files: tuple[Path, ...]) -> tuple[Arrays, Arrays]:
    from scipy.io import loadmat  # here: most commands do without

    def split(path: Path, count: int) -> Arrays:
        content = read_bounded(path, _bytes(source, count) + SLACK)
        remedy = "MATLAB files can do harm, so no other is read: get the original file"
        check_sum(content, source.sums[plain_name(path)], path, remedy)
        arrays = loadmat(io.BytesIO(content), variable_names=("X", "y"))
        return np.ascontiguousarray(arrays["X"].transpose(3, 0, 1, 2)), arrays["y"].ravel().astype(np.int64) % 10

    *train, (images, labels) = (split(file, max(source.train_count, source.test_count)) for file in files)
    if len(train) == 1:
        return train[0], (images, labels)
    pixels, classes = map(np.concatenate, zip(*train, strict=True))
    return (pixels, classes), (images, labels)


# --- the 8 x 8 digits of scikit-learn: data for a first run on any machine, without network or files ----------------


def _digits(source: Source, _: Path) -> Iterator[Layout]:
    yield Layout(Path("scikit-learn"), (), partial(_read_digits, source))


def _read_digits(source: Source) -> tuple[Arrays, Arrays]:
    with needing('data set digits comes with scikit-learn: pip install "cupyep[demo]"', DataError):
        from sklearn.datasets import load_digits
    bundle, n = load_digits(), source.train_count
    if len(bundle.target) != n + source.test_count:
        raise DataError(f"scikit-learn's digits hold {len(bundle.target)} images, expected {n + source.test_count}")
    images = np.rint(bundle.images * (255 / BRIGHTEST)).astype(np.uint8)[..., None]
    labels = bundle.target.astype(np.int64)
    return (images[:n], labels[:n]), (images[n:], labels[n:])


LAYOUTS = {
    **dict.fromkeys(("cifar10", "cifar100", "cifar100-coarse"), _cifar),
    **dict.fromkeys(idx.FOLDERS, idx.plain),
    **dict.fromkeys(("emnist-letters", "emnist-balanced", "emnist-digits"), idx.emnist),
    **dict.fromkeys(("svhn", "svhn-extra"), _svhn),
    "digits": _digits,
}
