"""The device object: array module, transfers, dtypes, the one matrix product.

Code that computes never asks "is there a GPU?": it asks an array for its module (`array_module`) or a
`Device` for ``xp``. CuPy is imported once, on first need, and the reason why it cannot be used is kept.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cupyep.backend.cuda import COMPILER_REMEDY, Cublas, CublasLibrary, Launcher, missing_compiler
from cupyep.backend.graphs import GraphCapture, graphs_wanted
from cupyep.errors import DeviceError, instance, number, one_line, require, shown

GPU_SCRATCH_SHARE = 0.8  # of L2; the rest is for weights and results passing by
ON_GPU = (2, 13)  # kinds of memory in DLPack: CUDA's, and CUDA's managed one
MOST_SCRATCH_MB = 1e6  # below that
LEAST_GPU_SCRATCH = 16 << 20  # where L2 is small, large products matter more than where the columns lie


@functools.cache
def _import_cupy() -> tuple[ModuleType | None, str]:
    """Import CuPy and prove that it computes; return (module or None, reason why not)."""
    try:
        import cupy
    except ImportError as error:
        return None, f"CuPy is not installed ({error}); install cupyep[cuda12] or cupyep[cuda13]"
    if not cupy.cuda.is_available():
        return None, "CuPy finds no CUDA device (no GPU, or no NVIDIA driver)"
    try:
        probe = cupy.ones((8, 8), dtype=cupy.float32)
        total = float((probe @ probe).sum())
    except Exception as error:  # any failure of driver, cuBLAS or NVRTC means "unusable", and is reported
        remedy = f"; {COMPILER_REMEDY}" if missing_compiler(error) else ""  # cuBLAS comes with the same parts
        return None, f"CuPy sees a GPU but cannot compute on it ({one_line(error)}){remedy}"
    if total != 512.0:
        return None, f"CuPy computes wrongly on this GPU (8x8 product sums to {total}, not 512)"
    return cupy, ""


def _cupy() -> ModuleType:
    """Return CuPy; `DeviceError` if it cannot be used."""
    cupy, reason = _import_cupy()
    if cupy is None:
        raise DeviceError(reason)
    return cupy


def gpu_status() -> tuple[bool, str]:
    """Return ``(usable, reason)``; the reason is empty when a GPU can be used."""
    cupy, reason = _import_cupy()
    return cupy is not None, reason


def array_module(array: Any) -> ModuleType:
    """Return the module (``numpy`` or ``cupy``) that `array` belongs to.

    An array class from elsewhere names its module in an attribute ``array_module`` (tests use this to
    prove that no NumPy call is ever applied to a device array).
    """
    if type(array) is np.ndarray:
        return np
    own = getattr(array, "array_module", None)
    if own is not None:
        return own
    if type(array).__module__.partition(".")[0] == "cupy":  # not cupyep
        return _cupy()
    raise TypeError(f"expected a NumPy or CuPy array, got {type(array).__name__}")


def host_array(array: Any) -> np.ndarray:
    """Return an array of NumPy, of CuPy or of anything with DLPack, or nested sequences, as one of NumPy.

    What is on the host shares its memory. Whatever the library says that it belongs to is raised where it refuses.
    """
    if isinstance(array, np.ndarray):
        return array
    try:
        return array_module(array).asnumpy(array)
    except TypeError:
        pass  # no array of a device
    if not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        return np.asarray(array)
    if array.__dlpack_device__()[0] in ON_GPU:
        cupy = _cupy()
        return cupy.asnumpy(cupy.from_dlpack(array))
    return np.from_dlpack(array)


class Device:
    """Where arrays live.

    Parameters
    ----------
    name : str
        ``"cpu"`` or ``"cuda:N"``.
    reason : str
        Why this device was chosen (for ``auto``), otherwise empty.
    scratch_mb : float, optional
        Scratch of one chunk of a batch in 10^6 bytes, above 0; what stays in the cache unless given.

    Attributes
    ----------
    xp : module
        ``numpy`` or ``cupy``.
    is_gpu : bool
    adds_products : bool
        Whether `add_gemm` needs no scratch.
    scratch_bytes : int
        Scratch of one chunk of a batch: `scratch_mb`, or what stays in the cache while the chunk is worked on, part of
        a GPU's L2, of a core's L2 and L3.
    graphs : GraphCapture or None
        None on the CPU, and on a GPU where ``CUPYEP_GRAPHS=0``.
    """

    def __init__(self, name: str, reason: str = "", scratch_mb: float | None = None):
        right = isinstance(name, str) and re.fullmatch(r"cpu|cuda:\d{1,9}", name)
        require(bool(right), f"unknown device {shown(name)} (choose from auto, cpu, cuda, cuda:N)")
        self.name = name
        self.reason = instance("reason", reason, str, "a text")
        if scratch_mb is not None:
            scratch_mb = number("scratch_mb", scratch_mb, above=0, below=MOST_SCRATCH_MB)
        self.scratch_mb = scratch_mb
        self.is_gpu = self.adds_products = name != "cpu"
        self.graphs: GraphCapture | None = None
        self.scratch_bytes = 8 << 20
        if self.is_gpu:
            cupy, why_not = _import_cupy()
            if cupy is None:
                raise DeviceError(f"device '{name}' cannot be used: {why_not}; or use --device cpu")
            count = cupy.cuda.runtime.getDeviceCount()
            self.index = int(name.partition(":")[2])
            if self.index >= count:
                raise DeviceError(f"device '{name}' does not exist: this machine has {count} CUDA device(s)")
            self.xp = cupy
            self.use()
            l2 = cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrL2CacheSize, self.index)
            self.scratch_bytes = gpu_scratch(l2)
            if graphs_wanted():
                self.graphs = GraphCapture(cupy, self.index)
        else:
            self.xp = np
        if scratch_mb is not None:
            self.scratch_bytes = int(scratch_mb * 1e6)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.reason, self.scratch_mb)  # pickled by name and found again

    def __repr__(self) -> str:
        return f"Device({self.name!r})"

    def use(self) -> None:
        """Make this GPU the one that the current thread launches kernels on; nothing on the CPU."""
        if self.is_gpu:
            self.xp.cuda.Device(self.index).use()

    def asarray(self, array: Any, dtype: Any = None) -> Any:
        """Copy `array` to this device if it is not there yet; on a GPU it is C-contiguous, as kernels take it."""
        if not self.is_gpu:
            return self.xp.asarray(array, dtype=dtype)
        self.use()
        return self.xp.asarray(array, dtype=dtype, order="C")  # CuPy keeps Fortran's order unless it is told

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return an array whose content is yet to be written."""
        return self.xp.empty(shape, dtype)

    def drawn(self, draw: Callable[[tuple[int, ...]], np.ndarray], shape: tuple[int, ...], dtype: Any) -> Any:
        """Return what `draw` makes of a shape on the host, so that every device gets the same numbers."""
        return self.asarray(draw(shape).astype(dtype))

    def to_numpy(self, array: Any) -> np.ndarray:
        """Return a host copy (or, on the CPU, the array itself)."""
        return self.xp.asnumpy(array) if self.is_gpu else np.asarray(array)

    def free_bytes(self) -> int | None:
        """Return the memory that is left on a GPU, what CuPy's pool holds in reserve included; None on the CPU."""
        if not self.is_gpu:
            return None
        self.use()
        pool = self.xp.get_default_memory_pool()
        return int(self.xp.cuda.runtime.memGetInfo()[0]) + int(pool.free_bytes())

    def launcher(self, source: Path) -> Launcher:
        """Return what compiles and launches the CUDA kernels of a file, the same one every time."""
        return _launcher_of(self.index, source)

    def synchronize(self) -> None:
        """Wait until all work on this device is done."""
        if self.is_gpu:
            self.use()
            self.xp.cuda.get_current_stream().synchronize()

    def peak_memory_bytes(self) -> int | None:
        """Return the peak memory in bytes: of CuPy's pool on a GPU, of the process (resident) on the CPU.

        None where the platform does not tell (Windows).
        """
        if self.is_gpu:
            self.use()
            return int(self.xp.get_default_memory_pool().total_bytes())
        try:
            import resource
        except ImportError:  # Windows
            return None
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def gpu_scratch(l2: int) -> int:
    """Return `Device.scratch_bytes` of a GPU with an L2 cache of so many bytes."""
    return max(LEAST_GPU_SCRATCH, int(GPU_SCRATCH_SHARE * l2))


def get_device(device: str | Device = "auto", scratch_mb: float | None = None) -> Device:
    """Return the device of the given name.

    Parameters
    ----------
    device : {"cpu", "cuda", "cuda:N", "auto"} or Device
        ``auto`` takes the first GPU that works, else the CPU; ``Device.reason`` says what it chose and why.
    scratch_mb : float, optional
        See `Device`. It changes no result but for the order of sums: larger chunks are fewer and larger products, but
        leave the cache. A `Device` has its own.

    Raises
    ------
    ConfigurationError
        If the name is none of these, or the scratch is no number above 0.
    DeviceError
        If a GPU is asked for and cannot be used; the message says why.
    """
    if isinstance(device, Device):
        require(scratch_mb is None, "scratch_mb is for a device by its name; a Device has its own")
        return device
    if isinstance(device, str) and device == "auto":
        usable, reason = gpu_status()
        return Device("cuda:0" if usable else "cpu", "a CUDA device answers" if usable else reason, scratch_mb)
    return Device("cuda:0" if isinstance(device, str) and device == "cuda" else device, scratch_mb=scratch_mb)


def gpu_of(name: str, place: int) -> str:
    """Return the device of one of several processes on this machine, the one with the number `place` of 0, 1, ...

    Where `name` leaves it open, each takes a GPU of its own as long as there are enough; else, and where GPUs cannot be
    used, it is `name`. No process touches the GPU of another, where a context takes hundreds of megabytes.
    """
    if name not in ("auto", "cuda"):
        return name
    with contextlib.suppress(Exception):  # whatever is wrong with CuPy or the GPU: `get_device` says so
        import cupy

        index = place % cupy.cuda.runtime.getDeviceCount()
        cupy.cuda.Device(index).use()
        return f"cuda:{index}" if gpu_status()[0] else name
    return name


@functools.cache
def _cublas_of(index: int, thread: int) -> Cublas:
    """Return the handle of one thread on one device: a handle has one stream at a time."""
    cupy = _cupy()
    with cupy.cuda.Device(index):
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        return Cublas(CublasLibrary(major), cupy, lambda: cupy.cuda.get_current_stream().ptr)


def _cublas(array: Any) -> Cublas:
    return _cublas_of(array.device.id, threading.get_ident())


@functools.cache
def _launcher_of(index: int, source: Path) -> Launcher:
    """Return what compiles and launches the kernels of a file on one device."""
    return Launcher(source, _cupy())


def launcher_for(array: Any, source: Path) -> Launcher | None:
    """Return what launches the kernels of a file on the GPU that `array` is on; None for an array on the host."""
    return _launcher_of(array.device.id, source) if array_module(array).__name__ == "cupy" else None


def workspace_for(array: Any) -> Any:
    """Return the workspace (bytes) of this thread's products on the GPU that `array` is on.

    Between two products it is scratch for anybody who launches on the same stream.
    """
    return _cublas(array).workspace


def gemm(a: Any, b: Any, out: Any, tf32: bool = False) -> Any:
    """Matrix product ``out = a @ b`` of 2-D arrays into `out`; every large product of the package goes through here.

    Arrays of more axes are stacks of matrices, as for ``matmul``.
    With `tf32` a GPU rounds float32 factors to TF32. NumPy multiplies float32 and float64 as they are: whoever wants
    fewer digits there rounds the factors before (`cupyep.ops.factors`).
    """
    xp = array_module(a)
    if xp.__name__ == "cupy" and a.ndim == 2:
        return _cublas(a).gemm(a, b, out, tf32=tf32)
    return xp.matmul(a, b, out=out)


def add_gemm(a: Any, b: Any, out: Any, scratch: Any, tf32: bool = False) -> Any:
    """Add the matrix product ``a @ b`` to `out`; see `gemm`.

    `scratch`, an array like `out`, takes the product where `Device.adds_products` is false; elsewhere it may be None.
    """
    if array_module(a).__name__ == "cupy":
        return _cublas(a).gemm(a, b, out, accumulate=True, tf32=tf32)
    out += gemm(a, b, out=scratch)
    return out
