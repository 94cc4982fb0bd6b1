"""The array operations of optimizers: one step for one parameter, or for a piece of it.

`OptimizerOps` is plain array code for NumPy and CuPy alike, and the reference; `CudaOptimizerOps` does the same in one
kernel each: a deep network has dozens of parameters, and a step of plain array code a dozen launches for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cupyep.backend import array_module
from cupyep.backend.device import launcher_for
from cupyep.ops.launch import launch_map, require_type, type_name, vector_width
from cupyep.ops.reduction import add_sum

SOURCE = Path(__file__).with_name("optimizer.cu")
UPDATED_AT_ONCE = 1 << 19  # numbers: the scratch of an update is small beside the parameters
SHORTEST_UNIT = 1e-3  # of clipping by unit norm, as published: units that begin at zero could never grow otherwise


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield indices that cut an array into pieces of about `UPDATED_AT_ONCE` numbers, whatever its strides."""
    row = math.prod(shape[1:])
    if math.prod(shape) <= UPDATED_AT_ONCE:
        yield (...,)
    elif row > UPDATED_AT_ONCE:
        for first in range(shape[0]):
            for rest in pieces(shape[1:]):
                yield (slice(first, first + 1), *rest)
    else:
        rows = UPDATED_AT_ONCE // row
        for start in range(0, shape[0], rows):
            yield (slice(start, start + rows),)


def clip_units(gradient: Any, parameter: Any, limit: float, scratch: Any) -> None:
    """Shorten each unit's part of `gradient` (.., K) to `limit` times the norm of the unit in `parameter`, in place.

    A unit is what leads to one of K outputs; it counts as `SHORTEST_UNIT` long at least. Squares are taken piece by
    piece in `scratch` (1-D), or without one of the whole array: more launches would cost a GPU more than the memory.
    """
    xp = array_module(parameter)
    squares = xp.zeros((2, parameter.shape[-1]), parameter.dtype)
    for array, sums in zip((parameter, gradient), squares, strict=True):
        for piece in [(...,)] if scratch is None else pieces(array.shape):
            part, out = array[piece], sums[piece[-1]] if len(piece) == array.ndim else sums
            kept = None if scratch is None else scratch[: part.size].reshape(part.shape)
            add_sum(xp.multiply(part, part, out=kept), out)
    most, length = xp.sqrt(squares, out=squares)
    xp.maximum(most, SHORTEST_UNIT, out=most)
    most *= limit
    gradient *= most / xp.maximum(most, length)


def ops_for(parameters: Mapping[str, Any]) -> OptimizerOps:
    """Return the operations for some parameters: kernels where they are on a GPU, each one run of memory."""
    launcher = launcher_for(next(iter(parameters.values())), SOURCE)
    if launcher is None or not all(p.flags.c_contiguous for p in parameters.values()):
        return OptimizerOps()
    return CudaOptimizerOps(launcher)


class OptimizerOps:
    """Steps without allocation. Arrays are of one shape and floating type.

    Attributes
    ----------
    needs_scratch : bool
        Whether a step wants an array like the parameter; then large parameters are better given in pieces.
    """

    needs_scratch = True

    def sgd(
        self,
        parameter: Any,
        gradient: Any,
        velocity: Any,
        scratch: Any,
        *,
        rate: float,
        momentum: float,
        nesterov: bool,
        decay: float,
    ) -> None:
        """Update `parameter` and `velocity` (None without momentum) in place; see `cupyep.optim.SGD`."""
        total = _decayed(parameter, gradient, decay, scratch)
        if velocity is not None:
            velocity *= momentum
            velocity += total
        if velocity is None or nesterov:  # the gradient's own term
            total *= rate
            parameter -= total
        if velocity is not None:  # the velocity's term
            share = momentum if nesterov else 1.0
            array_module(parameter).multiply(velocity, rate * share, out=total)
            parameter -= total

    def adam(
        self,
        parameter: Any,
        gradient: Any,
        mean: Any,
        square: Any,
        scratch: Any,
        *,
        rate: float,
        betas: tuple[float, float],
        correction: float,
        epsilon: float,
        decay: float,
        shrink: float,
    ) -> None:
        """Update `parameter`, `mean` and `square` in place; see `cupyep.optim.Adam`.

        `rate` is ``lr / (1 - b1^t)``, `correction` ``1 / (1 - b2^t)``; `shrink` multiplies the parameter first, after
        `decay` has looked at it.
        """
        xp, (b1, b2) = array_module(parameter), betas
        total = _decayed(parameter, gradient, decay, scratch)
        total *= 1.0 - b1
        mean *= b1
        mean += total
        total = _decayed(parameter, gradient, decay, scratch)  # once more: a second scratch would be larger
        total *= total
        total *= 1.0 - b2
        square *= b2
        square += total
        xp.multiply(square, correction, out=total)
        xp.sqrt(total, out=total)
        total += epsilon
        xp.divide(mean, total, out=total)
        total *= rate
        if shrink != 1.0:
            parameter *= shrink
        parameter -= total

    def average(self, average: Any, parameter: Any, scratch: Any, *, share: float) -> None:
        """Move `average` by `share` of the way to `parameter`, in place."""
        array_module(parameter).subtract(parameter, average, out=scratch)
        scratch *= share
        average += scratch


def _decayed(parameter: Any, gradient: Any, decay: float, out: Any) -> Any:
    """Return gradient + decay * parameter, in `out`."""
    array_module(parameter).multiply(parameter, decay, out=out)
    out += gradient
    return out


class CudaOptimizerOps(OptimizerOps):
    """`OptimizerOps` through the kernels of ``optimizer.cu``, `launcher` being that of `SOURCE`."""

    needs_scratch = False

    def __init__(self, launcher: Any):
        self.launcher = launcher

    def sgd(self, parameter: Any, gradient: Any, velocity: Any, scratch: Any, *,
            rate: float, momentum: float, nesterov: bool, decay: float) -> None:  # fmt: skip
        momentum = 0.0 if velocity is None else momentum
        self._launch("sgd_step", (parameter, gradient, velocity), (rate, momentum, decay), (nesterov,))

    def adam(self, parameter: Any, gradient: Any, mean: Any, square: Any, scratch: Any, *, rate: float,
             betas: tuple[float, float], correction: float, epsilon: float, decay: float,
             shrink: float) -> None:  # fmt: skip
        b1, b2 = betas
        numbers = (rate, b1, 1.0 - b1, b2, 1.0 - b2, correction, epsilon, decay, shrink)
        self._launch("adam_step", (parameter, gradient, mean, square), numbers, ())

    def average(self, average: Any, parameter: Any, scratch: Any, *, share: float) -> None:
        self._launch("average_step", (average, parameter), (share,), ())

    def _launch(self, kernel: str, arrays: tuple, numbers: tuple[float, ...], flags: tuple) -> None:
        dtype, size = arrays[0].dtype, arrays[0].size
        if size == 0:
            return
        require_type(dtype, *arrays)
        vec = vector_width(size, *arrays)
        arguments = (*arrays, *map(dtype.type, numbers))
        threads = (size // vec, 1, 1)
        launch_map(self.launcher, kernel, [type_name(dtype), vec], threads, arguments, (*flags, size // vec))
