"""CUDA kernels from source and products through cuBLAS: what CuPy's own wrappers do not allow in a captured graph.

Nothing is imported, compiled or loaded before its first use.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyep.errors import DeviceError

COMPILER_REMEDY = (
    'install CuPy with its CUDA toolkit parts (pip install "cupy-cuda12x[ctk]" or "cupy-cuda13x[ctk]"), '
    "or set CUDA_PATH to a CUDA toolkit of the same major version"
)
WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends on Hopper; it must not be allocated during a capture


def address(array: Any) -> int:
    """Return the address of the first element of a NumPy or CuPy array."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def identity(array: Any) -> tuple[Any, ...]:
    """Return what work on an array depends on besides its content: where it lies, and how."""
    return address(array), array.shape, array.strides, array.dtype.str


class Launcher:
    """Compiles the kernels of one source file, ``.cu`` templates, at their first launch, and launches them.

    Files that it includes by ``#include "name"`` are put in its text, because CuPy's cache of compiled kernels does not
    see changes in included files.
    """

    OPTIONS = ("-std=c++17",)

    def __init__(self, source: Path, xp: Any):
        self.source = source
        self._xp = xp
        self._text: str | None = None
        self._kernels: dict[str, Any] = {}

    def launch(
        self,
        kernel: str,
        type_arguments: Sequence[Any],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
    ) -> None:
        """Launch ``kernel<type_arguments>``, types by their CUDA names and numbers, on the current stream.

        The `arguments` are C-contiguous arrays, NumPy scalars of the parameters' types, and None for a null pointer.
        `DeviceError` if CUDA's run-time compiler or its headers cannot be found.
        """
        expression = name_expression(kernel, type_arguments)
        function = self._kernels.get(expression)
        if function is None:
            function = self._kernels[expression] = self._compile(expression)
        function(grid, block, tuple(kernel_argument(argument) for argument in arguments))

    def _compile(self, expression: str) -> Any:
        if self._text is None:
            self._text = source_text(self.source)
        module = self._xp.RawModule(code=self._text, options=self.OPTIONS, name_expressions=(expression,))
        try:
            return module.get_function(expression)
        except Exception as error:
            reason = missing_compiler(error)
            if reason is None:
                raise
            raise DeviceError(f"CUDA kernels cannot be compiled: {reason}; {COMPILER_REMEDY}") from error


def name_expression(kernel: str, type_arguments: Sequence[Any]) -> str:
    """Return the name expression of one instance of a kernel template."""
    return f"{kernel}<{', '.join(map(str, type_arguments))}>"


def source_text(source: Path) -> str:
    """Return a source file with the files of its folder that it includes put in their places."""
    return re.sub(
        r'^#include "([^"]+)"$',
        lambda match: source.with_name(match[1]).read_text(encoding="utf-8"),
        source.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )


def kernel_argument(argument: Any) -> Any:
    """Return what a launch takes for `argument`: itself, or a null pointer for None.

    Raises
    ------
    TypeError
        If an array is not C-contiguous or a number has no fixed size: a kernel would read the wrong memory.
    """
    if argument is None:
        return np.uint64(0)
    if isinstance(argument, np.generic):
        return argument
    if not hasattr(argument, "flags") or not argument.flags.c_contiguous:
        raise TypeError(f"a kernel takes C-contiguous arrays and NumPy scalars, not {type(argument).__name__}")
    return argument


def missing_compiler(error: Exception) -> str | None:
    """Return why the compiler cannot be used, or None if `error` says something else."""
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    header = re.search(r'(?:cannot|could not) open source file "([^"]+)"', text)
    if header:
        return f"the header {header[1]} is missing"
    if "Failed to find CUDA headers" in text:  # CuPy's words
        return "CUDA's headers are missing"
    if isinstance(error, ImportError | OSError) or re.search("(load|find).*nvrtc", first):
        return f"the compiler library NVRTC cannot be loaded ({first})"
    return None


# cuBLAS numbers its types and modes; from cublas_api.h and library_types.h.
_DATA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_32F_TF32 = 68, 70, 77
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
_GEMM_DEFAULT = -1
_NORMAL, _TRANSPOSED = 0, 1
_STATUS = {
    1: "not initialised",
    3: "out of memory",
    7: "invalid value",
    8: "architecture mismatch",
    11: "mapping error",
    13: "execution failed",
    14: "internal error",
    15: "not supported",
}


def _preload_cublas() -> None:
    """Let CuPy load the cuBLAS that it is linked with, from the folder of a wheel too: then it is found by its name."""
    with contextlib.suppress(Exception):  # whatever it is: the library may be on the loader's own path
        importlib.import_module("cupy_backends.cuda.libs").cublas  # noqa: B018 - an attribute that loads


class CublasLibrary:
    """The functions of NVIDIA's cuBLAS that `Cublas` needs, called through ctypes.

    Of the library of CUDA's major version, 12 say: CuPy's own, wherever it lies, has this number in its name.
    `DeviceError` if it cannot be loaded.
    """

    def __init__(self, major: int):
        name = f"libcublas.so.{major}"
        _preload_cublas()
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise DeviceError(f"cuBLAS cannot be loaded ({error}); {COMPILER_REMEDY}") from error

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise DeviceError(f"{function} failed: {_STATUS.get(status, 'unknown error')} (status {status})")

    def create(self) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(handle))
        return handle

    def set_math_mode(self, handle: Any, mode: int) -> None:
        self._call("cublasSetMathMode", handle, ctypes.c_int(mode))

    def set_stream(self, handle: Any, stream: int) -> None:
        self._call("cublasSetStream_v2", handle, ctypes.c_void_p(stream))

    def set_workspace(self, handle: Any, pointer: int, nbytes: int) -> None:
        self._call("cublasSetWorkspace_v2", handle, ctypes.c_void_p(pointer), ctypes.c_size_t(nbytes))

    def gemm_ex(self, handle: Any, transa: int, transb: int, m: int, n: int, k: int, alpha: Any,
                a: int, a_type: int, lda: int, b: int, b_type: int, ldb: int, beta: Any,
                c: int, c_type: int, ldc: int, compute: int) -> None:  # fmt: skip
        """Call ``cublasGemmEx``; `alpha`, `beta` are ctypes numbers on the host, `a`, `b`, `c` device addresses."""
        number, pointer = ctypes.c_int, ctypes.c_void_p
        self._call(
            "cublasGemmEx",
            handle,
            *map(number, (transa, transb, m, n, k)),
            *(ctypes.byref(alpha), pointer(a), number(a_type), number(lda)),
            *(pointer(b), number(b_type), number(ldb)),
            *(ctypes.byref(beta), pointer(c), number(c_type), number(ldc)),
            *(number(compute), number(_GEMM_DEFAULT)),
        )


class Cublas:
    """Matrix products of row-major arrays on one device, on the stream at the address that `current_stream` returns.

    They are allowed in a captured graph. Halves are multiplied with float32 accumulation; split sums are added in
    float32 too. One handle with one workspace gives the same bits from run to run. The handle lives as long as the
    process.
    """

    def __init__(self, library: Any, xp: Any, current_stream: Callable[[], int]):
        self._library = library
        self._current_stream = current_stream
        self.workspace = xp.empty(WORKSPACE_BYTES, np.uint8)
        self._stream: int | None = None
        self._handle = library.create()
        library.set_math_mode(self._handle, _DISALLOW_REDUCED_PRECISION_REDUCTION)

    def gemm(self, a: Any, b: Any, out: Any, accumulate: bool = False, tf32: bool = False) -> Any:
        """Write ``a @ b`` into `out`, or add it with `accumulate`; return `out`.

        Parameters
        ----------
        a, b : arrays of shapes (M, K) and (K, N), of one dtype
            float32, float64, float16 or bfloat16; rows or columns contiguous, so a transposed view is fine.
        out : array of shape (M, N)
            Rows contiguous; of the type of the factors, or float32 for halves.
        accumulate : bool
        tf32 : bool
            Round float32 factors to TF32; other types are multiplied as they are.

        Raises
        ------
        TypeError
            If shapes, types or memory layouts are not these.
        """
        rows, inner, columns = self._checked_sizes(a, b, out)
        self._use_current_stream()
        number, compute = self._arithmetic(a.dtype, b.dtype, out.dtype, tf32)
        # cuBLAS is column-major: it sees each row-major matrix transposed, and out^T = b^T a^T.
        b_mode, ldb = _layout(b)
        a_mode, lda = _layout(a)
        out_mode, ldc = _layout(out)
        if out_mode != _NORMAL:
            raise TypeError("the output of a product must have contiguous rows")
        self._library.gemm_ex(
            self._handle,
            *(b_mode, a_mode, columns, rows, inner, number(1)),
            *(address(b), _DATA_TYPES[b.dtype.name], ldb),
            *(address(a), _DATA_TYPES[a.dtype.name], lda),
            number(1 if accumulate else 0),
            *(address(out), _DATA_TYPES[out.dtype.name], ldc),
            compute,
        )
        return out

    def _use_current_stream(self) -> None:
        stream = self._current_stream()
        if stream != self._stream:
            self._library.set_stream(self._handle, stream)  # takes the workspace away again
            self._library.set_workspace(self._handle, address(self.workspace), self.workspace.nbytes)
            self._stream = stream

    @staticmethod
    def _arithmetic(a: np.dtype, b: np.dtype, out: np.dtype, tf32: bool) -> tuple[Any, int]:
        """Return the ctypes number of alpha and beta, and cuBLAS's compute type."""
        if a != b or a.name not in _DATA_TYPES or (out != a and (a.itemsize != 2 or out != np.float32)):
            raise TypeError(f"no product of {a} and {b} into {out}")
        if a == np.float64:
            return ctypes.c_double, _COMPUTE_64F
        return ctypes.c_float, _COMPUTE_32F_TF32 if tf32 and a == np.float32 else _COMPUTE_32F

    @staticmethod
    def _checked_sizes(a: Any, b: Any, out: Any) -> tuple[int, int, int]:
        (rows, inner), columns = a.shape, b.shape[1]
        if b.shape[0] != inner or out.shape != (rows, columns):
            raise TypeError(f"no product of shapes {a.shape} and {b.shape} into {out.shape}")
        return rows, inner, columns


def _layout(array: Any) -> tuple[int, int]:
    """Return how cuBLAS must read a matrix to see its transpose, and its leading dimension.

    `_NORMAL` for contiguous rows, `_TRANSPOSED` for contiguous columns.
    """
    rows, columns = array.shape
    down, right = (stride // array.itemsize for stride in array.strides)
    if (right == 1 or columns == 1) and (down >= columns or rows == 1):
        return _NORMAL, max(down if rows > 1 else columns, 1)
    if (down == 1 or rows == 1) and (right >= rows or columns == 1):
        return _TRANSPOSED, max(right if columns > 1 else rows, 1)
    raise TypeError("a factor of a product must have contiguous rows or columns")
