"""The factors of matrix products in one precision: rounded to its digits, in the type that the device multiplies."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.backend.device import add_gemm, gemm
from cupyep.backend.precision import Precision

ROUNDED_AT_ONCE = 1 << 16  # numbers; they and the scratch stay in the innermost caches


class Factors:
    """How one network's products are computed.

    A GPU multiplies halves, and float32 as TF32, by itself. NumPy multiplies float32: there a factor is a float32
    number with the digits of the precision. Sums are float32 on both (float64 for float64), so the numbers are the same
    up to the order of summation.

    Parameters
    ----------
    precision : Precision
    native : bool
        Whether the device multiplies the stored type and TF32 by itself.

    Attributes
    ----------
    dtype : dtype
        Of columns and copies of weights.
    copies : bool
        Whether a weight must be copied to be a factor.
    widens : bool
        Whether a state must be copied to be a factor, and a product to be stored: never on a GPU.
    rounds : bool
        Whether `round` has something to do.
    scratch : uint32 array of shape (scratch_size,), or None
        For `round`; whoever lets it round gives it one.
    """

    def __init__(self, precision: Precision, native: bool):
        self.precision = precision
        self.dtype = precision.stored if native else precision.number
        self.copies = precision.half or (precision.tf32 and not native)
        self.widens = precision.half and not native
        self.rounds = precision.tf32 and not native
        self.scratch_size = ROUNDED_AT_ONCE if self.rounds else 0
        self.scratch: Any = None

    def take_up(self, weight: Any, out: Any) -> None:
        """Write a float32 `weight` into `out`, rounded to the digits of a factor."""
        if self.widens:
            numbers, rounded = weight.reshape(-1), out.reshape(-1)
            for start in range(0, len(numbers), ROUNDED_AT_ONCE):
                part = slice(start, start + ROUNDED_AT_ONCE)
                rounded[part] = numbers[part].astype(self.precision.stored)
            return
        out[...] = weight
        self.round(out)

    def round(self, x: Any) -> None:
        """Round a C-contiguous float32 array in place to TF32, where that is this class's business."""
        if self.rounds:
            round_to_tf32(x, self.scratch)

    def product(self, a: Any, b: Any, out: Any) -> None:
        """Write ``a @ b`` into `out`."""
        gemm(a, b, out=out, tf32=self.precision.tf32)

    def add_product(self, a: Any, b: Any, out: Any, scratch: Any) -> None:
        """Add ``a @ b`` to `out`; `scratch` is an array like `out`, or None where the device adds products."""
        add_gemm(a, b, out, scratch, tf32=self.precision.tf32)


def round_to_tf32(x: Any, scratch: Any) -> None:
    """Round float32 numbers in place to 10 binary digits after the leading one, to nearest, ties to even.

    `x` is C-contiguous; `scratch`, uint32, has one axis of any length.
    """
    xp = array_module(x)
    bits = x.reshape(-1).view(np.uint32)
    for start in range(0, bits.shape[0], scratch.shape[0]):
        part = bits[start : start + scratch.shape[0]]
        half = scratch[: part.shape[0]]
        # Add half of the last place kept, less one where that place is even, and cut.
        xp.right_shift(part, 13, out=half)
        xp.bitwise_and(half, 1, out=half)
        half += 0xFFF
        part += half
        xp.bitwise_and(part, 0xFFFFE000, out=part)
