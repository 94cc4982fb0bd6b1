"""Launch code of ``head.cu``: the operations of `HeadOps` as one CUDA kernel each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cupyep.ops.head import HeadOps
from cupyep.ops.launch import map_grid, require_type, type_name, vector_width

SOURCE = Path(__file__).with_name("head.cu")
LOSSES = {"cross_entropy": 0, "squared_error": 1}  # enum Loss
THREADS = 32


class CudaHeadOps(HeadOps):
    """`HeadOps` through the kernels of ``head.cu``.

    Parameters
    ----------
    launcher : Launcher
        Of `SOURCE`.
    """

    def __init__(self, launcher: Any):
        self.launcher = launcher

    def scaled_error(self, loss, z, bias, target, scale, column, error=None, down=1.0):
        require_type(z.dtype, bias, target, scale)
        error, number = z if error is None else error, z.dtype.type
        self.launcher.launch(
            "scaled_error",
            [type_name(z.dtype), type_name(error.dtype), LOSSES[loss.name]],
            (len(z), 1, 1),
            (THREADS, 1, 1),
            (z, error, bias, target, scale, number(loss.temperature), number(down), np.int32(z.shape[1])),
        )

    def pool(self, s, p, out):
        height, width, channels = out.shape[1:]
        vec = vector_width(channels, s, out)
        grid, block = map_grid(width * (channels // vec), height, len(s))
        sizes = (*s.shape[1:3], height, width, channels // vec, p)
        types = [type_name(s.dtype), type_name(out.dtype), vec]
        self.launcher.launch("window_means", types, grid, block, (s, out, *map(np.int32, sizes)))

    def spread(self, s, p, force, add):
        require_type(s.dtype, force)
        height, width, channels = s.shape[1:]
        vec = vector_width(channels, s, force)
        rows, columns = (height * p, width * p) if add else force.shape[1:3]
        grid, block = map_grid(columns * (channels // vec), rows, len(s))
        sizes = (*force.shape[1:3], height, width, columns, channels // vec, p)
        types = [type_name(s.dtype), "true" if add else "false", vec]
        self.launcher.launch("spread", types, grid, block, (s, force, *map(np.int32, sizes)))
