"""Pickled CIFAR batches: only original files are unpickled, and what a pickle names is looked for in a short list."""

from __future__ import annotations

import io
import pickle
import sys

import numpy as np
import pytest
from data_files import (
    assert_one_line,
    cifar_python_files,
    planes,
    python2_pickle,
    random_arrays,
    shrink_source,
    trust,
    write_files,
)

from cupyep.data import load_dataset
from cupyep.data.formats import BatchUnpickler
from cupyep.errors import DataError


class Odd:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("trusted", [False, True])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch, trusted):
    """Unread, because it is no original file; and if it were called one, by what it asks for."""
    marker = tmp_path / "executed"
    evil = pickle.dumps({"data": Odd(open, str(marker), "w"), "labels": []}, protocol=2)
    pickle.loads(evil)["data"].close()
    assert marker.exists()  # the attack works on the plain unpickler
    marker.unlink()
    shrink_source(monkeypatch, "cifar10")
    files = trust(monkeypatch, "cifar10", cifar_python_files("cifar10", random_arrays((32, 32, 3), 10)))
    files |= trust(monkeypatch, "cifar10", {"test_batch": evil}) if trusted else {"test_batch": evil}
    write_files(tmp_path / "data", files)
    message = "asks for .*open" if trusted else "MD5 sum .* can run code.* get the original file or the binary version"
    with pytest.raises(DataError, match=message) as error:
        load_dataset("cifar10", tmp_path / "data", download=False)
    assert_one_line(error, *([] if trusted else [tmp_path / "data" / "test_batch"]))
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        Odd(sys.exit, 0),
        Odd(eval, "1"),
        Odd(np.fromfile, "/etc/passwd"),
        Odd(getattr, "text", "upper"),
        {1, 2},
        Odd(bytearray, 1 << 40),
        np.float32(1.0),
        b"Python 3 asks for an encoder, Python 2 did not",
    ],
    ids=["exit", "eval", "fromfile", "getattr", "set", "bytearray", "scalar", "bytes"],
)
def test_a_pickle_finds_nothing_else(content):
    with pytest.raises(DataError, match="a pickle asks for ") as error:
        BatchUnpickler(io.BytesIO(pickle.dumps({"data": content}, protocol=2))).load()
    assert_one_line(error)


def test_what_python_2_wrote_is_read():
    images, labels = random_arrays((2, 2, 3), 10)[1]
    content = python2_pickle({"data": planes(images), "labels": [int(y) for y in labels]})
    found = BatchUnpickler(io.BytesIO(content), encoding="latin1").load()
    np.testing.assert_array_equal(found["data"], planes(images))
    assert found["labels"] == labels.tolist()
