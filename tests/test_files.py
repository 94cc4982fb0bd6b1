"""Files that are whole or not there, and locks that die with their process.

Oracles: what lies in the folder after a failure planted at every single call; a second process for the lock.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cupyep import files
from cupyep.errors import ConfigurationError
from cupyep.files import (
    FolderLock,
    can_write,
    expanded,
    is_leftover,
    read_text,
    remove_leftovers,
    replacing,
    write_file,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_replacing_cleans_up(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("new\ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_what_was_there_is_kept(tmp_path):
    path, old = tmp_path / "x", tmp_path / "x.old"
    write_file(path, b"1")
    write_file(path, b"2", keep_as=old)
    assert (path.read_bytes(), old.read_bytes()) == (b"2", b"1")
    write_file(path, b"3", keep_as=old)
    assert (path.read_bytes(), old.read_bytes()) == (b"3", b"2")
    assert names(tmp_path) == ["x", "x.old"]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    test_what_was_there_is_kept(tmp_path)


class Disk:
    """Counts the calls that touch the disk; from number `full` on (of 0, 1, ...) there is no space left."""

    def __init__(self, monkeypatch, full=None):
        self.calls, self.full = 0, full
        for module, name in ((os, "fsync"), (os, "replace"), (os, "link"), (files.shutil, "copyfile")):
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))
        monkeypatch.setattr(files, "open", self.counted(open), raising=False)

    def counted(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.full is not None and self.calls > self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return call


def write_often(path, contents, old):
    for content in contents:
        write_file(path, content, keep_as=old)


def test_a_disk_that_fills_up_at_any_call_leaves_whole_files(tmp_path, monkeypatch):
    """Before and after, both files hold one of the contents that they may hold, and nothing else lies there."""
    path, old = tmp_path / "x", tmp_path / "x.old"
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        write_file(path, b"1")
        write_file(path, b"2", keep_as=old)
        calls = disk.calls
    assert calls > 8
    for full in range(calls):
        write_file(path, b"1")
        write_file(path, b"2", keep_as=old)
        with monkeypatch.context() as patch:
            Disk(patch, full)
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                write_often(path, (b"3", b"4", b"5"), old)
        assert names(tmp_path) == ["x", "x.old"]
        assert (path.read_bytes(), old.read_bytes()) in {
            (b"2", b"1"), (b"2", b"2"), (b"3", b"2"), (b"3", b"3"), (b"4", b"3"), (b"4", b"4")}  # fmt: skip


def test_a_file_that_is_being_read_on_windows(tmp_path, monkeypatch):
    """There a rename over an open file is refused, for as long as it is open."""
    path, refusals, rename = tmp_path / "x", [], os.replace

    def replace(*args):
        if len(refusals) < 2:
            refusals.append(args)
            raise PermissionError(errno.EACCES, "in use")
        rename(*args)

    write_file(path, b"old")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    refusals.clear()
    monkeypatch.setattr(files, "PAUSES", (0, 0, 0))
    write_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    for name in (".checkpoint.h5.123.tmp", ".lock", "notes.tmp", ".mine.tmp", "checkpoint.h5"):
        (tmp_path / name).touch()
    assert {p.name for p in tmp_path.iterdir() if is_leftover(p)} == {".checkpoint.h5.123.tmp", ".lock"}
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".lock", ".mine.tmp", "checkpoint.h5", "notes.tmp"]


def test_can_write(tmp_path):
    (tmp_path / "file").touch()
    assert can_write(tmp_path / "not" / "yet")
    assert not can_write(tmp_path / "file" / "below")


HOLDER = """
import sys, time
from pathlib import Path
from cupyep.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.acquire() == ""
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(files.fcntl is None, reason="this platform has no flock")
def test_a_lock_is_named_after_its_process_and_dies_with_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    lock = FolderLock(tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
        assert lock.acquire() == f"process {holder.pid}"
    finally:
        holder.kill()
        holder.communicate()
    assert lock.acquire() == ""
    assert lock.acquire() == "", "who holds it may ask again"
    assert FolderLock(tmp_path).acquire() == f"process {os.getpid()}"
    lock.release()
    other = FolderLock(tmp_path)
    assert other.acquire() == ""
    other.release()


def test_without_locks_nothing_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    assert FolderLock(tmp_path).acquire() == FolderLock(tmp_path).acquire() == ""
    assert names(tmp_path) == []


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def no_locks(request, monkeypatch):
    """A file system without locks, as some network file systems are."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_file_names_the_owner(tmp_path):
    lock, other = FolderLock(tmp_path), FolderLock(tmp_path)
    assert lock.acquire() == lock.acquire() == ""
    assert other.acquire() == f"process {os.getpid()} on {socket.gethostname()}"
    assert all(map(is_leftover, tmp_path.iterdir()))
    other.release()
    assert other.acquire() != "", "who does not hold it cannot give it back"
    lock.release()
    assert other.acquire() == ""
    other.release()
    assert names(tmp_path) == [".lock"]


@pytest.mark.usefixtures("no_locks")
def test_an_owner_that_has_ended_blocks_nobody(tmp_path):
    """Killed on this machine, or in a container that had our number; of another machine nobody here knows."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process in (ended.pid, os.getpid()):
        (tmp_path / ".owner").write_text(f"process {process} on {socket.gethostname()}")
        lock = FolderLock(tmp_path)
        assert lock.acquire() == ""
        lock.release()
    for text in (f"process {os.getppid()} on {socket.gethostname()}", "process 1 on elsewhere", ""):
        (tmp_path / ".owner").write_text(text)
        holder = FolderLock(tmp_path).acquire()
        assert holder.startswith(text or "another process")
        assert ("remove" in holder) is (socket.gethostname() not in text)
    assert names(tmp_path) == [".lock", ".owner"]


@pytest.mark.usefixtures("no_locks")
def test_of_many_that_come_at_once_one_gets_the_folder(tmp_path):
    for round_ in range(20):
        folder = tmp_path / str(round_)
        folder.mkdir()
        locks = [FolderLock(folder) for _ in range(8)]
        barrier = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda lock, barrier=barrier: (barrier.wait(), lock.acquire())[1], locks))
        assert sum(holder == "" for holder in found) == 1
        for lock in locks:
            lock.release()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_as_windows_writes_it(tmp_path, encoding):
    path = tmp_path / "x.toml"
    path.write_text("name = 'ä€'\r\n", encoding=encoding, newline="")
    assert read_text(path, 1000) == "name = 'ä€'\r\n"


def test_text_in_an_unknown_encoding_is_one_line(tmp_path):
    path = tmp_path / "x.toml"
    for content, words in ((b"a\xe4", "not text in UTF-8 .byte 1"), (b"\xff\xfea", "not text in UTF-16")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{words}.*save it as UTF-8"):
            read_text(path, 1000)


def test_the_home_is_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert expanded("~/runs/a") == tmp_path / "runs" / "a"
    assert expanded("~") == tmp_path
    for plain in ("a/~/b", "./~x", ".", ""):
        assert str(expanded(plain)) == str(Path(plain))


def test_without_a_home_the_remedy_is_named(monkeypatch):
    def unknown(_):
        raise RuntimeError("Could not determine home directory.")

    with pytest.raises(ConfigurationError, match="whose home"):
        expanded("~no-such-user-here/x")
    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(ConfigurationError, match=r"~/x': .*set HOME, or name the folder"):
        expanded("~/x")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    Disk(monkeypatch, 0)
    with pytest.raises(OSError, match="No space") as error:
        write_file(tmp_path / "x", b"1")
    assert error.value.filename == str(tmp_path / "x")


def test_leftovers_that_another_process_has_just_renamed(tmp_path, monkeypatch):
    ghost = tmp_path / ".a.npz.1.tmp"
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda folder: iter([ghost]))
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path, 60.0)
