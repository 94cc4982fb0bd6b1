"""Damaged and hostile files of the data sets: see `fuzzing` for the contract that every one of them is read under."""

from __future__ import annotations

import gzip
import os
import struct
import tarfile

import numpy as np
import pytest
from data_files import (
    cifar_binary_files,
    cifar_python_files,
    idx_bytes,
    idx_files,
    random_arrays,
    shrink_source,
    svhn_files,
    trust,
    write_files,
)
from fuzzing import amounts, damaged, explore, refused
from hypothesis import strategies as st

from cupyep.data import load_dataset
from cupyep.data.idx import read_idx
from cupyep.errors import DataError

IMAGES, LABELS = np.arange(10 * 4 * 5).reshape(10, 4, 5) % 251, np.arange(10)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The working folder; nothing may appear in it or beside it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def load(name, folder):
    return lambda: load_dataset(name, folder, download=False)


# --- IDX -----------------------------------------------------------------------------------------------------------


@amounts(25, 2500)
@pytest.mark.parametrize("compress", [True, False])
def test_idx(amount, work, compress):
    raw, path = idx_bytes(IMAGES), work / ("file.gz" if compress else "file")
    examples = damaged(raw)
    if compress:
        examples = examples.map(lambda content: gzip.compress(content, 1)) | damaged(gzip.compress(raw, 1))
    found = explore(examples, amount, path.write_bytes, lambda: read_idx(path, IMAGES.shape), folder=work)
    assert found[1] > amount // 4


@amounts(12, 1200)
def test_mnist(amount, work, monkeypatch):
    shrink_source(monkeypatch, "mnist")
    files = idx_files(random_arrays((28, 28, 1), 10), compress=False)
    write_files(work / "mnist", files)
    path = work / "mnist" / "t10k-labels-idx1-ubyte"
    explore(damaged(files[path.name]), amount, path.write_bytes, load("mnist", work), folder=work)


@pytest.mark.parametrize("shape", [(1 << 30, 1 << 30), (10, 4), (1 << 32 - 1, 5)])
def test_idx_files_of_any_declared_size_are_refused_at_their_header(work, shape):
    header = bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *(n % (1 << 32) for n in shape))
    for name, content in (("x", header), ("x.gz", gzip.compress(header + bytes(64 << 20), 1))):
        (work / name).write_bytes(content)
        assert refused(lambda path=work / name: read_idx(path, (10, 5)), memory=1 << 20, folder=work, kind=DataError)


# --- CIFAR ---------------------------------------------------------------------------------------------------------


@amounts(10, 1000)
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_binary_batches(amount, work, monkeypatch, name):
    shrink_source(monkeypatch, name)
    files = cifar_binary_files(name, random_arrays((32, 32, 3), 10))
    write_files(work / "data", files)
    path = work / "data" / sorted(files)[-1]
    found = explore(damaged(files[path.name]), amount, path.write_bytes, load(name, work / "data"), folder=work)
    assert found[1] > amount // 4


@amounts(6, 600)
def test_cifar_python_batches(amount, work, monkeypatch):
    shrink_source(monkeypatch, "cifar100")
    files = trust(monkeypatch, "cifar100", cifar_python_files("cifar100", random_arrays((32, 32, 3), 100)))
    write_files(work / "data", files)
    path = work / "data" / "test"
    found = explore(damaged(files["test"]), amount, path.write_bytes, load("cifar100", work / "data"), folder=work)
    assert found[1] > amount // 2


# --- archives ------------------------------------------------------------------------------------------------------

FOLDER = "cifar-100-binary"


def tar_of(members):
    """Return an uncompressed tar of (name, type, declared size, content, link, pax headers), whatever they say."""
    pieces = []
    for name, kind, size, content, link, headers in members:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size, info.pax_headers = kind, link, size, headers
        try:
            head = info.tobuf(tarfile.PAX_FORMAT)
        except ValueError:  # a size that no header can hold
            head = tarfile.TarInfo("x").tobuf()
        pieces += [head, content, bytes(-len(content) % 512)]
    return b"".join(pieces) + bytes(1024)


def good_members():
    files = cifar_binary_files("cifar100", random_arrays((32, 32, 3), 100))
    return [(f"{FOLDER}/{name}", tarfile.REGTYPE, len(raw), raw, "", {}) for name, raw in files.items()]


def odd_members(folder):
    names = st.sampled_from(
        ["../escaped", f"{folder}/escaped", f"{FOLDER}/../../escaped", f"{FOLDER}/train.bin", f"./{FOLDER}/test.bin"]
        + [f"{FOLDER}/", "", "/dev/null", "\udcff", "a\nb", "x" * 300]
    )
    kinds = st.sampled_from([bytes([n]) for n in b"01234567xgLKSDMV\0z"])
    sizes = st.sampled_from([0, 1, 512, 3074, 1 << 33, 1 << 60, -1, -512, -1536, (1 << 63) - 1])
    headers = st.dictionaries(
        st.sampled_from(
            ["size", "path", "linkpath", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.size", "mtime", "hdrcharset"]
        ),
        st.sampled_from(["-1", "99999999999999999999", "0,1,2", "x", "", "../escaped", "BINARY", "nan"]),
        max_size=2,
    )
    links = st.sampled_from(["", "/etc/passwd", "../escaped", f"{FOLDER}/train.bin"])
    member = st.tuples(names, kinds, sizes, st.binary(max_size=600), links, headers)
    return st.lists(member, min_size=1, max_size=4)


@amounts(12, 1200)
@pytest.mark.parametrize("way", ["damaged", "odd", "compressed"])
def test_archives(amount, work, monkeypatch, way):
    shrink_source(monkeypatch, "cifar100")
    members = good_members()
    tar, path = tar_of(members), work / "cifar-100-binary.tar.gz"
    if way == "compressed":
        examples = damaged(gzip.compress(tar, 1))
    elif way == "damaged":
        examples = damaged(tar, head=1600).map(lambda raw: gzip.compress(raw, 1))
    else:
        examples = st.tuples(odd_members(work), st.integers(0, 2)).map(
            lambda pair: gzip.compress(tar_of(members[: pair[1]] + pair[0] + members[pair[1] :]), 1)
        )
    found = explore(examples, amount, path.write_bytes, load("cifar100", work), folder=work)
    assert found[1] > amount // 8
    assert not list(work.rglob("escaped*"))


def header_of(kind):
    info = tarfile.TarInfo("name")
    info.type = kind
    return info.tobuf(tarfile.USTAR_FORMAT)


TARS = {
    "three thousand extended headers": header_of(b"x") * 3000,
    "three thousand global headers": header_of(b"g") * 3000,
    "three thousand long names": header_of(b"L") * 3000,
    "sparse file cut short": header_of(b"S")[:482] + b"\1" + header_of(b"S")[483:],
    "ten thousand members": header_of(b"0") * 10000,
    "zeros": bytes(64 << 20),
}


@pytest.mark.parametrize("case", TARS)
def test_archives_that_once_did_harm(work, monkeypatch, case):
    """RecursionError, IndexError, hours: one line each."""
    shrink_source(monkeypatch, "cifar100")
    content = bytearray(TARS[case])
    if case.startswith("sparse"):
        content[148:156] = b" " * 8
        content[148:156] = b"%06o\0 " % sum(content[:512])
    (work / "cifar-100-binary.tar.gz").write_bytes(gzip.compress(content, 1))
    assert refused(load("cifar100", work), memory=256 << 20, folder=work, kind=DataError)


def test_a_device_in_the_place_of_a_file_is_not_opened(work, monkeypatch):
    """A pipe that nobody writes to would be waited for."""
    shrink_source(monkeypatch, "mnist")
    write_files(work / "mnist", idx_files(random_arrays((28, 28, 1), 10)))
    path = work / "mnist" / "train-labels-idx1-ubyte.gz"
    path.unlink()
    os.mkfifo(path)
    assert refused(load("mnist", work), folder=work, kind=DataError)


# --- SVHN ----------------------------------------------------------------------------------------------------------


@amounts(20, 1600)
def test_svhn(amount, work, monkeypatch):
    shrink_source(monkeypatch, "svhn")
    files = trust(monkeypatch, "svhn", svhn_files(random_arrays((32, 32, 3), 10)))
    write_files(work, files)
    path = work / "test_32x32.mat"
    found = explore(damaged(files[path.name]), amount, path.write_bytes, load("svhn", work), folder=work)
    assert found[1] > amount // 2
