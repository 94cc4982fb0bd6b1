"""The original files of the data sets: under which names and where they may lie, and how each format is read.

IDX files and CIFAR's binary batches are plain bytes, and checked as such. A pickle can run code, and a damaged MATLAB
file can make SciPy crash, hang or fill the memory: of CIFAR's python batches and of SVHN only the original files are
opened, told by their published MD5 sums, and even then a pickle finds nothing but NumPy's arrays. Archives are read in
memory; nothing is ever extracted.

Sources: https://yann.lecun.com/exdb/mnist/, https://www.cs.toronto.edu/~kriz/cifar.html,
http://ufldl.stanford.edu/housenumbers/
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.data.files import check_labels, check_length, check_sum, find_file, plain_name, read_bounded
from cupyep.data.sources import IDX_FILES, SOURCES, Source, emnist_file
from cupyep.errors import DataError, one_line

Arrays = tuple[np.ndarray, np.ndarray]
"""Images (N, H, W, C) uint8 and labels (N,) int64."""
Content = bytes | memoryview

SLACK = 16 << 20  # bytes granted to a file beside its pixels
MEMBERS = 64  # the original archives hold at most ten
BRIGHTEST = 16  # the images of scikit-learn count ink from 0 to 16


@dataclass(frozen=True)
class Layout:
    """One accepted arrangement of files: it is there when all of `files` are, and `read` returns (train, test)."""

    place: Path
    files: tuple[Path, ...]
    read: Callable[[], tuple[Arrays, Arrays]]


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


# --- IDX: MNIST, Fashion-MNIST and KMNIST ---------------------------------------------------------------------------

IDX_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "MNIST"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST", "fashion_mnist", "fashion", "fashionmnist"),
    "kmnist": ("kmnist", "KMNIST/raw", "KMNIST"),
}
NAMED_AFTER = {"fashion-mnist": {"fashion-mnist", "FashionMNIST", "fashion_mnist"}, "kmnist": {"kmnist", "KMNIST"}}


def _idx(source: Source, folder: Path) -> Iterator[Layout]:
    """All these data sets use the same file names, so `folder` itself counts for Fashion-MNIST and KMNIST only when it
    is named so, and for MNIST only when it is not."""
    names, called = IDX_FOLDERS[source.name], {folder.name, folder.parent.name}
    named = next((name for name, known in NAMED_AFTER.items() if known & called), "mnist")
    for name in (*names, ".") if named == source.name else names:
        files = tuple(find_file(folder / name, file) for file in IDX_FILES)
        yield Layout(folder / name, files, partial(_read_idx, source, files))


def _read_idx(source: Source, files: tuple[Path, ...]) -> tuple[Arrays, Arrays]:
    def split(images: Path, labels: Path, count: int) -> Arrays:
        pixels, classes = read_idx(images, (count, *source.shape[:2])), read_idx(labels, (count,)).astype(np.int64)
        check_labels(classes, len(source.classes), labels)
        return pixels[..., None], classes

    return split(*files[:2], source.train_count), split(*files[2:], source.test_count)


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the uint8 array of `shape` in the IDX file `path`; any other content is a `DataError`.

    IDX: four magic bytes ``0 0 type rank`` (type 8 is uint8), `rank` big-endian uint32 lengths, then the bytes.
    """
    header = 4 + 4 * len(shape)
    expected = header + math.prod(shape)
    return _parsed_idx(read_bounded(path, expected), shape, path)


def _parsed_idx(content: bytes, shape: tuple[int, ...], path: str | Path) -> np.ndarray:
    header = 4 + 4 * len(shape)
    expected = header + math.prod(shape)
    if len(content) < header:
        raise DataError(f"{path}: ends within its header; it is truncated, get it again")
    if content[:4] != bytes((0, 0, 8, len(shape))):
        raise DataError(f"{path}: is not an IDX file of uint8 with {len(shape)} dimensions; get the original file")
    lengths = struct.unpack(f">{len(shape)}I", content[4:header])
    if lengths != shape:
        raise DataError(f"{path}: holds an array of shape {lengths}, expected {shape}; get the original file")
    check_length(content, expected, path)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# --- EMNIST: IDX files of every part, rows and columns of images exchanged, in a folder or in the original archive ---

EMNIST_PLACES = ("emnist", "EMNIST/raw", "EMNIST/raw/gzip", "emnist/gzip", "EMNIST", "gzip", ".")


def _emnist(source: Source, folder: Path) -> Iterator[Layout]:
    names = tuple(emnist_file(source.name.removeprefix("emnist-"), file) for file in IDX_FILES)
    for place in EMNIST_PLACES:
        files = tuple(find_file(folder / place, name) for name in names)
        yield Layout(folder / place, files, partial(_read_emnist, source, files, None))
    for place in ("emnist/gzip.zip", "EMNIST/raw/gzip.zip", "EMNIST/gzip.zip", "gzip.zip"):
        members = tuple(Path(f"gzip/{name}.gz") for name in names)
        yield Layout(folder / place, (folder / place,), partial(_read_emnist, source, members, folder / place))


def _read_emnist(source: Source, files: tuple[Path, ...], archive: Path | None) -> tuple[Arrays, Arrays]:
    """Return the images in four files, or in members of an archive called so."""

    def read(file: Path, shape: tuple[int, ...]) -> np.ndarray:
        return read_idx(file, shape) if archive is None else _idx_member(archive, file, shape)

    def split(images: Path, labels: Path, count: int) -> Arrays:
        first = 1 if source.name == "emnist-letters" else 0  # letters count from 1
        classes = read(labels, (count,)).astype(np.int64) - first
        check_labels(classes, len(source.classes), labels)
        pixels = read(images, (count, *source.shape[:2])).transpose(0, 2, 1)
        return np.ascontiguousarray(pixels)[..., None], classes

    return split(*files[:2], source.train_count), split(*files[2:], source.test_count)


def _idx_member(archive: Path, member: Path, shape: tuple[int, ...]) -> np.ndarray:
    where, most = f"{archive}: {member.as_posix()}", 4 + 4 * len(shape) + math.prod(shape)
    try:
        with zipfile.ZipFile(archive) as file, file.open(member.as_posix()) as raw, gzip.open(raw) as content:
            found = content.read(most + 1)
    except (OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{where}: cannot be read ({one_line(error)}); get the archive again") from error
    return _parsed_idx(found, shape, where)


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
        size = count // len(names)
        height, width, channels = source.shape
        decode = partial(_decode_binary, form.head) if isinstance(form.labels, int) else _decode_python
        for k, name in enumerate(names):
            rows = slice(k * size, (k + 1) * size)
            pixels, labels[rows] = decode(source, form.labels, content(name), size, prefix + name)
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


def _decode_binary(head: int, source: Source, labels: int, content: Content, count: int, where: str) -> Arrays:
    record = head + _bytes(source, 1)
    check_length(content, count * record, where)
    records = np.frombuffer(content, np.uint8).reshape(count, record)
    return records[:, head:], records[:, labels]


def _decode_python(source: Source, labels: str, content: Content, count: int, where: str) -> Arrays:
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
    return tuple(np.concatenate(arrays) for arrays in zip(*train, strict=True)), (images, labels)


# --- the 8 x 8 digits of scikit-learn: data for a first run on any machine, without network or files ----------------


def _digits(source: Source, _: Path) -> Iterator[Layout]:
    yield Layout(Path("scikit-learn"), (), partial(_read_digits, source))


def _read_digits(source: Source) -> tuple[Arrays, Arrays]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError('data set digits comes with scikit-learn: pip install "cupyep[demo]"') from error
    bundle, n = load_digits(), source.train_count
    if len(bundle.target) != n + source.test_count:
        raise DataError(f"scikit-learn's digits hold {len(bundle.target)} images, expected {n + source.test_count}")
    images = np.rint(bundle.images * (255 / BRIGHTEST)).astype(np.uint8)[..., None]
    labels = bundle.target.astype(np.int64)
    return (images[:n], labels[:n]), (images[n:], labels[n:])


LAYOUTS = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "cifar100-coarse": _cifar,
    "mnist": _idx,
    "fashion-mnist": _idx,
    "kmnist": _idx,
    "emnist-letters": _emnist,
    "emnist-balanced": _emnist,
    "emnist-digits": _emnist,
    "svhn": _svhn,
    "svhn-extra": _svhn,
    "digits": _digits,
}
