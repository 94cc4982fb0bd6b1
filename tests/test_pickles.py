"""Pickled CIFAR batches: read without Python's unpickler; nothing in them is called, nothing hangs, nothing grows."""

from __future__ import annotations

import pickle
import struct
import sys
import tracemalloc

import numpy as np
import pytest
from data_files import assert_one_line, planes, python2_pickle, python3_pickle, random_arrays

from cupyep.data import pickles
from cupyep.data.pickles import Array, load_pickle
from cupyep.errors import DataError


class Odd:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_pickle_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "executed"
    evil = pickle.dumps({"data": Odd(open, str(marker), "w"), "labels": []}, protocol=2)
    pickle.loads(evil)["data"].close()
    assert marker.exists()  # the attack works on the plain unpickler
    marker.unlink()
    with pytest.raises(DataError, match="asks for .*open") as error:
        load_pickle(evil, "file")
    assert_one_line(error, "file")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        np.zeros(3, np.float32),
        np.zeros(3, np.int8),
        np.array([None, "text"], dtype=object),
        np.float32(1.0),
        Odd(sys.exit, 0),
        Odd(eval, "1"),
        Odd(np.fromfile, "/etc/passwd"),
        Odd(getattr, "text", "upper"),
        {1, 2},
        Odd(bytearray, 1 << 40),
    ],
    ids=["float", "int8", "object", "scalar", "exit", "eval", "fromfile", "getattr", "set", "bytearray"],
)
def test_pickle_with_anything_else_is_refused(content):
    with pytest.raises(DataError) as error:
        load_pickle(pickle.dumps({"data": content}, protocol=2), "file")
    assert_one_line(error, "file: is not a readable CIFAR pickle")


def test_array_needs_a_dtype():
    content = python2_pickle({"data": np.zeros((2, 3), np.uint8)})
    start, end = content.index(b"cnumpy\ndtype"), content.index(b"tb\x89T") + 2
    assert load_pickle(content, "file")["data"].array.shape == (2, 3)
    with pytest.raises(DataError, match="array is not plain uint8"):
        load_pickle(content[:start] + b"N" + content[end:], "file")


def test_pickle_text_only_in_latin1():
    def encoded(codec):
        return b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX" + struct.pack("<i", len(codec)) + codec + b"\x86R."

    assert load_pickle(encoded(b"latin1"), "file") == b"a"
    with pytest.raises(DataError, match="encoding 'rot13'"):
        load_pickle(encoded(b"rot13"), "file")


def test_every_truncation_of_a_pickle_is_refused():
    images, labels = random_arrays((2, 2, 3), 10)[1]
    for dump in (python2_pickle, python3_pickle):
        content = dump({"data": planes(images), "labels": [int(y) for y in labels]})
        for end in range(0, len(content), 7):
            with pytest.raises(DataError) as error:
                load_pickle(content[:end], "file")
            assert_one_line(error, "file")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_the_files_hold_in_every_protocol(protocol):
    content = {
        "labels": list(range(300)),
        "names": ["ö", "x" * 300, b"b", b"y" * 300],
        "numbers": [-1, 70000, 1 << 60, 0.5],
    }
    content |= {"nothing": None, "both": (True, False), "nested": {"a": [], "b": {}, "c": (), 3: (1, 2, 3, 4)}}
    data = np.arange(24, dtype=np.uint8).reshape(2, 12)
    found = load_pickle(pickle.dumps(content | {"data": data}, protocol), "file")
    array = found.pop("data")
    assert isinstance(array, Array)
    np.testing.assert_array_equal(array.array, data)
    found["names"] = [bytes(n) if isinstance(n, memoryview) else n for n in found["names"]]
    assert found == content


def test_fortran_order():
    data = np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(2, 12))
    np.testing.assert_array_equal(load_pickle(pickle.dumps(data, 2), "file").array, data)


def array_pickle(shape, raw):
    """Return the pickle of an array whose shape and bytes need not agree."""
    content = python2_pickle({"data": np.zeros((2, 3), np.uint8)})
    start, end = content.index(b"(K\x01J") + 3, content.index(b"cnumpy\ndtype")
    return content[:start] + shape + content[end:].replace(b"T\x06\0\0\0" + bytes(6), raw)


LATIN1 = b"c_codecs\nencode\nX\x40\0\0\0" + b"a" * 64 + b"X\x06\0\0\0latin1\x86"
ATTACKS = {
    "crash by a deep key": b"}K\x01" + b"\x85" * 100000 + b"K\x01s.",
    "endless hash": b"}K\x01" + b"q\0h\0\x86" * 60 + b"K\x01s.",
    "key that is a list": b"}]K\x01s.",
    "endless text": b"cnumpy\ndtype\n]" + b"q\0(h\0h\0l" * 60 + b"\x85R.",
    "size of 2^60": b"\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
    "size of 4 GB": b"T\xff\xff\xff\xffx.",
    "many lists": b"]" * 200000 + b".",
    "one text a thousand times": LATIN1 + b"q\0R0"[:2] + b"Rq\1" + b"(" + b"c_codecs\nencode\nh\0R" * 1000 + b"l.",
    "shape of 2^60": array_pickle(b"\x8a\x08" + bytes(7) + b"\x10K\1\x86", b"T\x06\0\0\0" + bytes(6)),
    "negative shape": array_pickle(b"J\xff\xff\xff\xffK\1\x86", b"T\x06\0\0\0" + bytes(6)),
    "nested shape": array_pickle(b"K\1\x85K\6\x86", b"T\x06\0\0\0" + bytes(6)),
    "large long": b"\x8b\0\0\0\x01" + bytes(1 << 24) + b".",
    "extension registry": b"\x82\x01.",
    "persistent id": b"U\x01aQ.",
    "new object": b"c__builtin__\nobject\n)\x81.",
    "instance": b"(ios\nsystem\n.",
    "function as a value": b"c_codecs\nencode\n(U\x02idtRR.",
    "call of a text": b"U\x06system(U\x02idtR.",
    "state of a list": b"]}b.",
    "unmatched mark": b"l.",
    "empty stack": b".",
    "unknown memo": b"h\x07.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_an_unpickler_end_in_one_line(attack, monkeypatch):
    """Python's own can crash on the first and never returns from the second, whatever `find_class` forbids."""
    monkeypatch.setattr(pickles, "STEPS", 150000)
    content = b"\x80\x02" + ATTACKS[attack]
    tracemalloc.start()
    with pytest.raises(DataError) as error:
        load_pickle(content, "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_one_line(error, "file: is not a readable CIFAR pickle")
    assert peak < 150 * len(content) + (1 << 20)


def test_a_memo_of_many_places_takes_none():
    tracemalloc.start()
    assert load_pickle(b"\x80\x02K\x01r\xff\xff\xff\xffK\x02.", "file") == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
