"""KMNIST, EMNIST, coarse labels of CIFAR-100 and SVHN with its extra images, as tiny files of the original formats."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import pytest
from data_files import (
    assert_one_line,
    assert_same,
    cifar_binary_files,
    cifar_python_files,
    idx_bytes,
    idx_files,
    random_arrays,
    random_split,
    shrink_source,
    svhn_files,
    trust,
    write_files,
)

from cupyep.data import load_dataset, sources
from cupyep.errors import DataError

GREY = random_arrays((28, 28, 1), 10)


def load(name, folder):
    return load_dataset(name, folder, download=False)


@pytest.mark.parametrize("folder", ["kmnist", "KMNIST/raw"])
def test_kmnist(tmp_path, monkeypatch, folder):
    for name in ("kmnist", "mnist", "fashion-mnist"):
        shrink_source(monkeypatch, name)
    write_files(tmp_path / folder, idx_files(GREY))
    assert_same(load("kmnist", tmp_path), GREY)
    assert_same(load("kmnist", tmp_path / folder), GREY)  # the folder itself, for it is called so
    for name in ("mnist", "fashion-mnist"):
        with pytest.raises(DataError, match="not found"):
            load(name, tmp_path / folder)


def emnist(arrays, part, first=0):
    """Return {name: bytes}: rows and columns of EMNIST's images are exchanged, letters count from 1."""
    files = {}
    for prefix, (images, labels) in zip(("train", "test"), arrays, strict=True):
        turned = np.stack([image[..., 0].T for image in images])
        files[f"emnist-{part}-{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(turned), 1)
        files[f"emnist-{part}-{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(labels + first), 1)
    return files


def packed(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"gzip/{name}", content)
    return buffer.getvalue()


@pytest.mark.parametrize("where", ["emnist", "EMNIST/raw", ".", "zip"])
@pytest.mark.parametrize(("part", "classes", "first"), [("letters", 26, 1), ("balanced", 47, 0), ("digits", 10, 0)])
def test_emnist(tmp_path, monkeypatch, where, part, classes, first):
    shrink_source(monkeypatch, f"emnist-{part}")
    arrays = random_arrays((28, 28, 1), classes)
    files = emnist(arrays, part, first)
    if where == "zip":
        write_files(tmp_path / "emnist", {"gzip.zip": packed(files)})
    else:
        write_files(tmp_path / where, files)
    data = load(f"emnist-{part}", tmp_path)
    assert_same(data, arrays)
    assert data.classes[-1] == {"letters": "z", "balanced": "t", "digits": "9"}[part]


def test_wrong_files_of_emnist(tmp_path, monkeypatch):
    shrink_source(monkeypatch, "emnist-letters")
    files = emnist(random_arrays((28, 28, 1), 26), "letters")  # labels from 0: not the original's
    write_files(tmp_path / "one" / "emnist", files)
    with pytest.raises(DataError, match=r"labels lie outside 0\.\.25") as error:
        load("emnist-letters", tmp_path / "one")
    assert_one_line(error)
    content = packed(files)
    for n, damaged in enumerate((content[: len(content) // 2], packed({}), b"no archive")):
        write_files(tmp_path / f"zip{n}", {"gzip.zip": damaged})
        with pytest.raises(DataError, match="cannot be read .*; get the archive again") as error:
            load("emnist-letters", tmp_path / f"zip{n}")
        assert_one_line(error, "gzip.zip: gzip/emnist-letters-train-labels-idx1-ubyte.gz")


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_coarse_labels_of_cifar100(tmp_path, monkeypatch, kind):
    arrays = random_arrays((32, 32, 3), 100)
    shrink_source(monkeypatch, "cifar100-coarse")
    files = (cifar_binary_files if kind == "binary" else cifar_python_files)("cifar100", arrays)
    if kind == "python":
        trust(monkeypatch, "cifar100-coarse", files)
    write_files(tmp_path / f"cifar-100-{kind}", files)
    coarse = 7 if kind == "binary" else 3  # as the files are written
    assert_same(load("cifar100-coarse", tmp_path), [(images, np.full(len(images), coarse)) for images, _ in arrays])


def test_svhn_with_its_extra_images(tmp_path, monkeypatch):
    train, test = random_arrays((32, 32, 3), 10)
    extra = random_split(30, (32, 32, 3), 10, 3)
    shrink_source(monkeypatch, "svhn-extra")
    files = svhn_files((train, test))
    files["extra_32x32.mat"] = svhn_files((extra, test))["train_32x32.mat"]
    write_files(tmp_path, trust(monkeypatch, "svhn-extra", files))
    both = tuple(np.concatenate(pair) for pair in zip(train, extra, strict=True))
    assert_same(load("svhn-extra", tmp_path), (both, test))
    assert sources.SOURCES["svhn"].remotes[0] in sources.SOURCES["svhn-extra"].remotes
