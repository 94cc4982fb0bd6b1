"""Small synthetic data sets written in the original file formats, for the tests of `cupyep.data`."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import h5py
import numpy as np
import scipy.io

from cupyep.data import sources
from cupyep.persistence import hdf5

TRAIN, TEST = 50, 10


def shrink_source(monkeypatch, name):
    """Make the table say that data set `name` has 50 training and 10 test images."""
    small = dataclasses.replace(sources.SOURCES[name], train_count=TRAIN, test_count=TEST, fingerprints=())
    monkeypatch.setitem(sources.SOURCES, name, small)
    return small


def trust(monkeypatch, name, files):
    """Make the table say that `files` ({file name: bytes}) are original ones of data set `name`; return them."""
    source = sources.SOURCES[name]
    sums = dict(source.sums) | {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(sources.SOURCES, name, dataclasses.replace(source, sums=sums))
    return files


def random_split(count, shape, classes, seed):
    """Return images (N, H, W, C) uint8 and labels (N,) int64."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.integers(0, classes, count)


def random_arrays(shape, classes):
    return random_split(TRAIN, shape, classes, 1), random_split(TEST, shape, classes, 2)


def planes(images):
    """Return rows of red, green, blue planes, one image a row, by the definition of the CIFAR format."""
    return np.stack([np.concatenate([image[..., c].ravel() for c in range(3)]) for image in images])


def cifar_binary_files(name, arrays):
    """Return {file name: bytes} of the binary version."""
    (train_x, train_y), (test_x, test_y) = arrays

    def records(images, labels):
        coarse = b"\x07" if name == "cifar100" else b""
        return b"".join(coarse + bytes([y]) + row.tobytes() for row, y in zip(planes(images), labels, strict=True))

    if name == "cifar100":
        return {"train.bin": records(train_x, train_y), "test.bin": records(test_x, test_y)}
    files = {f"data_batch_{k + 1}.bin": records(train_x[10 * k :][:10], train_y[10 * k :][:10]) for k in range(5)}
    return files | {"test_batch.bin": records(test_x, test_y)}


def python2_pickle(content):
    """Return the pickle that Python 2 wrote for the original archives: byte strings, ``numpy.core`` paths."""

    def text(value):
        return b"U" + bytes([len(value)]) + value.encode()

    def number(value):
        return b"J" + struct.pack("<i", value)

    rows, columns = content["data"].shape
    raw = content["data"].tobytes()
    dtype = (
        b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R(K\x03" + text("|") + b"NNN" + number(-1) * 2 + b"K\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R"
    array += b"(K\x01" + number(rows) + number(columns) + b"\x86" + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw
    items = text("data") + array + b"tb"
    for key, value in content.items():
        if key != "data":
            items += text(key) + b"](" + b"".join(number(label) for label in value) + b"e"
    return b"\x80\x02}(" + items + b"u."


def cifar_python_files(name, arrays):
    """Return {file name: bytes} of the python version."""
    (train_x, train_y), (test_x, test_y) = arrays

    def batch(images, labels):
        labels = [int(y) for y in labels]
        if name == "cifar100":
            return python2_pickle({"data": planes(images), "coarse_labels": [3] * len(labels), "fine_labels": labels})
        return python2_pickle({"data": planes(images), "labels": labels})

    if name == "cifar100":
        return {"train": batch(train_x, train_y), "test": batch(test_x, test_y)}
    files = {f"data_batch_{k + 1}": batch(train_x[10 * k :][:10], train_y[10 * k :][:10]) for k in range(5)}
    return files | {"test_batch": batch(test_x, test_y)}


def write_files(folder: Path, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_archive(path: Path, folder, files):
    """Write a tar.gz with the member `folder` and below it `files`, as the original archives are."""
    staging = path.parent / "staging"
    write_files(staging / folder, files | {"readme.html": b"<html>"})
    with tarfile.open(path, "w:gz") as tar:
        tar.add(staging / folder, folder)


def idx_bytes(array):
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def idx_files(arrays, compress=True):
    """Return {file name: bytes} of the four IDX files."""
    files = {}
    for prefix, (images, labels) in zip(("train", "t10k"), arrays, strict=True):
        files[f"{prefix}-images-idx3-ubyte"] = idx_bytes(images[..., 0])
        files[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(labels)
    return {f"{name}.gz": gzip.compress(raw, 1) for name, raw in files.items()} if compress else files


def svhn_files(arrays):
    """Return {file name: bytes} of the two MATLAB files, with label 10 for digit 0."""
    files = {}
    for prefix, (images, labels) in zip(("train", "test"), arrays, strict=True):
        content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]}
        buffer = io.BytesIO()
        scipy.io.savemat(buffer, content, do_compression=True)
        files[f"{prefix}_32x32.mat"] = buffer.getvalue()
    return files


@contextlib.contextmanager
def edited(path):
    """Yield the HDF5 file at `path` to be changed; afterwards its seal holds again."""
    with h5py.File(path, "r+") as file:
        yield file
    hdf5.seal(path)


def assert_one_line(error, *parts):
    """The message is one line and names every one of `parts`."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def assert_same(dataset, arrays):
    for split, (images, labels) in zip((dataset.train, dataset.test), arrays, strict=True):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        np.testing.assert_array_equal(split.images, images)
        np.testing.assert_array_equal(split.labels, labels)
