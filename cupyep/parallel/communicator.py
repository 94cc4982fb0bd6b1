"""What connects the processes ("ranks") of a training: sums over all, decisions by all, errors and ends for all.

Every rank does the same things in the same order; what differs is its share of each batch, and that rank 0 owns what
lies outside: files, display. Whatever one rank alone can find out (a clock, a signal, a full disk) is no ground to do
anything until it has been told to all.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cupyep.backend import Device
from cupyep.backend.device import gpu_of
from cupyep.backend.nccl import NcclSum, gpu_identity, new_id
from cupyep.backend.threads import own_cpus, share_cpus
from cupyep.errors import ConfigurationError, CupyepError, Interrupted, require
from cupyep.parallel.watch import BYE, TOLD, Watch, connect

GRACE_S = 5.0  # a rank that fails waits so long for the others to come to the same end
PAUSES_S = (0.0001, 0.01)  # between two looks of a rank that waits for others: at first, at most


class Communicator:
    """One process, alone: base of `Ranks`, and what everything means where nobody else is.

    Attributes
    ----------
    rank, size : int
        Which of how many this one is.
    remedy : str
        What is to be done if another one dies, in words.
    """

    rank, size = 0, 1
    remedy = "start them again with the same command"

    def own_device(self, name: str) -> str:
        """Return the name of this rank's device, of several GPUs one of its own, unless `name` has a number."""
        return name

    def use(self, device: Device) -> None:
        """Say on which device the arrays to come are.

        Raises
        ------
        ConfigurationError
            If two ranks share a GPU, or some ranks have one and some not.
        DeviceError
            If there are GPUs, but no NCCL.
        """

    def sum(self, *arrays: Any) -> None:
        """Replace arrays on the device of this rank by their sums over all ranks."""

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether a rank has raised it."""
        return tuple(map(bool, flags))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank."""
        return [value]

    def first(self, function: Callable[[], Any]) -> Any:
        """Return on all ranks what `function` returns on rank 0, the only one to call it; raise what it raises."""
        return function()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks leave the block alike: if it raises on one, it raises on all."""
        yield

    def is_agreed(self, error: Exception) -> bool:
        """Return whether all ranks raise an error that has been raised here."""
        return True

    def check(self, check: Callable[[], None]) -> None:
        """Call `check`, which may raise `Interrupted`; if it does on one rank, all raise it."""
        check()

    def same(self, **values: Any) -> None:
        """Raise `ConfigurationError` unless all ranks have the same `values`; "_" in a name stands for a space."""

    def leave(self, code: int, message: str) -> tuple[int, str]:
        """Come to the end of the process with an exit code and an error message; return what to end with.

        All ranks end together: with the first code that is not 0, and only rank 0 says why. One that fails while the
        others go on says so itself after a while, and takes them along.
        """
        return code, message


class Ranks(Communicator):
    """Several processes, connected by MPI; on GPUs their arrays are summed by NCCL.

    Parameters
    ----------
    mpi : module
        ``mpi4py.MPI``.
    """

    def __init__(self, mpi: Any):
        self._mpi = mpi
        self._world, self._ends = mpi.COMM_WORLD.Dup(), mpi.COMM_WORLD.Dup()
        self.rank, self.size = self._world.rank, self._world.size
        self._here = mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)  # the ranks of this machine
        cpus = own_cpus()  # launchers may bind every rank to CPUs of its own
        share_cpus(sum(not cpus.isdisjoint(others) for others in self._here.allgather(cpus)))
        self._stderr = sys.stderr
        self._nccl: NcclSum | None = None
        self._watch: Watch | None = None

    def watch(self) -> None:
        """End this process, from now on, when another one dies. All ranks call this."""
        node, connections = self.gather(platform.node())[0], connect(self, self._here.size == self.size)
        first = int(node == platform.node())  # of this machine's ranks without rank 0
        self._speaks = self.rank == 0 or self._here.rank == first
        missed = self.size - 1 - len(connections)
        if self.rank == 0 and missed:
            told = f"Warning: {missed} ranks cannot reach rank 0 by TCP: should one die, it is left to the launcher to "
            self._say(told + "end the others (srun --kill-on-bad-exit=1)")
        self._watch = Watch(connections, self._end)
        atexit.register(self._watch.say, BYE)

    def _end(self, dead: int | None) -> None:
        if dead is not None and self._speaks:
            self._say(f"Error: rank {dead} has died; {self.remedy}")
        os._exit(1)  # the main thread waits for the dead one; every file in the run directory is whole at any time

    def _say(self, line: str) -> None:
        self._stderr.write(f"{line}\n")
        self._stderr.flush()

    def own_device(self, name: str) -> str:
        return gpu_of(name, self._here.rank)

    def use(self, device: Device) -> None:
        found = self.gather((device.is_gpu, platform.node(), gpu_identity(device), device.name))
        seen: dict[Any, int] = {}
        for rank, (is_gpu, node, identity, label) in enumerate(found):
            require(
                is_gpu == found[0][0],
                f"rank {rank} would compute on {label} of {node}, rank 0 on {found[0][3]} of {found[0][1]}: start no "
                "more ranks than there are GPUs, or give --device cpu",
            )
            other = seen.setdefault((node, identity), rank) if is_gpu else rank
            require(
                other == rank,
                f"ranks {other} and {rank} share {label} of {node}: start one rank a GPU, and leave --device out",
            )
        if device.is_gpu and self._nccl is None:
            self._nccl = NcclSum(device, self.rank, self.size, self.first(new_id))

    def sum(self, *arrays: Any) -> None:
        if self._nccl is not None:
            self._nccl(*arrays)
            return
        for array in arrays:
            self._world.Allreduce(self._mpi.IN_PLACE, array)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        raised = np.array(flags, np.int32)
        self._world.Allreduce(self._mpi.IN_PLACE, raised, self._mpi.MAX)
        return tuple(map(bool, raised))

    def gather(self, value: Any) -> list[Any]:
        return self._exchange(value)

    def _exchange(self, value: Any = None, error: Exception | None = None) -> list[Any]:
        """Return the values of all ranks, or raise the error of one, the same on all."""
        self._wait(self._world.Ibarrier())
        answers = self._world.allgather((value, error))
        errors = [(rank, error) for rank, (_, error) in enumerate(answers) if error is not None]
        if errors:
            rank, first = errors[0]
            if rank and isinstance(first, CupyepError):
                first.args = (f"rank {rank}: {first}",)
            first.shared = True  # seen by `is_agreed`
            raise first
        return [value for value, _ in answers]

    def _wait(self, request: Any, seconds: float = float("inf")) -> bool:
        """Return whether others come within so many seconds; meanwhile the processor is free, signals are heard."""
        (pause, longest), begin = PAUSES_S, time.monotonic()
        while not request.Test():
            if time.monotonic() - begin > seconds:
                return False
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return True

    def first(self, function: Callable[[], Any]) -> Any:
        value = error = None
        if self.rank == 0:
            try:
                value = function()
            except Exception as raised:
                error = raised
        return self._exchange(value, error)[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        error = None
        try:
            yield
        except Exception as raised:
            if self.is_agreed(raised):
                raise
            error = raised
        self._exchange(error=error)

    def is_agreed(self, error: Exception) -> bool:
        return hasattr(error, "shared")

    def check(self, check: Callable[[], None]) -> None:
        error = None
        try:
            check()
        except Interrupted as raised:
            error = raised
        if any(self.any(error is not None)):
            self._exchange(error=error)

    def same(self, **values: Any) -> None:
        everywhere = self.gather(values)
        for name, value in everywhere[0].items():
            for rank, other in enumerate(everywhere):
                if other[name] != value:
                    raise ConfigurationError(
                        f"all ranks need the same {name.replace('_', ' ')}; rank {rank} has {other[name]}, "
                        f"rank 0 {value}"
                    )

    def leave(self, code: int, message: str) -> tuple[int, str]:
        if not self._wait(self._ends.Ibarrier(), GRACE_S if code else float("inf")):
            self._say(f"Error: rank {self.rank}: {message}")
            if self._watch is not None:
                self._watch.say(TOLD)
            self._world.Abort(code)
        ends = self._ends.allgather((code, message))
        rank, (code, message) = next(((r, end) for r, end in enumerate(ends) if end[0]), (0, ends[0]))
        return code, "" if self.rank else message if rank == 0 else f"rank {rank}: {message}"
