"""Several processes that train one network, a share of every batch each; the only importer of mpi4py."""

from cupyep.parallel.communicator import Communicator, Ranks
from cupyep.parallel.launch import join, launched

__all__ = ["Communicator", "Ranks", "join", "launched"]
