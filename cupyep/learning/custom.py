"""Is a part of your own what it says? Signals, activations and edges against finite differences and their shapes.

Everything is done in float64, on copies: a few samples, random directions. What is wrong is raised as one line.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupyep.activations import ACTIVATIONS, BUILT_IN, Activation
from cupyep.backend import Device, get_device, get_precision
from cupyep.batch import Batch
from cupyep.errors import ConfigurationError, foreign_code, instance, require
from cupyep.graph import Graph
from cupyep.heads import Head, LossTerm
from cupyep.layers import Conv2d, Edge, Identity, Linear
from cupyep.memory.workspace import Memory
from cupyep.network import Network
from cupyep.signals import Augmenter

SAMPLES = 3
DIRECTIONS = 4
STEP = 1e-5
TOLERANCE = 1e-3  # a kink next to a random point costs less, a wrong factor more
EXACT = 1e-9  # of sums in another order


def check_parts(network: Network, signals: Sequence[Augmenter] = (), batch: Batch | None = None) -> None:
    """Check whatever in `network` and `signals` is not the package's own; see `check_signal` for the errors."""
    if type(network.activation) not in {type(ACTIVATIONS[name]) for name in BUILT_IN}:
        check_activation(network.activation)
    for edge in network.layers:
        if type(edge) not in (Conv2d, Identity, Linear):
            check_edge(edge, network.device)
    for signal in signals:
        if any(type(signal.term(layer)) is not Head for layer in network.bind(signal).layers):
            check_signal(signal, network, batch)


def check_signal(signal: Augmenter, network: Network, batch: Batch | None = None) -> None:
    """Check a signal: losses a sample, gradients against finite differences, forces added with their scale, kappa.

    Parameters
    ----------
    signal : Augmenter
        Stays as it is, bound or not.
    network : Network
    batch : Batch, optional
        Whose first samples are looked at; random images, labels and the first indices otherwise.

    Raises
    ------
    ConfigurationError
        Says what is wrong: a shape, a sign, a factor, or what was forgotten.
    """
    batch = _few(instance("network", network, Network), batch)
    name = type(instance("signal", signal, Augmenter)).__name__
    with foreign_code(name, ConfigurationError):
        _check_signal(name, copy.copy(signal), network, batch)


def _check_signal(name: str, twin: Augmenter, network: Network, batch: Batch) -> None:
    twin.network = None
    twin.layers = [network.graph.node(layer) for layer in twin.layers]
    twin.bind(network.state_shapes, network.classes, network.device, np.dtype(np.float64))
    for layer in twin.layers:
        term = twin.term(layer)
        require(
            getattr(term, "layer", None) == layer,
            f"{name}: its term for layer {layer} says that it looks at layer {getattr(term, 'layer', None)}",
        )
        _check_term(f"{name}, {network.graph.label(layer)}", term, twin.target(layer, batch), network, len(batch))
    _check_kappa(name, twin, batch)


def _few(network: Network, batch: Batch | None) -> Batch:
    if batch is not None:
        return network.labelled(batch).part(slice(0, SAMPLES))
    generator, rows = np.random.default_rng(0), np.arange(SAMPLES)
    images = generator.uniform(size=(SAMPLES, *network.input_shape))
    return network.batch(Batch(images, rows % network.classes, rows, np.zeros(SAMPLES, np.uint8)))


def _check_term(name: str, term: LossTerm, target: Any, network: Network, samples: int) -> None:
    generator, device = np.random.default_rng(term.layer), network.device
    shape = network.state_shapes[term.layer - 1]
    s = device.asarray(_states(generator, network.activation, (samples, *shape)))
    rows = samples if target is None else len(target)
    require(rows == samples, f"{name}: the target has {rows} rows for {samples} samples")
    _check_loss(name, term, s, target)
    before = s.copy()
    scale = device.asarray(generator.uniform(0.5, 2.0, samples))
    force = device.asarray(generator.standard_normal(s.shape))
    start = force.copy()
    try:
        term.add_force(s, target, scale, force)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{name}: the force cannot be added: {error}") from error
    require(bool((s == before).all()), f"{name}: the gradient changes the state that it is given")
    truth, added, written = [], [], []
    for v in _directions(generator, s.shape, device):
        truth.append(_difference(lambda step: term.loss(s + step, target), v))
        added.append(_rows(force - start, v))
        written.append(_rows(force, v))
    judge(f"{name}: the gradient", truth, added, written, device.to_numpy(scale))
    _check_learned(name, term, s, target, scale, device)


def _check_loss(name: str, term: LossTerm, s: Any, target: Any) -> None:
    loss = term.loss(s, target)
    found = getattr(loss, "shape", ())
    require(found == (len(s),), f"{name}: the loss has shape {found}, not one number a sample, ({len(s)},)")
    require(loss.dtype.kind == "f", f"{name}: the loss is of type {loss.dtype}, not of a floating one")
    alone = term.loss(s[:1], None if target is None else target[:1])
    same = abs(float(alone[0]) - float(loss[0])) <= EXACT * max(1.0, abs(float(loss[0])))
    require(
        same, f"{name}: the loss of a sample depends on the others of its batch; return a sum over each sample's own"
    )


def _check_learned(name: str, term: LossTerm, s: Any, target: Any, scale: Any, device: Device) -> None:
    generator = np.random.default_rng(1)
    parameters = term.parameters()
    gradients = {key: device.asarray(generator.standard_normal(array.shape)) for key, array in parameters.items()}
    starts = {key: array.copy() for key, array in gradients.items()}
    if parameters:
        term.add_parameter_gradient(s, target, scale, gradients)
    for key, array in parameters.items():
        _check_parameter(
            f"{name}: the gradient of '{key}'",
            array,
            lambda: (scale * term.loss(s, target)).sum(),
            starts[key],
            gradients[key],
            device,
        )


def _check_parameter(
    what: str, array: Any, value: Callable[[], Any], start: Any, gradient: Any, device: Device
) -> None:
    """Compare what was added to `start` with the differences of `value()` as `array` moves."""
    truth, added, written = [], [], []
    kept = array.copy()

    def moved(step: Any) -> Any:
        array[...] = kept + step
        return value().reshape(1)

    for v in _directions(np.random.default_rng(2), array.shape, device):
        truth.append(_difference(moved, v))
        added.append(((gradient - start) * v).sum().reshape(1))
        written.append((gradient * v).sum().reshape(1))
    array[...] = kept
    judge(what, truth, added, written)


def judge(what: str, truth: Any, added: Any, written: Any = None, scale: Any = None) -> None:
    """Raise `ConfigurationError` unless `added` is ``scale * truth``; it says in which way it is not.

    Each is a sequence of arrays (B,), a direction each: the difference quotient (`truth`), what was `added` along it,
    and what lies there now (`written`, where it was not empty). The `scale` (B,) is 1 by default.
    """
    truth, added, written = (
        np.array([np.asarray(row.get() if hasattr(row, "get") else row, float) for row in rows])
        for rows in (truth, added, added if written is None else written)
    )
    expected = truth if scale is None else scale * truth
    size = max(np.abs(expected).max(), np.abs(added).max(), 1e-12)

    def alike(a: np.ndarray, b: np.ndarray) -> bool:
        return bool(np.abs(a - b).max() <= TOLERANCE * size)

    if alike(added, expected):
        return
    if alike(written, expected):
        raise ConfigurationError(f"{what} is written over what was there; add it (+=)")
    if alike(added, -expected):
        raise ConfigurationError(f"{what} has the wrong sign")
    for unscaled, word in ((truth, ""), (-truth, " and its sign is wrong")):
        if scale is not None and alike(added, unscaled):
            raise ConfigurationError(f"{what} is added without its scale (-beta kappa a sample){word}")
    factor = float((added * expected).sum() / max((expected * expected).sum(), 1e-300))
    if factor != 0 and alike(added, factor * expected):
        raise ConfigurationError(f"{what} is {factor:.4g} times what it should be")
    norms = np.linalg.norm(added) * np.linalg.norm(expected)
    cosine = float((added * expected).sum() / norms) if norms else 0.0
    raise ConfigurationError(f"{what} is not what finite differences give (cosine {cosine:.3f})")


def _check_kappa(name: str, twin: Augmenter, batch: Batch) -> None:
    weights = []
    for kappa in (0.5, 1.0):
        twin.kappa = kappa
        weights.append({nudge.term.layer: nudge.weight for nudge in twin.nudges(batch)})
    missing = set(twin.layers) ^ set(weights[0])
    require(
        not missing, f"{name}: nudges() must give one summand for each of layers {twin.layers}, not {list(weights[0])}"
    )
    wrong = [layer for layer, weight in weights[0].items() if abs(weights[1][layer] - 2 * weight) > EXACT]
    require(
        not wrong, f"{name}: the weight of its nudges does not follow kappa (layers {wrong}); weigh each by self.kappa"
    )


def check_activation(activation: Activation) -> None:
    """Check an activation: range, slope and potential against differences, increments to full relative accuracy.

    A potential that is not defined, or refused, is not looked at: only the energy needs one.

    Raises
    ------
    ConfigurationError
        Says what is wrong.
    """
    name = f"activation {instance('activation', activation, Activation).name or type(activation).__name__}"
    with foreign_code(name, ConfigurationError):
        _check_activation(name, activation)


def _check_activation(name: str, activation: Activation) -> None:
    generator = np.random.default_rng(0)
    g = generator.uniform(-4, 4, (50, 8))

    def at(drive: np.ndarray, method: str = "value") -> np.ndarray:
        out, kept = np.full_like(drive, np.nan), drive.copy()
        getattr(activation, method)(drive, out)
        require(not np.isnan(out).any(), f"{name}: {method}(g, out) does not write into all of `out`")
        require(np.array_equal(drive, kept), f"{name}: {method}(g, out) changes g")
        getattr(activation, method)(kept, kept)
        require(np.array_equal(kept, out), f"{name}: {method}(g, out) is another one where `out` is g itself")
        return out

    far = at(np.concatenate([g, 100 * g]))
    inside = far.min() >= activation.low - EXACT and far.max() <= activation.high + EXACT
    found = f"{far.min():.4g} to {far.max():.4g}"
    require(inside, f"{name}: values reach from {found}, beyond its range {activation.low} to {activation.high}")
    right, middle, left = at(g + STEP), at(g), at(g - STEP)
    smooth = np.abs(right - 2 * middle + left) < STEP * STEP * 1e3  # no kink in between
    slope, quotient = at(g, "slope"), (right - left) / (2 * STEP)
    judge(f"{name}: slope", [quotient[smooth]], [slope[smooth]])
    steep = np.where(smooth & (np.abs(quotient) > 1e-2), slope, 0)
    for size in (1.0, 1e-3, 1e-20):
        dg = size * generator.uniform(-1, 1, g.shape)
        change, scratch = dg.copy(), (np.empty_like(g), np.empty_like(g))
        activation.increment(g, change, scratch)
        if size > 1e-6:
            judge(f"{name}: increment", [at(g + dg) - middle], [change])
        else:  # there only the slope is left; a difference of two values has no digits
            what = f"{name}: increment for a small dg (no difference of two values)"
            judge(what, [steep * dg / size], [change * (steep != 0) / size])
    _check_potential(name, activation, g, middle, steep)


def _check_potential(name: str, activation: Activation, g: Any, s: Any, steep: Any) -> None:
    room = np.minimum(s - activation.low, activation.high - s) > 1e-2
    rows = (steep > 1e-2) & room
    if not rows.any():
        return
    try:
        quotient = (activation.potential(s[rows] + STEP) - activation.potential(s[rows] - STEP)) / (2 * STEP)
    except (ConfigurationError, NotImplementedError):
        return
    require(quotient.shape == g[rows].shape, f"{name}: potential(s) must have the shape of s")
    judge(f"{name}: the derivative of the potential at sigma(g), which must be g,", [g[rows]], [quotient])


def check_edge(edge: Edge, device: Device | str = "cpu") -> None:
    """Check an edge: shapes, linearity, winners, the adjoint <Ax, y> = <x, A'y>, parameter gradients.

    Parameters
    ----------
    edge : Edge
        A copy with drawn parameters is looked at, so that it need not have any yet.
    device : Device or str

    Raises
    ------
    ConfigurationError
        Says what is wrong.
    """
    with foreign_code(type(instance("edge", edge, Edge)).__name__, ConfigurationError):
        _EdgeCheck(edge, get_device(device)).run()


class _EdgeCheck:
    """A copy of an edge in float64, with drawn parameters, two inputs and something above."""

    def __init__(self, edge: Edge, device: Device):
        self.edge, self.device, self.name = copy.deepcopy(edge), device, type(edge).__name__
        self.edge.reads_image = False  # all of it is checked, wherever it will be
        self.generator = np.random.default_rng(0)
        self.edge.initialize(np.random.default_rng(0), 1.0, device, np.dtype(np.float64))
        self.parameters = self.edge.parameters()
        strange = sorted(self.parameters.keys() - {"weight", "bias"})
        require(
            "weight" in self.parameters and not strange,
            f"{self.name}: parameters() must have a 'weight' and may have a 'bias', it has {sorted(self.parameters)}",
        )
        for array in self.parameters.values():
            array += self.drawn(array.shape, 0.1)
        self.memory = Memory(Graph([self.edge]), device, get_precision("float64"))
        shapes = [(SAMPLES, *shape) for shape in (edge.in_shape, edge.in_shape, edge.out_shape)]
        self.below, self.other, self.above = map(self.drawn, shapes)
        self.winners = device.xp.zeros(self.above.shape, np.uint8) if edge.has_winners else None

    def drawn(self, shape: tuple[int, ...], size: float = 1.0) -> Any:
        return self.device.asarray(size * self.generator.standard_normal(shape))

    def drive(self, s: Any) -> Any:
        return self._written("drive", s, self.above.shape, lambda out, ops: self.edge.drive(s, out, self.winners, ops))

    def linear(self, s: Any) -> Any:
        call = self.edge.linear_drive
        return self._written("linear_drive", s, self.above.shape, lambda out, ops: call(s, out, self.winners, ops))

    def topdown(self, s: Any) -> Any:
        call = self.edge.topdown
        return self._written("topdown", s, self.below.shape, lambda out, ops: call(s, self.winners, out, ops))

    def _written(self, method: str, s: Any, shape: tuple[int, ...], call: Callable[[Any, Any], None]) -> Any:
        """Return what `call` writes into an array of this shape, with the operations for today's parameters."""
        out, kept = self.device.xp.full(shape, np.nan), s.copy()
        self._guarded(method, lambda: call(out, self.memory.workspace(SAMPLES).ops[0]))
        require(not bool(self.device.xp.isnan(out).any()), f"{self.name}: {method} does not write into all of `out`")
        require(bool((s == kept).all()), f"{self.name}: {method} changes the state that it is given")
        return out

    def _guarded(self, method: str, call: Callable[[], None]) -> None:
        try:
            call()
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            shapes = f"{self.edge.in_shape} -> {self.edge.out_shape}"
            raise ConfigurationError(f"{self.name}: {method} fails for its shapes, {shapes}: {error}") from error

    def run(self) -> None:
        drive = self.drive(self.below)  # finds the winners that all below refers to
        one, two = self.linear(self.below), self.linear(self.other)
        both = self.linear(self.below + 2 * self.other)
        self._equal(both, one + 2 * two, "linear_drive is not linear at given winners (has_winners says whether any)")
        # What is left of the drive is the bias' share, the same in every sample.
        rest = drive - one
        self._equal(rest, rest[:1] + 0 * rest, "linear_drive is not the linear part of drive")
        down = self.topdown(self.above)
        size = float(abs(one * self.above).sum()) + float(abs(down * self.below).sum())
        upper, lower = float((one * self.above).sum()), float((self.below * down).sum())
        if abs(upper - lower) > EXACT * size:
            how = " (its sign is wrong)" if abs(upper + lower) <= EXACT * size else f" (factor {lower / upper:.4g})"
            raise ConfigurationError(
                f"{self.name}: topdown is not the adjoint of linear_drive, <Ax, y> = <x, A'y>{how}"
            )
        self._check_gradient()

    def _equal(self, a: Any, b: Any, what: str) -> None:
        require(float(abs(a - b).max()) <= EXACT * max(1.0, float(abs(b).max())), f"{self.name}: {what}")

    def _check_gradient(self) -> None:
        gradients = {key: self.drawn(array.shape) for key, array in self.parameters.items()}
        starts = {key: array.copy() for key, array in gradients.items()}
        ops, winners = self.memory.workspace(SAMPLES).ops[0], self.winners
        arguments = (self.below, self.above, winners, gradients["weight"], gradients.get("bias"), ops)
        self._guarded("add_gradient", lambda: self.edge.add_gradient(*arguments))
        for key, array in self.parameters.items():
            what = f"{self.name}: the gradient of '{key}'"
            value = lambda: (self.above * self.drive(self.below)).sum()  # noqa: E731
            _check_parameter(what, array, value, starts[key], gradients[key], self.device)


def _states(generator: np.random.Generator, activation: Activation, shape: tuple[int, ...]) -> np.ndarray:
    """Return states inside the range of an activation."""
    low, high = max(activation.low, -2.0), min(activation.high, 2.0)
    return low + (high - low) * generator.uniform(0.05, 0.95, shape)


def _directions(generator: np.random.Generator, shape: tuple[int, ...], device: Device) -> list[Any]:
    return [device.asarray(generator.standard_normal(shape)) for _ in range(DIRECTIONS)]


def _difference(value: Callable[[Any], Any], direction: Any) -> Any:
    return (value(STEP * direction) - value(-STEP * direction)) / (2 * STEP)


def _rows(force: Any, v: Any) -> Any:
    """Return ``<force, v>`` a sample."""
    return (force * v).reshape(len(v), -1).sum(axis=1)
