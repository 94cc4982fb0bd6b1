"""A device without memory: its arrays have shape and type and next to no memory, whatever their size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupyep.backend.device import Device, gpu_scratch
from cupyep.errors import choose, require

KINDS = ("cpu", "gpu")
L2_BYTES = 50 << 20  # of an H100, H200
MOST = 1 << 56  # numbers in one array


class BlankDevice(Device):
    """What can be told of a device without having it: networks and learners made on it take no memory to speak of.

    Parameters
    ----------
    kind : {"cpu", "gpu"}
    scratch_mb : float, optional
        See `Device`; by default what a CPU has here, or a GPU with 50 MB of L2.
    """

    def __init__(self, kind: str, scratch_mb: float | None = None):
        super().__init__("cpu", scratch_mb=scratch_mb)
        self.name = choose("device kind", kind, KINDS)
        self.is_gpu = self.adds_products = kind == "gpu"
        if self.is_gpu and scratch_mb is None:
            self.scratch_bytes = gpu_scratch(L2_BYTES)

    @classmethod
    def like(cls, device: Device) -> BlankDevice:
        """Return what stands for a real device."""
        blank = cls("gpu" if device.is_gpu else "cpu")
        blank.scratch_bytes = device.scratch_bytes
        return blank

    def use(self) -> None:
        """There is nothing to use."""

    def asarray(self, array: Any, dtype: Any = None) -> Any:
        """Return a read-only array of zeros of the shape and type, all of them in one place."""
        array = np.asarray(array)
        return _blank(array.shape, dtype or array.dtype)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return such an array."""
        return _blank(shape, dtype)

    def drawn(self, draw: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return such an array; nothing is drawn."""
        return _blank(shape, dtype)


def _blank(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    require(math.prod(shape) < MOST, f"an array of shape {shape} is larger than any memory; lower the width")
    return np.broadcast_to(np.zeros((), dtype), shape)
