"""SVHN: two MATLAB files, of which only the original ones are opened."""

from __future__ import annotations

import struct

import pytest
from data_files import assert_one_line, assert_same, random_arrays, shrink_source, svhn_files, trust, write_files

from cupyep.data import load_dataset
from cupyep.errors import DataError


@pytest.fixture
def arrays(monkeypatch):
    shrink_source(monkeypatch, "svhn")
    return random_arrays((32, 32, 3), 10)


@pytest.fixture
def files(monkeypatch, arrays):
    return trust(monkeypatch, "svhn", svhn_files(arrays))


@pytest.mark.parametrize("folder", [".", "svhn", "SVHN"])
def test_svhn(tmp_path, arrays, files, folder):
    assert (arrays[0][1] == 0).any()  # so that 10 -> 0 is tested
    write_files(tmp_path / folder, files)
    dataset = load_dataset("svhn", tmp_path, download=False)
    assert_same(dataset, arrays)
    assert dataset.flip is False


HEAD = b"MATLAB 5.0".ljust(124) + struct.pack("<H2s", 0x0100, b"IM")
HARM = {
    "no file at all": b"",
    # Of a type of values that there is not: SciPy looks it up beyond the end of its table, and crashes.
    "a crash": HEAD + struct.pack("<14I", 14, 80, 6, 8, 9, 0, 5, 8, 2, 5, 0x10001, ord("X"), 1000, 10) + bytes(16),
    # Of MATLAB 4, of which SciPy may read the same place for ever.
    "a negative size": struct.pack("<5i", 50, -22, 1, 0, 2) + bytes(200),
}


@pytest.mark.parametrize("case", [*HARM, 0.5, -1])
def test_any_other_file_is_refused_unread(tmp_path, files, case):
    path = tmp_path / "train_32x32.mat"
    content = files[path.name]
    write_files(tmp_path, files)
    path.write_bytes(HARM[case] if case in HARM else content[: int(case * len(content)) if case > 0 else case])
    message = "MD5 sum .*, the original has .*; MATLAB files can do harm, .*: get the original file"
    with pytest.raises(DataError, match=message) as error:
        load_dataset("svhn", tmp_path, download=False)
    assert_one_line(error, path)
