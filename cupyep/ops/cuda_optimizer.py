"""Launch code of ``optimizer.cu``: the operations of `OptimizerOps` as one CUDA kernel each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cupyep.ops.launch import map_grid, require_type, type_name, vector_width
from cupyep.ops.optimizer import OptimizerOps

SOURCE = Path(__file__).with_name("optimizer.cu")


class CudaOptimizerOps(OptimizerOps):
    """`OptimizerOps` through the kernels of ``optimizer.cu``; `scratch` is not looked at.

    Parameters
    ----------
    launcher : Launcher
        Of `SOURCE`.
    """

    needs_scratch = False

    def __init__(self, launcher: Any):
        self.launcher = launcher

    def sgd(self, parameter, gradient, velocity, scratch, *, rate, momentum, nesterov, decay):
        arrays = (parameter, gradient, velocity)
        momentum = 0.0 if velocity is None else momentum
        self._launch("sgd_step", arrays, (rate, momentum, decay), (np.int32(nesterov),))

    def adam(self, parameter, gradient, mean, square, scratch, *, rate, betas, correction, epsilon, decay):
        b1, b2 = betas
        numbers = (rate, b1, 1.0 - b1, b2, 1.0 - b2, correction, epsilon, decay)
        self._launch("adam_step", (parameter, gradient, mean, square), numbers, ())

    def _launch(self, kernel: str, arrays: tuple, numbers: tuple[float, ...], more: tuple) -> None:
        parameter = arrays[0]
        if parameter.size == 0:
            return
        require_type(parameter.dtype, *arrays)
        vec = vector_width(parameter.size, *arrays)
        count = parameter.size // vec
        grid, block = map_grid(count, 1, 1)
        scalars = map(parameter.dtype.type, numbers)
        types = [type_name(parameter.dtype), vec]
        self.launcher.launch(kernel, types, grid, block, (*arrays, *scalars, *more, np.int32(count)))
