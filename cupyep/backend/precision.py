"""Precisions: what numbers are stored as, what they are computed in, and how many digits the factors of products have.

One setting for a whole network. Parameters, their gradients and the optimizer's memory are float32 throughout (float64
for float64), and so are losses, residuals and everything that is added up. What is narrower are states, deviations,
drives, and the copies of weights and the columns that are multiplied; products are added up in float32.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from cupyep.errors import choose, needing


@dataclass(frozen=True)
class Precision:
    """A number format for a network.

    Attributes
    ----------
    name : {"float32", "tf32", "float16", "bfloat16", "float64"}
    number : dtype
        Of parameters, gradients and arithmetic.
    stored : dtype
        Of states, deviations, drives and images, and of the factors of products.
    digits : int
        Binary digits of a factor of a product, the leading one included.
    exact : bool
        Whether every unit is a direct sum of products, with none of the rounding of Winograd's transforms.
    """

    name: str
    number: np.dtype
    stored: np.dtype
    digits: int
    exact: bool = False

    @property
    def tf32(self) -> bool:
        """Whether float32 factors are rounded to TF32, 10 bits after the leading one."""
        return self.name == "tf32"

    @property
    def half(self) -> bool:
        """Whether states are stored in 16 bits."""
        return self.stored != self.number

    def scale(self, size: float) -> float:
        """Return the power of two by which numbers of the order of `size` are multiplied to be stored.

        float16 ends at 65504 and loses digits below 6e-5: `size` itself becomes 512 to 1024, so that there is room for
        64 times as much above and, with all digits, 1e7 times less below. 1 where the range is that of float32.
        """
        return 2.0 ** (10 - math.ceil(math.log2(size))) if self.name == "float16" else 1.0

    @property
    def tie_margin(self) -> float:
        """Difference, relative to the larger of a number and 1, that results of direct products may have by rounding.

        Sums of some thousand products, taken in different orders, differ by up to a dozen times the distance of 1 to
        the next number of the type that they are added up in, which is that of `number` whatever the factors are.
        """
        return 32 * float(np.finfo(self.number).eps)

    @property
    def spacing(self) -> float:
        """Distance of a factor between 1/2 and 1 to the next one."""
        return 2.0**-self.digits


PRECISIONS = ("float32", "tf32", "float16", "bfloat16", "float64")


@functools.cache
def get_precision(name: str, exact: bool = False) -> Precision:
    """Return the precision of the given name.

    Parameters
    ----------
    name : {"float32", "tf32", "float16", "bfloat16", "float64"}
    exact : bool
        See `Precision`.

    Raises
    ------
    ConfigurationError
        If there is no such name, or it is bfloat16 and ml_dtypes is not installed.
    """
    choose("precision", name, PRECISIONS)
    single, double = np.dtype(np.float32), np.dtype(np.float64)
    if name == "float64":
        return Precision(name, double, double, 53, exact)
    if name == "float16":
        return Precision(name, single, np.dtype(np.float16), 11, exact)
    if name == "bfloat16":
        return Precision(name, single, _bfloat16(), 8, exact)
    return Precision(name, single, single, 11 if name == "tf32" else 24, exact)


def _bfloat16() -> np.dtype:
    with needing(
        "precision bfloat16 needs the library ml_dtypes: pip install ml_dtypes (or cupyep[bfloat16]), "
        "or take precision float16"
    ):
        import ml_dtypes
    return np.dtype(ml_dtypes.bfloat16)
