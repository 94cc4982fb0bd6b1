"""The CUDA kernels on the CPU: the very same .cu files through g++ and the headers in ``shim/``, called by ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from cupyep.backend.cuda import address, kernel_argument, name_expression

SHIM = Path(__file__).parent / "shim"
WARNINGS = ("-Wall", "-Wno-unknown-pragmas")
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", *WARNINGS)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
SANITIZED = "CUPYEP_SHIM_SANITIZE"  # environment variable: "1" builds with the sanitizers, whose library is preloaded
WIDTHS = {"float": 4, "double": 2, "__half": 8, "__nv_bfloat16": 8}
# storage and the type that products, drives or inputs have beside it
PAIRS = [
    ("float", "float"),
    ("double", "double"),
    ("float", "__half"),
    ("float", "__nv_bfloat16"),
]
HALVES = [("__half", "__half"), ("__nv_bfloat16", "__nv_bfloat16")]


def instances(source: Path) -> list[str]:
    """Return every instance of the kernels of a source file that the launch code can ask for."""
    return _INSTANCES[source.name]()


def _widths(*types):
    return sorted({1, max(WIDTHS[name] for name in types)})


def _conv_instances():
    names = []
    for t in WIDTHS:
        for vec in _widths(t):
            names += [name_expression(kernel, [t, vec]) for kernel in ("im2col", "im2col_rows")[: 2 if vec > 1 else 1]]
            names += [name_expression("unpool_im2col", [t, vec, pool]) for pool in (0, 1, 2)]
            names += [name_expression("unpool", [t, vec, pool]) for pool in (1, 2)]
    for product, out in PAIRS:
        for vec in _widths(product, out):
            names += [name_expression("bias_pool", [product, out, vec, pool]) for pool in (0, 1, 2)]
            names += [name_expression("gather", [product, out, vec, pool]) for pool in (1, 2)]
            names.append(name_expression("col2im", [product, out, vec]))
    for half, _ in HALVES:  # without pooling a product is stored before its bias is added
        names += [name_expression("bias_pool", [half, half, vec, 0]) for vec in _widths(half)]
    return names


def _update_instances():
    names = [name_expression("add_partials", [t]) for t in ("float", "double")]
    for drive, state in PAIRS + HALVES:
        for vec, measure in itertools.product(_widths(drive, state), ("false", "true")):
            names += [name_expression("update_states", [state, drive, vec, rule, measure]) for rule in (0, 1)]
            names += [name_expression("update_deviations", [state, drive, vec, rule, measure]) for rule in (0, 1, 2)]
    for seen, state in PAIRS + HALVES:
        names += [
            name_expression("see", [state, seen, vec, rule]) for vec in _widths(seen, state) for rule in (0, 1, 3)
        ]
    for t in WIDTHS:
        names += [name_expression("compare_phases", [t, vec, rule]) for vec in _widths(t) for rule in (0, 1)]
    for t in ("float", "double"):
        names += [name_expression("slopes", [t, vec, rule]) for vec in _widths(t) for rule in (0, 1)]
    return names


def _head_instances():
    pairs = [("float", "float"), ("double", "double"), ("float", "__half"), ("float", "__nv_bfloat16")]
    names = [name_expression("scaled_error", [*pair, loss]) for pair in pairs for loss in (0, 1)]
    numbers, flags = ("float", "double"), ("true", "false")
    return names + [name_expression("spread", [t, add, vec]) for t in numbers for add in flags for vec in _widths(t)]


def _optimizer_instances():
    kernels = ("sgd_step", "adam_step", "average_step")
    return [name_expression(kernel, [t, vec]) for kernel in kernels for t in ("float", "double") for vec in _widths(t)]


def _reduction_instances():
    kernels = ("column_sums", "column_levels")
    names = [name_expression(kernel, [t, vec]) for kernel in kernels for t in WIDTHS for vec in _widths(t)]
    kernels = ("level_shares", "segment_squares", "segment_norms")
    return names + [name_expression(kernel, [t]) for kernel in kernels for t in ("float", "double")]


def _standardize_instances():
    kernels = ("standardize", "standardize_pullback")
    return [name_expression(kernel, [t, vec]) for kernel in kernels for t in ("float", "double") for vec in _widths(t)]


def _crop_instances():
    return [name_expression("crop", [stored, t]) for stored in ("unsigned char", "float") for t in ("float", "double")]


_INSTANCES = {
    "conv.cu": _conv_instances,
    "update.cu": _update_instances,
    "head.cu": _head_instances,
    "optimizer.cu": _optimizer_instances,
    "reduction.cu": _reduction_instances,
    "standardize.cu": _standardize_instances,
    "crop.cu": _crop_instances,
}


def tf32_of(x):
    """Return float32 numbers with 11 significant binary digits: exact in float64, where rounding is to the even one."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.rint(np.ldexp(fraction, 11)), exponent - 11).astype(np.float32)


def compiler() -> str | None:
    """Return the path of g++, or None."""
    return shutil.which("g++")


def sanitizer_library() -> str:
    """Return the AddressSanitizer library that a process must preload to use a sanitized build."""
    run = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return run.stdout.strip()


@functools.cache
def load(source: Path, names: tuple[str, ...], sanitize: bool) -> ctypes.CDLL:
    """Compile instances of kernels (once for a given text, in the temporary folder) and load them."""
    table = "\n".join(
        f'    {{"{name}", [](void** arguments) {{ shim::launch(&{name}, arguments); }}}},' for name in names
    )
    text = f"""#include "cuda_shim.h"
#include "{source}"

static const shim::Instance INSTANCES[] = {{
{table}
}};

extern "C" int shim_launch(const char* name, const unsigned* size, void** arguments)
{{
    gridDim = {{size[0], size[1], size[2]}};
    blockDim = {{size[3], 1, 1}};
    for (const shim::Instance& instance : INSTANCES) {{
        if (std::strcmp(instance.name, name) != 0) continue;
        instance.launch(arguments);
        return 0;
    }}
    return 1;
}}
"""
    command = [compiler(), *FLAGS, *(SANITIZE if sanitize else ()), f"-I{SHIM}", "-x", "c++"]
    parts = [text, *command, *(path.read_text() for path in sorted([*SHIM.iterdir(), *source.parent.glob("*.cu*")]))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"cupyep-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{source.stem}-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-", "-o", str(unfinished)], input=text, text=True, check=True)
        os.replace(unfinished, library)
    return ctypes.CDLL(str(library))


class ShimLauncher:
    """Stands in for `cupyep.backend.cuda.Launcher` on NumPy arrays.

    Attributes
    ----------
    launched : list of str
        The instances launched, in order.
    """

    def __init__(self, source: Path, names: list[str] | None = None):
        sanitize = os.environ.get(SANITIZED) == "1"
        self.compiled = load(source, tuple(instances(source) if names is None else names), sanitize)
        self.launched: list[str] = []

    def launch(self, kernel, type_arguments, grid, block, arguments):
        self.prepared(kernel, type_arguments, grid, block, arguments)()

    def prepared(self, kernel, type_arguments, grid, block, arguments):
        """Return a function that does the launch, as often as it is called."""
        name = name_expression(kernel, type_arguments)
        assert max(grid[1:]) <= 65535, f"no GPU has a grid of {grid}"
        assert block[0] <= 1024, f"no GPU has a block of {block}"
        assert block[1:] == (1, 1)
        values = [self._value(argument) for argument in arguments]
        size = (ctypes.c_uint * 4)(*grid, block[0])

        def launch():
            pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            assert self.compiled.shim_launch(name.encode(), size, pointers) == 0, f"{name} is not among the instances"
            self.launched.append(name)

        return launch

    @staticmethod
    def _value(argument):
        argument = kernel_argument(argument)
        if isinstance(argument, np.generic):
            return ctypes.create_string_buffer(argument.tobytes(), argument.itemsize)
        assert argument.flags.aligned
        return ctypes.c_void_p(address(argument))


@functools.cache
def launcher_of(source: Path) -> ShimLauncher:
    """Return the one launcher of a source file."""
    return ShimLauncher(source)


def twins(source: Path, arrays, kernels):
    """Return a fixture of operations: ``arrays()``, and ``kernels(launcher)`` of the kernels of a source file."""

    @pytest.fixture(params=["arrays", "kernels"])
    def ops(request):
        if request.param == "arrays":
            return arrays()
        if compiler() is None:
            pytest.skip("g++ is not installed: kernels cannot run on the CPU")
        return kernels(launcher_of(source))

    return ops
