"""The array operations of a head: the error of its outputs, pooling of its state, spreading of its force.

`HeadOps` is plain array code for NumPy and CuPy alike, and the reference; `CudaHeadOps` does the same in one kernel
each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cupyep.ops import update
from cupyep.ops.launch import launch_map, require_type, type_name, vector_width
from cupyep.ops.pooling import add_average_scatter, average_pool, average_scatter, clear_remainder, windows

SOURCE = Path(__file__).with_name("head.cu")
LOSSES = {"cross_entropy": 0, "squared_error": 1}  # enum Loss
WARP = 32


class HeadOps:
    """Operations without allocation. Arrays are C-contiguous and, where nothing else is said, of one floating type."""

    def scaled_error(
        self, loss: Any, z: Any, bias: Any, target: Any, scale: Any, column: Any, error: Any = None, down: float = 1.0
    ) -> None:
        """Overwrite outputs `z` by ``down * scale * dL/dz`` at ``down * z + bias``, or write that into `error`.

        `z` is scratch then. `z`, `target` and `error`, None or of any floating type, have the shape (B, classes),
        `scale` (B,), and `bias`, or None, (classes,); `column` (B, 1) is scratch. `down` is a power of two, by which
        the map is too large.
        """
        if down != 1.0:
            z *= down
        if bias is not None:
            z += bias
        loss.gradient(z, target, z, column)
        z *= scale[:, None]
        if down != 1.0:
            z *= down
        if error is not None:
            error[...] = z

    def pool(self, s: Any, p: int, out: Any) -> None:
        """Write the means over ``p x p`` windows of `s` (B, H, W, C) into `out` (B, H // p, W // p, C)."""
        average_pool(windows(s, p), out)

    def spread(self, s: Any, p: int, force: Any, add: bool) -> None:
        """Write the adjoint of `pool` at `s` (B, H // p, W // p, C) into `force` (B, H, W, C), or add it.

        `s` is overwritten.
        """
        if add:
            add_average_scatter(s, windows(force, p))
        else:
            average_scatter(s, windows(force, p))
            clear_remainder(force, p)


class CudaHeadOps(HeadOps):
    """`HeadOps` through the kernels of ``head.cu``, `launcher` being that of `SOURCE`, and ``see`` of ``update.cu``."""

    def __init__(self, launcher: Any, updates: Any):
        self.launcher, self.updates = launcher, updates

    def scaled_error(
        self, loss: Any, z: Any, bias: Any, target: Any, scale: Any, column: Any, error: Any = None, down: float = 1.0
    ) -> None:
        require_type(z.dtype, bias, target, scale)
        error, number = z if error is None else error, z.dtype.type
        self.launcher.launch(
            "scaled_error",
            [type_name(z.dtype), type_name(error.dtype), LOSSES[loss.name]],
            (len(z), 1, 1),
            (WARP, 1, 1),
            (z, error, bias, target, scale, number(loss.temperature), number(down), np.int32(z.shape[1])),
        )

    def pool(self, s: Any, p: int, out: Any) -> None:
        update.launch_see(self.updates, s, 1.0, None, p, out)

    def spread(self, s: Any, p: int, force: Any, add: bool) -> None:
        require_type(s.dtype, force)
        height, width, channels = s.shape[1:]
        vec = vector_width(channels, s, force)
        rows, columns = (height * p, width * p) if add else force.shape[1:3]
        sizes = (*force.shape[1:3], height, width, columns, channels // vec, p)
        types = [type_name(s.dtype), "true" if add else "false", vec]
        launch_map(self.launcher, "spread", types, (columns * (channels // vec), rows, len(s)), (s, force), sizes)
