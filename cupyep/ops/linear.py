"""The products of one dense edge, whatever its states and weights are stored in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyep.backend.device import Device
from cupyep.backend.precision import Precision
from cupyep.ops.buffers import Arena, Request
from cupyep.ops.factors import Factors


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
    nbytes, derived
        See `ConvOps`.
    flops : int
        Operations that one product takes for one sample.
    matrix : array of shape (inputs, units)
        The weight as a factor: itself, or a rounded copy.
    """

    derives = True

    def __init__(self, shape: tuple[int, int], batch: int, precision: Precision, device: Device):
        self.flops = 2 * shape[0] * shape[1]
        self.factors = Factors(precision, device.is_gpu)
        self.derived = [(shape, self.factors.dtype)] if self.factors.copies else []
        copied = batch if self.factors.widens or self.factors.rounds else 0
        gradient = [] if device.adds_products else [shape]
        copies = [(copied, width) for width in shape]
        self.requests: list[Request] = [(part, precision.number) for part in copies + gradient]
        self.requests.append(((self.factors.scratch_size,), np.uint32))
        self.nbytes = Arena.size(self.requests)

    def bind(self, arena: Arena, derived: Sequence[Any]) -> None:
        """Take views of the arena, and the arrays of `derived`."""
        self.matrix: Any = derived[0] if derived else None
        # copies of the states below and above, each a factor or a result, and a gradient on its way
        self._below, self._above, *gradient, self.factors.scratch = arena.views(self.requests)
        self.weight = gradient[0] if gradient else None

    def refresh(self, weight: Any) -> None:
        """Take up a weight (inputs, units) as a factor."""
        if not self.factors.copies:
            self.matrix = weight
        elif self.derives:
            self.factors.take_up(weight, self.matrix)

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
