"""SVHN: MATLAB 5 files, as SciPy writes them and as they could be damaged. Oracle: SciPy."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import scipy.io
from data_files import assert_one_line, assert_same, random_arrays, shrink_source, write_svhn

from cupyep.data import load_dataset
from cupyep.data.matlab import read_matlab
from cupyep.errors import DataError


def load(name, folder):
    return load_dataset(name, folder, download=False)


@pytest.mark.parametrize("folder", [".", "svhn", "SVHN"])
def test_svhn(monkeypatch, tmp_path, folder):
    shrink_source(monkeypatch, "svhn")
    arrays = random_arrays((32, 32, 3), 10)
    assert (arrays[0][1] == 0).any()  # so that 10 -> 0 is tested
    write_svhn(tmp_path / folder, arrays)
    dataset = load("svhn", tmp_path)
    assert_same(dataset, arrays)
    assert dataset.flip is False


@pytest.mark.parametrize("cut", [0, 64, 127, 130, 500, 0.5, 0.9, -1])
def test_truncated_svhn(monkeypatch, tmp_path, cut):
    shrink_source(monkeypatch, "svhn")
    write_svhn(tmp_path, random_arrays((32, 32, 3), 10))
    path = tmp_path / "train_32x32.mat"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(cut * len(raw)) if isinstance(cut, float) else cut])
    with pytest.raises(DataError) as error:
        load("svhn", tmp_path)
    assert_one_line(error, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"y": np.ones((50, 1), np.uint8)}, "array 'X' should have shape .*no such array"),
        ({"X": np.zeros((32, 32, 3, 50), np.uint8)}, "array 'y' should have shape .*no such array"),
        (
            {"X": np.zeros((32, 32, 3, 49), np.uint8), "y": np.ones((49, 1), np.uint8)},
            "found shape \\(32, 32, 3, 49\\)",
        ),
        ({"X": np.zeros((32, 32, 3, 50)), "y": np.ones((50, 1), np.uint8)}, "should be uint8, found float64"),
        ({"X": np.zeros((32, 32, 3, 50), np.uint8), "y": np.ones((50, 1)) + np.nan}, "found uint8 and float64"),
        (
            {"X": np.zeros((32, 32, 3, 50), np.uint8), "y": np.full((50, 1), 11, np.uint8)},
            "50 of 50 labels lie outside",
        ),
    ],
)
def test_wrong_svhn_files(monkeypatch, tmp_path, content, message):
    shrink_source(monkeypatch, "svhn")
    write_svhn(tmp_path, random_arrays((32, 32, 3), 10))
    path = tmp_path / "train_32x32.mat"
    scipy.io.savemat(path, content)
    with pytest.raises(DataError, match=message) as error:
        load("svhn", tmp_path)
    assert_one_line(error, path)


def saved(tmp_path, content, **options):
    path = tmp_path / "saved.mat"
    scipy.io.savemat(path, content, **options)
    return path.read_bytes()


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_arrays_of_integers_as_scipy_writes_them(tmp_path, kind, compress):
    rng = np.random.default_rng(0)
    limits = np.iinfo(kind)
    content = {name: rng.integers(limits.min, limits.max, shape, kind) for name, shape in SHAPES.items()}
    variables = read_matlab(saved(tmp_path, content, do_compression=compress), 1 << 16)
    assert list(variables) == list(SHAPES)
    for name, array in content.items():
        found = variables[name]
        assert (found.shape, found.kind, found.values.dtype) == (array.shape, kind, kind)
        np.testing.assert_array_equal(found.values, array)


SHAPES = {"y": (5, 1), "a_long_name": (2, 3, 4), "X": (2, 1, 3, 2), "one": (1, 1), "none": (0, 4)}


def test_other_variables_are_told_by_their_class(tmp_path):
    content = {
        "text": "abc",
        "cell": np.array([[1, "a"]], object),
        "double": np.zeros((2, 2)),
        "y": np.ones((1, 2), "u1"),
    }
    variables = read_matlab(saved(tmp_path, content), 1 << 16)
    assert [v.kind for v in variables.values()] == ["char", "cell", "float64", "uint8"]


def big_endian(array):
    """A file by the definition of the format, most significant byte first."""

    def element(kind, data):
        return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)

    flags = element(6, struct.pack(">II", 10, 0))
    shape = element(5, struct.pack(f">{array.ndim}i", *array.shape))
    values = element(3, array.astype(">i2").tobytes(order="F"))
    matrix = flags + shape + struct.pack(">HH4s", 1, 1, b"z") + values
    return b"MATLAB 5.0".ljust(124) + struct.pack(">H2s", 0x0100, b"MI") + element(14, matrix)


def test_big_endian_by_hand():
    array = np.arange(-6, 6).reshape(3, 4)
    found = read_matlab(big_endian(array), 100)["z"]
    np.testing.assert_array_equal(found.values, array)
    assert found.kind == "int16"


def little(kind, data, declared=None):
    return struct.pack("<II", kind, len(data) if declared is None else declared) + data + bytes(-len(data) % 8)


def array_of(data, declared=None, shape=(32, 32, 3, 50), kind=2):
    flags, name = little(6, struct.pack("<II", 9, 0)), struct.pack("<HH4s", 1, 1, b"X")
    shape = little(5, struct.pack(f"<{len(shape)}i", *shape))
    return flags + shape + name + little(kind, data, declared)


HEAD = b"MATLAB 5.0".ljust(124) + struct.pack("<H2s", 0x0100, b"IM")


def zipped_zeros(size, head):
    stream = zlib.compressobj(9)
    pieces = [stream.compress(head)]
    pieces += [stream.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join(pieces) + stream.flush()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEAD + little(14, array_of(b"x" * 10)), "holds 10 values, not those of its shape"),
        # Types of values that there are not: SciPy looks them up beyond the end of its table, and crashes.
        (HEAD + little(14, array_of(b"x" * 10, shape=(2, 5), kind=15)), "stores its integers as type 15"),
        (HEAD + little(14, array_of(b"x" * 10, shape=(2, 5), kind=1000)), "stores its integers as type 1000"),
        (HEAD + little(14, array_of(b"", declared=(1 << 32) - 16)), "ends too early"),
        (HEAD + little(14, array_of(b"", shape=(-1, 5))), "holds 0 values"),
        (HEAD + little(14, array_of(b"", shape=(1 << 30, 1 << 30, 1 << 30, 0, -1))), "holds 0 values"),
        (HEAD + little(15, zlib.compress(little(14, array_of(b"x" * 10)))[:-8]), "cut short"),
        (HEAD + little(14, array_of(b"", shape=(0,))) * 65, "something else than a few arrays"),
        (HEAD + little(9, b"x" * 8), "something else than a few arrays"),
        (HEAD + b"short", "error"),
        # A file of MATLAB 4 with a negative size, which SciPy reads for ever.
        (struct.pack("<5i", 50, -22, 1, 0, 2) + bytes(200), "not in the format of MATLAB 5"),
        (
            b"MATLAB 7.3".ljust(124) + struct.pack("<H2s", 0x0200, b"IM") + b"\x89HDF" * 10,
            "not in the format of MATLAB 5",
        ),
    ],
)
def test_damaged_files_are_refused(monkeypatch, tmp_path, content, message):
    shrink_source(monkeypatch, "svhn")
    write_svhn(tmp_path, random_arrays((32, 32, 3), 10))
    (tmp_path / "train_32x32.mat").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load("svhn", tmp_path)
    assert_one_line(error, tmp_path / "train_32x32.mat")


@pytest.mark.parametrize("pieces", [1, 60])
def test_a_compressed_bomb_is_not_unpacked(pieces):
    """In one array, or in many of which each alone would be allowed."""
    size = (256 // pieces) << 20
    array = array_of(b"", declared=size, shape=(size,))
    zipped = zipped_zeros(size, struct.pack("<II", 14, len(array) + size) + array)
    bomb = HEAD + (struct.pack("<II", 15, len(zipped)) + zipped) * pieces
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    with pytest.raises(ValueError, match="has more than [0-9]+ bytes"):
        read_matlab(bomb, 8 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
