"""Which of CUDA's libraries a process computes with, and where they lie: there may be several on a machine."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from cupyep.backend.device import Device, gemm

MAPS = Path("/proc/self/maps")  # of Linux


def cuda_libraries(device: Device) -> list[tuple[str, str]]:
    """Load what products and kernels take on a GPU; return (name, path, or why there is none) lines.

    cuBLAS, the run-time compiler NVRTC and the CUDA runtime, which CuPy may have as a part of its own.
    """
    cuda = device.xp.cuda
    uses = {
        "cublas": lambda: _multiply(device),
        "nvrtc": cuda.nvrtc.getVersion,
        "cudart": cuda.runtime.runtimeGetVersion,
    }
    lines = []
    for name, use in uses.items():
        try:
            version = use()
        except Exception as error:  # whatever it is: it is what there is to tell
            lines.append((name, f"cannot be used: {(str(error).splitlines() or ['no reason given'])[0]}"))
            continue
        without = f"version {version // 1000}.{version % 1000 // 10}, part of CuPy" if name == "cudart" else "loaded"
        lines.append((name, _path(name) or without))
    return lines


def _multiply(device: Device) -> None:
    a = device.xp.ones((8, 8), np.float32)
    gemm(a, a, out=device.xp.empty_like(a))


def _path(name: str) -> str | None:
    """Return where the loaded library of a name lies; None where it is not found or the system does not tell."""
    try:
        maps = MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"(/.*/lib{name}\.so[.\d]*|/.*/lib{name}\.alt\.so[.\d]*)$", maps, re.MULTILINE)
    return found[1] if found else None
