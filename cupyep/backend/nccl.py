"""Sums over the GPUs of several processes by NVIDIA's NCCL, which CuPy binds and its wheels do not hold."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from cupyep.backend.device import Device
from cupyep.errors import DeviceError


def library() -> Any:
    """Return CuPy's binding of NCCL; `DeviceError` if there is no library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what CuPy says of a missing library is longer than the line below
        from cupy.cuda import nccl
    if not nccl.available:
        raise DeviceError(
            "several GPUs need NCCL, which CuPy's wheels do not hold: pip install nvidia-nccl-cu12 (with cupy-cuda13x "
            "nvidia-nccl-cu13)"
        )
    return nccl


def new_id() -> bytes:
    """Return what all processes of a new group have to know."""
    return library().get_unique_id()


def gpu_identity(device: Device) -> str:
    """Return what tells a GPU from all others of its machine, whatever number it goes by; ``""`` for the CPU."""
    return device.xp.cuda.runtime.deviceGetPCIBusId(device.index) if device.is_gpu else ""


class NcclSum:
    """Adds up arrays of all processes, in place, on the stream on which everything else is launched.

    Nothing waits: the sum is done after what was launched before it, and before what is launched after.

    Parameters
    ----------
    device : Device
        Another one in every process.
    rank, size : int
        Which process of how many this is; all of them make this object at the same time.
    identity : bytes
        `new_id` of one of them.
    """

    def __init__(self, device: Device, rank: int, size: int, identity: bytes):
        self._nccl, self._cuda = library(), device.xp.cuda
        self._types = {np.dtype(np.float32): self._nccl.NCCL_FLOAT32, np.dtype(np.float64): self._nccl.NCCL_FLOAT64}
        device.use()
        self._group = self._nccl.NcclCommunicator(size, identity, rank)

    def __call__(self, *arrays: Any) -> None:
        """Replace contiguous arrays of float32 or float64 by their sums."""
        stream, total = self._cuda.get_current_stream().ptr, self._nccl.NCCL_SUM
        self._nccl.groupStart()
        for array in arrays:
            address = array.data.ptr
            self._group.allReduce(address, address, array.size, self._types[array.dtype], total, stream)
        self._nccl.groupEnd()
