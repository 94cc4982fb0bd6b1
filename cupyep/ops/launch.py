"""What the launch code of all kernels shares: names of element types, width of accesses, grids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cupyep.backend.cuda import address
from cupyep.errors import require

TYPES = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}
ACCESS_BYTES = 16
BLOCK = 256
LARGEST_GRID = 65535  # of the y and z axes


def type_name(dtype: Any) -> str:
    """Return the CUDA name of an element type."""
    return TYPES[np.dtype(dtype).name]


def arithmetic(dtype: Any) -> np.dtype:
    """Return the type that kernels compute in: float64 for float64, float32 for everything narrower."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def require_type(dtype: Any, *arrays: Any) -> None:
    """Raise `TypeError` unless all arrays, None aside, are of a type: a kernel would misread their memory."""
    for array in arrays:
        if array is not None and array.dtype != dtype:
            raise TypeError(f"a kernel for {np.dtype(dtype)} cannot read an array of {array.dtype}")


def vector_width(channels: int, *arrays: Any) -> int:
    """Return how many neighbouring channels one thread can handle.

    Parameters
    ----------
    channels : int
        Length of the runs.
    *arrays : array or None
        All that the kernel accesses in packs. None of them is skipped.

    Returns
    -------
    int
        As many as the narrowest floating type has in 16 bytes, or 1 where channels or addresses do not divide.
    """
    arrays = tuple(array for array in arrays if array is not None)
    width = ACCESS_BYTES // min(array.dtype.itemsize for array in arrays if array.dtype.kind != "u")
    divides = channels % width == 0 and all(
        address(array) % min(ACCESS_BYTES, width * array.dtype.itemsize) == 0 for array in arrays
    )
    return width if divides else 1


def map_grid(items: int, rows: int, samples: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return grid and block for `items` threads in each of `rows` rows of `samples` maps.

    The items are divided into equal blocks of at most 256 threads, rounded up to whole warps.
    """
    check_axes(rows, samples)
    blocks = -(-items // BLOCK)
    warps = -(-items // (blocks * 32))
    return (blocks, rows, samples), (32 * warps, 1, 1)


def packs_of(size: int, arguments: tuple) -> tuple[int, int, int, int]:
    """Return VEC, packs a sample of `size` units, threads of a block, a power of two, and blocks a sample."""
    vec = vector_width(size, *(argument for argument in arguments if getattr(argument, "ndim", 0)))
    count, block = size // vec, BLOCK
    while block // 2 >= max(count, 32):
        block //= 2  # as the sum over a block needs
    return vec, count, block, -(-count // block)


def launch_map(
    launcher: Any,
    kernel: str,
    types: list[Any],
    threads: tuple[int, int, int],
    arguments: Sequence[Any],
    sizes: Iterable[int],
) -> None:
    """Launch a kernel with a thread for each of (items, rows, samples), see `map_grid`; its last arguments are ints."""
    grid, block = map_grid(*threads)
    launcher.launch(kernel, types, grid, block, (*arguments, *map(np.int32, sizes)))


def check_axes(*lengths: int) -> None:
    """Raise `ConfigurationError` if the y or z axis of a grid cannot be so long."""
    require(
        max(lengths) <= LARGEST_GRID,
        f"a GPU kernel takes at most {LARGEST_GRID} samples or rows, not {max(lengths)}; use a smaller batch size",
    )
