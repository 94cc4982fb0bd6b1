"""Every instance of every kernel compiles for real GPUs, through NVIDIA's run-time compiler; no GPU is needed.

The compiler comes from the wheels of the extra ``kernels``. CUPYEP_REQUIRE_NVRTC=1 makes their absence a failure.
"""

from __future__ import annotations

import os
import re

import pytest
from cuda_cpu import instances

from cupyep.backend.cuda import source_text
from cupyep.ops import crop, cuda_conv, head, optimizer, reduction, standardize, update

MODULES = (cuda_conv, update, head, optimizer, reduction, standardize, crop)
SOURCES = {module.SOURCE.name: module.SOURCE for module in MODULES}


@pytest.fixture(scope="module")
def nvrtc():
    """The bindings of NVRTC, once the library answers, and the folder of CUDA's headers."""
    try:
        from cuda.bindings import nvrtc as bindings
        from cuda.pathfinder import find_nvidia_header_directory

        checked(bindings.nvrtcVersion())
        headers = find_nvidia_header_directory("cudart")
        reason = "" if headers else "CUDA's headers are missing"
    except (ImportError, RuntimeError, OSError) as error:
        reason = f"NVRTC is missing ({error})"
    if reason:
        reason += "; install cupyep[kernels]"
        if os.environ.get("CUPYEP_REQUIRE_NVRTC") == "1":
            pytest.fail(f"CUPYEP_REQUIRE_NVRTC=1, but {reason}")
        pytest.skip(reason)
    return bindings, headers


def checked(result):
    """Return the values of a call of the bindings; its first is the status."""
    status, *values = result
    assert status == 0, status
    return values[0] if values else None


def compile_all(nvrtc, source, names, architecture, *options):
    """Return the code of instances of kernels, their mangled names, and the compiler's log; fail with the log."""
    bindings, headers = nvrtc
    program = checked(bindings.nvrtcCreateProgram(source_text(source).encode(), source.name.encode(), 0, [], []))
    for name in names:
        checked(bindings.nvrtcAddNameExpression(program, name.encode()))
    # -ftz=true is what CuPy adds to every kernel.
    flags = [f"-arch={architecture}", "-std=c++17", "-ftz=true", f"-I{headers}", *options]
    (status,) = bindings.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    log = bytearray(checked(bindings.nvrtcGetProgramLogSize(program)))
    checked(bindings.nvrtcGetProgramLog(program, log))
    log = log.decode().rstrip("\0")
    assert status == 0, log
    cubin = architecture.startswith("sm_")
    size = checked((bindings.nvrtcGetCUBINSize if cubin else bindings.nvrtcGetPTXSize)(program))
    code = bytearray(size)
    checked((bindings.nvrtcGetCUBIN if cubin else bindings.nvrtcGetPTX)(program, code))
    mangled = {name: checked(bindings.nvrtcGetLoweredName(program, name.encode())).decode() for name in names}
    return bytes(code), mangled, log


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("name", SOURCES)
def test_every_kernel_compiles_without_spilling(nvrtc, name, architecture):
    """Registers spilled to memory, or arrays indexed at run time, would cost a memory-bound kernel its speed."""
    code, mangled, log = compile_all(nvrtc, SOURCES[name], instances(SOURCES[name]), architecture, "--ptxas-options=-v")
    assert code.startswith(b"\x7fELF")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) >= len(mangled)
    assert {number for frame in frames for number in frame} == {"0"}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert max(registers) <= 64, "above 64 registers a multiprocessor holds fewer than 1024 threads"


def width_of(expression):
    """Return VEC, the first number among the template arguments, 1 where there is none."""
    return int(next(iter(re.findall(r"[<,] ?(\d+)", expression)), 1))


@pytest.mark.parametrize("name", SOURCES)
def test_wide_instances_make_wide_accesses(nvrtc, name):
    """With VEC > 1 every global load and store moves 16 bytes, but for winners (VEC bytes) and what a block leaves."""
    names = [expression for expression in instances(SOURCES[name]) if width_of(expression) > 1]
    code, mangled, log = compile_all(nvrtc, SOURCES[name], names, "compute_80")
    assert "warning" not in log
    entries = dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.entry|\Z)", code.decode(), re.DOTALL))
    for expression, entry in mangled.items():
        accesses = re.findall(r"\b(ld|st)\.global(?:\.nc)?(?:\.v(\d))?\.[a-z](\d+)", entries[entry])
        sizes = [(kind, int(vector or 1) * int(bits) // 8) for kind, vector, bits in accesses]
        narrow = [(kind, size) for kind, size in sizes if size != 16]
        assert sizes.count(("st", 16)) > 0, expression
        if expression.startswith("im2col_rows"):  # reads numbers that lie as they come
            assert {kind for kind, _ in narrow} == {"ld"}, expression
            continue
        assert sizes.count(("ld", 16)) > 0, expression
        if expression.startswith("column_levels"):
            assert {kind for kind, _ in narrow} <= {"st"}, expression
        elif expression.endswith("true>") or expression.startswith("compare_phases"):
            assert narrow in ([("st", 4)], [("st", 8)]), expression
        else:
            assert {size for _, size in narrow} <= {width_of(expression)}, expression
        assert ".local" not in entries[entry], expression
