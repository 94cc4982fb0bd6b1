"""Several ranks without MPI: a stand-in for ``mpi4py.MPI`` whose processes are threads; and with it: mpiexec.

Run as a script, this is one of the processes that mpiexec starts: the command line of cupyep on the quadrants, with a
fault planted on one rank if ``--fault`` names one.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from cupyep.backend.threads import share_cpus
from cupyep.parallel import Ranks

SECONDS = 100  # a test that hangs fails


class Hub:
    """Where the threads of a group meet."""

    def __init__(self, size):
        self.barrier, self.places = threading.Barrier(size), [None] * size
        self.lock, self.arrived = threading.Lock(), {}


class FakeWorld:
    """One thread's communicator; the groups made of it are found by the order in which they are made."""

    def __init__(self, rank, size, hubs, name=("world",)):
        self.rank, self.size, self._hubs, self._name = rank, size, hubs, name
        with hubs["lock"]:
            self._hub = hubs.setdefault(name, Hub(size))
        self._made, self._barriers = 0, 0
        self.aborted = None

    def Dup(self):
        self._made += 1
        return FakeWorld(self.rank, self.size, self._hubs, (*self._name, self._made))

    def Split_type(self, kind):
        return self.Dup()

    def allgather(self, value):
        hub = self._hub
        hub.places[self.rank] = pickle.dumps(value)
        hub.barrier.wait(SECONDS)
        values = [pickle.loads(place) for place in hub.places]
        hub.barrier.wait(SECONDS)
        return values

    def Allreduce(self, place, array, op="sum"):
        assert place == "in place"
        assert array.flags.c_contiguous, "MPI takes one run of memory"
        values = self.allgather(array.copy())
        array[...] = np.sum(values, axis=0) if op == "sum" else np.max(values, axis=0)

    def Ibarrier(self):
        number, hub = self._barriers, self._hub
        self._barriers += 1
        with hub.lock:
            hub.arrived[number] = hub.arrived.get(number, 0) + 1
        return SimpleNamespace(Test=lambda: hub.arrived[number] == self.size)

    def Abort(self, code):
        raise Aborted(code)


class Aborted(BaseException):
    """A rank has ended all."""


def in_ranks(size, work):
    """Call ``work(ranks)`` in one thread a rank; return by rank what it returned or raised."""
    hubs, results = {"lock": threading.Lock()}, [None] * size

    def run(rank):
        world = FakeWorld(rank, size, hubs)
        mpi = SimpleNamespace(COMM_WORLD=world, IN_PLACE="in place", MAX="max", COMM_TYPE_SHARED=0)
        try:
            results[rank] = work(Ranks(mpi))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a rank waits for others"
    share_cpus(1)
    return results


def mpiexec():
    """Return the launcher beside this Python, or on the path; None without one."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def launch(size, *arguments, fault="", blind="", **more):
    """Start ``cupyep *arguments`` in so many processes of MPI, as a `subprocess.Popen`.

    While there is a file `blind`, the launcher does not notice that one of them has ended.
    """
    here = Path(__file__)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent.parent), str(here.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    command = [sys.executable, str(here), fault, *map(str, arguments)]
    if blind:
        command = ["sh", "-c", '"$@"; while test -e "$0"; do sleep 0.1; done', str(blind), *command]
    command = [mpiexec(), "-n", str(size), *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, **pipes, **more)


def launched(size, *arguments, fault=""):
    """Return (exit code, stdout, stderr) of `launch`."""
    process = launch(size, *arguments, fault=fault)
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, out, err


def plant(fault, rank):
    """Let this rank fail, of the ranks that are to."""
    from cupyep.errors import DataError
    from cupyep.learning import EquilibriumPropagation
    from cupyep.parallel import communicator
    from cupyep.training import build, run_directory

    communicator.GRACE_S = 0.5
    if fault == "no data on 1" and rank == 1:

        def missing(*_, **__):
            raise DataError("nothing is there")

        build.load_dataset = missing
    elif fault == "other data on 2" and rank == 2:
        from quadrants import quadrant_data

        build.load_dataset = lambda *_, **__: quadrant_data(41)
    elif fault == "no memory on 1" and rank == 1:
        at_third(EquilibriumPropagation, "step", lambda: raising(MemoryError("as planted")))
    elif fault == "a signal to 1" and rank == 1:
        at_third(EquilibriumPropagation, "step", lambda: os.kill(os.getpid(), signal.SIGTERM))
    elif fault == "full disk on 0" and rank == 0:
        full = OSError(errno.ENOSPC, "No space left on device", "checkpoint.h5")
        at_third(run_directory, "save_checkpoint", lambda: raising(full))
    elif fault == "a defect on 1" and rank == 1:
        EquilibriumPropagation.step = None


def at_third(place, name, happens):
    """Let something happen when a function is called for the third time, before it is done."""
    calls, function = [], getattr(place, name)

    def counted(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            happens()
        return function(*args, **more)

    setattr(place, name, counted)


def raising(error):
    raise error


def main():
    from quadrants import quadrant_data

    from cupyep.cli import main as command_line
    from cupyep.parallel import join
    from cupyep.training import build

    data = quadrant_data()
    build.load_dataset = lambda *_, **__: data
    plant(sys.argv[1], join().rank)
    for arguments in " ".join(sys.argv[2:]).split(" then "):
        try:
            command_line(arguments.split(), prog_name="cupyep")
        except SystemExit as end:
            code = end.code
    sys.exit(code)


if __name__ == "__main__":
    main()
