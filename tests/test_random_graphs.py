"""Graphs drawn at random, against graph_oracle.py and torch_oracle.py: states of all schedules and forms, gradients.

Skips over several nodes, of the image too, strided, pooled and identities, branches, dense nodes, and chains among
them. Drawn again is what rounding decides, as in test_random_networks.py.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from graph_oracle import GraphOracle, GraphPhase, bptt_gradients, ep_gradients
from oracle import SIGMA
from small import CLASSES, Teacher
from test_random_networks import WINNERS, Comparison, FeatureTeacher, choose, draw_how

import cupyep as ep
from cupyep.graph import IMAGE

SAMPLES = 3
UNROLLED = 3
FAST = [*((seed, "float64") for seed in range(36)), *((seed, WINNERS) for seed in range(12))]
SLOW = [*((seed, "float64") for seed in range(36, 800)), *((seed, WINNERS) for seed in range(12, 200))]


@functools.cache
def convolutions(source, target):
    """Return what `Conv2d` takes to lead from a map of one shape to one of another; those with a pool come apart."""
    plain, pooled = [], []
    for kernel, stride, pool in np.ndindex(3, 3, 3):
        for padding in range(kernel + 1):
            options = {"kernel": kernel + 1, "stride": stride + 1, "padding": padding, "pool": pool + 1}
            try:
                edge = ep.Conv2d(source, target[2], pooling="max", **options)
            except ep.ConfigurationError:
                continue
            if edge.out_shape == target:
                (pooled if pool else plain).append(options)
    return plain, pooled


def draw_edge(rng, source, target, bias, kind):
    """Return an edge from a state of one shape to one of another, None if there is none."""
    if len(target) == 1:
        return ep.Linear(choose(rng, source, (int(np.prod(source)),)), target[0], bias=bias)
    plain, pooled = convolutions(source, target) if len(source) == 3 else ([], [])
    if not plain and not pooled:
        return None
    use_pool = pooled and (not plain or kind == WINNERS or rng.random() < 0.5)
    options = choose(rng, *(pooled if use_pool else plain))
    pooling = "none" if options["pool"] == 1 else "max" if kind == WINNERS else choose(rng, "max", "average")
    return ep.Conv2d(source, target[2], pooling=pooling, bias=bias, **options)


def draw_shape(rng, source, known, kind):
    """Return the shape of a node from that of one below it, or that of another one, for identities."""
    if known and rng.random() < 0.5:
        return choose(rng, *known)
    if len(source) == 1 or (kind != WINNERS and rng.random() < 0.1):
        return (int(rng.integers(2, 6)),)
    height, width = source[:2]
    sizes = [(height, width), (height // 2, width // 2), (height - 1, width - 1)]
    return (*choose(rng, *(size for size in sizes if min(size) > 0)), int(rng.integers(1, 4)))


def draw_connections(rng, nodes, last, kind, is_chain):
    """Return the connections of a graph, those into a node in random order, the whole in random order."""
    names = [str(name) for name in rng.permutation([f"n{n}" for n in range(nodes - 1)] + ["a-b_1"])]
    shapes = {IMAGE: (*map(int, rng.integers(4, 8, 2)), int(rng.integers(1, 4)))}
    pairs = {}
    for n, name in enumerate(names):
        below = IMAGE if n == 0 else choose(rng, *[IMAGE, *names[:n]][-1 if is_chain else -3 :])
        source = shapes[below]
        shape = last if n == nodes - 1 else draw_shape(rng, source, [shapes[name] for name in names[:n]], kind)
        edge = draw_edge(rng, source, shape, True, kind)
        if edge is None:
            return None
        shapes[name], pairs[below, name] = shape, edge
        for other in [IMAGE, *names[:n]]:
            if other != below and not is_chain and rng.random() < 0.35:
                identity = shapes[other] == shape and rng.random() < 0.7
                edge = ep.Identity(shape) if identity else draw_edge(rng, shapes[other], shape, False, kind)
                pairs |= {(other, name): edge} if edge else {}
    for name in names[:-1]:
        if not any(below == name for below, _ in pairs):
            edge = draw_edge(rng, shapes[name], last, False, kind)
            if edge is None:
                return None
            pairs[name, names[-1]] = edge
    return [ep.Connection(*pair, edge) for pair, edge in pairs.items()]


def draw_network(rng, seed, kind):
    loss = choose(rng, "cross_entropy", "squared_error")
    last = (CLASSES,) if loss == "squared_error" else choose(rng, (4,), (1, 1, 3), (2, 2, 2))
    connections, is_chain = None, seed % 7 == 6
    while not connections:
        connections = draw_connections(rng, 2 + seed % 5, last, kind, is_chain)
    layers = [connections[n] for n in rng.permutation(len(connections))]
    if is_chain:
        layers = [c.edge for c in connections]
    feedback = choose(rng, 1.0, 0.3) if kind == WINNERS else choose(rng, 1.0, 0.3, 0.1)
    options = {"activation": choose(rng, *sorted(SIGMA.keys() - {"identity"})), "loss": loss, "feedback": feedback}
    net = ep.Network(layers, CLASSES, gain=float(rng.uniform(0.3, 0.7)), device="cpu", precision="float64", **options)
    for path, array in net.parameters().items():
        array[...] = rng.normal(0, 1, array.shape) * (np.abs(array).max() / 2 if path.endswith("weight") else 0.3)
    return net


def draw_signal(rng, net):
    """Return a signal at nodes by name or by number."""
    nodes = [int(n) for n in 1 + rng.permutation(net.depth)[: rng.integers(1, 3)]]
    layers = [choose(rng, n, net.graph.names[n - 1]) for n in nodes]
    kind = choose(rng, "local", "fixed", "learned", "features")
    if kind == "features":
        features = {layer: str(n) for layer, n in zip(layers, nodes, strict=True)}
        return ep.FeatureDistillation(FeatureTeacher(net.state_shapes), features, kappa=0.5)
    options = {"kappa": 0.5, "loss": choose(rng, "cross_entropy", "squared_error"), "seed": 3}
    if kind == "local":
        return ep.LocalError(layers, learned=len(layers) == 2, **options)
    return ep.Distillation(Teacher(), layers, learned=kind == "learned", temperature=2.0, **options)


@dataclass
class Case:
    """Network, batch, signals and how to learn; what the oracle makes of it; why earlier draws were rejected."""

    net: ep.Network
    batch: ep.Batch
    signals: list
    how: dict
    text: str
    oracle: GraphOracle = None
    start: dict = None  # of the free phase, None for zeros
    free: GraphPhase = None
    phases: dict = field(default_factory=dict)  # by beta
    terms: dict = field(default_factory=dict)  # by path
    rejected: list = field(default_factory=list)

    def parameters(self):
        learned = {f"signals.{i}.{path}": p for i, s in enumerate(self.signals) for path, p in s.parameters().items()}
        return {path: np.array(p, np.float64) for path, p in (self.net.parameters() | learned).items()}

    def package_start(self):
        return None if self.start is None else ep.State([self.start[name] for name in self.net.graph.names])


def draw(seed, attempt, kind):
    rng = np.random.default_rng([seed, attempt, 77])
    net = draw_network(rng, seed, kind)
    signals = [net.bind(draw_signal(rng, net)) for _ in range(rng.integers(3))]
    images = rng.uniform(0, 1, (SAMPLES, *net.input_shape))
    view = (np.arange(SAMPLES) % 2).astype(np.uint8)
    batch = ep.Batch(images, rng.integers(0, CLASSES, SAMPLES), np.arange(SAMPLES) + 5, view)
    how = draw_how(rng, seed, kind)
    case = Case(net, batch, signals, how, f"seed {seed}, {kind}\n{net}\n{how}")
    case.oracle = GraphOracle(net)
    if rng.random() < 0.4:
        low, high = max(net.activation.low, -1), min(net.activation.high, 1)
        shapes = zip(net.graph.names, net.state_shapes, strict=True)
        case.start = {name: rng.uniform(low, high, (SAMPLES, *shape)) for name, shape in shapes}
    return case


def solve(case):
    """Let the oracle settle all phases of a case."""
    how, oracle, x = case.how, case.oracle, case.batch.images
    case.free = free = GraphPhase(oracle, x, case.start).run(how["schedule"], how["free_steps"], how["relaxation"])
    case.terms = oracle.terms(case.net, case.batch, case.signals)
    tangent = how["scheme"] == "tangent"
    for beta in [1.0] if tangent else [how["beta"], -how["beta"]]:
        more = {"start": free.states} if how["nudge"] == "classical" else {"rest": free, "tangent": tangent}
        phase = GraphPhase(oracle, x, terms=list(case.terms.values()), beta=beta, **more)
        case.phases[beta] = phase.run(how["schedule"], how["nudged_steps"], how["relaxation"])


def objection(case):
    """Return why a case must be drawn again, "" if it need not."""
    unrolled = GraphPhase(case.oracle, case.batch.images, case.free.states).run("synchronous", UNROLLED)
    phases = [case.free, *case.phases.values(), unrolled]
    if max(np.abs(s).max() for phase in phases for s in phase.states.values()) > 100:
        return "wild"
    if any(phase.kink < 1e-9 for phase in phases):
        return "clip boundary"
    return "pooled units" if any(phase.tie < 1e-6 for phase in phases) else ""


@functools.cache
def case_of(seed, kind):
    rejected = []
    for attempt in range(100):
        case = draw(seed, attempt, kind)
        solve(case)
        if why := objection(case):
            rejected.append(why)
            continue
        case.rejected = rejected
        return case
    raise AssertionError(f"seed {seed}, {kind}: no case in 100 draws: {Counter(rejected)}")


def settled(case):
    how = case.how
    settling = {"schedule": how["schedule"], "relaxation": how["relaxation"]}
    return case.net.settle(case.batch, case.package_start(), steps=how["free_steps"], **settling), settling


def check_phases(case, same):
    """States of the free and of the nudged phases, drives and winners."""
    net, how, names = case.net, case.how, case.net.graph.names
    state, settling = settled(case)
    for name, s, g in zip(names, state.layers, state.drives, strict=True):
        same(s, case.free.states[name], f"free state of {name}")
        same(g, case.free.g[name], f"drive of {name}")
    for link, found in zip(case.oracle.links, state.winners, strict=True):
        wanted = case.free.winners[case.oracle.links.index(link)]
        assert (found is None) == (wanted is None), case.text
        if found is not None:
            np.testing.assert_array_equal(found, wanted, err_msg=f"winners {link.path}: {case.text}")
    form = "tangent" if how["scheme"] == "tangent" else how["nudge"]
    options = {"nudge": form, "signals": case.signals, "steps": how["nudged_steps"], **settling}
    for beta, phase in case.phases.items():
        nudged = net.settle(case.batch, state, targets=case.batch, beta=beta, **options)
        for n, name in enumerate(names):
            found = (nudged.layers if form == "classical" else nudged.deviations)[n]
            same(found, phase.states[name], f"nudged {name}, beta {beta}")
    return state


def check_step(case, same, seed, state):
    """Gradients of a step, whole and (from a cold start) in micro-batches."""
    how, free = case.how, case.free
    sign = 1 if np.random.default_rng(seed).random() < 0.5 else -1
    betas = {"centered": [how["beta"], -how["beta"]], "onesided": [how["beta"]], "tangent": [1.0]}
    phases = [case.phases[b] for b in betas.get(how["scheme"], [sign * how["beta"]])]
    wanted = ep_gradients(free, phases)
    for path, term in case.terms.items():
        parts = [term.map_gradient(p.state(term.layer)) for p in phases]
        for i, name in enumerate(["weight", "bias"] if path == "readout" else ["weight"]):
            if f"{path}.{name}" in case.parameters():
                wanted[f"{path}.{name}"] = sum(part[i] for part in parts) / len(parts) / SAMPLES
    learner = ep.EquilibriumPropagation(
        case.net, signals=case.signals, generator=np.random.default_rng(seed), **how | {"micro_batch": None}
    )
    results = [learner.step_from(case.batch, state)]
    if case.start is None:
        generator = np.random.default_rng(seed)
        results.append(
            ep.EquilibriumPropagation(case.net, signals=case.signals, generator=generator, **how).step(case.batch)
        )
    for result in results:
        assert result.gradients.keys() == wanted.keys() == case.parameters().keys(), case.text
        for path, value in wanted.items():
            a = case.oracle.a[path.split(".")[1]] if path.startswith("layers") else 0.0
            lost = max(1.0, a / how["beta"]) if how["nudge"] == "classical" else 1.0  # a difference of states
            same(result.gradients[path], value, path, lost)


def check_bptt(case, same, state):
    """BPTT from the free state, against the oracle's."""
    net, batch, terms = case.net, case.batch, case.terms
    learner = ep.BackpropagationThroughTime(net, 1, UNROLLED, signals=case.signals, schedule="synchronous")
    found = learner.step_from(batch, state).gradients
    wanted = bptt_gradients(case.oracle, batch.images, case.free.states, UNROLLED, list(terms.values()))
    assert wanted.keys() <= found.keys(), case.text
    for path, value in wanted.items():
        same(found[path], value, f"BPTT {path}")


def check(seed, kind):
    case = case_of(seed, kind)
    same = Comparison(case)
    state = check_phases(case, same)
    check_step(case, same, seed, state)
    check_bptt(case, same, state)


def check_by_torch(seed, kind):
    """BPTT from the free state, and BP: all gradients by reverse mode."""
    gradients, case = pytest.importorskip("torch_oracle").graph_gradients, case_of(seed, kind)
    same, (state, _) = Comparison(case), settled(case)
    bptt = ep.BackpropagationThroughTime(case.net, 1, UNROLLED, signals=case.signals, schedule="synchronous")
    bp = ep.Backpropagation(case.net, signals=case.signals)
    ways = {"BPTT": (lambda: bptt.step_from(case.batch, state), {"steps": UNROLLED, "start": case.free.states})}
    for name, (step, how) in (ways | {"BP": (lambda: bp.step(case.batch), {})}).items():
        wanted = gradients(case.oracle, case.batch.images, case.terms, case.parameters(), **how)
        found = step().gradients
        assert found.keys() == wanted.keys(), case.text
        for path, value in wanted.items():
            same(found[path], value, f"{name} {path}")


def check_bp_by_differences(seed, kind):
    """BP along one direction, by central differences of the loss of the oracle's forward pass; False at a kink."""
    case, rng = case_of(seed, kind), np.random.default_rng(seed)
    parameters = case.parameters()
    direction = {path: rng.normal(0, 1, p.shape) for path, p in parameters.items()}

    def loss(step):
        moved = {path: p + step * direction[path] for path, p in parameters.items()}
        oracle = GraphOracle(case.net, {path: p for path, p in moved.items() if not path.startswith("signals")})
        terms = oracle.terms(case.net, case.batch, case.signals, moved).values()
        return oracle.loss_value(oracle.forward(case.batch.images), terms).mean()

    slopes = [(loss(step) - loss(-step)) / (2 * step) for step in (1e-6, 5e-7)]
    found = ep.Backpropagation(case.net, signals=case.signals).step(case.batch).gradients
    if abs(slopes[0] - slopes[1]) > 1e-6 * max(1, abs(slopes[0])):
        return False
    mine = sum((found[path] * direction[path]).sum() for path in direction)
    np.testing.assert_allclose(mine, slopes[0], rtol=1e-5, atol=1e-6, err_msg=case.text)
    return True


def check_draws(cases):
    """Few draws are rejected, and what is rarely drawn is drawn often enough."""
    found = [case_of(*case) for case in cases]
    rejected = Counter(why for case in found for why in case.rejected)
    edges = [(c, case.net.graph) for case in found for c in case.net.graph.connections]
    kinds = Counter()
    for c, graph in edges:
        node, below = graph.node(c.above), 0 if c.below == IMAGE else graph.node(c.below)
        kinds["identity"] += isinstance(c.edge, ep.Identity)
        kinds["several into a node"] += len(graph.into[node]) > 1
        kinds["several out of a node"] += below > 0 and len(graph.out_of[below]) > 1
        kinds["long skip"] += below > 0 and graph.depths[node - 1] - graph.depths[below - 1] > 1
        kinds["skip from the image"] += below == 0 and graph.depths[node - 1] > 1
        kinds["strided"] += getattr(c.edge, "stride", 1) > 1
        kinds["max"] += getattr(c.edge, "pooling", "") == "max"
        kinds["average"] += getattr(c.edge, "pooling", "") == "average"
        kinds["no bias"] += not c.edge.has_bias
    text = f"{len(found)} cases of {len(edges)} connections, rejected {rejected}, {kinds}"
    print(text)
    assert min(kinds.values()) >= 0.02 * len(edges), text
    assert sum(case.net.graph.is_chain for case in found) >= 0.1 * len(found), text
    assert sum(len(case.net.graph.colours) > 2 for case in found) >= 0.2 * len(found), text
    assert sum(case.start is not None for case in found) >= 0.2 * len(found), text
    assert rejected.total() <= 0.2 * len(found), text


def named(cases):
    return [pytest.param(seed, kind, id=f"{kind}-seed{seed}") for seed, kind in cases]


@pytest.mark.parametrize(("seed", "kind"), named(FAST))
def test_random_graph(seed, kind):
    check(seed, kind)


@pytest.mark.parametrize(("seed", "kind"), named(FAST))
def test_true_gradients_by_torch(seed, kind):
    check_by_torch(seed, kind)


def test_backpropagation_by_differences():
    assert sum(check_bp_by_differences(*case) for case in FAST[:20]) >= 18


def test_what_is_drawn():
    check_draws(FAST)


def test_colours_are_a_partition_that_no_connection_joins():
    for case in (case_of(*pair) for pair in FAST):
        graph = case.net.graph
        assert sorted(node for colour in graph.colours for node in colour) == list(range(1, case.net.depth + 1))
        colour = {node: number for number, nodes in enumerate(graph.colours) for node in nodes}
        assert all(colour[b] != colour[a] for b, a in zip(graph.below, graph.above, strict=True) if b), case.text


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kind"), named(SLOW))
def test_many_random_graphs(seed, kind):
    check(seed, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kind"), named(SLOW))
def test_many_true_gradients_by_torch(seed, kind):
    check_by_torch(seed, kind)


@pytest.mark.slow
def test_what_is_drawn_of_many():
    check_draws(SLOW)
