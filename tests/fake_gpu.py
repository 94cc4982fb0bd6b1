"""A GPU without one: the strict device, kernels through the shim, cuBLAS in NumPy, streams and graphs that record.

Everything between the classes that a user calls and the kernels runs as on a GPU: the launch code, the calls of cuBLAS
on raw addresses, the capturing of iterations. While a stream is captured nothing is done; launching the graph does it,
on what the memory holds by then. What a graph cannot hold (an allocation, a transfer, a read by the host) raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import strict
from cuda_cpu import ShimLauncher, compiler, tf32_of
from strict import StrictDevice, Tape, do

from cupyep.backend import device as device_module
from cupyep.backend.cuda import Cublas
from cupyep.backend.graphs import GraphCapture

ELEMENTS = {0: np.float32, 1: np.float64, 2: np.float16}


def element_type(code):
    return ELEMENTS[code] if code != 14 else pytest.importorskip("ml_dtypes").bfloat16


def column_major(address, code, rows, columns, leading):
    """Return the matrix (rows, columns) at an address, element (i, j) at i + j * leading, as a writable view."""
    assert leading >= max(rows, 1)
    dtype = np.dtype(element_type(code))
    count = (columns - 1) * leading + rows
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    flat = np.frombuffer(memory, dtype)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, leading * dtype.itemsize))


class FakeCublas:
    """The column-major product of cuBLAS in NumPy, and a record of everything else that it is told."""

    def __init__(self):
        self.calls = []

    def create(self):
        self.calls.append(("create",))
        return "handle"

    def set_math_mode(self, handle, mode):
        self.calls.append(("math mode", handle, mode))

    def set_stream(self, handle, stream):
        self.calls.append(("stream", handle, stream))

    def set_workspace(self, handle, pointer, nbytes):
        self.calls.append(("workspace", handle, pointer, nbytes))

    def gemm_ex(self, handle, transa, transb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc,
                compute):  # fmt: skip
        # On a device this would be done later: everything is taken now, but for what the matrices hold.
        left = column_major(a, a_type, k, m, lda).T if transa else column_major(a, a_type, m, k, lda)
        right = column_major(b, b_type, n, k, ldb).T if transb else column_major(b, b_type, k, n, ldb)
        out = column_major(c, c_type, m, n, ldc)
        number = np.float64 if compute == 70 else np.float32
        factor_of = tf32_of if compute == 77 else np.asarray
        assert isinstance(alpha, ctypes.c_double if compute == 70 else ctypes.c_float)
        factor, kept = alpha.value, beta.value

        def multiply():
            product = factor * (factor_of(left.astype(number)) @ factor_of(right.astype(number)))
            if kept:
                product += kept * out.astype(number)
            out[...] = product

        do(multiply, left, right, out)
        self.calls.append(("gemm", handle, (a_type, b_type, c_type), compute))


class FakeStream:
    """A stream on which work is done at once, or recorded."""

    current = None
    made = 0

    def __init__(self, non_blocking=False):
        FakeStream.made += 1
        self.ptr, self.non_blocking, self._tape = 16 * FakeStream.made, non_blocking, None

    def __enter__(self):
        self._before, FakeStream.current = FakeStream.current, self
        return self

    def __exit__(self, *error):
        FakeStream.current = self._before

    def begin_capture(self, mode):
        assert mode == "relaxed", "CuPy may have to allocate: other modes forbid it"
        assert self.non_blocking, "a stream that waits for the default one cannot be captured beside it"
        self._tape = Tape()
        self._tape.__enter__()

    def end_capture(self):
        tape, self._tape = self._tape, None
        tape.__exit__()
        return FakeGraph(tape)


class FakeGraph:
    """What was captured; launching it does it."""

    made: list[FakeGraph] = []

    def __init__(self, tape):
        self.tape, self.launches = tape, 0
        FakeGraph.made.append(self)

    def launch(self):
        assert Tape.current is None
        self.launches += 1
        self.tape.play()


class FakeEvent:
    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        assert Tape.current is None


class FakeLauncher(ShimLauncher):
    """Launches kernels on device arrays, or records it."""

    def launch(self, kernel, type_arguments, grid, block, arguments):
        hosts = [getattr(argument, "_host", argument) for argument in arguments]
        do(self.prepared(kernel, type_arguments, grid, block, hosts), *hosts)


class FakeGpu(StrictDevice):
    """A device that takes itself for a GPU."""

    def __init__(self):
        super().__init__()
        self.name, self.index, self.is_gpu, self.adds_products = "cuda:0", 0, True, True
        self.graphs = GraphCapture(self.xp, 0)
        self.scratch_bytes = 12_000  # several chunks even of small batches

    def free_bytes(self):
        """Return what a test makes it: None, as on the host that it is."""

    def use(self):
        pass

    def make_launcher(self, source):
        if compiler() is None:
            pytest.skip("g++ is not installed: kernels cannot run on the CPU")
        return FakeLauncher(source)


def current_stream():
    return 0 if FakeStream.current is None else FakeStream.current.ptr


def make_fake_gpu(monkeypatch):
    """Return a `FakeGpu`; arrays of the strict device are CuPy's as far as the package can see."""
    FakeGraph.made.clear()
    monkeypatch.setattr(strict.XP, "__name__", "cupy")
    cuda = SimpleNamespace(
        Event=FakeEvent,
        get_elapsed_time=lambda start, end: 1000 * (end.time - start.time),
        get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
        Device=lambda index: contextlib.nullcontext(),
        Stream=FakeStream,
        MemoryPool=lambda: SimpleNamespace(malloc=None),
        using_allocator=lambda allocator: contextlib.nullcontext(),
        runtime=SimpleNamespace(streamCaptureModeRelaxed="relaxed"),
    )
    monkeypatch.setattr(strict.XP, "cuda", cuda, raising=False)
    cublas = Cublas(FakeCublas(), strict.XP, current_stream)
    monkeypatch.setattr(device_module, "_cublas", lambda array: cublas)
    gpu = FakeGpu()
    monkeypatch.setattr(device_module, "_launcher_of", functools.cache(lambda index, source: gpu.make_launcher(source)))
    return gpu


@pytest.fixture
def fake_gpu(monkeypatch):
    return make_fake_gpu(monkeypatch)
