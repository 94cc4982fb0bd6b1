"""The array operations of a head: the error of its outputs, pooling of its state, spreading of its force.

`HeadOps` is plain array code for NumPy and CuPy alike, and the reference; ``head.cu`` does the same in one kernel each
(`cupyep.ops.cuda_head`).
"""

from __future__ import annotations

from typing import Any

from cupyep.ops.pooling import add_average_scatter, average_pool, average_scatter, clear_remainder, windows


class HeadOps:
    """Operations without allocation. Arrays are C-contiguous and, where nothing else is said, of one floating type."""

    def scaled_error(
        self, loss: Any, z: Any, bias: Any, target: Any, scale: Any, column: Any, error: Any = None, down: float = 1.0
    ) -> None:
        """Overwrite outputs `z` by ``down * scale * dL/dz`` at ``down * z + bias``, or write that into `error`.

        `z` is scratch then.

        Parameters
        ----------
        loss : CrossEntropy or SquaredError
        z, target : arrays of shape (B, classes)
        bias : array of shape (classes,), or None
        scale : array of shape (B,)
        column : array of shape (B, 1)
            Scratch.
        error : array of shape (B, classes), of any floating type, or None
        down : float
            A power of two, by which the map is too large.
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
