"""How a process finds out that it is one of several: by what a launcher of MPI leaves in its environment."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

from cupyep.errors import ConfigurationError, require
from cupyep.parallel.communicator import Communicator, Ranks

VARIABLE = "CUPYEP_MPI"
#: What launchers set: how many processes they started, and which one this is. Slurm alone connects nobody: PMIx does.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "PMIX_RANK"),
)


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return how many processes a launcher of MPI says it has started, and which one this is; (1, 0) without one."""
    for size, rank in LAUNCHERS:
        found = environment.get(size, ""), environment.get(rank, "")
        if all(text.isdecimal() for text in found):
            return int(found[0]), int(found[1])
    return 1, 0


@functools.cache
def join() -> Communicator:
    """Return what connects this process with those that were started with it, the same every time.

    MPI is loaded where a launcher says that there are several, or ``CUPYEP_MPI=1`` asks for it; ``CUPYEP_MPI=0`` lets
    each go its own way.

    Raises
    ------
    ConfigurationError
        If mpi4py is missing, or its MPI is not the launcher's.
    """
    (size, rank), asked = launched(), os.environ.get(VARIABLE)
    require(asked in (None, "", "0", "1"), f"{VARIABLE} must be 0 (every process by itself) or 1 (MPI), not '{asked}'")
    if asked == "0" or (size == 1 and asked != "1"):
        return Communicator()
    remedy = f"set {VARIABLE}=0 to let every process train by itself"
    try:
        # With mpi4py's own level of threads: MPICH, told that there is one, does not let go of the processor while it
        # waits, and a sum of 1 MB over two ranks that share a core takes 1.5 s in place of 10 ms.
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        who = f"rank {rank} of {size} cannot use MPI" if size > 1 else "MPI cannot be used"
        raise ConfigurationError(f"{who}: {error}; install cupyep[mpi] and an MPI library, or {remedy}") from error
    if MPI.COMM_WORLD.size < size:
        name = " ".join(MPI.Get_library_version().replace("Version:", "").split()[:2])
        raise ConfigurationError(
            f"the launcher started {size} processes, but the MPI library of mpi4py ({name}) sees "
            f"{MPI.COMM_WORLD.size}: use that library's own mpiexec, or an mpi4py of the launcher's; or {remedy}"
            if rank == 0
            else ""  # rank 0 says it for all
        )
    if MPI.COMM_WORLD.size == 1:
        return Communicator()
    ranks = Ranks(MPI)
    ranks.watch()
    return ranks
