"""Peak memory, measured. Oracle: arrays of known sizes that live and die at known times."""

from __future__ import annotations

import numpy as np
import pytest

import cupyep as ep
from cupyep.backend.cuda import WORKSPACE_BYTES
from cupyep.memory import plan

MEGABYTE = 10**6


def test_peak_is_that_of_arrays_alive_together():
    def two_of_three():
        first = np.zeros(MEGABYTE, np.uint8)
        second = np.zeros(MEGABYTE, np.uint8)
        del first
        return second, np.zeros(MEGABYTE, np.uint8)

    assert 2e6 <= plan.peak_bytes(lambda: two_of_three, ep.get_device("cpu")) < 2.1e6


def test_what_is_made_counts_and_what_it_took_to_make_it_does_not():
    def make():
        kept = np.zeros(2 * MEGABYTE, np.uint8)
        np.zeros(50 * MEGABYTE, np.uint8)
        return lambda: (kept, np.zeros(MEGABYTE, np.uint8))

    before = np.zeros(9 * MEGABYTE, np.uint8)
    assert 3e6 <= plan.peak_bytes(make, ep.get_device("cpu")) < 3.1e6
    assert before.nbytes == 9e6


class Pool:
    """What CuPy does around every block: the hooks in force are told. Blocks are as large as one asks for."""

    hooks: list = []

    class MemoryHook:
        def __enter__(self):
            Pool.hooks.append(self)
            return self

        def __exit__(self, *error):
            Pool.hooks.remove(self)

    @staticmethod
    def malloc(pointer, size):
        for hook in Pool.hooks:
            hook.malloc_postprocess(device_id=0, size=size - 1, mem_size=size, mem_ptr=pointer, pmem_id=7)

    @staticmethod
    def free(pointer, size):
        for hook in Pool.hooks:
            hook.free_postprocess(device_id=0, mem_size=size, mem_ptr=pointer, pmem_id=7)


def test_blocks_of_a_gpu(fake_gpu, monkeypatch):
    """An address may be taken twice; what was there before the hook, or could not be had, does not count."""
    monkeypatch.setattr(fake_gpu.xp.cuda, "MemoryHook", Pool.MemoryHook, raising=False)
    Pool.malloc(1, 64)

    def make():
        Pool.malloc(2, 1000)
        Pool.malloc(3, 9000)
        Pool.free(3, 9000)

        def work():
            Pool.malloc(3, 500)
            Pool.free(1, 64)
            Pool.free(3, 500)
            Pool.malloc(0, 10**9)
            Pool.malloc(4, 200)
            Pool.malloc(3, 100)

        return work

    assert plan.peak_bytes(make, fake_gpu) == 1000 + 500 + WORKSPACE_BYTES
    assert Pool.hooks == []


def test_cupy_takes_the_hook():
    """CuPy's own class, whose methods are called by the names of their arguments."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    hook = plan._follower(cupy)
    assert isinstance(hook, cupy.cuda.MemoryHook)
    with hook:
        hook.malloc_postprocess(device_id=0, size=5, mem_size=512, mem_ptr=16, pmem_id=1)
        hook.free_postprocess(device_id=0, mem_size=512, mem_ptr=16, pmem_id=1)
    assert (hook.used, hook.peak) == (0, 512)
    for name in ("malloc_postprocess", "free_postprocess"):
        assert getattr(cupy.cuda.MemoryHook, name) is not getattr(type(hook), name)
