"""Optimizers (SGD, Adam, AdamW) and learning-rate schedules.

An optimizer updates the parameter arrays in place, so a network whose `parameters()` it was given learns by
`optimizer.step(result.gradients)`. All buffers exist after construction: a step allocates nothing of the size of a
parameter, but on a GPU the squares of each weight that is clipped, one at a time. The same code runs on NumPy and CuPy
arrays and keeps each parameter's dtype; on a GPU a step is one kernel a parameter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.errors import CheckpointError, ConfigurationError, flag, instance, items, nearest, number, require, shown
from cupyep.ops.optimizer import clip_units, ops_for, pieces

AVERAGE = "average"  # the buffers of the running average; "average.<path>" in `Optimizer.state_dict`


def constant(progress: float) -> float:
    """Return 1: the learning rate stays as it is."""
    number("progress", progress, 0, 1)
    return 1.0


def cosine(progress: float) -> float:
    """Return ``(1 + cos(pi * progress)) / 2``: 1 at the start, 0 at the end.

    Parameters
    ----------
    progress : float
        Fraction of the training that is done, in [0, 1].

    References
    ----------
    Loshchilov & Hutter, "SGDR", arXiv 1608.03983 (one cycle, minimum 0).
    """
    number("progress", progress, 0, 1)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def step_decay(progress: float) -> float:
    """Return 1, then 0.1 from half of the training on, then 0.01 from three quarters on."""
    number("progress", progress, 0, 1)
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


#: The learning-rate schedules by name: each maps progress in [0, 1] to the factor of the learning rate.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine, "step": step_decay}


class Optimizer:
    """What all optimizers share: rates by path, buffers, checks, state.

    Parameters
    ----------
    parameters : mapping of str to array
        By path; the arrays are updated in place.
    learning_rate : float or mapping of str to float
        One rate for all, or one for each path (layer-wise). Above 0.
    weight_decay : float
        L2 penalty; adds ``weight_decay * p`` to the gradient of *every* parameter, biases included, as PyTorch's
        optimizers and both published EP code bases (Laborieux 2021, Scellier 2023) do. At least 0.
    clip_unit_norm : float, optional
        Adaptive gradient clipping (Brock et al., arXiv 2102.06171): the gradient of a unit (a filter, a column of a
        dense map's (in, units)) is at most so many times as long as the unit's weights, which count as `SHORTEST_UNIT`
        long at least. For every weight but the readout's and those of signals; the gradients given to `step` are
        changed then.
    slots : tuple of str
        Names of the buffers kept for every parameter.
    ema : float, optional
        Decay d in (0, 1) of a running average of the parameters, which `averaged` puts in their place. After step t
        it moves by ``1 - min(d, (1 + t) / (10 + t))`` of the way to them: more at first, so that it forgets the start.

    Raises
    ------
    ConfigurationError
        If a hyper-parameter is out of range, or a rate is missing or belongs to no parameter.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        learning_rate: float | Mapping[str, float],
        weight_decay: float,
        slots: tuple[str, ...],
        ema: float | None = None,
        clip_unit_norm: float | None = None,
    ):
        instance("parameters", parameters, Mapping, "a mapping of arrays by path")
        require(len(parameters) > 0, "an optimizer needs at least one of parameters")
        for path, p in parameters.items():
            floats = getattr(getattr(p, "dtype", None), "kind", "") == "f"
            require(
                isinstance(path, str) and floats, f"parameters must be arrays of floats by path; '{path}' is {shown(p)}"
            )
        number("weight_decay", weight_decay, 0)
        self.parameters = dict(parameters)
        self.rates = _rates(self.parameters, learning_rate)
        self.weight_decay = float(weight_decay)
        self.ema = None if ema is None else number("ema", ema, above=0, below=1)
        clip = clip_unit_norm
        self.clip_unit_norm = None if clip is None else number("clip_unit_norm", clip, above=0)
        self.steps = 0
        self._slots = slots if ema is None else (*slots, AVERAGE)
        self._buffers = {
            f"{slot}.{path}": array_module(p).zeros_like(p) for slot in slots for path, p in self.parameters.items()
        }
        if ema is not None:
            self._buffers |= {f"{AVERAGE}.{path}": p.copy(order="K") for path, p in self.parameters.items()}
        self._ops = ops_for(self.parameters)
        module = array_module(next(iter(self.parameters.values())))
        sizes = _scratch_sizes(self.parameters) if self._ops.needs_scratch else {}
        self._scratch = {dtype: module.empty(size, dtype) for dtype, size in sizes.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_ops"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _ops=ops_for(state["parameters"]))

    def step(self, gradients: Mapping[str, Any], factor: float = 1.0) -> None:
        """Update every parameter in place.

        Parameters
        ----------
        gradients : mapping of str to array
            By path: exactly the paths, shapes and dtypes of the parameters; only `clip_unit_norm` modifies them.
        factor : float, default=1.0
            Multiplies every learning rate (what a schedule returns).

        Raises
        ------
        ConfigurationError
            If a gradient is missing, belongs to no parameter or has another shape.
        """
        number("factor", factor, 0)
        _check_names("gradients", gradients, self.parameters, ConfigurationError)
        self.steps += 1
        if self.clip_unit_norm is not None:
            for path, parameter in self.parameters.items():
                if path.endswith(".weight") and not path.startswith(("readout.", "signals.")):
                    scratch = self._scratch.get(parameter.dtype)
                    clip_units(gradients[path], parameter, self.clip_unit_norm, scratch)
        for path, parameter in self.parameters.items():
            buffers = [self._buffers[f"{slot}.{path}"] for slot in self._slots]
            rate = self.rates[path] * factor
            if not self._ops.needs_scratch:
                self._advance(parameter, gradients[path], buffers, None, rate)
                continue
            for piece in pieces(parameter.shape):
                part, gradient, *slots = (array[piece] for array in (parameter, gradients[path], *buffers))
                scratch = self._scratch[part.dtype][: part.size].reshape(part.shape)
                self._advance(part, gradient, slots, scratch, rate)

    def _advance(self, parameter: Any, gradient: Any, slots: Sequence[Any], scratch: Any, rate: float) -> None:
        """Update a parameter, or a piece of it, and its average."""
        if self.ema is None:
            self._update(parameter, gradient, slots, scratch, rate)
            return
        self._update(parameter, gradient, slots[:-1], scratch, rate)
        share = 1.0 - min(self.ema, (1 + self.steps) / (10 + self.steps))
        self._ops.average(slots[-1], parameter, scratch, share=share)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average in the place of the parameters as long as the context lasts; without `ema` change nothing."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for path, p in self.parameters.items() if self.ema is not None else ():
            average = self._buffers[f"{AVERAGE}.{path}"]
            for piece in pieces(p.shape):
                kept = p[piece].copy()
                p[piece] = average[piece]
                average[piece] = kept

    def _update(self, parameter: Any, gradient: Any, slots: Sequence[Any], scratch: Any, rate: float) -> None:
        """Update a parameter, or a piece of it, and its buffers; `scratch` is an array like it where it is needed."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to go on: ``"steps"`` and the buffers as ``"<slot>.<path>"`` (not copied)."""
        return {"steps": np.asarray(self.steps, dtype=np.int64), **self._buffers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy `state` (host or device arrays) into this optimizer.

        Raises
        ------
        CheckpointError
            If an entry is missing, unknown or has another shape: the state of another network or optimizer; or if the
            number of steps is none.
        """
        _check_names("optimizer state", state, self.state_dict(), CheckpointError)
        if state["steps"].dtype.kind not in "iu" or int(state["steps"]) < 0:
            raise CheckpointError(f"optimizer state 'steps' is {state['steps']}, not a number of steps")
        self.steps = int(state["steps"])
        with np.errstate(over="ignore"):  # what becomes infinite is found by the next step
            for name, buffer in self._buffers.items():
                buffer[...] = array_module(buffer).asarray(state[name])


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, in PyTorch's convention.

    With gradient g, rate lr, momentum m and weight decay d, a step does::

        g <- g + d * p
        v <- m * v + g              (v starts at 0)
        p <- p - lr * v             or, with Nesterov's form,  p <- p - lr * (g + m * v)

    Parameters
    ----------
    parameters : mapping of str to array
    learning_rate : float or mapping of str to float, default=0.05
    momentum : float, default=0.9
        In [0, 1).
    nesterov : bool, default=False
        Needs a momentum above 0.
    weight_decay : float, default=0.0
    ema, clip_unit_norm : float, optional

    Raises
    ------
    ConfigurationError
        If a hyper-parameter is out of range.

    See Also
    --------
    Optimizer : the meaning of layer-wise rates, `weight_decay`, `ema` and `clip_unit_norm`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        learning_rate: float | Mapping[str, float] = 0.05,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        ema: float | None = None,
        clip_unit_norm: float | None = None,
    ):
        number("momentum", momentum, 0, below=1)
        require(not flag("nesterov", nesterov) or momentum > 0, "nesterov needs a momentum above 0")
        super().__init__(parameters, learning_rate, weight_decay, self.slots(momentum), ema, clip_unit_norm)
        self.momentum = float(momentum)
        self.nesterov = bool(nesterov)

    @staticmethod
    def slots(momentum: float) -> tuple[str, ...]:
        """Return the names of the buffers kept for every parameter."""
        return ("velocity",) if momentum > 0 else ()

    def _update(self, parameter: Any, gradient: Any, slots: Sequence[Any], scratch: Any, rate: float) -> None:
        how: dict[str, Any] = {"momentum": self.momentum, "nesterov": self.nesterov, "decay": self.weight_decay}
        self._ops.sgd(parameter, gradient, slots[0] if slots else None, scratch, rate=rate, **how)


class Adam(Optimizer):
    """Adam with bias correction and classic L2 weight decay (added to the gradient, not decoupled).

    With gradient g, step count t = 1, 2, ..., a step does::

        g <- g + d * p
        m <- b1 * m + (1 - b1) * g
        v <- b2 * v + (1 - b2) * g * g
        p <- p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)

    Parameters
    ----------
    parameters : mapping of str to array
    learning_rate : float or mapping of str to float, default=0.001
    betas : tuple of two floats, default=(0.9, 0.999)
        b1 and b2, each in [0, 1).
    epsilon : float, default=1e-8
        Above 0.
    weight_decay : float, default=0.0
    ema, clip_unit_norm : float, optional

    Raises
    ------
    ConfigurationError
        If a hyper-parameter is out of range.

    References
    ----------
    Kingma & Ba, "Adam: a method for stochastic optimization", arXiv 1412.6980, algorithm 1.
    """

    SLOTS = ("mean", "square")
    decoupled = False

    def __init__(
        self,
        parameters: Mapping[str, Any],
        learning_rate: float | Mapping[str, float] = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        ema: float | None = None,
        clip_unit_norm: float | None = None,
    ):
        checked = [number("each of betas", beta, 0, below=1) for beta in items("betas", betas)]
        require(len(checked) == 2, f"betas must be two numbers, not {checked}")
        number("epsilon", epsilon, above=0)
        super().__init__(parameters, learning_rate, weight_decay, self.SLOTS, ema, clip_unit_norm)
        self.betas = (checked[0], checked[1])
        self.epsilon = float(epsilon)

    def _update(self, parameter: Any, gradient: Any, slots: Sequence[Any], scratch: Any, rate: float) -> None:
        mean, square = slots
        shrink = 1.0 - rate * self.weight_decay
        rate, correction = rate / (1.0 - self.betas[0] ** self.steps), 1.0 / (1.0 - self.betas[1] ** self.steps)
        how: dict[str, Any] = {"betas": self.betas, "correction": correction, "epsilon": self.epsilon}
        how |= {"decay": 0.0, "shrink": shrink} if self.decoupled else {"decay": self.weight_decay, "shrink": 1.0}
        self._ops.adam(parameter, gradient, mean, square, scratch, rate=rate, **how)


class AdamW(Adam):
    """`Adam` with decoupled weight decay: ``p <- p - lr * d * p`` before the step, and no decay in its gradient.

    References
    ----------
    Loshchilov & Hutter, "Decoupled weight decay regularization", arXiv 1711.05101; PyTorch's form, in which the decay
    is multiplied by the learning rate.
    """

    decoupled = True

    def __init__(
        self,
        parameters: Mapping[str, Any],
        learning_rate: float | Mapping[str, float] = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.01,
        ema: float | None = None,
        clip_unit_norm: float | None = None,
    ):
        super().__init__(parameters, learning_rate, betas, epsilon, weight_decay, ema, clip_unit_norm)


#: The optimizers by name, as the option ``--optimizer`` takes them.
OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


def optimizer_bytes(parameters: Mapping[str, Any], slots: Sequence[str], is_gpu: bool = False) -> int:
    """Return the bytes of an optimizer's buffers and scratch."""
    sizes = {} if is_gpu else _scratch_sizes(parameters)
    scratch = sum(size * np.dtype(dtype).itemsize for dtype, size in sizes.items())
    return len(slots) * sum(p.nbytes for p in parameters.values()) + scratch


def _scratch_sizes(parameters: Mapping[str, Any]) -> dict[Any, int]:
    """Return the numbers of the largest piece that is updated at once, by dtype."""
    sizes: dict[Any, int] = {}
    for p in parameters.values():
        sizes[p.dtype] = max(sizes.get(p.dtype, 0), *(p[piece].size for piece in pieces(p.shape)))
    return sizes


def _rates(parameters: Mapping[str, Any], learning_rate: float | Mapping[str, float]) -> dict[str, float]:
    """Return the learning rate of every path."""
    if not isinstance(learning_rate, Mapping):
        return dict.fromkeys(parameters, number("learning_rate", learning_rate, above=0))
    for path, rate in learning_rate.items():
        require(path in parameters, f"learning_rate names no parameter: '{path}'{nearest(str(path), parameters)}")
        number(f"learning_rate of '{path}'", rate, above=0)
    for path in parameters:
        require(path in learning_rate, f"learning_rate has no entry for '{path}'; give every parameter one")
    return {path: float(learning_rate[path]) for path in parameters}


def _check_names(what: str, given: Mapping[str, Any], known: Mapping[str, Any], error: type[Exception]) -> None:
    """Raise `error` unless `given` has exactly the names and shapes of `known`."""
    if not isinstance(given, Mapping):
        raise error(f"{what} must be a mapping of arrays by path, not {shown(given)}")
    for name in given:
        if name not in known:
            raise error(f"{what} '{name}' belongs to no parameter here{nearest(str(name), known)}")
    for name, array in known.items():
        if name not in given:
            raise error(f"{what} of '{name}' is missing")
        found = getattr(given[name], "shape", None)
        if found != array.shape:
            raise error(f"{what} '{name}' has shape {found} where {array.shape} is needed")
