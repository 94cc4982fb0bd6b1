"""HDF5 files: sealed or walked through before they are read; what must not be read is refused.

Oracles: SHA-256 by hand, files that are known to hang, crash or reach elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys

import h5py
import numpy as np
import pytest

from cupyep.errors import DataError
from cupyep.persistence import hdf5


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "sealed.h5"
    with writing(path) as file:
        file.attrs["text"] = "Schüler"
        file.attrs["names"] = ["a", "longer"]
        file.attrs["number"] = 3
        file["group/array"] = np.arange(6.0).reshape(2, 3)
    return path


@contextlib.contextmanager
def writing(path):
    """Yield a new file at `path`; sealed when the block ends without error."""
    with hdf5.create(path) as file:
        yield file
    hdf5.seal(path)


def plain(path, fill=lambda file: None):
    """Write a file as other programs do, without a seal."""
    with h5py.File(path, "w", libver="earliest") as file:
        fill(file)
    return path


def test_the_seal_is_the_sha256_of_the_rest(sealed):
    content = sealed.read_bytes()
    head = content[:512].rstrip(b"\0")
    assert head.endswith(hashlib.sha256(content[512:]).hexdigest().encode() + b"\n")
    assert content[512:520] == b"\x89HDF\r\n\x1a\n"
    with hdf5.open_file(sealed) as file:
        np.testing.assert_array_equal(hdf5.find_array(file, "group/array"), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("kind", ["sealed", "plain"])
def test_reading_and_writing_ask_for_no_lock(sealed, tmp_path, monkeypatch, kind):
    """Some file systems have no locks. Here one is taken: whoever asked for another would be refused."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.delenv("HDF5_USE_FILE_LOCKING", raising=False)
    path = sealed
    if kind == "plain":
        path = tmp_path / "plain.h5"
        plain(path, lambda file: file.create_dataset("array", data=np.arange(3)))
    with open(path, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            h5py.File(path, "r", locking=True)
        with hdf5.open_file(path) as file:
            assert len(file) == 1
    target = tmp_path / "written.h5"
    target.touch()
    with open(target, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with writing(target) as file:
            file["array"] = np.arange(3)
        with hdf5.open_file(target) as file:
            assert file["array"].shape == (3,)


def test_an_edit_needs_a_new_seal(sealed):
    with h5py.File(sealed, "r+") as file:
        file.attrs["number"] = 4
    with pytest.raises(OSError, match="damaged, cut, or edited"):
        hdf5.open_file(sealed)
    hdf5.seal(sealed)
    with hdf5.open_file(sealed) as file:
        assert hdf5.attribute(file, "number") == 4


@pytest.mark.parametrize("content", [b"", b"short", None])
def test_a_file_without_room_is_not_sealed(content, tmp_path):
    path = tmp_path / "plain.h5"
    if content is None:
        with h5py.File(path, "w") as file:
            file["numbers"] = np.arange(300)
        content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"has no room for a seal; make it by h5py\.File\(path, 'w', userblock_size=512\)"
    ):
        hdf5.seal(path)
    assert path.read_bytes() == content


def test_sealed_files_are_not_walked_through_and_others_are(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    hdf5.open_file(sealed).close()
    with pytest.raises(OSError, match="exit code 1"):
        hdf5.open_file(plain(tmp_path / "plain.h5"))


def test_attributes(sealed):
    with hdf5.open_file(sealed) as file:
        assert hdf5.attribute(file, "text") == "Schüler"
        assert list(hdf5.attribute(file, "names")) == ["a", "longer"]
        assert hdf5.attribute(file, "number") == 3
        assert hdf5.attribute(file, "none") is None


def test_attributes_of_fixed_length_and_odd_ones(tmp_path):
    def fill(file):
        file.attrs["text"] = np.bytes_("Schüler".encode())
        file.attrs["names"] = np.array([[b"a", b"bc"]])
        file.attrs["reference"] = file.ref
        file.attrs["pairs"] = np.zeros(2, [("x", int), ("y", int)])
        file.attrs["latin1"] = np.bytes_(b"\xfc")
        file.attrs.create("large", np.zeros(1 << 18))

    with h5py.File(tmp_path / "x.h5", "w", libver="v108") as file:
        fill(file)
        assert hdf5.attribute(file, "text") == "Schüler"
        assert hdf5.attribute(file, "names").tolist() == [["a", "bc"]]
        for name in ("reference", "pairs"):
            with pytest.raises(TypeError, match=f"attribute '{name}' is neither text nor numbers"):
                hdf5.attribute(file, name)
        with pytest.raises(ValueError, match="attribute 'large' is larger than"):
            hdf5.attribute(file, "large")
        with pytest.raises(UnicodeDecodeError):
            hdf5.attribute(file, "latin1")


def first_text_heap(content):
    """Return the place of the size of the first object in the heap of texts of variable length."""
    return content.index(b"GCOL") + 16 + 8


def test_an_endless_loop_in_the_hdf5_library_is_ended(tmp_path, monkeypatch):
    """Text of variable length lies in a heap whose objects give their sizes; a wrong one, and HDF5 loops for ever."""
    path = plain(tmp_path / "x.h5", lambda file: file.attrs.update(text="some text"))
    content = bytearray(path.read_bytes())
    place = first_text_heap(content)
    content[place : place + 8] = b"\xff" * 8
    path.write_bytes(content)
    monkeypatch.setattr(hdf5, "PROBE_SECONDS", 1)
    with pytest.raises(OSError, match="does not come to an end|crashes|Error"):  # the last two: other versions of HDF5
        hdf5.open_file(path)


@pytest.mark.parametrize(
    ("code", "message", "seconds"),
    [
        ("import os; os.abort()", "crashes on it .signal 6", 60),
        ("import time; time.sleep(60)", "does not come to an end with it in 1 seconds", 1),
        ("raise KeyError('the reason')", "KeyError: 'the reason'", 60),
        ("import sys; sys.exit(7)", "exit code 7", 60),
    ],
)
def test_what_becomes_of_the_other_process_is_told(tmp_path, monkeypatch, code, message, seconds):
    """A second is too little for a process to start in on a machine that is busy."""
    path = plain(tmp_path / "x.h5")
    script = tmp_path / "other_process.py"
    script.write_text(code)
    monkeypatch.setattr(hdf5, "PROBE", script)
    monkeypatch.setattr(hdf5, "PROBE_SECONDS", seconds)
    with pytest.raises(OSError, match=message):
        hdf5.open_file(path)


def test_the_other_process_imports_nothing_from_the_working_folder(tmp_path, monkeypatch):
    path = plain(tmp_path / "x.h5")
    for name in ("h5py", "numpy", "runpy", "contextlib", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    hdf5.open_file(path).close()
    assert not (tmp_path / "executed").exists()


def test_a_bomb_of_texts_is_refused(tmp_path):
    """4000 names that are one and the same text of a megabyte: 16 bytes each in the file, 4 GB in memory."""
    count, length = 4000, 1 << 20
    path = plain(tmp_path / "x.h5", lambda file: file.attrs.update(names=["x" * length] + ["y"] * (count - 1)))
    content = path.read_bytes()
    # An element is its length, the place of its heap and its number there; the next one has length 1.
    place = content.index(length.to_bytes(4, "little"))
    while content[place + 16 : place + 20] != b"\1\0\0\0":
        place = content.index(length.to_bytes(4, "little"), place + 1)
    path.write_bytes(content[:place] + content[place : place + 16] * count + content[place + 16 * count :])
    assert path.stat().st_size < 2 * length
    with pytest.raises(OSError, match=r"MemoryError|memory|crashes"):
        hdf5.open_file(tmp_path / "x.h5")


def other_file(folder):
    with h5py.File(folder / "other.h5", "w") as file:
        file["array"] = np.arange(3.0)
        file["group/array"] = np.arange(3.0)
    return folder / "other.h5"


def test_links_are_not_followed(tmp_path):
    other = other_file(tmp_path)
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    with writing(tmp_path / "x.h5") as file:
        file["array"] = np.arange(3.0)
        file["soft"] = h5py.SoftLink("/array")
        file["loop"] = h5py.SoftLink("/loop")
        file["external"] = h5py.ExternalLink(str(other), "/array")
        file["folder"] = h5py.ExternalLink(str(other), "/group")
        file["fifo"] = h5py.ExternalLink(str(tmp_path / "fifo"), "/array")
    with hdf5.open_file(tmp_path / "x.h5") as file:
        assert hdf5.find(file, "array").shape == (3,)
        for name in ("soft", "loop", "external", "folder", "folder/array", "fifo", "none", "array/deeper"):
            assert hdf5.find(file, name) is None


def test_arrays_whose_values_lie_elsewhere_are_not_found(tmp_path):
    other = other_file(tmp_path)
    virtual = h5py.VirtualLayout((3,), float)
    virtual[:] = h5py.VirtualSource(str(other), "array", (3,))
    with h5py.File(tmp_path / "x.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("virtual", virtual)
        file.create_dataset("external", (4,), "u1", external=[("/etc/passwd", 0, 4)])
        file["empty"] = h5py.Empty("f")
        file.create_group("group")
    with hdf5.open_file(tmp_path / "x.h5") as file:
        for name in ("virtual", "external", "empty", "group"):
            assert hdf5.find_array(file, name, compressed=True) is None


def test_arrays_larger_than_the_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "CHUNK_BYTES", 1 << 19)
    with writing(tmp_path / "x.h5") as file:
        file.create_dataset("unwritten", (1 << 30, 1 << 30), np.float32, chunks=(1, 1 << 10))
        file.create_dataset("late", (1 << 40,), np.float32)
        file.create_dataset("zip", data=np.zeros(1 << 20, np.float32), compression="gzip", chunks=(1 << 17,))
        file.create_dataset("good", data=np.zeros((30, 4)), compression="gzip", shuffle=True, fletcher32=True)
        file.create_dataset("chunks", data=np.zeros(1 << 18, np.float32), compression="gzip", chunks=(1 << 18,))
        file.create_dataset("offset", data=np.zeros(100, int), scaleoffset=0)
    with hdf5.open_file(tmp_path / "x.h5") as file:
        for name in ("unwritten", "late"):
            with pytest.raises(ValueError, match=f"array '{name}' promises [0-9]+ bytes, the file holds 0"):
                hdf5.find_array(file, name, compressed=True)
        with pytest.raises(ValueError, match="chunks of more than"):
            hdf5.find_array(file, "chunks", compressed=True)
        with pytest.raises(ValueError, match="filters that are not read here"):
            hdf5.find_array(file, "offset", compressed=True)
        for name, shape in (("zip", (1 << 20,)), ("good", (30, 4))):
            assert hdf5.find_array(file, name, compressed=True).shape == shape
            with pytest.raises(ValueError, match="filters that are not read here"):
                hdf5.find_array(file, name)


def test_two_compressors_in_a_row_are_refused(tmp_path):
    with writing(tmp_path / "x.h5") as file:
        created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        created.set_chunk((1000,))
        created.set_deflate(9)
        created.set_filter(h5py.h5z.FILTER_LZF)
        space = h5py.h5s.create_simple((1000,))
        h5py.h5d.create(file.id, b"array", h5py.h5t.NATIVE_FLOAT, space, created)
    with hdf5.open_file(tmp_path / "x.h5") as file, pytest.raises(ValueError, match="filters that are not read here"):
        hdf5.find_array(file, "array", compressed=True)
