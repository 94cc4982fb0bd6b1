"""Parametrisations of weights: the energy needs w, the optimizer owns what w is made of.

EP gives dL/dw; the pullback of a parametrisation makes of it the gradient of what is trained, filter by filter. The
energy, its fixed points and the EP theorem are untouched, and no activation is normalised: samples stay independent.

A weight is (kh, kw, C, K) or (in, K), a filter all of it but the last axis: ``fan_in = kh * kw * C`` or ``in``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.backend.cuda import identity
from cupyep.errors import ConfigurationError, choose, flag, number, require
from cupyep.ops.standardize import StandardizeOps, standardize_ops


class Parametrisation:
    """A weight as a function of parameters. Each weight has an object of its own: it may keep what `forward` found.

    Attributes
    ----------
    shares : bool
        Whether w is the parameter ``"weight"`` itself, and no array of its own is needed.
    """

    shares = False

    def parameters(self, weight: Any) -> dict[str, Any]:
        """Return the parameters by name, ``"weight"`` the drawn `weight` itself.

        Raises
        ------
        ConfigurationError
            If a weight of this shape cannot be made so.
        """
        raise NotImplementedError

    def forward(self, parameters: dict[str, Any], out: Any) -> None:
        """Write w into `out`, an array like ``parameters["weight"]`` (and it itself only with `shares`)."""
        raise NotImplementedError

    def pullback(self, dw: Any, parameters: dict[str, Any], out: dict[str, Any]) -> None:
        """Write the gradients of the parameters into the arrays of `out`, which has their names.

        Parameters
        ----------
        dw : array like w
            dL/dw, the sum over all parts of a batch: the pullback is linear in it. ``out["weight"]`` may be `dw`.
        parameters : dict of str to array
            Those of the last `forward`, unchanged since.
        out : dict of str to array
        """
        raise NotImplementedError

    def scale(self, parameters: dict[str, Any], factor: float) -> None:
        """Change the parameters such that w is multiplied by `factor`."""
        raise NotImplementedError

    def assign(self, parameters: dict[str, Any], weight: np.ndarray) -> None:
        """Change the parameters such that w is `weight`, an array on the host.

        Raises
        ------
        ConfigurationError
            If no parameters give it.
        """
        raise NotImplementedError

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of a weight of the given shape."""
        return {"weight": shape}

    def numbers(self, shape: tuple[int, ...], is_gpu: bool = False) -> int:
        """Return how many numbers, of the type of the weight, are kept for a weight of a shape; w aside."""
        return 0


class Plain(Parametrisation):
    """w = v."""

    shares = True

    def parameters(self, weight: Any) -> dict[str, Any]:
        return {"weight": weight}

    def forward(self, parameters: dict[str, Any], out: Any) -> None:
        if out is not parameters["weight"]:
            out[...] = parameters["weight"]

    def pullback(self, dw: Any, parameters: dict[str, Any], out: dict[str, Any]) -> None:
        if out["weight"] is not dw:
            out["weight"][...] = dw

    def scale(self, parameters: dict[str, Any], factor: float) -> None:
        parameters["weight"] *= factor

    def assign(self, parameters: dict[str, Any], weight: np.ndarray) -> None:
        _write(parameters["weight"], weight)


class Standardized(Parametrisation):
    """w = g (v - mean(v)) / (sqrt(var(v) + epsilon) sqrt(fan_in)), mean and variance (biased) of each filter of v.

    Parameters
    ----------
    gain : float, default=1.0
        g, above 0: of all channels where it is fixed, where they start where it is trained. Inputs of unit mean square
        that are independent give drives of variance g^2.
    trained : bool, default=True
        Whether every output channel has a gain of its own, the parameter ``"gain"`` (K,).
    epsilon : float, default=1e-8
        Above 0. Within the root, beside a variance that is 1 / fan_in for weights drawn as usual (2e-4 at a fan_in of
        4608); published codes have it in several places, 1e-4 to 1e-8.

    Notes
    -----
    w does not change with v -> a v + b, a > 0, as far as epsilon is small beside var(v). So dL/dv of a filter sums to 0
    and is orthogonal to v - mean(v), but for epsilon. It is of the order of dL/dw / (std(v) sqrt(fan_in)).

    A constant filter has w = 0, but for rounding, and a finite gradient. A filter of one weight would have w = 0
    whatever v, and no gradient: `parameters` refuses it, and `get_parametrisation` gives it plain weights.

    References
    ----------
    Qiao et al., "Micro-batch training with batch-channel normalization and weight standardization", arXiv 1903.10520;
    Brock et al., "Characterizing signal propagation to close the performance gap in unnormalized ResNets", arXiv
    2101.08692 (sqrt(fan_in) and gain).
    """

    def __init__(self, gain: float = 1.0, trained: bool = True, epsilon: float = 1e-8):
        self.gain = number("gain", gain, above=0)
        self.trained = flag("trained", trained)
        self.epsilon = number("epsilon", epsilon, above=0)
        self._of: Any = None  # which weight, in which memory, the rest belongs to
        self._statistics: Any = None
        self._scratch: Any = None

    def parameters(self, weight: Any) -> dict[str, Any]:
        require(
            _fan_in(weight.shape) > 1,
            f"a weight of shape {weight.shape} has filters of one number, which standardized would always be 0; use "
            "plain weights there",
        )
        if not self.trained:
            return {"weight": weight}
        return {"weight": weight, "gain": array_module(weight).full(weight.shape[-1], self.gain, weight.dtype)}

    def forward(self, parameters: dict[str, Any], out: Any) -> None:
        v = _matrix(parameters["weight"])
        ops = standardize_ops(v)
        self._keep(v, ops)
        w = _matrix(out)
        if identity(w) == self._of:
            raise ConfigurationError("a standardized weight needs an array of its own: the optimizer has the other")
        ops.forward(v, *self._gains(parameters), self.epsilon, w, self._statistics, self._scratch)

    def pullback(self, dw: Any, parameters: dict[str, Any], out: dict[str, Any]) -> None:
        v = _matrix(parameters["weight"])
        if self._of != identity(v):
            raise ConfigurationError(
                "a pullback belongs to the last forward, which was of another weight; give each weight a "
                "parametrisation of its own"
            )
        dv, dgain = _matrix(out["weight"]), out["gain"] if self.trained else None
        gains = self._gains(parameters)
        standardize_ops(v).pullback(_matrix(dw), v, *gains, self._statistics, dv, dgain, self._scratch)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"weight": shape} | ({"gain": shape[-1:]} if self.trained else {})

    def scale(self, parameters: dict[str, Any], factor: float) -> None:
        if self.trained:
            parameters["gain"] *= factor
        else:
            self.gain *= factor

    def assign(self, parameters: dict[str, Any], weight: np.ndarray) -> None:
        fan_in = _fan_in(weight.shape)
        w = weight.reshape(fan_in, -1).astype(np.float64)
        centred = (np.abs(w.mean(axis=0)) <= 1e-4 * np.abs(w).max(axis=0)).all()
        require(centred, "filters of standardized weights have mean 0, these have not; use weights plain")
        deviation, drawn = w.std(axis=0), 1 / math.sqrt(fan_in)  # v becomes as large as it is drawn
        gain = deviation / drawn * math.sqrt(1 + self.epsilon * fan_in)
        if self.trained:
            _write(parameters["gain"], gain)
        else:
            same = np.allclose(gain, self.gain, rtol=1e-3, atol=0)
            require(same, f"the gains of these weights are not the fixed one, {self.gain:g}; use weights standardized")
        _write(parameters["weight"], (w * (drawn / np.where(deviation > 0, deviation, 1))).reshape(weight.shape))

    def numbers(self, shape: tuple[int, ...], is_gpu: bool = False) -> int:
        scratch = 0 if is_gpu else math.prod(StandardizeOps().scratch_shape((_fan_in(shape), shape[-1])))
        return 2 * shape[-1] + scratch

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_of": None, "_statistics": None, "_scratch": None}

    def _gains(self, parameters: dict[str, Any]) -> tuple[Any, float]:
        """Return an array of gains, or None, and what multiplies it."""
        share = 1 / math.sqrt(_fan_in(parameters["weight"].shape))
        return (parameters["gain"], share) if self.trained else (None, self.gain * share)

    def _keep(self, v: Any, ops: StandardizeOps) -> None:
        """Make room for what a forward leaves for its pullback, once for a weight."""
        if self._of != identity(v):
            xp = array_module(v)
            self._statistics = xp.empty((2, v.shape[1]), v.dtype)
            self._scratch = xp.empty(ops.scratch_shape(v.shape), v.dtype)
            self._of = identity(v)


#: The parametrisations of weights by name, made of the gain that a network's weights start with.
PARAMETRISATIONS: dict[str, Callable[[float], Parametrisation]] = {
    "plain": lambda gain: Plain(),
    "standardized": Standardized,
    "standardized-fixed": lambda gain: Standardized(gain, trained=False),
}


def get_parametrisation(weights: str, shape: tuple[int, ...], gain: float = 1.0) -> Parametrisation:
    """Return a new parametrisation of the given name, for a weight of a shape; where a filter is one number, plain.

    Such a filter leads from an image of one channel along a skip; standardized it would be 0.
    """
    made = PARAMETRISATIONS[choose("parametrisation of weights", weights, PARAMETRISATIONS)](gain)
    return made if _fan_in(shape) > 1 else Plain()


def _write(parameter: Any, values: np.ndarray) -> None:
    parameter[...] = array_module(parameter).asarray(values)


def _fan_in(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def _matrix(array: Any) -> Any:
    """Return the view (fan_in, K) of a weight."""
    if not array.flags.c_contiguous:
        raise ConfigurationError("standardized weights and their gradients must be C-contiguous arrays")
    return array.reshape(-1, array.shape[-1])
