"""A residual network through everything around the core: files, runs, exports, checks, pictures, by names of nodes.

Oracles: a straight run for a resumed one; onnxruntime and a PyTorch module made of the exported file alone; the steps
and the gradient check; the numbers of the records.
"""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import residual as small
from quadrants import SILENT, assert_same_state, numbers, quadrant_data
from residual import residual

import cupyep as ep
from cupyep.commands.diagnose import diagnose
from cupyep.commands.export import export_run
from cupyep.commands.gradient_check import CHECK_DEFAULTS, check_gradient
from cupyep.commands.memory import memory_report, network_report
from cupyep.errors import CheckpointError, ConfigurationError, DivergenceError
from cupyep.export import onnx_model
from cupyep.learning import check_signal
from cupyep.learning.check import check_gradients, compare_precisions
from cupyep.persistence import hdf5
from cupyep.persistence.checkpoint import load_checkpoint
from cupyep.training import build, runs
from cupyep.training.config import make_config, parse_layers
from cupyep.training.divergence import check_finite, check_means
from cupyep.training.run_directory import RunDirectory
from cupyep.training.tensorboard import scalars
from cupyep.training.trained import load_trained

NODES = ["stem", "a", "b", "c", "d"]
DEPTHS = [1, 2, 3, 4, 5]  # b is above a, d above c, whatever skips there are
OPTIONS = {"arch": "vgg5", "batch_size": 16, "device": "cpu", "epochs": 2, "feedback": 0.5, "gain": 0.5, "seed": 3}
SCHEDULES = [("synchronous", 0.7), ("evenodd", 1.6), ("sweeps", 1.0), ("sweeps", 1.3)]


def images(count=4, shape=(8, 8, 3)):
    return np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)


def planes(x):
    return np.ascontiguousarray(np.moveaxis(x, 3, 1))


def scores_of(model, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": planes(x)})[0]


@pytest.fixture(params=["plain", "standardized"])
def run(request, monkeypatch, tmp_path):
    """Return a function that trains a residual network on the quadrants for two epochs, and its folder."""
    dataset = quadrant_data(train=48)
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: dataset)
    monkeypatch.setattr(build, "build", lambda *args, **how: small.build(*args, **how | {"weights": request.param}))

    def train(name="run", **options):
        options = {"data_dir": str(tmp_path / "data"), **options}
        runs.start_run(make_config(OPTIONS, options), tmp_path / name, SILENT).run()
        return tmp_path / name

    return train


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["plain", "standardized", "standardized-fixed"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_a_loaded_network_is_the_saved_one(tmp_path, loss, weights):
    net = residual(loss=loss, weights=weights, feedback=0.5, seed=2)
    for array in net.parameters().values():
        array += 0.1 * np.random.default_rng(array.size).standard_normal(array.shape).astype(array.dtype)
    net.save(tmp_path / "net.h5")
    loaded = ep.Network.load(tmp_path / "net.h5", device="cpu")
    assert repr(loaded) == repr(net)
    assert loaded.graph.names == net.graph.names
    assert list(loaded.parameters()) == list(net.parameters())
    for schedule, _ in SCHEDULES:
        how = {"steps": 7, "schedule": schedule, "relaxation": 1.0}
        np.testing.assert_array_equal(loaded.scores(images(), **how), net.scores(images(), **how))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ends: ends.pop(), "not a readable network"),
        (lambda ends: ends[0].append("a"), "not a readable network"),
        (lambda ends: ends.__setitem__(3, ["stem", 7]), "a node's name is made of letters"),
        (lambda ends: ends.__setitem__(1, ["b", "a"]), "connected in a cycle"),
        (lambda ends: ends.__setitem__(5, ["b", "d"]), "two connections from b to d"),
        (lambda ends: ends.__setitem__(3, ["a", "c"]), "node c"),
    ],
)
def test_damaged_connections_are_refused_in_one_line(tmp_path, damage, message):
    path = tmp_path / "net.h5"
    residual().save(path)
    with h5py.File(path, "r+") as file:
        structure = json.loads(file.attrs["network"])
        damage(structure["connections"])
        file.attrs["network"] = json.dumps(structure)
    hdf5.seal(path)
    with pytest.raises(CheckpointError, match=message) as error:
        ep.Network.load(path, device="cpu")
    assert "\n" not in str(error.value)


def test_an_edge_that_a_file_cannot_hold_is_named_by_its_node(tmp_path):
    class Own(ep.Linear):
        pass

    layers = [*small.connections(), ep.Connection("d", "last", Own((2, 2, 6), 4))]
    with pytest.raises(ConfigurationError, match="^node last is a Own, which a file cannot hold"):
        ep.Network(layers, 3, device="cpu", feedback=1.0).save(tmp_path / "net.h5")


@pytest.mark.parametrize("lsuv", [False, True])
def test_a_resumed_run_is_a_straight_one(run, lsuv):
    """Also one whose weights started from data: a run that goes on has its own."""
    taken_up = run("taken up", epochs=1, lr_schedule="constant", lsuv=lsuv)
    straight = run("constant", lr_schedule="constant", lsuv=lsuv)
    runs.resume_run(taken_up, {"epochs": 2}, SILENT).run()
    assert numbers(RunDirectory.open(taken_up)) == numbers(RunDirectory.open(straight))
    assert_same_state(*(load_checkpoint(path / "checkpoint.h5") for path in (taken_up, straight)))


def test_a_checkpoint_of_other_connections_is_refused(run, monkeypatch, tmp_path):
    path, connections = run(epochs=1), small.connections
    less = lambda *args: [c for c in connections(*args) if type(c.edge) is not ep.Identity]  # noqa: E731
    monkeypatch.setattr(small, "connections", less)
    with pytest.raises(CheckpointError, match="layers: saved 7, this network 6"):
        runs.resume_run(path, {"epochs": 2}, SILENT)


@pytest.mark.parametrize("run", ["plain"], indirect=True)
def test_a_run_that_starts_from_data_begins_elsewhere(run):
    courses = [numbers(RunDirectory.open(run(str(lsuv), epochs=1, lsuv=lsuv))) for lsuv in (False, True)]
    assert courses[0] != courses[1]


# --- exports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["plain", "standardized"])
@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_onnxruntime_gives_the_scores_of_every_schedule(loss, pooling, weights):
    pytest.importorskip("onnx")
    net, x = residual(loss=loss, pooling=pooling, weights=weights, feedback=0.5, gain=0.8, seed=3), images()
    for schedule, relaxation in SCHEDULES:
        scores = scores_of(onnx_model(net, 5, schedule, relaxation=relaxation), x)
        wanted = net.scores(x, steps=5, schedule=schedule, relaxation=relaxation)
        np.testing.assert_allclose(scores, wanted, atol=2e-6, err_msg=schedule)
    up = scores_of(onnx_model(net, 1, feedforward=True), x)
    np.testing.assert_allclose(up, ep.Backpropagation(net).scores(net.batch(x)), atol=2e-6)
    assert np.abs(up - wanted).max() > 1e-3, "no feedback was seen"


def test_a_module_made_of_the_exported_file_alone_gives_the_feed_forward_scores(run, tmp_path):
    torch = pytest.importorskip("torch")
    path = run(algorithm="bp")
    export_run(path, "npz", tmp_path / "net.npz")
    with np.load(tmp_path / "net.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name.startswith(("layers", "readout"))}
        settings = json.loads(str(file["settings"]))
    description, states = settings["network"], {}
    assert description["connections"] == [[c.below, c.above] for c in small.connections()]

    def drive(n, s):
        edge = description["layers"][n]
        if edge["type"] == "Identity":
            return s
        weight, bias = arrays[f"layers.{n}.weight"], arrays.get(f"layers.{n}.bias")
        u = torch.nn.functional.conv2d(s, weight, bias, edge["stride"], edge["padding"])
        return torch.nn.functional.max_pool2d(u, edge["pool"]) if edge["pooling"] == "max" else u

    trained, x = load_trained(path), images(shape=(16, 16, 3))
    states["image"] = torch.from_numpy(planes(x))
    for node in dict.fromkeys(above for _, above in description["connections"]):
        ends = enumerate(description["connections"])
        total = sum(drive(n, states[below]) for n, (below, above) in ends if above == node)
        states[node] = total.clamp(0, 1)  # the hard sigmoid
    scores = states["d"].flatten(1) @ arrays["readout.weight"].T + arrays["readout.bias"]
    net = trained.network
    np.testing.assert_allclose(scores.numpy(), ep.Backpropagation(net).scores(net.batch(x)), atol=2e-6)


def test_the_onnx_file_of_a_run_predicts_as_the_run_does(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = run()
    export_run(path, "onnx", tmp_path / "net.onnx")
    model, trained = onnx.load(tmp_path / "net.onnx"), load_trained(path)
    pixels = quadrant_data().test.images[:6]
    x = ((pixels / 255 - trained.images.mean) / trained.images.std).astype(np.float32)
    wanted = trained.learner.scores(trained.network.batch(x))
    np.testing.assert_allclose(scores_of(model, (pixels / 255).astype(np.float32)), wanted, atol=1e-5)


# --- what a run says ------------------------------------------------------------------------------------------------


def test_records_name_their_nodes_and_the_event_log_reads_the_names(run):
    record = RunDirectory.open(run()).metrics()[-1]
    assert list(record["nodes"].items()) == list(zip(NODES, DEPTHS, strict=True))
    assert len(record["activity"]) == len(record["nudge_response"]) == 5
    found = scalars(record | {"learning_rate": [0.1] * 6})
    for n, name in enumerate(NODES):
        for key in ("activity", "gradient_norm", "nudge_response", "free_distance"):
            assert found[f"{key}/{name}"] == record[key][n]
    assert found["gradient_norm/readout"] == record["gradient_norm"][5]
    assert found["learning_rate/2"] == 0.1


def test_chains_keep_numbers():
    assert ep.Graph([ep.Linear((4,), 3)]).named_depths() is None
    assert scalars({"activity": [0.5, 0.25], "gradient_norm": [1.0, 2.0, 3.0]}) == {
        "activity/1": 0.5, "activity/2": 0.25, "gradient_norm/1": 1.0, "gradient_norm/2": 2.0,
        "gradient_norm/readout": 3.0,
    }  # fmt: skip


def test_a_divergence_names_the_node():
    names = [f"layers.{name}" for name in NODES] + ["readout"]
    with pytest.raises(DivergenceError, match="^the state of node b is not finite in epoch 2, batch 4"):
        check_finite({"activity": np.array([5, 5, 3, 4, 4]), "loss": np.array(4)}, 5, 2, names)
    with pytest.raises(DivergenceError, match="^'nudge_response' of node c is not finite"):
        check_means({"nudge_response": [1.0, 1.0, 1.0, np.inf, 1.0]}, 2, names)
    with pytest.raises(DivergenceError, match="^the state of layer 3 is not finite"):
        check_finite({"activity": np.array([5, 5, 3])}, 5, 2, ["layers.1", "layers.2", "layers.3", "readout"])


# --- diagnosis, check, memory --------------------------------------------------------------------------------------


def test_a_diagnosis_by_names(run):
    report = diagnose(run(), bptt=True)
    assert [row["name"] for row in report.rows] == [*NODES, "readout"]
    for row, depth in zip(report.rows, DEPTHS, strict=False):
        assert row["scaled_response"] == pytest.approx(row["nudge_response"] * 0.5 ** (depth - 5), rel=1e-9)
    assert report.trace["nodes"] == NODES
    lines = report.lines()
    assert [line.split()[0] for line in lines[2:9]] == ["node", *NODES, "readout"]
    assert "layer 3" not in " ".join(line for line in lines if line.startswith("warning"))
    assert all(-1 <= row["cosine"] <= 1 for row in report.rows)


def test_findings_name_nodes():
    net = residual(feedback=1.0, gain=4.0, seed=1)
    learner = ep.EquilibriumPropagation(net, 0.5, free_steps=1, nudged_steps=1, schedule="synchronous")
    from cupyep.commands.diagnose import examine

    batch = net.batch(images(20), np.arange(20) % 3)
    findings = {finding.signature: finding for finding in examine(learner, batch).findings}
    assert "the nudge has not reached node stem yet" in " ".join(f.message for f in findings.values())
    named = ", ".join(NODES[n - 1] for n in findings["collapse"].layers)
    assert f"nodes {named}" in findings["collapse"].message
    assert not any("layer" in f.message.replace("last layer", "") for f in findings.values())


@pytest.mark.parametrize("weights", ["plain", "standardized"])
def test_the_gradient_check_has_a_row_a_weight_with_the_response_of_its_node(weights):
    how = {"pooling": "average", "activation": "sigmoid", "feedback": 0.5}
    net = residual(**how, precision="float64", gain=0.4, weights=weights, seed=2)
    batch = net.batch(images(3).astype(np.float64), np.arange(3))
    how = {"beta": 0.01, "free_steps": 200, "nudged_steps": 60, "schedule": "evenodd", "tolerance": 1e-13}
    rows = {row["name"]: row for row in check_gradients(net, batch, **how)}
    names = ["layers.stem", "layers.a", "layers.b", "layers.c", "layers.d", "layers.d.b", "readout"]
    assert list(rows) == names
    assert all(row["cosine"] > 0.99999 and row["relative_error"] < 1e-3 for row in rows.values())
    assert rows["layers.d.b"]["nudge_response"] == rows["layers.d"]["nudge_response"] > 0
    assert rows["readout"]["nudge_response"] is None


def test_the_check_of_a_graph_lines_up(run, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "build", lambda *args, **how: small.build(*args, **how | {"gain": 0.4}))
    config = make_config(OPTIONS, CHECK_DEFAULTS | {"feedback": 0.5, "pooling": "average", "activation": "tanh"})
    lines = check_gradient(config, report=lambda _: None).table().splitlines()
    assert [line.split()[0] for line in lines[2:]] == [f"layers.{n}" for n in [*NODES, "d.b"]] + ["readout"]
    assert len({len(line) for line in lines[1:]}) == 1, "columns do not line up"


def test_the_plan_of_a_graph_is_what_is_measured(run):
    config = make_config(OPTIONS, {"dataset": "cifar10", "batch_size": 64})
    report = memory_report(config, [2, 6], measure=True, report=lambda _: None)
    for row in report.rows:
        assert row.total == pytest.approx(row.measured, rel=0.05), row.label
    bptt = [row.total for row in report.rows if row.algorithm == "bptt"]
    assert bptt[1] > bptt[0]
    text = network_report(config)
    assert "stem to b: Identity" in text


def test_pictures_by_names(run, monkeypatch):
    pytest.importorskip("matplotlib")
    from cupyep.commands import plots
    from cupyep.commands.plots import maps
    from cupyep.commands.plots.diagnosis import diagnosis

    path, seen = run(), {}
    directory = RunDirectory.open(path)
    over_epochs = maps.over_epochs
    monkeypatch.setattr(
        maps, "over_epochs", lambda values, *more: seen.update({more[1]: values}) or over_epochs(values, *more)
    )
    figures = dict(plots._figures(*plots.opened([path]), {}, SILENT))
    assert not [kind for kind, made in figures.items() if isinstance(made, str)]
    named = {"response": NODES, "gradient": [*NODES, "readout"], "distance": NODES, "units": NODES}
    for kind, names in named.items():
        axis = figures[kind].axes[0]
        assert [tick.get_text() for tick in axis.get_yticklabels()] == names
        assert axis.get_ylabel() == "node"
    scaled = np.array([np.array(r["nudge_response"]) * [16, 8, 4, 2, 1] for r in directory.metrics()])
    np.testing.assert_allclose(seen[r"$a_n\,$ mean $|s_+-s_-|$"][""], scaled)
    bar = figures["settling"].axes[-1]
    assert [tick.get_text() for tick in bar.get_yticklabels()] == NODES
    report = diagnose(path)
    figure = diagnosis(report.rows, report.trace, "title", ["healthy"])
    labels = [[tick.get_text() for tick in axis.get_xticklabels()] for axis in figure.subfigs[0].axes]
    assert labels.count(NODES) == 2
    figure.canvas.draw()


def test_a_predicted_run_and_its_confusion(run):
    from cupyep.commands.confusion import confusion_of

    matrix, classes = confusion_of(RunDirectory.open(run()), {}, SILENT)
    assert matrix.sum() == 20
    assert tuple(classes) == ("up", "down")


class Half(ep.Conv2d):
    """A convolution of the user's own, right or with half of its top-down input."""

    factor = 1.0

    def topdown(self, s, winners, out, ops):
        super().topdown(s, winners, out, ops)
        out *= self.factor


@pytest.mark.parametrize("weights", ["plain", "standardized"])
def test_an_edge_of_ones_own_in_a_graph_is_checked(weights):
    layers = small.connections(pooling="average")
    layers[2] = ep.Connection("a", "b", Half((4, 4, 4), 4))
    net = ep.Network(layers, 3, gain=0.4, weights=weights, device="cpu", precision="float64", feedback=1.0)
    batch = net.batch(images(2).astype(np.float64), np.arange(2))
    trained = {path: array.copy() for path, array in net.parameters().items()}
    how = {"free_steps": 30, "nudged_steps": 20}
    assert len(check_gradients(net, batch, **how)) == 7
    for path, array in net.parameters().items():
        np.testing.assert_array_equal(array, trained[path])
    layers[2].edge.factor = 0.5
    with pytest.raises(ConfigurationError, match="Half: topdown is not the adjoint"):
        check_gradients(net, batch, **how)


@pytest.mark.parametrize("weights", ["plain", "standardized"])
def test_the_check_of_half_precision_has_the_rows_of_a_graph(weights):
    how = {"pooling": "average", "activation": "sigmoid", "gain": 0.4, "feedback": 0.5, "weights": weights}
    rows = compare_precisions(
        lambda precision: (residual(**how, precision=precision), []), "float16", images(2), np.arange(2),
        forms=("deviation",), free_steps=40, nudged_steps=20, schedule="evenodd",
    )[0.05]["deviation"]  # fmt: skip
    assert [row["name"] for row in rows][5:] == ["layers.d.b", "readout"]
    assert all(row["cosine"] > 0.99 and row["cosine_float32"] > 0.99 for row in rows)


# --- signals by names ----------------------------------------------------------------------------------------------


def test_signals_by_name_are_those_by_number(run):
    names, counted = (run(layers, aug="le", signal_layers=layers, signal_pool=2) for layers in ("stem,b", "1,3"))
    one, two = (load_checkpoint(path / "checkpoint.h5") for path in (names, counted))
    assert_same_state(one, two)
    with pytest.raises(ConfigurationError, match="--signal-layers must be like 2,3,4 or 2-5 or all or of stem, a, b"):
        run("wrong", aug="le", signal_layers="stem,bb")


def test_signals_by_name_in_the_class_api():
    net, x = residual(feedback=0.5), images()
    signal = net.bind(ep.LocalError(["stem", 4]))
    assert signal.layers == [1, 4]
    assert [nudge.term.layer for nudge in signal.nudges(net.labelled(x, [0, 1, 2, 0]))] == [1, 4]
    with pytest.raises(ConfigurationError, match="there is no layer 'stam'; did you mean 'stem'"):
        net.bind(ep.LocalError(["stam"]))
    with pytest.raises(ConfigurationError, match="must not repeat"):
        net.bind(ep.LocalError(["stem", 1]))
    check_signal(ep.LocalError(["b", "d"]), net)


def test_a_wrong_signal_is_named_by_its_node():
    class Doubled(ep.Augmenter):
        def loss(self, layer, state, target):
            return (state**2).reshape(len(state), -1).sum(axis=1)

        def gradient(self, layer, state, target):
            return 4 * state

    with pytest.raises(ConfigurationError, match="^Doubled, node c: the gradient is 2 times what it should be"):
        check_signal(Doubled(["c"]), residual())


def test_features_by_name():
    class Teacher:
        feature_layers = {"middle": (4, 4, 4)}

        def feature(self, name, split, index, view):
            return np.full((len(index), 4, 4, 4), 0.5)

    net = residual()
    signal = net.bind(ep.FeatureDistillation(Teacher(), {"b": "middle"}))
    batch = ep.Batch(images(), np.zeros(4, int), np.arange(4), np.zeros(4, np.uint8))
    (nudge,) = signal.nudges(net.batch(batch))
    assert nudge.term.layer == 3
    assert nudge.target.shape == (4, 4, 4, 4)


@pytest.mark.parametrize(
    ("text", "layers"), [("stem,c", [1, 4]), (" b , 5", [3, 5]), ("2-3,d", [2, 3, 5]), ("all", [1, 2, 3, 4, 5])]
)
def test_names_on_the_command_line(text, layers):
    assert parse_layers(text, 5, NODES) == layers


def test_a_range_in_a_name_is_the_name():
    assert parse_layers("2-3", 3, ["2", "3", "2-3"]) == [3]
