"""A residual network: where it rests, its gradients, its energy, its memory, and graphs that are none.

Oracles: one dense linear solve, finite differences, graph_oracle.py; of memory, a twin in which no two arrays overlap,
and programs played on a board of cells.
"""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from graph_oracle import IMAGE, GraphOracle
from oracle import INVERSE, finite_difference, relative_error
from small import CLASSES, Teacher, batch_of, hosts, on_host

import cupyep as ep
from cupyep import settling
from cupyep.graph import Graph
from cupyep.memory import layout
from cupyep.memory.layout import ALWAYS, Request, allot
from cupyep.program import Drive, TopDown, Update, Value, make_program

SCHEDULES = ("synchronous", "evenodd", "sweeps")
LINEAR = ep.Clip("identity", 1.0, -1e6, 1e6)  # linear as long as nothing is that large


def residual(device="cpu", *, pooling="average", seed=0, gain=0.3, identity=True, **options):
    """Return skips over one node and two, of the image, a strided one, an identity, pooled and dense ones."""
    same = ep.Identity((3, 3, 4)) if identity else ep.Conv2d((3, 3, 4), 4, kernel=1, padding=0, bias=False)
    connections = [
        ("image", "stem", ep.Conv2d((6, 6, 2), 3)),
        ("image", "mid", ep.Conv2d((6, 6, 2), 4, pooling=pooling, bias=False)),
        ("stem", "mid", ep.Conv2d((6, 6, 3), 4, stride=2)),
        ("stem", "top", ep.Conv2d((6, 6, 3), 4, kernel=1, stride=2, padding=0, bias=False)),
        ("mid", "top", ep.Conv2d((3, 3, 4), 4)),
        ("mid", "side", same),
        ("top", "side", ep.Conv2d((3, 3, 4), 4, kernel=1, padding=0)),
        ("stem", "out", ep.Linear((108,), CLASSES, bias=False)),
        ("top", "out", ep.Linear((3, 3, 4), CLASSES, bias=False)),
        ("side", "out", ep.Linear((3, 3, 4), CLASSES)),
    ]
    rng = np.random.default_rng([seed, 5])
    order = rng.permutation(len(connections))
    layers = [ep.Connection(*connections[n]) for n in order]
    options = {"activation": "sigmoid", "precision": "float64", "feedback": 1.0} | options
    net = ep.Network(layers, CLASSES, gain=gain, seed=seed, device=device, **options)
    for path, array in net.parameters().items():
        if path.endswith(".bias"):
            array[...] = net.device.asarray(rng.uniform(0.1, 0.4, array.shape), net.dtype)
    return net


def named_terms(net, batch, signals=()):
    for signal in signals:
        net.bind(signal)
    return list(GraphOracle(net).terms(net, batch, signals).values())


class Dense:
    """The residual network as one matrix a sample: inputs ``s M + c`` of all nodes, at given winners."""

    def __init__(self, oracle, x, winners):
        self.oracle, self.names, starts = oracle, oracle.names, [0]
        for name in self.names:
            starts.append(starts[-1] + int(np.prod(oracle.shapes[name])))
        self.size = starts[-1]
        self.parts = {name: slice(starts[n], starts[n + 1]) for n, name in enumerate(self.names)}
        self.matrices = np.zeros((len(x), self.size, self.size))  # of each sample, from row to column
        self.constants = np.zeros((len(x), self.size))
        for link, its in zip(oracle.links, winners, strict=True):
            here = self.parts[link.above]
            for n in range(len(x)):
                below = oracle.shapes[link.below]
                basis = np.eye(int(np.prod(below))).reshape(-1, *below)
                rows = None if its is None else np.repeat(its[n : n + 1], len(basis), axis=0)
                zero = None if its is None else its[n : n + 1]
                bias = link.edge.bias if link.has_bias else 0.0
                self.constants[n, here] += np.broadcast_to(bias, link.shape_above).ravel()
                if link.below == IMAGE:
                    self.constants[n, here] += link.linear_drive(x[n : n + 1], zero).ravel()
                    continue
                drive, there = link.linear_drive(basis, rows).reshape(len(basis), -1), self.parts[link.below]
                self.matrices[n, there, here] += drive
                self.matrices[n, here, there] += oracle.ratio(link) * drive.T

    def flat(self, states):
        return np.concatenate([states[name].reshape(len(states[name]), -1) for name in self.names], axis=1)

    def named(self, rows):
        shapes = self.oracle.shapes
        return {name: rows[:, part].reshape(len(rows), *shapes[name]) for name, part in self.parts.items()}

    def loss_slope(self, states, terms):
        slopes = {name: np.zeros_like(s) for name, s in states.items()}
        for term in terms:
            slopes[term.layer] += term.gradient(states[term.layer])
        return slopes

    def rest(self, terms=(), beta=0.0):
        """Return where the linear network rests, nudged by losses whose gradients are linear in s."""
        samples, a = len(self.constants), np.ones(self.size)
        for name, part in self.parts.items():
            a[part] = self.oracle.a[name]
        zero = self.named(np.zeros((samples, self.size)))
        pull = self.flat(self.loss_slope(zero, terms)) if terms else 0.0
        right = self.constants - beta / a * pull
        hessian = np.zeros((self.size, self.size))
        if terms:  # a unit of one sample at a time, the others at zero
            for unit in range(self.size):
                row = np.zeros((samples, self.size))
                row[:, unit] = 1
                hessian[unit] = (self.flat(self.loss_slope(self.named(row), terms)) - pull)[0]
        systems = np.eye(self.size) - self.matrices + beta * hessian / a
        return self.named(np.stack([np.linalg.solve(m.T, r) for m, r in zip(systems, right, strict=True)]))

    def gradients(self, x, states, terms, winners):
        """Return the gradient of the mean loss at the equilibrium `states`, by path of connections."""
        oracle = self.oracle
        g = np.einsum("nij,ni->nj", self.matrices, self.flat(states)) + self.constants
        slope, loss = oracle.slope(g), self.flat(self.loss_slope(states, terms))
        # mu_i = dL/ds_i + sum over j of ds_j/ds_i mu_j, with ds_j/ds_i = M_ij slope_j
        mu = [
            np.linalg.solve(np.eye(self.size) - m * k, right)
            for m, k, right in zip(self.matrices, slope, loss, strict=True)
        ]
        q, s, result = self.named(slope * np.stack(mu)), states | {IMAGE: x}, {}
        for link, its in zip(oracle.links, winners, strict=True):
            found = link.gradient(s[link.below], q[link.above], its)
            if found and link.below != IMAGE:
                more = link.gradient(q[link.below], s[link.above], its)[f"{link.path}.weight"]
                found[f"{link.path}.weight"] = found[f"{link.path}.weight"] + oracle.ratio(link) * more
            result |= {path: gradient / len(x) for path, gradient in found.items()}
        return result


def in_package_order(oracle, states):
    return [states[name] for name in oracle.numbers]


@pytest.mark.parametrize("feedback", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_linear_residual_network_is_one_linear_solve(device, schedule, feedback):
    options = {"loss": "squared_error", "feedback": feedback, "gain": 0.2, "identity": feedback < 1}
    net = residual(
        device, activation=LINEAR, **options
    )  # at lambda 1 an identity alone has the gain 1, and never rests
    batch = batch_of(net)
    signals = [ep.LocalError(["top", "mid"], kappa=0.3, loss="squared_error", seed=5)]
    terms, oracle = named_terms(net, batch, signals), GraphOracle(net)
    x = net.device.to_numpy(batch.images)
    dense = Dense(oracle, x, [None] * len(oracle.links))
    how = {"steps": 120, "schedule": schedule, "relaxation": 1.0}
    free = net.settle(batch, **how)
    for found, s in zip(hosts(net, free.layers), in_package_order(oracle, dense.rest()), strict=True):
        np.testing.assert_allclose(found, s, rtol=1e-9, atol=1e-11)
    for nudge in ("classical", "deviation"):
        nudged = net.settle(batch, free, targets=batch, beta=0.3, nudge=nudge, signals=signals, **how)
        for found, s in zip(hosts(net, nudged.layers), in_package_order(oracle, dense.rest(terms, 0.3)), strict=True):
            np.testing.assert_allclose(found, s, rtol=1e-9, atol=1e-11)
    assert relative_error(hosts(net, nudged.layers)[0], hosts(net, free.layers)[0]) > 1e-4 * feedback**2


def equilibrium(device, pooling, feedback, seed=0):
    net = residual(device, pooling=pooling, feedback=feedback, seed=seed)
    batch = batch_of(net)
    signals = [ep.LocalError(["mid"], kappa=0.5, seed=3), ep.Distillation(Teacher(), ["side"], temperature=2.0, seed=4)]
    terms, oracle = named_terms(net, batch, signals), GraphOracle(net)
    free = net.settle(batch, steps=300, schedule="sweeps")
    assert float(free.stats.per_sample.max()) < 1e-14
    states = dict(zip(oracle.numbers, hosts(net, free.layers), strict=True))
    x = net.device.to_numpy(batch.images)
    winners = [None if w is None else net.device.to_numpy(w) for w in free.winners]
    truth = Dense(oracle, x, winners).gradients(x, states, terms, winners)
    return net, batch, signals, free, truth


def error_of(net, found, truth):
    """Return the relative error of each connection's gradient."""
    return np.array([relative_error(found[path], value) for path, value in truth.items()])


@pytest.mark.parametrize("feedback", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("pooling", ["average", "max"])
def test_ep_tends_to_the_gradient_of_the_equilibrium(device, pooling, feedback):
    """Against a dense linear solve: as beta one-sided, as beta^2 centered, exact in the tangent; BPTT is exact, too."""
    net, batch, signals, free, truth = equilibrium(device, pooling, feedback)
    steps = 120 if feedback == 1 else 40
    how = {"free_steps": 1, "nudged_steps": steps, "schedule": "sweeps", "signals": signals}
    forms = ["deviation"] if pooling == "max" else ["deviation", "classical"]
    for scheme, order, largest in (("onesided", 2.0, 0.01), ("centered", 4.0, 0.04)):
        for nudge in forms:
            errors = []
            for beta in (largest, largest / 2):
                learner = ep.EquilibriumPropagation(net, beta, scheme=scheme, nudge=nudge, **how)
                errors.append(error_of(net, on_host(net, learner.step_from(batch, free).gradients), truth))
            np.testing.assert_allclose(errors[0] / errors[1], order, rtol=0.1, err_msg=f"{scheme} {nudge}")
            assert errors[0].max() < 0.1
    tangent = ep.EquilibriumPropagation(net, scheme="tangent", **how).step_from(batch, free).gradients
    assert error_of(net, on_host(net, tangent), truth).max() < 1e-9
    bptt = ep.BackpropagationThroughTime(net, 1, steps, signals=signals, schedule="synchronous")
    assert error_of(net, on_host(net, bptt.step_from(batch, free).gradients), truth).max() < 1e-9
    limit, rest = bptt.step_from_equilibrium(batch, free)
    assert rest < 1e-5
    assert error_of(net, on_host(net, limit.gradients), truth).max() < 1e-4


def random_states(net):
    generator = np.random.default_rng(7)
    return [generator.uniform(0.2, 0.8, (3, *shape)) for shape in net.state_shapes]


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("feedback", [1.0, 0.3])
def test_energy_and_its_gradients(device, pooling, feedback):
    """The value is the oracle's formula; forces and parameter gradients are its differences."""
    net = residual(device, pooling=pooling, feedback=feedback, activation="hard_sigmoid")
    batch, signals, beta = batch_of(net), [ep.LocalError(["top"], kappa=0.7)], 0.35
    terms, oracle, energy = named_terms(net, batch, signals), GraphOracle(net), net.energy
    x, host, nudges = net.device.to_numpy(batch.images), random_states(net), net.nudges(batch, signals)

    def on_device():
        return [net.device.asarray(s) for s in host]

    def value():
        return float(energy.value(batch.images, on_device(), nudges, beta).sum())

    expected = oracle.energy(x, dict(zip(oracle.numbers, host, strict=True)), terms, beta)
    found = net.device.to_numpy(energy.value(batch.images, on_device(), nudges, beta))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    phi = net.device.to_numpy(energy.phi(batch.images, on_device()))
    for n, name in enumerate(oracle.numbers):
        s = dict(zip(oracle.numbers, host, strict=True)) | {IMAGE: x}
        np.testing.assert_allclose(phi[n], (s[name] * oracle.drive(name, s)).reshape(3, -1).sum(axis=1), rtol=1e-12)
    generator = np.random.default_rng(0)
    forces = hosts(net, energy.force(batch.images, on_device(), nudges, beta))
    for n, name in enumerate(oracle.numbers):
        entries = generator.choice(host[n].size, min(host[n].size, 8), replace=False)
        numeric = finite_difference(value, host[n], 1e-5, entries).ravel()[entries]
        wanted = forces[n].ravel()[entries] - oracle.a[name] * INVERSE["hard_sigmoid"](host[n].ravel()[entries])
        np.testing.assert_allclose(-numeric, wanted, rtol=1e-6, atol=1e-7)
    gradients = on_host(net, energy.parameter_gradient(batch.images, on_device()))
    assert gradients.keys() == {path for path in net.parameters() if not path.startswith("readout")}
    for path, gradient in gradients.items():
        parameter = net.parameters()[path]
        own = np.array(net.device.to_numpy(parameter))

        def moved(parameter=parameter, own=own):
            parameter[...] = net.device.asarray(own)
            return float(energy.value(batch.images, on_device()).sum())

        entries = generator.choice(own.size, min(own.size, 6), replace=False)
        numeric = finite_difference(moved, own, 1e-5, entries).ravel()[entries]
        parameter[...] = net.device.asarray(own)
        np.testing.assert_allclose(gradient.ravel()[entries], numeric, rtol=1e-6, atol=1e-7)


def test_depths_and_weights_by_hand():
    graph = residual().graph
    assert graph.depths == [1, 2, 3, 4, 5]
    assert graph.names == ["stem", "mid", "top", "side", "out"]
    assert graph.weights(0.5) == [16.0, 8.0, 4.0, 2.0, 1.0]
    pairs = zip(graph.connections, graph.feedback(0.5), strict=True)
    assert {(c.below, c.above): ratio for c, ratio in pairs} == {
        ("image", "stem"): 0, ("image", "mid"): 0, ("stem", "mid"): 0.5, ("stem", "top"): 0.25, ("mid", "top"): 0.5,
        ("mid", "side"): 0.25, ("top", "side"): 0.5,
        ("stem", "out"): 0.0625, ("top", "out"): 0.25, ("side", "out"): 0.5,
    }  # fmt: skip
    assert graph.colours == [[3], [2, 5], [1, 4]]  # three: skips close triangles
    chain = Graph([ep.Linear((2,), 2) for _ in range(5)])
    assert chain.colours == [[2, 4], [1, 3, 5]]


@pytest.mark.parametrize("kind", ["le", "kd"])
def test_signals_by_name_are_those_by_number(device, kind):
    def signal(layers):
        if kind == "le":
            return ep.LocalError(layers, kappa=0.5, seed=3)
        return ep.Distillation(Teacher(), layers, learned=True, seed=3)

    found = []
    for layers in (["top", "stem"], [3, 1], ["top", 1]):
        net = residual(device)
        learner = ep.EquilibriumPropagation(
            net, free_steps=3, nudged_steps=3, signals=[signal(layers)], schedule="synchronous"
        )
        found.append(on_host(net, learner.step(batch_of(net)).gradients))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for path, gradient in found[0].items():
            np.testing.assert_array_equal(gradient, other[path])
    assert residual().bind(signal(["side"])).layers == [4]


def test_features_by_name():
    net = residual()
    signal = net.bind(ep.FeatureDistillation(Teacher(), {"top": "middle"}))
    assert (signal.layers, signal.features) == ([3], {3: "middle"})
    assert len(net.nudges(batch_of(net), [signal])) == 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["tip"], "there is no layer 'tip'; did you mean 'top'?: the network has nodes stem, mid, top, side, out"),
        ([6], "there is no layer 6: the network has nodes stem, mid, top, side, out"),
        (["top", 3], "signal layers must not repeat"),
        (["image"], "there is no layer 'image'"),
    ],
)
def test_signals_at_no_node_are_one_line(layers, message):
    with pytest.raises(ep.ConfigurationError) as error:
        residual().bind(ep.LocalError(layers))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def dense(bias=True, units=4, inputs=4):
    return ep.Linear((inputs,), units, bias=bias)


@pytest.mark.parametrize(
    ("connections", "message"),
    [
        ([("image", "a", dense()), ("a", "b", dense()), ("b", "a", dense(False))], "a, b are connected in a cycle"),
        ([("image", "a", dense()), ("a", "a", dense(False))], "a are connected in a cycle"),
        ([("image", "a", dense()), ("x", "a", dense(False))], "node x is not reached from the image"),
        ([("image", "a", dense()), ("b", "c", dense()), ("c", "b", dense())], "b are connected in a cycle"),
        ([("image", "a", dense()), ("image", "b", dense())], "one node must lead nowhere, the output; a and b do"),
        ([("image", "a", dense()), ("a", "b", dense(inputs=5))], "node b takes (5,) but node a gives (4,)"),
        (
            [("image", "a", dense()), ("a", "b", dense()), ("image", "b", dense(False, 5))],
            "node b is (4,), but its connection from the image gives (5,)",
        ),
        (
            [("image", "a", dense()), ("a", "b", dense()), ("image", "b", dense(False, inputs=5))],
            "node b takes (5,) but the image gives (4,)",
        ),
        (
            [("image", "a", dense()), ("a", "b", dense()), ("image", "b", dense())],
            "node b has 2 biases, those of its connections from a and image",
        ),
        ([("image", "a.b", dense())], "a node's name is made of letters, digits, _ and -, not 'a.b'"),
        ([("image", 1, dense())], "a node's name is made of letters, digits, _ and -, not 1"),
        ([("image", "a", dense()), ("image", "a", dense(False))], "there are two connections from image to a"),
        ([("image", "a", dense()), ("a", "b", ep.Identity((4,)))], "node b has no weights"),
        ([("image", "a", dense()), ("a", "image", dense())], "the image is given: nothing leads into it"),
        ([], "a network needs at least one layer"),
        ([("image", "a", 5)], "layers must be a sequence of Edge, or of Connection"),
        (
            [
                ("image", "a", ep.Conv2d((4, 4, 2), 2)),
                ("image", "b", ep.Identity((32,))),
                ("a", "b", ep.Linear((4, 4, 2), 32)),
            ],
            "node b takes (32,) but the image gives (4, 4, 2)",
        ),
    ],
)
def test_what_is_no_graph_is_one_line(connections, message):
    with pytest.raises(ep.ConfigurationError) as error:
        Graph([ep.Connection(*c) for c in connections])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_edge_belongs_to_one_connection():
    edge = dense()
    with pytest.raises(ep.ConfigurationError, match="the edge from image to 1 is that of another connection too"):
        Graph([edge, edge])
    same = ep.Identity((4,))  # without weights it may be anywhere
    connections = [("image", "a", dense()), ("image", "b", same), ("a", "b", dense()), ("a", "c", same)]
    Graph([ep.Connection(*c) for c in [*connections, ("b", "c", dense())]])


# --- memory ---------------------------------------------------------------------------------------------------------


def random_graph(seed):
    """Return a graph of dense nodes of several sizes, most pairs of which are connected."""
    rng = np.random.default_rng([seed, 9])
    count = int(rng.integers(1, 8))
    sizes = [3, *(int(rng.integers(1, 40)) for _ in range(count))]
    pairs = {(n - 1 if rng.random() < 0.7 else int(rng.integers(0, n)), n) for n in range(1, count + 1)}
    pairs |= {(i, j) for j in range(1, count + 1) for i in range(j) if rng.random() < 0.3}
    pairs |= {(i, count) for i in range(1, count) if not any(below == i for below, _ in pairs)}
    names, seen, connections = ["image", *(f"n{n}" for n in rng.permutation(count))], set(), []
    for below, above in sorted(pairs):
        edge = ep.Linear((sizes[below],), sizes[above], bias=above not in seen)
        seen.add(above)
        connections.append(ep.Connection(names[below], names[above], edge))
    return Graph(connections)


class Board:
    """Memory as cells, each with who wrote there last; programs are played on it from their instructions alone."""

    def __init__(self, graph, schedule, image, warm):
        self.graph = graph
        cold = make_program(graph, schedule, False, image).lifetimes()
        self.program = make_program(graph, schedule, warm, image)
        constants = [Value("constant", graph.above[c]) for c in graph.out_of[0] if image]
        lives = dict.fromkeys(constants, ALWAYS) | cold  # warm programs have the places of cold ones
        requests = [Request((64 * self.size(value),), np.dtype("float32"), alive) for value, alive in lives.items()]
        places, nbytes = allot(requests)
        self.places = {
            value: slice(place // 256, place // 256 + self.size(value))
            for value, place in zip(lives, places, strict=True)
        }
        self.cells, self.nbytes = np.full(nbytes // 256, -1), nbytes
        self.sum_of_sizes = sum(map(self.size, lives)) * 256
        self.stamps, self.clock = {}, 0  # of each value its last writing
        self.alive = self.program.lifetimes()
        for value in constants:
            self.write(value)
        for value in self.program.unwritten:
            self.write(value)

    def size(self, value):
        ends = {"drive term": self.graph.above, "topdown term": self.graph.below}.get(value.kind)
        return int(np.prod(self.graph.shapes[(value.index if ends is None else ends[value.index]) - 1]))

    def write(self, value):
        self.clock += 1
        self.stamps[value] = self.clock
        self.cells[self.places[value]] = self.stamps[value]

    def read(self, value, where):
        intact = (self.cells[self.places[value]] == self.stamps[value]).all()
        assert intact, f"{value} is gone when read by instruction {where}: {self.program}"

    def poison(self, moment):
        """Spoil all cells that hold nothing alive."""
        living = np.zeros(len(self.cells), bool)
        for value, place in self.places.items():
            if self.alive.get(value, ALWAYS) >> moment & 1:
                living[place] = True
        self.cells[~living] = -1

    def play(self, instruction, where):
        if isinstance(instruction, Update):
            for value in (instruction.drive, instruction.topdown):
                if value is not None:
                    self.read(value, where)
            if instruction.keep is not None:
                self.write(Value("kept", instruction.node))
        elif instruction.add:
            kind = "drive term" if isinstance(instruction, Drive) else "topdown term"
            self.write(Value(kind, instruction.connection))
            self.read(instruction.out, where)
            self.read(Value(kind, instruction.connection), where)
            self.write(instruction.out)
        else:
            self.write(instruction.out)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_live_value_is_overwritten(schedule):
    """Three times round, cold and warm, with all memory outside lifetimes spoilt before each instruction."""
    saved = 0
    for seed in range(60):
        graph = random_graph(seed)
        for image in (True, False):
            for warm in (False, True):
                board = Board(graph, schedule, image, warm)
                for instruction in board.program.start:
                    board.play(instruction, "start")
                for _ in range(3):
                    for moment, instruction in enumerate(board.program.body):
                        board.poison(moment)
                        board.play(instruction, moment)
                saved += board.nbytes < board.sum_of_sizes
    assert saved > 60  # otherwise nothing lay over anything


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_iteration_has_one_drive_and_one_top_down_product_a_connection(schedule):
    for seed in range(30):
        graph = random_graph(seed)
        inner = [c for c, below in enumerate(graph.below) if below]
        for warm in (False, True):
            for image in (True, False):
                body = make_program(graph, schedule, warm, image).body
                drives = Counter(i.connection for i in body if isinstance(i, Drive) and graph.below[i.connection])
                topdowns = Counter(i.connection for i in body if isinstance(i, TopDown))
                assert drives == topdowns == Counter(inner)
                updates = Counter(i.node for i in body if isinstance(i, Update))
                assert updates == dict.fromkeys(range(1, len(graph.names) + 1), 2 if schedule == "sweeps" else 1)


@pytest.mark.parametrize("form", ["free", "classical", "deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_products_that_are_computed(monkeypatch, schedule, form):
    """Two a connection and iteration, none of them from the image, whatever adds up where."""
    net = residual(pooling="max", feedback=0.5)
    batch, free, counts = batch_of(net), net.settle(batch_of(net), steps=1, schedule="synchronous"), Counter()
    names = {id(c.edge): (c.below, c.above) for c in net.graph.connections}

    def counting(inner, kind):
        def counted(edge, *args):
            counts[(*names[id(edge)], kind)] += 1
            return inner(edge, *args)

        return counted

    for cls in (ep.Conv2d, ep.Linear, ep.Identity):
        for method in ("drive", "linear_drive", "topdown"):
            if cls is not ep.Linear or method != "drive":  # which calls the other
                monkeypatch.setattr(cls, method, counting(getattr(cls, method), "up" if "drive" in method else "down"))

    def counted_in(steps):
        counts.clear()
        beta = 1.0 if form == "tangent" else [0.3, -0.3]
        how = {} if form == "free" else {"targets": batch, "beta": beta, "nudge": form, "start": free}
        net.settle(batch, steps=steps, schedule=schedule, relaxation=1.0, **how)
        return Counter(counts)

    few, many = counted_in(2), counted_in(5)
    pairs = [(c.below, c.above) for c in net.graph.connections if c.below != IMAGE]
    assert many - few == {(*pair, kind): 3 for pair in pairs for kind in ("up", "down")}


@pytest.mark.parametrize("form", ["free", "classical", "deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_iteration_allocates_nothing(monkeypatch, schedule, form):
    """After the first: tracemalloc's peak within each, views and small objects aside; a state of mid takes 18 KiB."""
    net = residual(pooling="max", feedback=0.5, activation="hard_sigmoid")
    monkeypatch.setattr("cupyep.backend.threads.PART", 64)  # other threads would be counted, too
    batch, inner, peaks = batch_of(net, 64), settling._iterate, []
    free = net.settle(batch, steps=1, schedule="synchronous")

    def watched(phase, measure):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        inner(phase, measure)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)

    monkeypatch.setattr(settling, "_iterate", watched)
    beta = 1.0 if form == "tangent" else [0.3, -0.3]
    how = {} if form == "free" else {"targets": batch, "beta": beta, "nudge": form, "start": free}
    buffer_size = np.setbufsize(16)
    tracemalloc.start()
    try:
        net.settle(batch, steps=4, schedule=schedule, relaxation=1.0, copy=False, **how)  # in one part
    finally:
        tracemalloc.stop()
        np.setbufsize(buffer_size)
    assert len(peaks) == 4
    assert max(peaks[1:]) < 8192, peaks


def everything(net, batch, schedule):
    """Return arrays of phases of all forms, free from zero and from a state, and of all learners."""
    how, found = {"schedule": schedule, "steps": 3, "relaxation": 1.0}, []
    signals = [net.bind(ep.LocalError(["mid", "top"], kappa=0.5, seed=3))]
    free = net.settle(batch, **how)
    warm = net.settle(batch, free, **how)
    found += [*free.layers, *free.drives, free.stats.per_sample, *warm.layers, *warm.drives]
    for nudge, beta in (("classical", [0.4, -0.3]), ("deviation", [0.4, -0.3]), ("tangent", 1.0)):
        nudged = net.settle(batch, free, targets=batch, beta=beta, nudge=nudge, signals=signals, **how)
        found += [*nudged.layers, *(nudged.deviations or []), nudged.stats.per_sample]
    steps = {"free_steps": 3, "nudged_steps": 3, "schedule": schedule, "relaxation": 1.0, "signals": signals}
    for scheme, nudge in (("centered", "classical"), ("onesided", "classical"), ("centered", "deviation"),
                          ("onesided", "deviation"), ("tangent", "deviation")):  # fmt: skip
        learner = ep.EquilibriumPropagation(net, scheme=scheme, nudge=nudge, **steps)
        result = learner.step(batch)
        found += [*(g.copy() for g in result.gradients.values()), np.array(result.nudge_response)]
    for learner in (
        ep.BackpropagationThroughTime(net, 2, 3, schedule=schedule, signals=signals, relaxation=1.0),
        ep.Backpropagation(net, signals=signals),
    ):
        found += [g.copy() for g in learner.step(batch).gradients.values()]
    return found


@pytest.mark.parametrize("precision", ["float64", "float32", "float16"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_arrays_of_their_own_have_the_same_bits(monkeypatch, recwarn, pooling, schedule, precision):
    """A lavish twin: no two arrays that are taken together share memory, and all is NaN before anything is written."""
    options = {"pooling": pooling, "feedback": 0.5, "precision": precision}
    lean = residual(**options)
    batch = batch_of(lean, 4)
    wanted = everything(lean, batch, schedule)
    used = lean.memory._block.nbytes

    def apart(requests):
        places, top = [], 0
        for request in requests:
            places.append(top)
            top += layout.padded_bytes(request.shape, request.dtype)
        return places, top

    monkeypatch.setattr(layout, "allot", apart)
    lavish = residual(**options)
    lavish.memory.reserve(4 * used)
    lavish.memory._block[...] = 255
    found = everything(lavish, batch, schedule)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("nudge", ["classical", "deviation", "tangent"])
def test_nudged_phases_leave_the_free_state_alone_and_use_nothing_beyond(schedule, nudge):
    """What lies behind the free state is spoilt before the nudged phase starts: it is not used."""
    net = residual(pooling="max", feedback=0.5)
    batch = batch_of(net)
    how = {"targets": batch, "beta": 1.0 if nudge == "tangent" else [0.3, -0.3]}
    how |= {"steps": 3, "schedule": schedule, "relaxation": 1.0}
    kept = net.settle(batch, steps=4, schedule=schedule, relaxation=1.0)
    wanted = net.settle(batch, kept, nudge=nudge, **how)
    free = net.settle(batch, steps=4, schedule=schedule, copy=False, relaxation=1.0)
    net.memory._block[free.end :] = 255
    found = net.settle(batch, free, nudge=nudge, copy=False, **how)
    for a, b in zip(found.deviations or found.layers, wanted.deviations or wanted.layers, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(free.layers + free.drives, kept.layers + kept.drives, strict=True):
        np.testing.assert_array_equal(a, b)
