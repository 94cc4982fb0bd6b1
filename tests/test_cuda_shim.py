"""The shim itself: its halves, its barriers, and that AddressSanitizer sees what the kernels do."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_cpu import SANITIZED, SHIM, ShimLauncher, compiler, sanitizer_library

pytestmark = pytest.mark.skipif(compiler() is None, reason="g++ is not installed: kernels cannot run on the CPU")

PROBES = [
    "to_floats<__half>",
    "to_floats<__nv_bfloat16>",
    "from_floats<__half>",
    "from_floats<__nv_bfloat16>",
    "rotate<5>",
    "unequal<0>",
    "overrun<0>",
]


SANITIZED_TESTS = [
    "test_cuda_kernels.py",
    "test_cuda_update.py",
    "test_reduction.py",
    "test_weights.py",
    "test_crop.py",
]


@functools.cache
def probes():
    return ShimLauncher(SHIM / "probe.cu", PROBES)


def half_types():
    return [("__half", np.dtype(np.float16)), ("__nv_bfloat16", np.dtype(pytest.importorskip("ml_dtypes").bfloat16))]


def convert(kernel, name, values, dtype):
    out = np.empty(len(values), dtype)
    blocks = -(-len(values) // 256)
    probes().launch(kernel, [name], (blocks, 1, 1), (256, 1, 1), (values, out, np.int32(len(values))))
    return out


@pytest.mark.parametrize("index", [0, 1], ids=["float16", "bfloat16"])
def test_every_half_becomes_the_right_float(index):
    name, dtype = half_types()[index]
    values = np.arange(65536, dtype=np.uint16).view(dtype)
    np.testing.assert_array_equal(convert("to_floats", name, values, np.float32), values.astype(np.float32))


@pytest.mark.parametrize("index", [0, 1], ids=["float16", "bfloat16"])
def test_floats_are_rounded_to_the_nearest_even_half(rng, index):
    """Random floats of all sizes, every half itself, and every midpoint between neighbours with its own neighbours."""
    name, dtype = half_types()[index]
    random = rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    random = random[~np.isnan(random)]
    halves = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    middle = ((halves[:-1].astype(float) + halves[1:].astype(float)) / 2).astype(np.float32)
    special = np.array([np.inf, -np.inf, 65520.0, 65519.99], np.float32)
    values = np.concatenate([random, halves, middle, np.nextafter(middle, np.float32(9e9)), special])
    with np.errstate(over="ignore"):
        expected = values.astype(dtype)
    found = convert("from_floats", name, values, dtype)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
    assert np.isnan(convert("from_floats", name, np.full(1, np.nan, np.float32), dtype).astype(np.float32)).all()


@pytest.mark.parametrize("threads", [1, 32, 256])
def test_barriers_order_what_threads_share(threads):
    values = np.arange(3 * threads, dtype=np.int32)
    probes().launch("rotate", [5], (3, 1, 1), (threads, 1, 1), (values,))
    expected = np.roll(np.arange(3 * threads).reshape(3, threads), -5, axis=1)
    np.testing.assert_array_equal(values, expected.ravel())


def run_python(code, sanitize):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    if sanitize:
        environment |= {
            SANITIZED: "1",
            "LD_PRELOAD": sanitizer_library(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "OPENBLAS_NUM_THREADS": "1",
        }
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


PRELUDE = """
import numpy as np
from cuda_cpu import SHIM, ShimLauncher
from test_cuda_shim import PROBES
probes = ShimLauncher(SHIM / "probe.cu", PROBES)
"""


def test_a_barrier_that_some_threads_miss_is_an_error():
    code = PRELUDE + "probes.launch('unequal', [0], (1, 1, 1), (32, 1, 1), (np.zeros(32, np.int32),))"
    run = run_python(code, sanitize=False)
    assert run.returncode != 0
    assert "16 of 32 threads reached a barrier" in run.stderr


@pytest.mark.slow
def test_the_sanitizer_finds_a_write_behind_the_end():
    write = "probes.launch('overrun', [0], (1, 1, 1), (256, 1, 1), (values, np.int32({})))"
    for count, found in [(99, False), (100, True)]:
        run = run_python(PRELUDE + "values = np.ones(100, np.float32)\n" + write.format(count), sanitize=True)
        assert (run.returncode != 0) == found, run.stderr
        assert ("heap-buffer-overflow" in run.stderr) == found


@pytest.mark.slow
def test_kernels_are_clean_under_the_sanitizers():
    """Tests of the kernels once more, built with AddressSanitizer and UndefinedBehaviorSanitizer."""
    files = [str(Path(__file__).with_name(name)) for name in SANITIZED_TESTS]
    code = (
        f"import pytest, sys; sys.exit(pytest.main({[*files, '-p', 'no:cacheprovider', '-x', '-k', 'not arrays']!r}))"
    )
    run = run_python(code, sanitize=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert " passed" in run.stdout or "100%" in run.stdout
