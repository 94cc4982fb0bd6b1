"""The host's side of the GPU path on real CuPy arrays, without a GPU: their memory is the host's.

CuPy makes arrays, views and addresses without a driver; only what it launches itself needs one. So kernels (through the
shim) and products (in NumPy, from raw addresses) are given CuPy's own arrays here, and CuPy's own compiler path is
taken up to where a module would be loaded.
"""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
from cuda_cpu import ShimLauncher, compiler, instances
from fake_gpu import FakeCublas

import cupyep as ep
from cupyep.backend import device as device_module
from cupyep.backend.cuda import Cublas, Launcher, address, kernel_argument, source_text
from cupyep.backend.precision import get_precision
from cupyep.heads import Head
from cupyep.losses import CrossEntropy
from cupyep.memory.layout import Stack
from cupyep.ops import crop, cuda_conv, head, optimizer, reduction, standardize, update
from cupyep.ops.buffers import Arena
from cupyep.ops.update import CudaUpdateOps, UpdateOps

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
SOURCES = [module.SOURCE for module in (cuda_conv, update, head, optimizer, reduction, standardize, crop)]


def on_host(size):
    """An allocator for CuPy: memory of the host, which it takes for that of device 0."""
    memory = np.empty(max(size, 1) + 256, np.uint8)
    start = -memory.ctypes.data % 256  # aligned as a device's
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory.ctypes.data + start, size, memory, 0), 0)


def view(array):
    """Return a CuPy array on the host as a NumPy array of the same memory."""
    if not isinstance(array, cupy.ndarray):
        return array
    count = 1 + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) // array.itemsize
    flat = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_ubyte * (count * array.itemsize)).from_address(array.data.ptr))
    return np.lib.stride_tricks.as_strided(flat.view(array.dtype), array.shape, array.strides)


class HostLauncher(ShimLauncher):
    def launch(self, kernel, type_arguments, grid, block, arguments):
        checked = [kernel_argument(argument) for argument in arguments]  # as `Launcher` does
        super().launch(kernel, type_arguments, grid, block, [None if a is None else view(b)
                       for a, b in zip(arguments, checked, strict=True)])  # fmt: skip


class CupyOnHost(ep.Device):
    """A device with CuPy's arrays on the host."""

    def __init__(self):
        super().__init__("cpu")
        self.name, self.index, self.xp, self.is_gpu, self.adds_products = "cuda:0", 0, cupy, True, True

    def asarray(self, array, dtype=None):
        array = np.asarray(array, dtype)
        here = cupy.empty(array.shape, array.dtype)
        view(here)[...] = array
        return here


@pytest.fixture
def host(monkeypatch):
    """Return a device whose arrays are CuPy's, on the host."""
    if cupy.cuda.is_available():
        pytest.skip("with a GPU CuPy's arrays belong there")
    if compiler() is None:
        pytest.skip("g++ is not installed: kernels cannot run on the CPU")
    monkeypatch.setattr(device_module, "_import_cupy", lambda: (cupy, ""))
    with cupy.cuda.using_allocator(on_host):
        cublas = Cublas(FakeCublas(), cupy, lambda: 0)
        monkeypatch.setattr(device_module, "_cublas", lambda array: cublas)
        device = CupyOnHost()
        monkeypatch.setattr(device_module, "_launcher_of", functools.cache(lambda index, source: HostLauncher(source)))
        yield device


def test_addresses_views_and_modules(host):
    """What the launch code asks of an array."""
    array = host.asarray(np.arange(96, dtype=np.float32).reshape(4, 6, 4))
    assert device_module.array_module(array) is cupy
    assert array.device.id == 0
    assert address(array) == array.data.ptr
    assert address(array[2:]) == array.data.ptr + 2 * 6 * 4 * 4
    np.testing.assert_array_equal(view(array[1:3, ::2]), np.arange(96).reshape(4, 6, 4)[1:3, ::2])
    for wrong in (array.T, array[:, 1:], 3):
        with pytest.raises(TypeError, match="C-contiguous"):
            kernel_argument(wrong)
    assert kernel_argument(array[1:]) is not None
    assert kernel_argument(array.reshape(-1)[5:]) is not None


def test_arena_and_stack(host):
    """Views of one block of bytes are aligned and of their own types, empty ones too."""
    requests = [((3, 5), np.float32), ((0, 7), np.float64), ((2, 2), np.float16), ((4,), np.bool_)]
    block = Arena(cupy, Arena.size(requests))
    arrays = block.views(requests)
    assert [array.shape for array in arrays] == [shape for shape, _ in requests]
    assert [array.dtype for array in arrays] == [np.dtype(dtype) for _, dtype in requests]
    assert [(array.data.ptr - block.block.data.ptr) % 256 for array in arrays if array.size] == [0, 0, 0]
    stack = Stack(block.block, 256)
    first, second = stack.take("a", (2, 3), np.float64), stack.take("b", (0,), np.uint8)
    assert (first.data.ptr - block.block.data.ptr, first.shape, first.dtype) == (256, (2, 3), np.float64)
    assert second.shape == (0,)


LAYOUTS = {
    "rows": lambda a: a,
    "transposed": lambda a: a.T,
    "part": lambda a: a[1:, 2:],
    "columns": lambda a: a[:, 1:].T,
}


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_products(host, rng, left, right, accumulate):
    """Strides and addresses of CuPy's views are read as those of NumPy's."""
    a, b = (LAYOUTS[layout](host.asarray(rng.integers(-9, 9, (6, 6)), np.float32)) for layout in (left, right))
    inner = min(a.shape[1], b.shape[0])
    a, b = a[:, :inner], b[:inner]
    out = host.asarray(np.ones((a.shape[0], b.shape[1])), np.float32)
    expected = np.einsum("ik,kj->ij", view(a).astype(float), view(b)) + accumulate
    if accumulate:
        device_module.add_gemm(a, b, out, None)
    else:
        device_module.gemm(a, b, out)
    np.testing.assert_array_equal(view(out), expected)


EDGES = {
    "max": lambda: ep.Conv2d((8, 8, 4), 8, pooling="max"),
    "average": lambda: ep.Conv2d((7, 6, 3), 5, pooling="average", pool=3),
    "none": lambda: ep.Conv2d((5, 5, 4), 6),
    "stride": lambda: ep.Conv2d((7, 7, 4), 4, stride=2, padding=0, kernel=3, pooling="max"),
    "dense": lambda: ep.Linear((4, 4, 3), 10),
}
BATCH = 5


def edge_pair(host, kind, precision, nbytes):
    """Return the same edge on NumPy and on CuPy's arrays, with operations bound and weights taken up."""
    ends = []
    for device in (ep.get_device("cpu"), host):
        edge = EDGES[kind]()
        edge.initialize(np.random.default_rng(0), 1.0, device, precision.number)
        view(edge.bias)[...] = np.linspace(-1, 1, len(edge.bias))
        ops = edge.prepare(BATCH, nbytes, precision, device)
        ops.bind(Arena(device.xp, ops.nbytes), [device.asarray(np.zeros(*request)) for request in ops.derived])
        ends.append((edge, ops, device))
    (edge, ops, _), (same, theirs, _) = ends
    edge.refresh(ops)
    # What CuPy would do by kernels of its own: copies of the weight, in the type of a factor, for each direction.
    if isinstance(edge, ep.Linear):
        theirs.matrix = host.asarray(edge.weight, precision.stored) if precision.half else same.weight
        return ends
    if theirs.copies:
        view(theirs.kernel)[...] = edge.weight
    else:
        theirs.kernel, theirs.factor = same.weight, same.weight.reshape(-1, same.weight.shape[-1])
    if theirs.flipped is not None:
        mirrored = view(theirs.kernel)[::-1, ::-1].transpose(0, 1, 3, 2)
        view(theirs.flipped)[...] = mirrored.reshape(theirs.flipped.shape)
    return ends


@pytest.mark.parametrize("nbytes", [1, 1 << 30], ids=["chunks", "whole"])
@pytest.mark.parametrize("precision", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", EDGES)
def test_edges(host, rng, kind, precision, nbytes):
    """Drive, both products and the weight gradient of every edge, all launch code included."""
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    number = get_precision(precision)
    ends = edge_pair(host, kind, number, nbytes)
    shapes = ends[0][0].in_shape, ends[0][0].out_shape
    below, above = (rng.standard_normal((BATCH, *shape)).astype(number.stored) for shape in shapes)
    found = []
    for edge, ops, device in ends:
        s, t = device.asarray(below), device.asarray(above)
        drive, linear, down = (device.asarray(np.zeros_like(array)) for array in (above, above, below))
        gradient = device.asarray(np.ones(edge.weight.shape), number.number)
        winners = device.asarray(np.zeros(above.shape, np.uint8)) if edge.has_winners else None
        if kind != "dense":  # a dense drive adds its bias by a kernel of CuPy's
            edge.drive(s, drive, winners, ops)
        edge.linear_drive(s, linear, winners, ops)
        edge.topdown(t, winners, down, ops)
        edge.add_gradient(s, t, winners, gradient, None, ops)
        found.append([view(a) for a in (drive, winners, linear, down, gradient) if a is not None])
    tolerance = {"float64": 1e-12, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}[precision]
    for own, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(theirs.astype(float), own.astype(float), rtol=tolerance, atol=tolerance)
        assert np.count_nonzero(own) > 0 or kind == "dense"


@pytest.mark.parametrize("form", ["states", "deviations", "tangents"])
@pytest.mark.parametrize("name", ["hard_sigmoid", "tanh"])
def test_updates(host, rng, form, name):
    activation = copy.copy(ep.get_activation(name))
    arrays = {key: rng.normal(0.4, 1, (6, 3, 3, 4)) for key in ("s", "drive", "topdown", "force", "g")}
    arrays |= {"rest": rng.normal(0.4, 1, (3, 3, 3, 4))}
    ends = []
    for device in (ep.get_device("cpu"), host):
        a = {key: device.asarray(np.array(array), np.float64) for key, array in arrays.items()}
        own = UpdateOps(np, activation)
        ops = own if device.xp is np else CudaUpdateOps(cupy, activation, device.launcher(update.SOURCE))
        scratch = device.xp.empty(ops.scratch_size(6, 36), np.float64)
        residual = device.asarray(np.zeros(6))
        shared = (a["s"], a["drive"], a["topdown"], 0.5, a["force"])
        if form == "states":
            ops.states(*shared, a["g"], residual, scratch)
        elif form == "deviations":
            ops.deviations(*shared, 4.0, a["rest"], residual, scratch)
        else:
            ops.tangents(*shared, a["rest"], residual, scratch)
        ends.append([view(x) for x in (a["s"], a["g"], residual)])
    for own, theirs in zip(*ends, strict=True):
        np.testing.assert_allclose(theirs, own, rtol=1e-13)


@pytest.mark.parametrize("pool", [None, 2])
def test_heads(host, rng, pool):
    """The force of a readout or of a local error is all our own launches."""
    s, target = rng.uniform(0, 1, (3, 5, 4, 8)), np.eye(10)[[1, 3, 7]]
    ends = []
    for device in (ep.get_device("cpu"), host):
        head = Head(1, s.shape[1:], CrossEntropy(2.0), 10, bias=device.xp is np, pool=pool)
        head.initialize(np.random.default_rng(0), 1.0, device, np.float64)
        head.bias = device.asarray(np.linspace(-1, 1, 10))
        force = device.asarray(np.ones_like(s))
        scratch = device.xp.empty(head.scratch_size(3), np.float64)
        scale = device.asarray(np.array([0.5, -0.5, 2.0]))
        head.add_force(device.asarray(s), device.asarray(target), scale, force, scratch)
        ends.append(view(force))
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-12)
    assert math.isfinite(ends[0].sum())


def test_crops_of_a_loader(host, rng):
    """Rows of an epoch's draws are handed over as they lie; the images are those of NumPy's arrays."""
    images, draws = rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8), rng.integers(0, 2, (30, 6))
    scale, shift = rng.standard_normal((2, 3)).astype(np.float32)
    found, expected = (
        crop.crop(device.asarray(images), device.asarray(draws)[7:19],
                  device.asarray(scale), device.asarray(shift), 2, 3)
        for device in (host, ep.get_device("cpu"))
    )  # fmt: skip
    np.testing.assert_allclose(view(found), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_cupys_own_compiler_path(monkeypatch, source):
    """CuPy finds CUDA's headers, accepts our options and name expressions, and gives machine code for an H100."""
    nvrtc = pytest.importorskip("cupy.cuda.compiler")
    try:
        nvrtc._get_nvrtc_version()
    except RuntimeError as error:
        pytest.skip(f"NVRTC is missing ({error})")
    loaded = []

    class Module(cupy.cuda.function.Module):
        def load(self, cubin):
            loaded.append(cubin)

    monkeypatch.setattr(nvrtc, "_get_arch", lambda: "90")
    monkeypatch.setattr(nvrtc, "_get_arch_for_options_for_nvrtc", lambda arch=None: ("-arch=sm_90", "cubin"))
    monkeypatch.setattr(nvrtc.function, "Module", Module)
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    name = instances(source)[-1]
    module = cupy._core.core.compile_with_cache(
        source_text(source), Launcher.OPTIONS, prepend_cupy_headers=False, backend="nvrtc", name_expressions=(name,)
    )
    assert [cubin[:4] for cubin in loaded] == [b"\x7fELF"]
    assert name.partition("<")[0] in module.mapping[name]
