"""How much memory something takes, measured: arrays on the CPU, blocks of CuPy's pools on a GPU."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from cupyep.backend.cuda import WORKSPACE_BYTES
from cupyep.backend.device import Device, gemm


def peak_bytes(make: Callable[[], Callable[[], Any]], device: Device) -> int:
    """Return the peak memory of some work in bytes, beyond what was there before.

    Parameters
    ----------
    make : callable
        Makes all that the work uses and returns the work, a function. What is made counts, what was needed to make it
        does not.
    device : Device

    Returns
    -------
    int
        On the CPU what Python and NumPy allocated; BLAS's own buffers are not seen. On a GPU what was taken from CuPy's
        pools, and the workspace of cuBLAS, which all networks of a thread share; the code of kernels and what CUDA
        itself takes are not seen.
    """
    return _on_gpu(make, device) if device.is_gpu else _on_host(make)


def _on_host(make: Callable[[], Callable[[], Any]]) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work = make()
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _on_gpu(make: Callable[[], Callable[[], Any]], device: Device) -> int:
    small = device.xp.zeros((1, 1), np.float32)
    gemm(small, small, out=device.xp.empty_like(small))  # the workspace is there now, and is counted below
    with _hook(device.xp) as hook:
        work = make()
        hook.peak = hook.used
        work()
        device.synchronize()
    return WORKSPACE_BYTES + hook.peak


def _hook(cupy: Any) -> Any:
    """Return a hook that follows what is taken from CuPy's pools, and its peak."""

    class Follower(cupy.cuda.MemoryHook):
        """Counts blocks while it is in force; one that was taken before and is given back does not count."""

        name = "cupyep peak"

        def __init__(self):
            self.used = self.peak = 0
            self._taken: dict[int, int] = {}  # address -> bytes

        def malloc_postprocess(self, device_id, size, mem_size, mem_ptr, pmem_id):
            if mem_ptr:  # 0: there was no memory
                self._taken[mem_ptr] = mem_size
                self.used += mem_size
                self.peak = max(self.peak, self.used)

        def free_postprocess(self, device_id, mem_size, mem_ptr, pmem_id):
            self.used -= self._taken.pop(mem_ptr, 0)

    return Follower()
