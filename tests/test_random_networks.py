"""Networks drawn at random, against oracle.py and torch_oracle.py: states of every schedule and form, all gradients.

A case is its seed: a failure prints it with the network. What rounding decides is drawn again: a unit within 1e-9 of a
clip boundary (1e-5 in float32); two units of a pooling window neither equal, as the package has it
(`Precision.tie_margin`), nor 1e-6 of the larger of the maximum and 1 apart (1e-4 in float32); states beyond 100. So is
a case of which no two finite differences agree. How many draws are rejected is bounded.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from oracle import EQUAL, KINKS, RANGE, SIGMA, Oracle, Phase, ep_gradients, levels, responses
from small import CLASSES, Teacher, oracle_terms

import cupyep as ep
from cupyep.backend.precision import get_precision
from cupyep.ops import winograd

SAMPLES = 3
NEAR = {"float64": (1e-9, 1e-6), "float32": (1e-5, 1e-4)}  # a clip boundary; a maximum
WINNERS = "winners"  # a kind of case: max-pooling that has not settled, states nudged, in float64
FAST = [*((seed, "float64") for seed in range(30)), *((seed, WINNERS) for seed in range(15))]
FAST += [(seed, "float32") for seed in range(400, 406)]
SLOW = [*((seed, "float64") for seed in range(30, 1230)), *((seed, WINNERS) for seed in range(15, 315))]
SLOW += [(seed, "float32") for seed in range(406, 806)]


class FeatureTeacher(Teacher):
    """Logits, and features of any shapes."""

    def __init__(self, shapes):
        self.feature_layers = {str(n): shape for n, shape in enumerate(shapes, 1)}

    def feature(self, layer, split, index, view):
        shape, seeds = self.feature_layers[layer], zip(index, view, strict=True)
        return np.stack([np.random.default_rng([int(layer), i, v]).uniform(0, 1, shape) for i, v in seeds])


def choose(rng, *values):
    return values[rng.integers(len(values))]


def draw_conv(rng, shape, kind, by_winograd):
    channels = int(rng.integers(1, 5))
    if kind == WINNERS or (by_winograd and rng.random() < 0.7):
        pooling = "max" if kind == WINNERS else choose(rng, "none", "max", "average")
        return ep.Conv2d(shape, channels, kernel=3, padding=1, pooling=pooling, pool=2)
    kernel = choose(rng, 1, 2, 3, 3, 5)
    options = {"stride": choose(rng, 1, 1, 2, 3), "padding": int(rng.integers(kernel)), "pool": int(rng.integers(1, 4))}
    return ep.Conv2d(shape, channels, kernel=kernel, pooling=choose(rng, "none", "max", "average"), **options)


def draw_network(rng, depth, kind, by_winograd):
    loss = choose(rng, "cross_entropy", "squared_error")
    least = 8 if kind == WINNERS else 4
    shape, layers = (*map(int, rng.integers(least, 10, 2)), int(rng.integers(1, 5))), []
    for _ in range(depth - (loss == "squared_error")):
        try:
            edge = draw_conv(rng, shape, kind, by_winograd)
        except (ep.ConfigurationError, ValueError):  # the map is too small
            edge = ep.Conv2d(shape, 2, kernel=1, padding=0) if len(shape) == 3 else ep.Linear(shape, 4)
        layers.append(edge)
        shape = edge.out_shape
    if loss == "squared_error":
        layers.append(ep.Linear(shape, CLASSES))
    precision = "float32" if kind == "float32" else "float64"
    how = {"activation": choose(rng, *sorted(SIGMA.keys() - {"identity"})), "loss": loss, "precision": precision}
    feedback = choose(rng, 1.0, 0.3) if kind == WINNERS else choose(rng, 1.0, 0.3, 0.1, 0.03)
    net = ep.Network(layers, CLASSES, feedback=feedback, gain=float(rng.uniform(0.4, 0.9)), device="cpu", **how)
    for path, array in net.parameters().items():
        array[...] = rng.normal(0, 1, array.shape) * (np.abs(array).max() / 2 if path.endswith("weight") else 0.3)
    return net


def draw_signal(rng, net):
    shapes = [edge.out_shape for edge in net.layers]
    layers = [int(n) for n in 1 + rng.permutation(net.depth)[: rng.integers(1, 3)]]
    kind = choose(rng, "local", "fixed", "learned", "features")
    if kind == "features":
        return ep.FeatureDistillation(FeatureTeacher(shapes), {n: str(n) for n in layers}, kappa=0.5)
    maps = [shapes[n - 1] for n in layers if len(shapes[n - 1]) == 3]
    pool = 2 if maps and min(min(shape[:2]) for shape in maps) >= 2 and rng.random() < 0.5 else None
    options = {"kappa": 0.5, "loss": choose(rng, "cross_entropy", "squared_error"), "seed": 3, "pool": pool}
    if kind == "local":
        return ep.LocalError(layers, learned=len(layers) == 2, **options)
    return ep.Distillation(Teacher(), layers, learned=kind == "learned", temperature=2.0, **options)


def draw_how(rng, seed, kind):
    """Return how to learn."""
    form = choose(rng, "classical", "deviation")
    scheme = choose(rng, "centered", "onesided", "random", "tangent")
    steps = 3 if kind == WINNERS else 7
    if kind == WINNERS:  # what comes to rest has the same winners in all phases
        form, scheme = "classical", ("centered", "onesided", "random")[seed % 3]
    if kind == "float32" or scheme == "tangent":  # a difference of float32 states carries no small response
        form = "deviation"
    schedule, relaxation = choose(rng, "synchronous", "evenodd", "sweeps"), choose(rng, 1.0, 0.8, 1.3)
    return {
        "scheme": scheme,
        "nudge": form,
        "schedule": schedule,
        "beta": choose(rng, 0.5, 0.9) if kind == WINNERS else choose(rng, 0.5, 0.1),
        "free_steps": int(rng.integers(1, steps)),
        "nudged_steps": int(rng.integers(1, steps)),
        "relaxation": min(relaxation, 1.0) if schedule == "synchronous" else relaxation,  # more would be refused
        "micro_batch": choose(rng, None, 1, 2),
    }


@dataclass
class Case:
    """Network, batch, signals and how to learn; what the oracle makes of it; why earlier draws were rejected."""

    net: ep.Network
    batch: ep.Batch
    signals: list
    how: dict
    by_winograd: bool
    text: str
    free: Phase = None
    phases: dict = field(default_factory=dict)  # by beta
    terms: dict = field(default_factory=dict)  # by path
    truths: list = field(default_factory=list)  # direction and derivative of the loss, of BPTT and of BP
    rejected: list = field(default_factory=list)

    @property
    def x(self):
        return self.free.x

    def parameters(self):
        learned = {
            f"signals.{i}.{path}": p for i, signal in enumerate(self.signals) for path, p in signal.parameters().items()
        }
        return {path: np.array(p, np.float64) for path, p in (self.net.parameters() | learned).items()}

    def loss(self, parameters, forward):
        """Return the loss that BPTT (three steps) or BP is to lower."""
        oracle = Oracle(self.net, {p: v for p, v in parameters.items() if not p.startswith("signals")})
        layers = oracle.forward(self.x) if forward else oracle.settle(self.x, 3, self.free.layers)
        return oracle.loss_value(layers, oracle_terms(self.net, self.batch, self.signals, parameters)).mean()


def draw(seed, attempt, kind):
    rng = np.random.default_rng([seed, attempt])
    depth, by_winograd = (2 + seed % 3 if kind == WINNERS else 1 + seed % 6), bool(rng.integers(2))
    net = draw_network(rng, depth, kind, by_winograd)
    signals = [net.bind(draw_signal(rng, net)) for _ in range(rng.integers(3))]
    images = np.asarray(rng.uniform(0, 1, (SAMPLES, *net.input_shape)), net.dtype)
    if rng.random() < 0.3:  # a flat area: units that are equal but for rounding
        images[:, : images.shape[1] // 2 + 2] = images[:, :1, :1]
    view = (np.arange(SAMPLES) % 2).astype(np.uint8)
    batch = ep.Batch(images, rng.integers(0, CLASSES, SAMPLES), np.arange(SAMPLES) + 5, view)
    how = draw_how(rng, seed, kind)
    text = f"seed {seed}, {kind}, winograd {by_winograd}\n{net.layers}\n{net.activation.name} {net.feedback} {how}"
    return Case(net, batch, signals, how, by_winograd, f"{text}\n{[(type(s).__name__, s.layers) for s in signals]}")


def solve(case):
    """Let the oracle settle all phases of a case."""
    how, oracle, x = case.how, Oracle(case.net), np.array(case.batch.images, np.float64)
    case.free = free = Phase(oracle, x).run(how["schedule"], how["free_steps"], how["relaxation"])
    paths = ["readout", *(f"signals.{i}.layer{n}" for i, signal in enumerate(case.signals) for n in signal.layers)]
    case.terms = dict(zip(paths, oracle_terms(case.net, case.batch, case.signals), strict=True))
    tangent = how["scheme"] == "tangent"
    for beta in [1.0] if tangent else [how["beta"], -how["beta"]]:
        more = {"start": free.layers} if how["nudge"] == "classical" else {"rest": free, "tangent": tangent}
        phase = Phase(oracle, x, terms=list(case.terms.values()), beta=beta, **more)
        case.phases[beta] = phase.run(how["schedule"], how["nudged_steps"], how["relaxation"])


def directional_derivative(loss, parameters, direction):
    """Return d loss by central differences, None where no two steps agree: a kink or a tie lies that near."""
    for step in (1e-6, 1e-7, 1e-8):
        slopes = []
        for t in (step, step / 2):
            ends = [loss({p: v + sign * t * direction[p] for p, v in parameters.items()}) for sign in (1, -1)]
            slopes.append((ends[0] - ends[1]) / (2 * t))
        if abs(slopes[0] - slopes[1]) <= 1e-6 * max(1, abs(slopes[0])):
            return slopes[0]
    return None


def objection(case, seed):
    """Return why a case must be drawn again, "" if it need not."""
    unrolled = Phase(case.free.oracle, case.x, start=case.free.layers).run("synchronous", 3)
    phases = [case.free, *case.phases.values(), unrolled]
    kink, tie = NEAR[case.net.precision.name]
    if max(np.abs(s).max() for phase in phases for s in phase.layers) > 100:
        return "wild"
    if any(phase.kink < kink for phase in phases):
        return "clip boundary"
    if any(phase.tie < tie for phase in phases):
        return "pooled units"
    if case.net.precision.name == "float64":
        rng, parameters = np.random.default_rng([seed, 7]), case.parameters()
        for forward in (False, True):
            direction = {path: rng.normal(0, 1, p.shape) for path, p in parameters.items()}
            slope = directional_derivative(functools.partial(case.loss, forward=forward), parameters, direction)
            if slope is None:
                return "finite differences"
            case.truths.append((direction, slope))
    return ""


@functools.cache
def case_of(seed, kind):
    rejected = []
    for attempt in range(100):
        case = draw(seed, attempt, kind)
        solve(case)
        if why := objection(case, seed):
            rejected.append(why)
            continue
        case.rejected = rejected
        return case
    raise AssertionError(f"seed {seed}, {kind}: no case in 100 draws: {Counter(rejected)}")


def learners_of(case):
    how, shared = case.how, {"signals": case.signals, "micro_batch": case.how["micro_batch"]}
    settling = {"schedule": how["schedule"], "relaxation": how["relaxation"]}
    bptt = ep.BackpropagationThroughTime(case.net, how["free_steps"], 3, **settling, **shared)
    return bptt, ep.Backpropagation(case.net, **shared)


class Comparison:
    """Equal within the tolerance of a case's precision, relative to the largest number."""

    def __init__(self, case):
        self.tolerance, self.text = 1e-9 if case.net.precision.name == "float64" else 1e-4, case.text

    def __call__(self, found, wanted, what, loss_of_digits=1.0):
        atol = self.tolerance * max(np.abs(wanted).max(), 1e-3) * loss_of_digits
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol, err_msg=f"{what}: {self.text}")


def check_phases(case, same):
    """States of the free and of the nudged phases."""
    net, batch, how = case.net, case.batch, case.how
    settling = {"schedule": how["schedule"], "relaxation": how["relaxation"]}
    state = net.settle(batch, steps=how["free_steps"], **settling)
    for n, s in enumerate(case.free.layers):
        same(state.layers[n], s, f"free state {n + 1}")
    form = "tangent" if how["scheme"] == "tangent" else how["nudge"]
    options = {"nudge": form, "signals": case.signals, "steps": how["nudged_steps"], **settling}
    for beta, phase in case.phases.items():
        nudged = net.settle(batch, state, targets=batch, beta=beta, **options)
        for n, s in enumerate(phase.layers):
            same((nudged.layers if form == "classical" else nudged.deviations)[n], s, f"nudged {n + 1}, beta {beta}")


def check_step(case, same, seed):
    """Gradients and statistics of a step."""
    net, batch, how, free = case.net, case.batch, case.how, case.free
    learner = ep.EquilibriumPropagation(net, signals=case.signals, generator=np.random.default_rng(seed), **how)
    sign = 1 if np.random.default_rng(seed).random() < 0.5 else -1
    betas = {"centered": [how["beta"], -how["beta"]], "onesided": [how["beta"]], "tangent": [1.0]}
    phases = [case.phases[b] for b in betas.get(how["scheme"], [sign * how["beta"]])]
    wanted = ep_gradients(free, phases)
    for path, term in case.terms.items():
        parts = [term.map_gradient(p.state(term.layer - 1)) for p in phases]
        for i, name in enumerate(["weight", "bias"] if path == "readout" else ["weight"]):
            if f"{path}.{name}" in case.parameters():
                wanted[f"{path}.{name}"] = sum(part[i] for part in parts) / len(parts) / SAMPLES
    result = learner.step(batch)
    assert result.gradients.keys() == wanted.keys() == case.parameters().keys(), case.text
    classical = how["nudge"] == "classical"  # a difference of states, divided by beta
    for path, value in wanted.items():
        a = free.oracle.scales[int(path.split(".")[1]) - 1] if path.startswith("layers") else 0.0
        same(result.gradients[path], value, path, max(1.0, a / how["beta"]) if classical else 1.0)
    same(result.nudge_response, responses(free, phases), "response")
    check_figures(case, result, same)


def check_figures(case, result, same):
    term, top = case.terms["readout"], case.free.layers[-1]
    same(result.loss, term.value(top).mean(), "loss")
    assert result.count == SAMPLES, case.text
    assert result.correct == (term.output(top).argmax(axis=1) == case.batch.labels).sum(), case.text
    largest = np.abs(RANGE[case.free.oracle.activation]).max()
    activity, saturated, dead = zip(*(levels(s, largest) for s in case.free.layers), strict=True)
    same(result.activity, activity, "activity")
    same(result.saturated, saturated, "saturated")
    if case.how["micro_batch"] is None:  # otherwise a mean over the parts
        same(result.dead, dead, "dead")


def check_truths(case):
    """BPTT and BP: the directional derivative of the loss of the oracle."""
    for learner, (direction, slope) in zip(learners_of(case), case.truths, strict=False):
        found = learner.step(case.batch).gradients
        mine = sum((found[path] * direction[path]).sum() for path in direction)
        np.testing.assert_allclose(mine, slope, rtol=1e-5, atol=1e-6, err_msg=f"{learner} {case.text}")


def check(seed, kind, request):
    case = case_of(seed, kind)
    if case.by_winograd:
        request.getfixturevalue("winograd_everywhere")
    same = Comparison(case)
    check_phases(case, same)
    check_step(case, same, seed)
    check_truths(case)


def check_by_torch(seed, kind):
    """BPTT and BP: all gradients by reverse mode, which needs no finite differences."""
    gradients, case = pytest.importorskip("torch_oracle").gradients, case_of(seed, kind)
    same, free = Comparison(case), case.free
    for learner, how in zip(learners_of(case), ({"steps": 3, "start": free.layers}, {}), strict=True):
        wanted = gradients(free.oracle, case.x, case.terms, case.parameters(), **how)
        found = learner.step(case.batch).gradients
        for path, value in wanted.items():
            same(found[path], value, f"{type(learner).__name__} {path}")


def check_draws(cases):
    """Few draws are rejected, and what is rarely drawn is drawn often enough."""
    found = [case_of(*case) for case in cases]
    rejected = Counter(why for case in found for why in case.rejected)
    edges = [edge for case in found for edge in case.net.layers if isinstance(edge, ep.Conv2d)]
    tried = [(edge, case) for case in found if case.by_winograd for edge in case.net.layers if edge in edges]
    qualified = sum(winograd.tile_size(edge.geometry, SAMPLES, case.net.precision) is not None for edge, case in tried)
    kinds = Counter(type(signal).__name__ for case in found for signal in case.signals)
    pooled = sum(term.pool > 1 for case in found for term in case.terms.values())
    several = sum(len(signal.layers) > 1 for case in found for signal in case.signals)
    text = f"{len(found)} cases, rejected {rejected}, {qualified} of {len(edges)} edges by Winograd, {kinds}, {pooled}"
    print(text, several)
    assert rejected["finite differences"] <= 0.02 * len(found), text
    assert rejected.total() <= 0.1 * len(found), text
    assert qualified >= 0.2 * len(edges), text
    assert min(kinds[name] for name in ("LocalError", "Distillation", "FeatureDistillation")) >= 0.1 * len(found), text
    assert pooled >= 0.1 * len(found), text
    assert several >= 0.1 * len(found), text


def named(cases):
    return [pytest.param(seed, kind, id=f"{kind}-seed{seed}") for seed, kind in cases]


def test_the_sweep_draws_kinked_and_smooth_activations():
    assert KINKS.keys() < SIGMA.keys() == RANGE.keys()


def test_equal_units_tie_in_both_precisions():
    for name, (_, tie) in NEAR.items():
        margin = get_precision(name).tie_margin
        assert EQUAL <= margin / 2 < max(winograd.TIE_MARGINS.values()) * margin < tie


@pytest.mark.parametrize(("seed", "kind"), named(FAST))
def test_random_network(seed, kind, request):
    check(seed, kind, request)


@pytest.mark.parametrize(("seed", "kind"), named(case for case in FAST if case[1] != "float32"))
def test_true_gradients_by_torch(seed, kind):
    check_by_torch(seed, kind)


@pytest.mark.usefixtures("winograd_everywhere")
def test_few_draws_are_rejected():
    check_draws(FAST)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kind"), named(SLOW))
def test_many_random_networks(seed, kind, request):
    check(seed, kind, request)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kind"), named(case for case in SLOW if case[1] != "float32"))
def test_many_true_gradients_by_torch(seed, kind):
    check_by_torch(seed, kind)


@pytest.mark.slow
@pytest.mark.usefixtures("winograd_everywhere")
def test_few_of_many_draws_are_rejected():
    check_draws(SLOW)
