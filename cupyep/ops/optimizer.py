"""The array operations of optimizers: one step for one parameter, or for a piece of it.

`OptimizerOps` is plain array code for NumPy and CuPy alike, and the reference; `CudaOptimizerOps` does the same in one
kernel each: a deep network has dozens of parameters, and a step of plain array code a dozen launches for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cupyep.backend import array_module
from cupyep.ops.launch import launch_map, require_type, type_name, vector_width

SOURCE = Path(__file__).with_name("optimizer.cu")


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
    ) -> None:
        """Update `parameter`, `mean` and `square` in place; see `cupyep.optim.Adam`.

        `rate` is ``lr / (1 - b1^t)``, `correction` ``1 / (1 - b2^t)``.
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

    def sgd(self, parameter, gradient, velocity, scratch, *, rate, momentum, nesterov, decay):
        momentum = 0.0 if velocity is None else momentum
        self._launch("sgd_step", (parameter, gradient, velocity), (rate, momentum, decay), (nesterov,))

    def adam(self, parameter, gradient, mean, square, scratch, *, rate, betas, correction, epsilon, decay):
        b1, b2 = betas
        numbers = (rate, b1, 1.0 - b1, b2, 1.0 - b2, correction, epsilon, decay)
        self._launch("adam_step", (parameter, gradient, mean, square), numbers, ())

    def average(self, average, parameter, scratch, *, share):
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
