"""Activations sigma: each with its derivative, its range, its stable increment and its share of the energy.

A layer at rest obeys ``s = sigma(g)``. In the energy ``E = sum(potential(s)) - Phi`` the potential is the integral of
the inverse of sigma, ``s**2 / 2`` for a clip of slope one, so that dE/ds = sigma^-1(s) - g vanishes at rest
(Scellier & Bengio 2017 write the same with the clip as a projection).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupyep.backend import array_module
from cupyep.errors import ConfigurationError, choose, instance, number, require

SLOPES_AT_ONCE = 1 << 22  # units; what is inside a clip takes memory


class Activation:
    """Base class: a function of the total drive g, increasing where an energy is wanted.

    Attributes
    ----------
    name : str
    low, high : float
        Range of the states; may be infinite.
    code : (str, tuple of float) or None
        What the CUDA kernels know it by; None where they do not, and plain array code serves.

    Notes
    -----
    Subclass it with the four methods below to use your own; all work element by element and write into `out`,
    which may be the first argument.
    """

    name = ""
    low = -math.inf
    high = math.inf
    code: tuple[str, tuple[float, ...]] | None = None

    def value(self, g: Any, out: Any) -> None:
        """Write sigma(g) into `out`."""
        raise NotImplementedError(f"{type(self).__name__} must define value(g, out)")

    def slope(self, g: Any, out: Any) -> None:
        """Write the derivative sigma'(g) into `out`."""
        raise NotImplementedError(f"{type(self).__name__} must define slope(g, out)")

    def slope_bytes(self, shape: tuple[int, ...]) -> int:
        """Return how many bytes `slope` takes on the way, for arrays of this shape."""
        return 0

    def increment(self, g: Any, dg: Any, scratch: tuple[Any, Any]) -> None:
        """Overwrite `dg` by ``sigma(g + dg) - sigma(g)`` to full relative accuracy, however small `dg` is.

        Parameters
        ----------
        g : array
            Drive of the rest point.
        dg : array
            Its change; overwritten.
        scratch : pair of arrays
            All four have one shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must define increment(g, dg, scratch)")

    def potential(self, s: Any) -> Any:
        """Return an integral of sigma^-1 at `s`, element by element (up to a constant)."""
        raise NotImplementedError(f"{type(self).__name__} must define potential(s)")


class Clip(Activation):
    """``sigma(g) = clip(slope * g, low, high)``; derivative `slope` strictly inside the range, zero elsewhere."""

    def __init__(self, name: str, slope: float, low: float, high: float):
        self.name = instance("name", name, str, "a text")
        self.gain = number("slope", slope, above=0)
        self.low = number("low", low, infinite=True)
        self.high = number("high", high, infinite=True)
        require(self.low < self.high, f"low must be below high, not {self.low:g} and {self.high:g}")
        self.code = ("clip", (self.gain, self.low, self.high))

    def value(self, g: Any, out: Any) -> None:
        xp = array_module(g)
        source = g
        if self.gain != 1.0:
            source = xp.multiply(g, self.gain, out=out)
        xp.maximum(source, self.low, out=out)
        if self.high < math.inf:
            xp.minimum(out, self.high, out=out)

    def slope(self, g: Any, out: Any) -> None:
        xp = array_module(g)
        step = max(1, SLOPES_AT_ONCE // max(1, math.prod(g.shape[1:])))
        for start in range(0, len(g), step):
            part = g[start : start + step]
            inside = part > self.low / self.gain
            inside &= part < self.high / self.gain
            xp.multiply(inside, self.gain, out=out[start : start + step])

    def slope_bytes(self, shape: tuple[int, ...]) -> int:
        one = math.prod(shape[1:])
        return 2 * one * min(shape[0], max(1, SLOPES_AT_ONCE // max(1, one)))

    def increment(self, g: Any, dg: Any, scratch: tuple[Any, Any]) -> None:
        # A difference of two clips would lose a response below the precision of s; a clamp of the change does not. It
        # clamps drives: `clipped`, and how far g lies beyond it, exactly zero where g is inside its bounds.
        xp, (clipped, bound) = array_module(dg), scratch
        low, high = self.low / self.gain, self.high / self.gain
        xp.maximum(g, low, out=clipped)
        if high < math.inf:
            xp.minimum(clipped, high, out=clipped)
        xp.subtract(g, clipped, out=bound)
        dg += bound
        xp.subtract(low, clipped, out=bound)
        xp.maximum(dg, bound, out=dg)
        if high < math.inf:
            xp.subtract(high, clipped, out=bound)
            xp.minimum(dg, bound, out=dg)
        if self.gain != 1.0:
            dg *= self.gain

    def potential(self, s: Any) -> Any:
        return s * s * (0.5 / self.gain)


class Tanh(Activation):
    """``sigma(g) = center + height * tanh(rate * (g - center))``, a smooth clip."""

    def __init__(self, name: str, center: float, height: float, rate: float):
        self.name = instance("name", name, str, "a text")
        self.center = number("center", center)
        self.height = number("height", height, above=0)
        self.rate = number("rate", rate, above=0)
        self.low = self.center - self.height
        self.high = self.center + self.height
        self.code = ("tanh", (self.center, self.height, self.rate))

    def value(self, g: Any, out: Any) -> None:
        xp = array_module(g)
        xp.subtract(g, self.center, out=out)
        out *= self.rate
        xp.tanh(out, out=out)
        out *= self.height
        out += self.center

    def _decay(self, g: Any, out: Any) -> None:
        """Write ``e^(-2 |a|)``, ``a = rate (g - center)``, into `out`."""
        xp = array_module(g)
        xp.subtract(g, self.center, out=out)
        xp.abs(out, out=out)
        out *= -2 * self.rate
        xp.exp(out, out=out)

    def slope(self, g: Any, out: Any) -> None:
        # 1 - tanh(a)^2 would be rounded where it is tiny; 4 e / (1 + e)^2, e = e^(-2 |a|), is not.
        decay = g.copy()
        self._decay(g, decay)
        array_module(g).add(1, decay, out=out)
        out *= out
        array_module(g).divide(decay, out, out=out)
        out *= 4 * self.height * self.rate

    def slope_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * 8  # of a copy, at most in float64

    def increment(self, g: Any, dg: Any, scratch: tuple[Any, Any]) -> None:
        # tanh(a + b) - tanh(a) = sinh(b) / (cosh(a) cosh(a + b)), with e^-|x| in place of every e^|x|: each factor
        # keeps its digits, whether b is tiny or swings a saturated unit all the way back.
        xp, (first, second) = array_module(dg), scratch
        dg *= self.rate
        xp.subtract(g, self.center, out=first)
        first *= self.rate
        xp.add(first, dg, out=second)
        xp.abs(first, out=first)
        xp.abs(second, out=second)
        first += second
        second *= -2
        xp.exp(second, out=second)
        second += 1
        xp.copysign(second, dg, out=second)
        xp.abs(dg, out=dg)
        xp.subtract(dg, first, out=first)
        xp.minimum(first, 0, out=first)  # |b| <= |a| + |a + b|, but for rounding
        xp.exp(first, out=first)
        dg *= -2
        xp.expm1(dg, out=dg)
        dg *= first
        dg /= second
        self._decay(g, first)
        first += 1
        dg /= first
        dg *= -2 * self.height

    def potential(self, s: Any) -> Any:
        xp = array_module(s)
        edge = 1 - float(np.finfo(s.dtype).eps)  # at the ends themselves arctanh is infinite, and the limit log 2
        t = ((s - self.center) / self.height).clip(-edge, edge)
        bulk = t * xp.arctanh(t) + 0.5 * xp.log1p(-t * t)
        return self.center * s + self.height / self.rate * bulk


TANH = Tanh("tanh", 0.0, 1.0, 1.0)


class Gelu(Activation):
    """``sigma(g) = g (1 + tanh(u)) / 2``, ``u = sqrt(2 / pi) (g + 0.044715 g^3)``: Gaussian error linear unit, by its
    usual approximation (Hendrycks & Gimpel, arXiv 1606.08415).

    Not increasing below -0.75, so that no energy has it as its rest point: `potential` raises. States settle and EP's
    gradient is right all the same, for it needs symmetric connections and a slope, not an inverse.
    """

    RATE, CUBE = math.sqrt(2 / math.pi), 0.044715

    name = "gelu"
    low = -0.17004075057125

    def _half(self, g: Any) -> Any:
        """Return u."""
        return self.RATE * (g + self.CUBE * g**3)

    @staticmethod
    def _gate(u: Any) -> tuple[Any, Any]:
        """Return ``(1 + tanh(u)) / 2`` with all its digits, and ``e^(-2 |u|)``."""
        xp = array_module(u)
        decay = xp.exp(-2 * abs(u))
        return xp.where(u < 0, decay, 1) / (1 + decay), decay

    def value(self, g: Any, out: Any) -> None:
        array_module(g).multiply(g, self._gate(self._half(g))[0], out=out)

    def slope(self, g: Any, out: Any) -> None:
        gate, decay = self._gate(self._half(g))
        steepness = self.RATE * (1 + 3 * self.CUBE * g * g)
        array_module(g).add(gate, 2 * g * decay / (1 + decay) ** 2 * steepness, out=out)

    def increment(self, g: Any, dg: Any, scratch: tuple[Any, Any]) -> None:
        # With T = tanh(u) and T' = T + dT the increment is dg (1 + T) / 2 + (g + dg) dT / 2, dT as for the smooth clip.
        u = self._half(g)
        half = self.RATE * dg * (1 + self.CUBE * (3 * g * (g + dg) + dg * dg))
        TANH.increment(u, half, scratch)
        half *= 0.5 * (g + dg)
        dg *= self._gate(u)[0]
        dg += half

    def potential(self, s: Any) -> Any:
        raise ConfigurationError("gelu is not increasing, so no energy belongs to it; use another activation")


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Clip("hard_sigmoid", 1.0, 0.0, 1.0),
        Clip("half_hard_sigmoid", 0.5, 0.0, 1.0),
        Clip("relu6", 1.0, 0.0, 6.0),
        Clip("relu", 1.0, 0.0, math.inf),
        Tanh("sigmoid", 0.5, 0.5, 2.0),
        TANH,
        Gelu(),
    )
}


BUILT_IN = tuple(ACTIVATIONS)  # others are of plugins


def get_activation(activation: str | Activation) -> Activation:
    """Return the activation of the given name: ``hard_sigmoid`` clip(g, 0, 1), ``half_hard_sigmoid`` clip(g / 2, 0, 1)
    (Laborieux et al. 2021), ``relu6``, ``relu``, ``gelu``, ``sigmoid`` (logistic of 4 g - 2) or ``tanh``.

    Raises
    ------
    ConfigurationError
        If there is no such name.
    """
    if isinstance(activation, Activation):
        return activation
    return ACTIVATIONS[choose("activation", activation, ACTIVATIONS)]
