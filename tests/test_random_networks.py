"""Networks drawn at random, against oracle.py: states of every schedule and form, and all gradients.

A case is its seed: a failure prints it with the network. A case in which a unit comes within 1e-9 of a clip boundary
(1e-5 in float32), or two units of a pooling window within 1e-6 of each other (1e-4 in float32), is drawn again, as
rounding decides there. So is one with states beyond 100.
"""

import numpy as np
import pytest
from oracle import KINKS, SIGMA, Oracle, Phase, ep_gradients
from small import CLASSES, Teacher, oracle_terms

import cupyep as ep
from cupyep.kernels import winograd

SAMPLES = 3


def draw_network(rng, depth, precision):
    loss = str(rng.choice(["cross_entropy", "squared_error"]))
    shape = (*map(int, rng.integers(4, 10, 2)), int(rng.integers(1, 5)))
    layers = []
    for _ in range(depth - (loss == "squared_error")):
        kernel = int(rng.choice([1, 2, 3, 3, 5]))
        options = {"kernel": kernel, "stride": int(rng.choice([1, 1, 2, 3])), "padding": int(rng.integers(kernel))}
        options["pooling"] = str(rng.choice(["none", "max", "average"]))
        options["pool"] = int(rng.integers(1, 4))
        try:
            edge = ep.Conv2d(shape, int(rng.integers(1, 5)), **options)
        except ep.ConfigurationError:  # the map is too small
            edge = ep.Conv2d(shape, 2, kernel=1, padding=0) if len(shape) == 3 else ep.Linear(shape, 4)
        layers.append(edge)
        shape = edge.out_shape
    if loss == "squared_error":
        layers.append(ep.Linear(shape, CLASSES))
    how = {"activation": str(rng.choice(sorted(set(SIGMA) - {"identity"}))), "loss": loss, "precision": precision}
    feedback = float(rng.choice([1, 0.3, 0.1, 0.03]))
    net = ep.Network(layers, CLASSES, feedback=feedback, gain=float(rng.uniform(0.4, 0.9)), device="cpu", **how)
    for path, array in net.parameters().items():
        array[...] = rng.normal(0, 1, array.shape) * (np.abs(array).max() / 2 if path.endswith("weight") else 0.3)
    return net


def draw_signals(rng, depth):
    layers = [int(rng.integers(1, depth + 1))]
    kind = rng.integers(4)
    options = {"kappa": 0.5, "loss": str(rng.choice(["cross_entropy", "squared_error"])), "seed": 3}
    if kind == 0:
        return []
    if kind == 1:
        return [ep.LocalError(layers, **options)]
    return [ep.Distillation(Teacher(), layers, learned=bool(kind == 2), temperature=2.0, **options)]


def draw(seed, attempt, precision):
    """Return network, batch, signals and how to learn."""
    rng = np.random.default_rng([seed, attempt])
    depth = 1 + seed % 6
    net, signals = draw_network(rng, depth, precision), draw_signals(rng, depth)
    view = (np.arange(SAMPLES) % 2).astype(np.uint8)
    images = np.asarray(rng.uniform(0, 1, (SAMPLES, *net.input_shape)), net.dtype)
    batch = ep.Batch(images, rng.integers(0, CLASSES, SAMPLES), np.arange(SAMPLES) + 5, view)
    scheme = str(rng.choice(["centered", "onesided", "random", "tangent"]))
    how = {
        "scheme": scheme,
        "nudge": "deviation" if scheme == "tangent" else str(rng.choice(["classical", "deviation"])),
        "schedule": str(rng.choice(["synchronous", "evenodd", "sweeps"])),
        "beta": float(rng.choice([0.5, 0.1])),
        "free_steps": int(rng.integers(1, 7)),
        "nudged_steps": int(rng.integers(1, 7)),
        "relaxation": float(rng.choice([1.0, 0.8, 1.3])),
        "micro_batch": rng.choice([None, 1, 2]),
    }
    if how["schedule"] == "synchronous":  # would be refused
        how["relaxation"] = min(how["relaxation"], 1.0)
    if precision == "float32":  # a difference of float32 states carries no small response
        how["nudge"] = "deviation"
    return net, batch, signals, how, bool(rng.integers(2))


def expected(net, batch, signals, how):
    """Return the free phase, the nudged phases by beta, and the loss terms, of the oracle."""
    oracle, x = Oracle(net), np.array(batch.images, np.float64)
    free = Phase(oracle, x).run(how["schedule"], how["free_steps"], how["relaxation"])
    terms = oracle_terms(net, batch, signals)
    tangent = how["scheme"] == "tangent"

    def nudged(beta):
        more = {"start": free.layers} if how["nudge"] == "classical" else {"rest": free, "tangent": tangent}
        phase = Phase(oracle, x, terms=terms, beta=beta, **more)
        return phase.run(how["schedule"], how["nudged_steps"], how["relaxation"])

    beta = how["beta"]
    return free, {b: nudged(b) for b in ([1.0] if tangent else [beta, -beta])}, terms


def rounding_decides(phases, precision):
    kink, tie = (1e-9, 1e-6) if precision == "float64" else (1e-5, 1e-4)
    wild = max(np.abs(s).max() for phase in phases for s in phase.layers) > 100
    return wild or any(phase.kink < kink or phase.tie < tie for phase in phases)


def case(seed, precision):
    for attempt in range(100):
        drawn = draw(seed, attempt, precision)
        net, batch, signals, how, _ = drawn
        for signal in signals:
            net.bind(signal)
        wanted = expected(net, batch, signals, how)
        if not rounding_decides([wanted[0], *wanted[1].values()], precision):
            return drawn, wanted
    raise AssertionError(f"seed {seed}: no case in 100 draws")


def direction_derivative(loss, parameters, direction, step=1e-6):
    def at(t):
        return loss({path: p + t * direction[path] for path, p in parameters.items()})

    return (at(step) - at(-step)) / (2 * step)


def check_truths(net, batch, signals, how, free, seed, text):
    """BPTT and BP: the directional derivative of the loss of the oracle, where no kink is near."""
    rng, x = np.random.default_rng([seed, 7]), free.x
    bptt = ep.BackpropagationThroughTime(
        net, how["free_steps"], 3, schedule=how["schedule"], signals=signals, relaxation=how["relaxation"]
    )
    start = free.layers

    def loss(parameters, forward=False):
        oracle = Oracle(net, {p: v for p, v in parameters.items() if not p.startswith("signals")})
        layers = oracle.forward(x) if forward else oracle.settle(x, 3, start)
        return oracle.loss_value(layers, oracle_terms(net, batch, signals, parameters)).mean()

    for learner, forward in ((bptt, False), (ep.Backpropagation(net, signals=signals), True)):
        parameters = {path: np.array(p, np.float64) for path, p in learner.parameters().items()}
        found = learner.step(batch).gradients
        direction = {path: rng.normal(0, 1, p.shape) for path, p in parameters.items()}
        slopes = [
            direction_derivative(lambda p, f=forward: loss(p, f), parameters, direction, step) for step in (1e-6, 5e-7)
        ]
        if abs(slopes[0] - slopes[1]) > 1e-6 * max(1, abs(slopes[0])):  # a kink or a tie lies between
            continue
        mine = sum((found[path] * direction[path]).sum() for path in parameters)
        np.testing.assert_allclose(mine, slopes[1], rtol=1e-5, atol=1e-6, err_msg=f"{learner} {text}")


def check(seed, precision, monkeypatch):
    (net, batch, signals, how, by_winograd), (free, by_beta, terms) = case(seed, precision)
    if by_winograd:
        monkeypatch.setattr(winograd, "pays", lambda geometry, batch: True)
    text = f"seed {seed}, {precision}, winograd {by_winograd}\n{net.layers}\n{net.activation.name} {net.feedback} {how}"
    tolerance = 1e-9 if precision == "float64" else 1e-4

    def same(found, wanted, what, loss_of_digits=1.0):
        atol = tolerance * max(np.abs(wanted).max(), 1e-3) * loss_of_digits
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol, err_msg=f"{what}: {text}")

    settling = {"schedule": how["schedule"], "relaxation": how["relaxation"]}
    state = net.settle(batch, steps=how["free_steps"], **settling)
    for n, s in enumerate(free.layers):
        same(state.layers[n], s, f"free state {n + 1}")
    form = "tangent" if how["scheme"] == "tangent" else how["nudge"]
    for beta, phase in by_beta.items():
        nudged = net.settle(
            batch, state, targets=batch, beta=beta, nudge=form, signals=signals, steps=how["nudged_steps"], **settling
        )
        for n, s in enumerate(phase.layers):
            same((nudged.layers if form == "classical" else nudged.deviations)[n], s, f"nudged {n + 1}, beta {beta}")
    learner = ep.EquilibriumPropagation(net, signals=signals, generator=np.random.default_rng(seed), **how)
    sign = 1 if np.random.default_rng(seed).random() < 0.5 else -1
    betas = {"centered": [how["beta"], -how["beta"]], "onesided": [how["beta"]], "tangent": [1.0]}
    phases = [by_beta[b] for b in betas.get(how["scheme"], [sign * how["beta"]])]
    wanted = ep_gradients(free, phases)
    maps = {(term.layer, i): [t.map_gradient(p.state(term.layer - 1)) for p in phases for t in [term]]
            for i, term in enumerate(terms)}  # fmt: skip
    found = learner.step(batch).gradients
    for (layer, i), parts in maps.items():
        weight, bias = (sum(p[k] for p in parts) / len(parts) / SAMPLES for k in (0, 1))
        for path, value in (("weight", weight), ("bias", bias)):
            name = f"readout.{path}" if i == 0 else f"signals.0.layer{layer}.{path}"
            if name in found:
                wanted[name] = value
    assert found.keys() == wanted.keys(), text
    for path, value in wanted.items():
        lost = free.oracle.scales[0] / how["beta"] if form == "classical" else 1.0
        same(found[path], value, path, lost)
    if precision == "float64":
        check_truths(net, batch, signals, how, free, seed, text)


def test_the_sweep_draws_kinked_and_smooth_activations():
    assert KINKS.keys() < SIGMA.keys()


def seeds(first, last):
    return [pytest.param(seed, id=f"seed{seed}") for seed in range(first, last)]


@pytest.mark.parametrize("seed", seeds(0, 12))
def test_random_network(seed, monkeypatch):
    check(seed, "float64", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(12, 312))
def test_many_random_networks(seed, monkeypatch):
    check(seed, "float64", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(400, 460))
def test_random_networks_in_float32(seed, monkeypatch):
    check(seed, "float32", monkeypatch)
