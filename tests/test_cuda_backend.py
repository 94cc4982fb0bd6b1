"""backend/cuda.py without a GPU: a stand-in for CuPy compiles and launches, two stand-ins for cuBLAS multiply.

One multiplies column-major matrices of every type in NumPy, from raw addresses; the other is a C library with
cuBLAS's own signatures, which proves the calls by ctypes.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_cpu import SHIM, compiler
from fake_gpu import FakeCublas

import cupyep as ep
from cupyep.backend import cuda, device, gpu_status, libraries
from cupyep.backend.cuda import Cublas, CublasLibrary, Launcher, kernel_argument, name_expression, source_text
from cupyep.commands.system import system_report
from cupyep.errors import DeviceError

# --- Launcher ------------------------------------------------------------------------------------------------------


class FakeModule:
    """Stands in for cupy.RawModule; records what is compiled and launched."""

    error = None

    def __init__(self, code, options, name_expressions):
        self.made.append((code, options, name_expressions))

    def get_function(self, expression):
        if self.error:
            raise self.error
        return lambda grid, block, arguments: self.launched.append((expression, grid, block, arguments))


@pytest.fixture
def module():
    """A fresh class with records of its own."""
    return type("Module", (FakeModule,), {"made": [], "launched": []})


@pytest.fixture
def source(tmp_path):
    (tmp_path / "shared.cuh").write_text("// shared\n")
    (tmp_path / "kernels.cu").write_text('#include "shared.cuh"\n#include <cuda_fp16.h>\n// kernels\n')
    return tmp_path / "kernels.cu"


def test_included_files_are_put_in_the_text(source):
    assert source_text(source) == "// shared\n\n#include <cuda_fp16.h>\n// kernels\n"


def test_kernels_are_compiled_at_their_first_launch_only(module, source):
    launcher = Launcher(source, SimpleNamespace(RawModule=module))
    assert module.made == []
    array = np.zeros(3, np.float32)
    for _ in range(2):
        launcher.launch("scale", ["float", 4], (2, 1, 1), (32, 1, 1), (array, np.int32(3), None))
    launcher.launch("scale", ["double", 2], (1, 1, 1), (32, 1, 1), (array,))
    assert module.made == [
        (source_text(source), ("-std=c++17",), ("scale<float, 4>",)),
        (source_text(source), ("-std=c++17",), ("scale<double, 2>",)),
    ]
    expression, grid, block, (first, count, null) = module.launched[0]
    assert (expression, grid, block) == ("scale<float, 4>", (2, 1, 1), (32, 1, 1))
    assert first is array
    assert (count, count.dtype, null, null.dtype) == (3, np.int32, 0, np.uint64)
    assert [name for name, *_ in module.launched] == ["scale<float, 4>"] * 2 + ["scale<double, 2>"]


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ImportError("libnvrtc.so.12 is not there"), "NVRTC cannot be loaded (libnvrtc.so.12 is not there)"),
        (RuntimeError("CuPy failed to load libnvrtc.so.12: OSError"), "NVRTC cannot be loaded"),
        (
            RuntimeError('Failure finding "libnvrtc.so.12": No such file'),
            "NVRTC cannot be loaded (Failure finding",
        ),
        (
            ValueError('k.cu(3): error: cannot open source file "cuda_fp16.h"\n1 error'),
            "the header cuda_fp16.h is missing",
        ),
        (RuntimeError("Failed to find CUDA headers. Please install them"), "CUDA's headers are missing"),
        (ValueError('k.cu(3): catastrophic error: could not open source file "x.h"'), "the header x.h is missing"),
    ],
)
def test_a_missing_compiler_is_one_line_with_the_remedy(module, source, error, part):
    module.error = error
    launcher = Launcher(source, SimpleNamespace(RawModule=module))
    with pytest.raises(DeviceError) as caught:
        launcher.launch("scale", ["float"], (1, 1, 1), (32, 1, 1), ())
    message = str(caught.value)
    assert part in message
    assert 'pip install "cupy-cuda12x[ctk]"' in message
    assert "\n" not in message


def test_other_errors_of_the_compiler_are_not_disguised(module, source):
    module.error = ValueError("k.cu(7): error: identifier is undefined")
    with pytest.raises(ValueError, match="identifier is undefined"):
        Launcher(source, SimpleNamespace(RawModule=module)).launch("scale", ["float"], (1, 1, 1), (1, 1, 1), ())


def test_arguments_that_a_kernel_would_misread_are_refused():
    array = np.zeros((4, 4))
    assert kernel_argument(array) is array
    for wrong in (array.T[1:], array[:, ::2], 3, 0.5):
        with pytest.raises(TypeError, match="C-contiguous arrays and NumPy scalars"):
            kernel_argument(wrong)


def test_name_of_an_instance():
    assert name_expression("pool", ["float", "__half", 8, "true"]) == "pool<float, __half, 8, true>"


# --- Cublas --------------------------------------------------------------------------------------------------------


class Stream:
    address = 5

    def __call__(self):
        return self.address


def matrices(rng, dtype, layouts, sizes=(5, 7, 3)):
    """Return (M, K) and (K, N) integers in the given layouts."""
    rows, inner, columns = sizes
    return [
        arrange(rng.integers(-9, 10, shape).astype(dtype), layout)
        for shape, layout in zip([(rows, inner), (inner, columns)], layouts, strict=True)
    ]


def arrange(matrix, layout):
    """Return the same matrix, laid out otherwise in memory."""
    rows, columns = matrix.shape
    if layout == "transposed":
        return np.ascontiguousarray(matrix.T).T
    if layout == "rows of a larger":
        larger = np.full((rows + 1, columns + 3), 99, matrix.dtype)
        larger[1:, 2 : 2 + columns] = matrix
        return larger[1:, 2 : 2 + columns]
    if layout == "columns of a larger":
        larger = np.full((columns + 2, rows + 4), 99, matrix.dtype)
        larger[1:-1, 3 : 3 + rows] = matrix.T
        return larger[1:-1, 3 : 3 + rows].T
    return matrix


LAYOUTS = ["rows", "transposed", "rows of a larger", "columns of a larger"]
TYPES = [
    ("float32", "float32", 68),
    ("float64", "float64", 70),
    ("float16", "float16", 68),
    ("float16", "float32", 68),
    ("bfloat16", "bfloat16", 68),
    ("bfloat16", "float32", 68),
]
CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}


def dtype_of(name):
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)))
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_all_layouts(rng, layouts, accumulate):
    a, b = matrices(rng, np.float32, layouts)
    larger = np.full((6, 9), 7, np.float32)
    out = larger[1:, 2:5]
    assert Cublas(FakeCublas(), np, Stream()).gemm(a, b, out, accumulate) is out
    expected = np.full((6, 9), 7.0)
    expected[1:, 2:5] = np.einsum("ik,kj->ij", a.astype(float), b) + (7 if accumulate else 0)
    np.testing.assert_array_equal(larger, expected)


@pytest.mark.parametrize(("factor", "product", "compute"), TYPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_all_types(rng, factor, product, compute, accumulate):
    library = FakeCublas()
    a, b = matrices(rng, dtype_of(factor), ("rows", "transposed"), (4, 2, 3))
    out = np.ones((4, 3), dtype_of(product))
    Cublas(library, np, Stream()).gemm(a, b, out, accumulate)
    expected = np.einsum("ik,kj->ij", a.astype(float), b.astype(float)) + accumulate
    np.testing.assert_array_equal(out.astype(float), expected)  # sums below 256 are exact in every type
    assert library.calls[-1] == ("gemm", "handle", (CODES[factor], CODES[factor], CODES[product]), compute)


@pytest.mark.parametrize("sizes", [(1, 7, 3), (5, 1, 3), (5, 7, 1), (1, 1, 1), (1, 7, 1)])
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_products_with_an_axis_of_one(rng, sizes, layouts):
    """Strides of an axis of length one say nothing."""
    a, b = matrices(rng, np.float32, layouts, sizes)
    out = np.full((sizes[0], sizes[2]), np.nan, np.float32)
    Cublas(FakeCublas(), np, Stream()).gemm(a, b, out)
    np.testing.assert_array_equal(out, np.einsum("ik,kj->ij", a.astype(float), b))


def test_tf32_is_a_choice_of_each_product_for_float32_alone(rng):
    library = FakeCublas()
    cublas = Cublas(library, np, Stream())
    for factor, product, tf32, compute in [
        ("float32", "float32", True, 77),
        ("float32", "float32", False, 68),
        ("float16", "float32", True, 68),
        ("float64", "float64", True, 70),
    ]:
        a, b = matrices(rng, factor, ("rows", "rows"))
        cublas.gemm(a, b, np.empty((5, 3), product), tf32=tf32)
        assert library.calls[-1][-1] == compute


def test_handle_workspace_and_stream(rng):
    """Sums stay in float32 (mode 16). A stream is set when it changes, and then the workspace that this takes away."""
    library, stream = FakeCublas(), Stream()
    cublas = Cublas(library, np, stream)
    assert library.calls == [("create",), ("math mode", "handle", 16)]
    a, b = matrices(rng, np.float32, ("rows", "rows"))
    for stream.address in (5, 5, 0, 5):
        cublas.gemm(a, b, np.empty((5, 3), np.float32))
    names = [call[0] for call in library.calls[2:]]
    assert names == ["stream", "workspace", "gemm", "gemm"] + ["stream", "workspace", "gemm"] * 2
    assert [call[2] for call in library.calls if call[0] == "stream"] == [5, 0, 5]
    workspaces = {call[2:] for call in library.calls if call[0] == "workspace"}
    assert len(workspaces) == 1
    assert workspaces.pop()[1] == 32 * 2**20


@pytest.mark.parametrize(
    ("shapes", "types", "message"),
    [
        (((2, 3), (4, 5), (2, 5)), ("float32",) * 3, "no product of shapes"),
        (((2, 3), (3, 5), (5, 2)), ("float32",) * 3, "no product of shapes"),
        (((2, 3), (3, 5), (2, 5)), ("float32", "float64", "float64"), "no product of float32 and float64"),
        (((2, 3), (3, 5), (2, 5)), ("float32", "float32", "float64"), "into float64"),
        (((2, 3), (3, 5), (2, 5)), ("int32",) * 3, "no product of int32"),
    ],
)
def test_products_that_do_not_exist(shapes, types, message):
    a, b, out = (np.zeros(shape, dtype) for shape, dtype in zip(shapes, types, strict=True))
    with pytest.raises(TypeError, match=message):
        Cublas(FakeCublas(), np, Stream()).gemm(a, b, out)


def test_layouts_that_no_product_can_read():
    cublas = Cublas(FakeCublas(), np, Stream())
    a, b, out = np.zeros((4, 6)), np.zeros((3, 4)), np.zeros((4, 4))
    with pytest.raises(TypeError, match="contiguous rows or columns"):
        cublas.gemm(a[:, ::2], b, out)
    with pytest.raises(TypeError, match="output of a product"):
        cublas.gemm(a[:, :3], b, out.T)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The C stand-in, found under the name of the library of CUDA 99."""
    if compiler() is None:
        pytest.skip("g++ is not installed: the C stand-in for cuBLAS cannot be built")
    path = tmp_path / "stub.so"
    subprocess.run([compiler(), "-shared", "-fPIC", "-o", path, SHIM / "cublas_stub.cpp"], check=True)
    real = ctypes.CDLL

    def load(name):
        assert name == "libcublas.so.99"
        return real(str(path))

    monkeypatch.setattr(cuda, "_preload_cublas", lambda: None)
    monkeypatch.setattr(cuda.ctypes, "CDLL", load)
    return CublasLibrary(99)


class Told(ctypes.Structure):
    _fields_ = [
        ("stream", ctypes.c_size_t),
        ("workspace", ctypes.c_size_t),
        ("nbytes", ctypes.c_size_t),
        ("mode", ctypes.c_int),
        ("types", ctypes.c_int * 3),
        ("compute", ctypes.c_int),
        ("algorithm", ctypes.c_int),
    ]


@pytest.mark.parametrize("layouts", [("rows", "rows"), ("transposed", "rows of a larger"), ("rows", "transposed")])
def test_calls_by_ctypes(rng, stub, layouts):
    """Addresses above 4 GB, a stream's among them, arrive whole."""
    stream = Stream()
    stream.address = 0x7F12_3456_789A
    cublas = Cublas(stub, np, stream)
    a, b = matrices(rng, np.float32, layouts)
    out = np.ones((5, 3), np.float32)
    cublas.gemm(a, b, out)
    cublas.gemm(a, b, out, accumulate=True)
    np.testing.assert_array_equal(out, 2 * np.einsum("ik,kj->ij", a.astype(float), b))
    told = Told.in_dll(stub._library, "told")
    assert (told.stream, told.nbytes, told.mode) == (0x7F12_3456_789A, 32 * 2**20, 16)
    assert told.workspace > 2**32
    assert ([*told.types], told.compute, told.algorithm) == ([0, 0, 0], 68, -1)


def test_a_failed_call_is_an_error(stub):
    with pytest.raises(DeviceError, match=r"cublasSetWorkspace_v2 failed: invalid value \(status 7\)"):
        stub.set_workspace(stub.create(), 0, 1)


def test_a_missing_library_is_one_line_with_the_remedy():
    with pytest.raises(DeviceError, match=r"cuBLAS cannot be loaded \(.*libcublas.so.0.*\); install CuPy") as caught:
        CublasLibrary(0)
    assert "\n" not in str(caught.value)


def test_cublas_is_loaded_by_cupy_before_it_is_looked_for_by_name(monkeypatch):
    """In a wheel's folder the system's loader does not find it, unless it is loaded: that is not left to chance."""
    order = []

    class Libs:
        @property
        def cublas(self):
            order.append("CuPy's")

    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", Libs())
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: order.append(name))
    CublasLibrary(12)
    assert order == ["CuPy's", "libcublas.so.12"]


MAPS = """\
7f10-7f20 r-xp 00000000 08:01 11 /env/nvidia/cublas/lib/libcublasLt.so.12
7f20-7f30 r-xp 00000000 08:01 12 /env/nvidia/cublas/lib/libcublas.so.12
7f30-7f40 r-xp 00000000 08:01 13 /with space/nvrtc/libnvrtc-builtins.so.12.9
7f40-7f50 r-xp 00000000 08:01 14 /with space/nvrtc/libnvrtc.so.12
7f50-7f60 rw-p 00000000 00:00 0
"""


def test_libraries_of_a_gpu_and_where_they_lie(fake_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "MAPS", tmp_path / "maps")
    (tmp_path / "maps").write_text(MAPS)
    cuda_of = fake_gpu.xp.cuda
    cuda_of.nvrtc = SimpleNamespace(getVersion=lambda: (12, 9))
    cuda_of.runtime.runtimeGetVersion = lambda: 12090
    assert libraries.cuda_libraries(fake_gpu) == [
        ("cublas", "/env/nvidia/cublas/lib/libcublas.so.12"),
        ("nvrtc", "/with space/nvrtc/libnvrtc.so.12"),
        ("cudart", "version 12.9, part of CuPy"),
    ]
    (tmp_path / "maps").unlink()  # another system
    cuda_of.nvrtc.getVersion = lambda: 1 / 0
    assert libraries.cuda_libraries(fake_gpu) == [
        ("cublas", "loaded"),
        ("nvrtc", "cannot be used: division by zero"),
        ("cudart", "version 12.9, part of CuPy"),
    ]


def test_without_a_gpu_nothing_is_said_of_its_libraries():
    usable, _ = gpu_status()
    assert usable or not {"cublas", "nvrtc", "cudart"} & dict(system_report()).keys()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ImportError('Failure finding "libcublasLt.so.13 or libcublasLt.so.12": No such file: ...\n'), True),
        (RuntimeError('k.cu(3): catastrophic error: cannot open source file "cuda_fp16.h"\n\n1 error'), True),
        (RuntimeError("cudaErrorECCUncorrectable: uncorrectable ECC error encountered"), False),
    ],
)
def test_a_gpu_without_cudas_libraries_is_one_line_with_the_remedy(monkeypatch, error, remedy):
    """CuPy's wheels hold none of them, and its own message on cuBLAS ends with a new line."""

    def ones(*_, **__):
        raise error

    cupy = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True), ones=ones, float32=np.float32)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    module, reason = device._import_cupy.__wrapped__()
    assert module is None
    assert reason.startswith(f"CuPy sees a GPU but cannot compute on it ({type(error).__name__}: {str(error)[:20]}")
    assert "\n" not in reason
    assert ('pip install "cupy-cuda12x[ctk]"' in reason) == remedy


def test_objects_of_this_package_are_not_taken_for_cupys():
    """Its name begins like CuPy's."""
    net = ep.Network([ep.Linear((4,), 3)], 3, device="cpu")
    state = net.settle(np.zeros((2, 4), np.float32))
    for thing in (state, net):
        with pytest.raises(TypeError, match="expected a NumPy or CuPy array"):
            device.array_module(thing)
        with pytest.raises(ep.ConfigurationError, match="images"):
            net.settle(thing)


def test_a_device_speaks_of_its_own_gpu_whichever_is_the_current_one(monkeypatch):
    """What CuPy allocates, counts and waits for is the current GPU's; of a new thread that is the first."""
    current, waited = [0], []

    class Gpu:
        def __init__(self, index):
            self.index = index

        def use(self):
            current[0] = self.index

    pool = SimpleNamespace(free_bytes=lambda: current[0], total_bytes=lambda: 7 + current[0])
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(
            Device=Gpu,
            runtime=SimpleNamespace(
                getDeviceCount=lambda: 2,
                cudaDevAttrL2CacheSize=38,
                deviceGetAttribute=lambda attribute, index: 1 << 20,
                memGetInfo=lambda: (100 * current[0], 1000),
            ),
            get_current_stream=lambda: SimpleNamespace(synchronize=lambda: waited.append(current[0])),
        ),
        get_default_memory_pool=lambda: pool,
        asarray=lambda array, dtype, order: (current[0], order),
    )
    monkeypatch.setattr(device, "_import_cupy", lambda: (cupy, ""))
    monkeypatch.setenv("CUPYEP_GRAPHS", "0")
    gpus = [ep.get_device(f"cuda:{index}") for index in (0, 1)]
    for other in (0, 1):
        for index, gpu in enumerate(gpus):
            current[0] = other
            assert gpu.asarray([1.0]) == (index, "C")
            current[0] = other
            assert gpu.free_bytes() == 101 * index
            current[0] = other
            assert gpu.peak_memory_bytes() == 7 + index
            current[0] = other
            gpu.synchronize()
    assert waited == [0, 1, 0, 1]
