"""The network as a user meets it. Oracle: oracle.py, sorting by hand, and the messages a user must see."""

import numpy as np
import pytest
from graph_oracle import GraphOracle
from oracle import Oracle
from residual import residual
from small import CLASSES, batch_of, network, on_host
from strict import StrictDevice

import cupyep as ep


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_parameters_are_updated_in_place(device):
    net = network("conv", device)
    names = [f"layers.{n}.{name}" for n in (1, 2, 3) for name in ("weight", "bias")]
    assert list(net.parameters()) == [*names, "readout.weight", "readout.bias"]
    net.parameters()["layers.2.weight"][...] = 0.5
    assert float(net.layers[1].weight.max()) == 0.5
    assert list(network("dense", device, loss="squared_error").parameters())[-1] == "layers.4.bias"


def test_load_parameters(device):
    a, b = network("conv", device, seed=1), network("conv", device, seed=2)
    b.load_parameters({path: p.astype(np.float32) for path, p in on_host(a, a.parameters()).items()})
    for path, p in on_host(b, b.parameters()).items():
        np.testing.assert_array_equal(p, on_host(a, a.parameters())[path].astype(np.float32))
    assert b.parameters()["readout.weight"].dtype == np.float64
    batch = batch_of(a)
    for path, p in a.parameters().items():
        p[...] = b.parameters()[path]
    for s, t in zip(
        a.settle(batch, steps=4, schedule="synchronous").layers,
        b.settle(batch, steps=4, schedule="synchronous").layers,
        strict=True,
    ):
        np.testing.assert_array_equal(a.device.to_numpy(s), b.device.to_numpy(t))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"layers.1.weight": None}, ["missing ['layers.1.weight']", "unknown []"]),
        ({"layers.9.weight": np.zeros(3)}, ["unknown ['layers.9.weight']"]),
        ({"readout.bias": np.zeros(7)}, ["readout.bias", "(7,)", "(3,)"]),
        ({"layers.2.weight": np.zeros((3, 3, 4, 3))}, ["layers.2.weight", "(3, 3, 4, 3)", "(3, 3, 3, 4)"]),
    ],
)
def test_load_parameters_refuses_what_does_not_fit(device, change, parts):
    """One line, and nothing is changed: not even the arrays that would have fitted."""
    net = network("conv", device)
    before = on_host(net, net.parameters())
    wrong = {path: p + 1 for path, p in before.items()} | change
    with pytest.raises(ep.ConfigurationError) as error:
        net.load_parameters({path: p for path, p in wrong.items() if p is not None})
    one_line(error, *parts)
    for path, p in on_host(net, net.parameters()).items():
        np.testing.assert_array_equal(p, before[path])


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_scores_are_the_readout_of_the_settled_state(device, loss):
    net = network("conv", device, loss=loss)
    batch = batch_of(net, samples=5)
    oracle = Oracle(net)
    top = oracle.settle(net.device.to_numpy(batch.images), 6)[-1]
    expected = oracle.readout_term(batch.labels).output(top)
    scores = net.scores(batch.images, steps=6, schedule="synchronous")
    np.testing.assert_allclose(net.device.to_numpy(scores), expected, rtol=1e-11)
    net.scores(batch_of(net, samples=5, seed=9).images, steps=6, schedule="synchronous")
    np.testing.assert_allclose(net.device.to_numpy(scores), expected, rtol=1e-11, err_msg="scores were overwritten")


@pytest.mark.parametrize("ask", ["scores", "predict"])
def test_scores_and_predictions_name_what_they_do_not_take(ask):
    """What `settle` takes besides has no meaning for them; all that they take, they take."""
    net = network("dense", "cpu")
    batch, start = batch_of(net), net.settle(batch_of(net))
    for name in ("copy", "targets", "retain", "feedforward", "unrolled_steps", "stepps"):
        with pytest.raises(ep.ConfigurationError) as error:
            getattr(net, ask)(batch, **{name: False})
        one_line(error, f"unknown argument of scores or predict '{name}'", "steps, schedule, tolerance")
    how = {"steps": 3, "schedule": "sweeps", "tolerance": 1e9, "relaxation": 1.0, "check_every": 2, "record": True}
    assert len(getattr(net, ask)(batch, start=start, **how)) == len(batch)


@pytest.mark.parametrize("k", [1, 2])
def test_an_image_without_a_finite_score_has_no_class(device, k):
    """It would be of class 0. With weights of 1 states grow without bound; without a drive they stay 0."""
    net = ep.Network([ep.Linear((3,), 4), ep.Linear((4,), 4)], 3, activation="relu", feedback=1.0, device=device)
    for name, p in net.parameters().items():
        p[...] = 1.0 if name.endswith("weight") else 0.0
    x = device.xp.stack([-device.xp.ones(3), device.xp.ones(3)])
    how = {"steps": 90, "schedule": "synchronous"}
    with np.errstate(over="ignore", invalid="ignore"):
        assert net.predict(x[:1], **how) == [0]
        with pytest.raises(ep.DivergenceError, match="image 1: its scores are NaN or infinite"):
            net.predict(x, k, **how)


def test_predict_top_k(device):
    net = network("conv", device)
    images = net.device.to_numpy(batch_of(net, samples=6).images)
    oracle = Oracle(net)
    z = oracle.readout_term(np.zeros(6, int)).output(oracle.settle(images, 6)[-1])
    ranked = [sorted(range(CLASSES), key=lambda c, row=row: -row[c]) for row in z]
    for k in (2, 3):
        found = net.predict(images, k=k, steps=6, schedule="synchronous")
        assert type(found) is np.ndarray
        assert found.tolist() == [row[:k] for row in ranked]
    assert net.predict(images, steps=6, schedule="synchronous").tolist() == [row[0] for row in ranked]
    for k in (0, 4):
        with pytest.raises(ep.ConfigurationError) as error:
            net.predict(images, k=k, schedule="synchronous")
        one_line(error, "k must be an integer from 1 to 3")


def test_learners_evaluate_by_the_same_scores(device):
    net = network("conv", device)
    batch = batch_of(net, samples=5)
    oracle = Oracle(net)
    term = oracle.readout_term(batch.labels)
    bptt = ep.BackpropagationThroughTime(net, free_steps=4, unrolled_steps=2, schedule="synchronous")
    top = oracle.settle(net.device.to_numpy(batch.images), 6)[-1]
    for learner in (ep.EquilibriumPropagation(net, free_steps=6, schedule="synchronous"), bptt):
        loss, correct = learner.evaluate(batch.images, batch.labels)
        assert float(loss) == pytest.approx(term.value(top).sum(), rel=1e-11)
        assert int(correct) == (term.output(top).argmax(axis=1) == batch.labels).sum()


@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (2, 2, 6, 6), (6, 6, 2), (2, 5, 6, 2), (0, 6, 6, 2)])
def test_images_of_a_wrong_shape_are_one_line(device, shape):
    net = network("conv", device)
    for call in (net.settle, net.scores, net.predict):
        with pytest.raises(ep.ConfigurationError) as error:
            call(device.xp.zeros(shape))
        hints = {(0, 6, 6, 2): "N is at least 1", (2, 2, 6, 6): "x.transpose(0, 2, 3, 1)"}
        one_line(error, str(shape), "(N, 6, 6, 2)", hints.get(shape, ""))


X = np.zeros((2, 6, 6, 2))


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda net, free: net.settle(X, targets=[0, 1], schedule="synchronous"), ["beta that is not 0"]),
        (lambda net, free: net.settle(X, beta=0.5, schedule="synchronous"), ["needs targets"]),
        (lambda net, free: net.settle(X, targets=[0, 1], beta=0.5, schedule="synchronous"), ["starts at a free state"]),
        (
            lambda net, free: net.settle(X, free, targets=[0, 1, 2], beta=0.5, schedule="synchronous"),
            ["2 images need 2 labels"],
        ),
        (
            lambda net, free: net.settle(X, free, targets=np.eye(3)[:2], beta=0.5, schedule="synchronous"),
            ["2 images need 2 labels", "of one-hot rows take y.argmax(axis=1)"],
        ),
        (lambda net, free: net.settle(X, free, targets=[0, 3], beta=0.5, schedule="synchronous"), ["from 0 to 2"]),
        (
            lambda net, free: net.settle(X, free, targets=[0, 1], beta=[0.5, 0.0], schedule="synchronous"),
            ["other than 0"],
        ),
        (
            lambda net, free: net.settle(X, free, targets=[0, 1], beta=float("nan"), schedule="synchronous"),
            ["beta must be a finite number, not nan"],
        ),
        (
            lambda net, free: net.settle(X, free, targets=[0, 1], beta=1, nudge="tangents", schedule="synchronous"),
            ["did you mean 'tangent'"],
        ),
        (lambda net, free: net.settle(np.zeros((3, 6, 6, 2)), free, schedule="synchronous"), ["2 samples", "3"]),
        (
            lambda net, free: net.settle(
                np.zeros((3, 6, 6, 2)), free, targets=[0, 1, 2], beta=1, schedule="synchronous"
            ),
            ["2 samples", "3"],
        ),
        (
            lambda net, free: net.settle(
                np.zeros((3, 6, 6, 2)), free, targets=[0, 1, 2], beta=1, nudge="deviation", schedule="synchronous"
            ),
            ["2 samples", "3"],
        ),
        (lambda net, free: net.settle(X, ep.State(free.layers[:2]), schedule="synchronous"), ["2 layers", "3"]),
        (
            lambda net, free: net.settle(
                X, ep.State(free.layers), targets=[0, 1], beta=1, nudge="deviation", schedule="synchronous"
            ),
            ["drives"],
        ),
    ],
)
def test_wrong_settles_are_one_line(call, parts):
    net = network("conv")
    free = net.settle(X, steps=2, schedule="synchronous")
    with pytest.raises(ep.ConfigurationError) as error:
        call(net, free)
    one_line(error, *parts)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: ep.Network([], 3, feedback=1.0), ["at least one layer"]),
        (
            lambda: ep.Network([ep.Linear((4,), 5), ep.Linear((6,), 3)], 3, feedback=1.0),
            ["layer 2 takes (6,)", "layer 1 gives (5,)"],
        ),
        (
            lambda: ep.Network([ep.Conv2d((4, 4, 1), 2), ep.Conv2d((2, 8, 2), 2)], 3, feedback=1.0),
            ["layer 2 takes (2, 8, 2)", "layer 1 gives (4, 4, 2)"],
        ),
        (lambda: ep.Network([ep.Linear((4,), 5)], 3, loss="squared_error", feedback=1.0), ["(3,)", "(5,)"]),
        (lambda: ep.Network([ep.Linear((4,), 3)], 3, loss="mse", feedback=1.0), ["unknown loss 'mse'"]),
        (lambda: ep.Network([ep.Linear((4,), 3)], 3, activation="relu7", feedback=1.0), ["did you mean 'relu"]),
        (lambda: ep.Network([ep.Linear((4,), 3)], 3, precision="float23", feedback=1.0), ["did you mean 'float32'"]),
        (lambda: ep.Network([ep.Linear((4,), 3)], 3, feedback=0), ["feedback", "not 0"]),
        (lambda: ep.Network([ep.Linear((4,), 3)], 3, feedback=1.5), ["feedback", "not 1.5"]),
        (
            lambda: ep.Network([ep.Linear((3,), 3) for _ in range(12)], 3, feedback=1e-3),
            ["feedback 0.001", "float32", "float64"],
        ),
        (lambda: ep.Network([ep.Linear((4,), 3)], 3, gain=[1.0, 2.0], feedback=1.0), ["one gain or 1", "not 2"]),
        (lambda: ep.Network([ep.Linear((4,), 3)], 3, device="gpu", feedback=1.0), ["unknown device 'gpu'"]),
    ],
)
def test_wrong_networks_are_one_line(make, parts):
    with pytest.raises(ep.ConfigurationError) as error:
        make()
    one_line(error, *parts)


def test_a_dense_edge_may_flatten_a_map(device):
    """An edge that takes (36,) fits a layer that gives (3, 3, 4): the same numbers as one that takes (3, 3, 4)."""
    images = np.random.default_rng(0).uniform(0, 1, (2, 3, 3, 2))
    ends = []
    for shape in [(3, 3, 4), (36,)]:
        edges = [ep.Conv2d((3, 3, 2), 4), ep.Linear(shape, 5)]
        net = ep.Network(edges, CLASSES, activation="sigmoid", device=device, precision="float64", feedback=1.0)
        result = ep.EquilibriumPropagation(net, free_steps=4, nudged_steps=4, schedule="synchronous").step(
            images, [0, 2]
        )
        ends.append(on_host(net, result.gradients))
    for path in ends[0]:
        np.testing.assert_array_equal(*(gradients[path] for gradients in ends))


def test_gain_a_layer(device):
    edges = [ep.Linear((400,), 100), ep.Linear((100,), 400)]
    net = ep.Network(edges, 2, gain=[0.5, 2.0], device=device, feedback=1.0)
    # N(0, gain^2 / fan_in): 0.5 / 20 and 2 / 10; 40000 draws each
    assert float(net.layers[0].weight.std()) == pytest.approx(0.025, rel=0.02)
    assert float(net.layers[1].weight.std()) == pytest.approx(0.2, rel=0.02)
    assert float(net.readout.weight.std()) == pytest.approx(1 / 20, rel=0.1)  # 1 / sqrt(400), whatever the gains
    assert not device.to_numpy(net.readout.bias).any()


@pytest.mark.parametrize(
    ("feedback", "schedule", "steps", "nudged", "relaxation"),
    [
        (None, None, 2, 1, 1.0),
        (0.031, None, 2, 2, 1.0),
        (0.3, None, 2, 2, 1.0),
        (0.31, None, 6, 4, 1.0),
        (1.0, "sweeps", 6, 4, 1.0),
        (1.0, "synchronous", 60, 20, 1.0),
        (0.1, "evenodd", 60, 20, 1.0),
        (1.0, "evenodd", 60, 20, 1.6),
    ],
)
def test_defaults_are_what_the_documentation_says(device, feedback, schedule, steps, nudged, relaxation):
    """Gain 1, feedback 0.01; by 2 + 1 sweeps, above 0.03 2 + 2, above 0.3 6 + 4, or 60 + 20 steps."""
    given = {} if feedback is None else {"feedback": feedback}
    net = ep.Network([ep.Linear((400,), 100), ep.Linear((100,), 7)], 2, device=device, **given)
    assert net.feedback == (feedback or 0.01)
    assert float(net.layers[0].weight.std()) == pytest.approx(1 / 20, rel=0.02)
    images = np.random.default_rng(0).uniform(0, 1, (3, 400))
    told = {} if schedule is None else {"schedule": schedule}
    said = {"steps": steps, "schedule": schedule or "sweeps", "relaxation": relaxation}
    assert net.settles(schedule=schedule) == tuple(said.values())
    assert net.settle(images, **told).stats.steps == steps
    for method in (net.scores, net.predict, lambda x, **how: net.settle(x, **how).layers[0]):
        np.testing.assert_array_equal(*on_host(net, {1: method(images, **told), 2: method(images, **said)}).values())
    learner, bptt = ep.EquilibriumPropagation(net, **told), ep.BackpropagationThroughTime(net, **told)
    for each in (learner, bptt):
        assert (each.free_steps, each.schedule, each.relaxation) == tuple(said.values())
    assert (learner.nudged_steps, bptt.unrolled_steps) == (nudged, 20)


def test_a_network_settles_as_its_settling_says(device):
    """What is given goes first, then `settling`; that of another schedule has nothing of it."""
    net = network("conv", device)
    images = batch_of(net).images
    assert net.settling == {}
    net.settling = {"steps": 7, "schedule": "evenodd", "relaxation": 1.2}
    net.settling["steps"] = 9  # a copy
    assert net.settling == {"steps": 7, "schedule": "evenodd", "relaxation": 1.2}
    for given, expected in (
        ({}, (7, "evenodd", 1.2)),
        ({"schedule": "evenodd"}, (7, "evenodd", 1.2)),
        ({"steps": 3, "relaxation": 0.9}, (3, "evenodd", 0.9)),
        ({"schedule": "sweeps"}, (6, "sweeps", 1.0)),
        ({"schedule": "synchronous", "steps": 5}, (5, "synchronous", 1.0)),
    ):
        said = dict(zip(("steps", "schedule", "relaxation"), expected, strict=True))
        assert net.settles(**given) == expected
        np.testing.assert_array_equal(
            *on_host(net, {1: net.scores(images, **given), 2: net.scores(images, **said)}).values()
        )
        assert net.settle(images, **given).stats.steps == expected[0]
    learner = ep.EquilibriumPropagation(net)
    assert (learner.free_steps, learner.nudged_steps, learner.schedule, learner.relaxation) == (7, 20, "evenodd", 1.2)
    net.settling = {"steps": np.int64(3), "relaxation": np.float32(0.5)}
    assert [type(value) for value in net.settling.values()] == [int, float]  # as files have them
    net.settling = {"steps": 3}
    assert net.settles() == (3, "sweeps", 1.0)
    net.settling = {}
    assert net.settles() == (6, "sweeps", 1.0)


@pytest.mark.parametrize("name", ["conv", "skips"])
def test_a_network_judges_as_its_training_did(name):
    """Oracles: the same phases, called by hand, and the forward pass of oracle.py and graph_oracle.py."""
    net = network(name, "cpu") if name == "conv" else residual(precision="float64", activation="hard_sigmoid", gain=0.5)
    images = batch_of(net).images
    plain = {"steps": 200, "schedule": "evenodd", "relaxation": 1.0}
    net.settling = plain | {"tolerance": 0.05}
    stopped = net.settle(images, **plain, tolerance=0.05)
    assert stopped.stats.converged
    assert stopped.stats.steps < 200
    assert_same(net, net.scores(images), net.outputs(stopped.layers[-1]))
    assert_same(net, net.scores(images, tolerance=None), net.scores(images, **plain, tolerance=None))
    swept = net.settle(images, steps=2, schedule="sweeps")
    assert_same(net, net.scores(images, schedule="sweeps", steps=2), net.outputs(swept.layers[-1]))
    net.settling = {"steps": 2, "unrolled_steps": 3}
    begun = net.settle(images, steps=2)
    after = net.settle(images, begun, steps=3, schedule="synchronous")
    assert_same(net, net.scores(images), net.outputs(after.layers[-1]))
    net.settling = {"steps": 2, "feedforward": True}
    top = list(GraphOracle(net).forward(images).values())[-1] if name == "skips" else Oracle(net).forward(images)[-1]
    np.testing.assert_allclose(net.scores(images), net.outputs(top), rtol=1e-9)
    assert_same(net, net.scores(images, steps=2), net.outputs(begun.layers[-1]))
    assert_same(net, net.scores(images, start=begun), net.outputs(net.settle(images, begun, steps=2).layers[-1]))


def assert_same(net, found, wanted):
    np.testing.assert_array_equal(net.device.to_numpy(found), net.device.to_numpy(wanted))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"tolerance": 0.0}, ["tolerance", "0.0"]),
        ({"tolerance": None}, ["tolerance", "None"]),
        ({"unrolled_steps": 0}, ["unrolled_steps", "0"]),
        ({"feedforward": 1}, ["feedforward", "True or False"]),
        ({"free_steps": 4}, ["unknown settling 'free_steps'"]),
        ({"step": 4}, ["unknown settling 'step'", "did you mean 'steps'"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"steps": 2.5}, ["steps", "2.5"]),
        ({"steps": None}, ["steps", "None"]),
        ({"schedule": "sweep"}, ["did you mean 'sweeps'"]),
        ({"schedule": None}, ["schedule", "None"]),
        ({"relaxation": 2.0}, ["relaxation", "below 2"]),
        ({"relaxation": None}, ["relaxation", "None"]),
        ({"schedule": "synchronous", "relaxation": 1.5}, ["relaxation 1.5 with synchronous updates"]),
        ([("steps", 4)], ["settling", "a mapping of steps, schedule, relaxation"]),
        (None, ["settling", "a mapping of steps, schedule, relaxation"]),
    ],
)
def test_wrong_settling_is_one_line_and_changes_nothing(values, parts):
    net = network("conv")
    net.settling = {"steps": 5}
    with pytest.raises(ep.ConfigurationError) as error:
        net.settling = values
    one_line(error, *parts)
    assert net.settling == {"steps": 5}


def test_workspaces_of_the_last_few_batch_sizes_are_kept(device, monkeypatch):
    """Settling many batch sizes must not keep the buffers of all of them, nor change a result."""
    net = network("conv", device)
    monkeypatch.setattr(net.memory, "WORKSPACES_KEPT", 4)
    batch = batch_of(net, samples=8)
    first = net.device.to_numpy(net.settle(batch.images[:2], steps=3, schedule="synchronous").layers[0]).copy()
    for samples in range(8, 2, -1):
        net.settle(batch.images[:samples], steps=3, schedule="synchronous")
    assert len(net.memory._workspaces) == net.memory.WORKSPACES_KEPT
    again = net.device.to_numpy(net.settle(batch.images[:2], steps=3, schedule="synchronous").layers[0])
    np.testing.assert_array_equal(again, first)


def test_state_copies_are_independent(device):
    net = network("conv", device, pooling="max")
    batch = batch_of(net)
    state = net.settle(batch, steps=3, schedule="synchronous")
    copy = state.copy()
    copy.layers[0][...] = 0
    copy.winners[0][...] = 9
    assert float(state.layers[0].max()) > 0
    assert int(state.winners[0].max()) < 4


def test_repr_names_what_it_is():
    text = repr(network("conv", pooling="max", feedback=0.5))
    for part in ("sigmoid", "feedback 0.5", "float64", "(6, 6, 2) -> (3, 3, 3)", "max pool 2", "cross_entropy"):
        assert part in text


def test_calls_run_on_the_networks_own_device():
    """Another network or thread may have made another GPU the current one."""
    used = []

    class Noted(StrictDevice):
        def use(self):
            used.append(self.name)

    net = network("conv", Noted())
    for call in (
        lambda: net.settle(batch_of(net), steps=1, schedule="synchronous"),
        lambda: net.predict(batch_of(net).images, steps=1, schedule="synchronous"),
    ):
        used.clear()
        call()
        assert used


def test_edges_belong_to_one_network():
    """A second network would draw their weights anew. What refuses it changes nothing, and takes what never had one."""
    edges = [ep.Linear((4,), 5), ep.Linear((5,), 3)]
    with pytest.raises(ep.ConfigurationError, match="gain"):
        ep.Network(edges, 3, device="cpu", gain=[1.0, -1.0])
    net = ep.Network(edges, 3, device="cpu", seed=0)
    kept = {path: p.copy() for path, p in net.parameters().items()}
    for shared in (edges, edges[1:], net.graph, [ep.Connection("image", "a", edges[1])]):
        with pytest.raises(ep.ConfigurationError) as error:
            ep.Network(shared, 3, device="cpu", seed=1)
        one_line(error, "has the weights of another network", "make new edges")
    for path, p in net.parameters().items():
        np.testing.assert_array_equal(p, kept[path])
    assert [edge.reads_image for edge in edges] == [True, False]
    same = ep.Identity((4,))  # nothing to share
    for _ in range(2):
        ends = [("image", "a", ep.Linear((4,), 4)), ("a", "b", ep.Linear((4,), 4)), ("image", "b", same)]
        ep.Network([ep.Connection(*each) for each in ends], 3, device="cpu")


@pytest.mark.parametrize(("layers", "feedback"), [("8 8 8", 1e-120), ("mlp:" + ",".join(["4"] * 40), 1e-8)])
def test_feedback_too_weak_for_any_number(layers, feedback):
    """lambda^-(L-1) beyond float64: when the network is made, and when it is assigned."""
    shape = (4, 4, 1)
    with pytest.raises(ep.ConfigurationError, match="makes layer weights of .*, too large for float32; raise"):
        ep.build(layers, 3, shape, feedback=feedback, device="cpu")
    net = ep.build(layers, 3, shape, feedback=0.9, device="cpu")
    net.feedback = feedback
    with pytest.raises(ep.ConfigurationError, match="too large for float32"):
        net.settle(np.ones((1, *shape), np.float32))
