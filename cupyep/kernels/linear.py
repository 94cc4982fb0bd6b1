"""The products of one dense edge, whatever its states and weights are stored in."""

from __future__ import annotations

from typing import Any

from cupyep.backend.device import Device
from cupyep.backend.precision import Precision
from cupyep.kernels.buffers import Arena
from cupyep.kernels.factors import Factors


class LinearOps:
    """Products and scratch of one dense edge for one batch size.

    Parameters
    ----------
    shape : (inputs, units)
        Of the weight.
    batch : int
    precision : Precision
    device : Device

    Attributes
    ----------
    nbytes : int
        Bytes wanted from the arena.
    flops : int
        Operations that one product takes for one sample.
    matrix : array of shape (inputs, units)
        The weight as a factor: itself, or a rounded copy.
    """

    def __init__(self, shape: tuple[int, int], batch: int, precision: Precision, device: Device):
        xp = device.xp
        self.flops = 2 * shape[0] * shape[1]
        self.factors = Factors(precision, xp, device.is_gpu)
        self.matrix = xp.empty(shape, self.factors.dtype) if self.factors.copies else None
        self.weight = None if device.adds_products else xp.empty(shape, precision.number)  # a gradient on its way
        copied = batch if self.factors.widens or self.factors.rounds else 0
        self._requests = [((copied, width), precision.number) for width in shape]
        self.nbytes = Arena.size(self._requests)

    def bind(self, arena: Arena) -> None:
        """Take views of the arena: a copy of the state below, one of the state above, each a factor or a result."""
        self._below, self._above = arena.views(self._requests)

    def refresh(self, weight: Any) -> None:
        """Take up a weight (inputs, units) as a factor."""
        if self.factors.copies:
            self.factors.take_up(weight, self.matrix)
        else:
            self.matrix = weight

    def drive(self, s: Any, out: Any) -> None:
        """Write ``s w`` into `out` (B, units)."""
        self._product(self._factor(s, self._below), self.matrix, out, self._above)

    def topdown(self, s: Any, out: Any) -> None:
        """Write ``s w^T`` into `out` (B, inputs)."""
        self._product(self._factor(s, self._above), self.matrix.T, out, self._below)

    def add_gradient(self, below: Any, s: Any, gradient: Any) -> None:
        """Add ``below^T s`` to `gradient`."""
        factors = self._factor(below, self._below).T, self._factor(s, self._above)
        self.factors.add_product(*factors, gradient, self.weight)

    def _factor(self, s: Any, copy: Any) -> Any:
        if not (self.factors.widens or self.factors.rounds):
            return s
        factor = copy[: len(s)]
        factor[...] = s
        self.factors.round(factor)
        return factor

    def _product(self, a: Any, b: Any, out: Any, scratch: Any) -> None:
        if not self.factors.widens:
            self.factors.product(a, b, out)
            return
        result = scratch[: len(out)]
        self.factors.product(a, b, result)
        out[...] = result
