"""A rank that dies ends the others, whatever the launcher does; one that is slow, or done, ends nobody."""

import os
import platform
import queue
import signal
import socket
import time
from pathlib import Path

import pytest
from quadrants import SILENT
from ranks import SECONDS, in_ranks, launch
from test_parallel import EXACT, needs_mpi, ranks_of, words

from cupyep.parallel import communicator, watch
from cupyep.parallel.watch import BYE, TOLD, Watch, connect
from cupyep.training import runs
from cupyep.training.run_directory import RunDirectory


def watching(ranks, ends):
    """Return the connections, and the watch that puts what it hears into `ends`."""
    connections = connect(ranks, True)
    return connections, Watch(connections, ends.put)


def close(connections):
    """Do what the kernel does for a process that has ended."""
    for connection in connections.values():
        connection.close()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_death_is_heard_by_all_and_the_first_to_hear_of_it_is_told_who_it_was(victim):
    def work(ranks):
        connections = connect(ranks, True)
        assert sorted(connections) == ([0] if ranks.rank else [1, 2, 3])
        ends = queue.Queue()
        if ranks.rank == victim:
            close(connections)
            return "dead"
        Watch(connections, ends.put)
        found = ends.get(timeout=SECONDS)
        close(connections)
        return found

    expected = ["dead", 0, 0, 0] if victim == 0 else [2, None, "dead", None]
    assert in_ranks(4, work) == expected


def test_those_that_are_done_say_so_and_end_nobody():
    def work(ranks):
        ends = queue.Queue()
        connections, own = watching(ranks, ends)
        own.say(BYE)
        own.thread.join(SECONDS)
        assert not own.thread.is_alive()
        ranks.gather(None)
        close(connections)
        return ends.empty()

    assert in_ranks(3, work) == [True] * 3


def test_one_that_has_said_why_it_ends_takes_the_others_along_without_a_word():
    def work(ranks):
        ends = queue.Queue()
        connections, own = watching(ranks, ends)
        if ranks.rank == 1:
            own.say(TOLD)
        found = ends.get(timeout=SECONDS)
        ranks.gather(None)
        close(connections)
        return found

    assert in_ranks(3, work) == [None] * 3


def test_nobody_asks_a_rank_anything_that_the_kernel_does_not_answer_and_a_machine_that_is_gone_is_known_in_30_s():
    def work(ranks):
        connections = connect(ranks, True)
        found = [
            [c.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}")) for name in ("IDLE", "INTVL", "CNT")]
            + [c.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), c.gettimeout()]
            for c in connections.values()
        ]
        ranks.gather(None)
        close(connections)
        return found

    if not hasattr(socket, "TCP_KEEPIDLE"):
        pytest.skip("this system names it otherwise")
    for idle, interval, count, on, timeout in sum(in_ranks(3, work), []):
        assert idle + interval * count < 30
        assert (on, timeout) == (1, None)


def test_strangers_are_not_welcome():
    token = b"t" * 16
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
        with (
            socket.create_connection(place) as stranger,
            socket.create_connection(place) as hasty,
            socket.create_connection(place) as other,
        ):
            stranger.sendall(b"x" * 20)
            hasty.close()
            other.sendall(token + (3).to_bytes(4, "big"))
            found = watch._answer(listener, token, 1)
            assert list(found) == [3]
            assert other.recv(1) == watch.WELCOME
            assert watch._heard(stranger) == b""
            close(found)


@pytest.mark.parametrize("what", ["create_server", "create_connection"])
def test_where_there_are_no_connections_rank_0_says_so_and_all_goes_on(what, monkeypatch, capsys):
    def missing(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(watch, "CONNECT_S", 0.2)
    monkeypatch.setattr(watch.socket, what, missing)

    def work(ranks):
        ranks.watch()
        return ranks.gather(ranks.rank)

    assert in_ranks(3, work) == [[0, 1, 2]] * 3
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("Warning: 2 ranks cannot reach rank 0 by TCP")


@pytest.mark.parametrize(("victim", "speaker"), [(0, 1), (2, 0)])
def test_one_line_says_who_has_died_and_what_to_do(victim, speaker, monkeypatch, capsys):
    codes = queue.Queue()
    monkeypatch.setattr(communicator.os, "_exit", codes.put)

    def work(ranks):
        if ranks.rank == victim:
            ranks.gather(platform.node())
            return close(connect(ranks, True))
        ranks.remedy = f"(says {ranks.rank}) go on with: --resume"
        ranks.watch()
        ranks._watch.thread.join(SECONDS)
        return close(ranks._watch._connections)

    assert in_ranks(3, work) == [None] * 3
    assert [codes.get_nowait() for _ in range(2)] == [1, 1]
    assert capsys.readouterr().err == f"Error: rank {victim} has died; (says {speaker}) go on with: --resume\n"


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_ranks_end_by_themselves_where_the_launcher_does_not_notice(victim, quadrants, tmp_path):
    """It waits for the shells around them. The run goes on from what it has saved, in one process."""
    path, blind = tmp_path / "run", tmp_path / "blind"
    blind.touch()
    process = launch(3, "train", *words(EXACT | {"epochs": 500}), "--run-dir", path, blind=blind)
    try:
        until(60, (path / "checkpoint.h5").exists)
        ranks = {rank: pid for pid, rank in ranks_of(process.pid).items() if is_python(pid)}
        assert sorted(ranks) == [0, 1, 2]
        os.kill(ranks[victim], signal.SIGKILL)
        until(30, lambda: not any(map(is_python, ranks.values())))
    finally:
        blind.unlink()
        out, err = process.communicate(timeout=60)
    lines = [line for line in err.splitlines() if "Error" in line]
    assert lines == [f"Error: rank {victim} has died; go on with: cupyep train --run-dir {path} --resume"]
    done = RunDirectory.open(path).load().epoch
    runs.resume_run(path, {"epochs": done + 1}, SILENT, stretch=True).run()
    assert RunDirectory.open(path).load().epoch == done + 1


def until(seconds, condition):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.05)


def is_python(pid):
    """Whether there is such a process, neither a shell nor one that has ended."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return Path(file.read().split("\0")[0]).name.startswith("python")
    except OSError:
        return False
