"""What a network is: one description for files, checkpoints and exports; edges with and without a bias."""

import json

import numpy as np
import pytest
from small import batch_of, network

import cupyep as ep
from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.export import onnx_model, torch_layout
from cupyep.persistence.checkpoint import load_checkpoint
from cupyep.persistence.network_file import difference
from cupyep.training.config import TrainConfig
from cupyep.training.run_directory import RunDirectory
from cupyep.training.trainer import Trainer


class Bare(ep.Edge):
    """A dense map with nothing that a bias would need: of `Linear` it has only the operations."""

    def __init__(self, inputs, units, strength=1.0):
        self.in_shape, self.out_shape, self.strength = (inputs,), (units,), strength

    def initialize(self, generator, gain, device, dtype):
        shape = self.in_shape + self.out_shape
        self.weight = device.drawn(lambda s: generator.standard_normal(s) * (gain / np.sqrt(s[0])), shape, dtype)

    def parameters(self):
        return {"weight": self.weight}

    def prepare(self, batch, nbytes, precision, device):
        return ep.Linear(self.in_shape, *self.out_shape).prepare(batch, nbytes, precision, device)

    def refresh(self, ops):
        ops.refresh(self.weight)

    def drive(self, s, out, winners, ops):
        self.linear_drive(s, out, winners, ops)

    def linear_drive(self, s, out, winners, ops):
        ops.drive(s, out)
        out *= self.strength

    def topdown(self, s, winners, out, ops):
        ops.topdown(s, out)
        out *= self.strength

    def add_gradient(self, s_below, s, winners, weight, bias, ops):
        assert bias is None
        ops.add_gradient(s_below, self.strength * s, weight)


def bare(strength=1.0, **options):
    options = {"seed": 3, "activation": "sigmoid", "device": "cpu", "feedback": 1.0} | options
    return ep.Network([Bare(6, 5, strength), Bare(5, 4)], 3, **options)


def dense(bias):
    layers = [ep.Linear((6,), 5, bias=bias), ep.Linear((5,), 4, bias=bias)]
    return ep.Network(layers, 3, seed=3, activation="sigmoid", device="cpu", feedback=1.0)


def conv(bias, pooling="max", **options):
    first = ep.Conv2d((7, 6, 2), 3, pooling=pooling, bias=bias)
    second = ep.Conv2d(first.out_shape, 4, kernel=2, bias=bias)
    layers = [first, second, ep.Linear(second.out_shape, 5, bias=bias)]
    return ep.Network(layers, 3, seed=3, activation="sigmoid", device="cpu", **{"feedback": 0.5, **options})


def images_of(net):
    return np.random.default_rng(0).uniform(size=(4, *net.input_shape)), np.array([0, 1, 2, 1])


LEARNERS = {
    f"{scheme} {nudge}": lambda net, scheme=scheme, nudge=nudge: ep.EquilibriumPropagation(
        net, free_steps=20, nudged_steps=10, scheme=scheme, nudge=nudge, schedule="synchronous"
    )
    for scheme in ("centered", "onesided", "random", "tangent")
    for nudge in ("classical", "deviation")
    if (scheme, nudge) != ("tangent", "classical")
} | {"bptt": lambda net: ep.BackpropagationThroughTime(net, 20, 10, schedule="synchronous"), "bp": ep.Backpropagation}


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("kind", [bare, conv])
def test_without_a_bias_all_is_as_with_one_that_stays_zero(kind, learner):
    """Biases start at zero: a step without them has the same gradients of all that is there."""
    plain, other = (bare(), dense(True)) if kind is bare else (conv(False), conv(True))
    one, two = LEARNERS[learner](plain), LEARNERS[learner](other)
    x, y = images_of(plain)
    found, expected = one.step(x, y).gradients, two.step(x, y).gradients
    assert set(expected) - set(found) == {f"layers.{n}.bias" for n in range(1, plain.depth + 1)}
    for path, gradient in found.items():
        np.testing.assert_array_equal(gradient, expected[path], err_msg=path)
    before = {path: array.copy() for path, array in plain.parameters().items()}
    ep.Adam(one.parameters(), 0.01).step(found)
    assert all((before[path] != array).any() for path, array in plain.parameters().items())
    np.testing.assert_allclose(one.evaluate(x, y)[0], two.evaluate(x, y)[0], rtol=0.2)


@pytest.mark.parametrize(("make", "first"), [(bare, 2.0), (conv, False)], ids=["own", "conv"])
def test_energy_without_a_bias(make, first):
    """dF/dw of the energy is that of finite differences."""
    double = make(first, feedback=0.5, precision="float64")
    x, _ = images_of(double)
    layers = [np.random.default_rng(n).uniform(0.2, 0.8, (4, *s)) for n, s in enumerate(double.state_shapes)]
    gradients = double.energy.parameter_gradient(x, layers)
    assert not any(path.endswith("bias") for path in gradients)
    for path, gradient in gradients.items():
        array, v = double.parameters()[path], np.random.default_rng(9).standard_normal(gradient.shape)
        values = []
        for h in (1e-5, -2e-5):
            array += h * v
            values.append(double.energy.value(x, layers).sum())
        array += 1e-5 * v
        np.testing.assert_allclose((gradient * v).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-6)


def test_files_and_exports_without_a_bias(tmp_path):
    net = conv(False)
    net.save(tmp_path / "net.h5")
    loaded = ep.Network.load(tmp_path / "net.h5", device="cpu")
    x, _ = images_of(net)
    assert loaded.describe() == net.describe() != conv(True).describe()
    np.testing.assert_array_equal(loaded.scores(x, schedule="synchronous"), net.scores(x, schedule="synchronous"))
    assert sorted(torch_layout(net)) == [*(f"layers.{n}.weight" for n in range(3)), "readout.bias", "readout.weight"]
    assert "no bias" in repr(net)


@pytest.mark.parametrize("pooling", ["none", "max", "average"])
def test_onnx_without_a_bias(pooling):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    net = conv(False, pooling)
    x, _ = images_of(net)
    model = onnx_model(net, 4)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    planes = np.ascontiguousarray(np.moveaxis(x, 3, 1), np.float32)
    np.testing.assert_allclose(
        session.run(None, {"images": planes})[0], net.scores(x, steps=4, schedule="synchronous"), atol=1e-5
    )
    kept = {p.key: p.value for p in model.metadata_props}
    assert json.loads(kept["network"]) == net.describe()


def test_a_description_is_plain_and_says_everything():
    net = network(activation=ep.Clip("mine", 0.25, -1.0, np.inf), feedback=0.5, pooling="max")
    found = net.describe()
    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert found["activation"] == {"type": "Clip", "name": "mine", "low": -1.0, "high": "inf", "gain": 0.25}
    assert found["layers"][0] == {
        "type": "Conv2d", "in_shape": [6, 6, 2], "channels": 3, "kernel": 3, "stride": 1, "padding": 1,
        "pooling": "max", "pool": 2, "has_bias": True,
    }  # fmt: skip
    assert {key: found[key] for key in ("feedback", "loss", "classes", "input_shape", "precision")} == {
        "feedback": 0.5, "loss": "cross_entropy", "classes": 3, "input_shape": [6, 6, 2], "precision": "float64",
    }  # fmt: skip
    assert difference(found, network(activation="tanh", feedback=0.5, pooling="max").describe()).startswith(
        "activation"
    )


CHANGES = [
    ({"feedback": 0.5}, "feedback: saved 1.0, this network 0.5"),
    ({"activation": "tanh"}, "activation type: saved Clip, this network Tanh"),
    ({"activation": ep.Clip("hard_sigmoid", 1.0, 0.0, 2.0)}, "activation high: saved 1.0, this network 2.0"),
    ({"precision": "float32"}, "precision: saved float64, this network float32"),
    ({"pooling": "max"}, "layers 1 pooling: saved average, this network max"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_another_network_made_by_hand_is_not_resumed(tmp_path, change, message):
    def trainer(directory, **options):
        net = network(**{"activation": "hard_sigmoid", **options})
        learner = ep.EquilibriumPropagation(net, free_steps=3, nudged_steps=2, schedule="synchronous")
        batches = BatchList([batch_of(net)])
        return Trainer(learner, ep.SGD(learner.parameters(), 0.1), batches, batches, epochs=2, directory=directory)

    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    trainer(directory).run()
    saved = load_checkpoint(directory.path / "checkpoint.h5")
    assert saved.network == network(activation="hard_sigmoid").describe() | {"signals": []}
    with pytest.raises(CheckpointError, match=f"belongs to another network: {message}"):
        trainer(RunDirectory.open(directory.path), **change).resume()
    with pytest.raises(ConfigurationError, match="all 2 epochs are done"):  # the same network gets further
        trainer(RunDirectory.open(directory.path)).resume()


class BatchList(list):
    """One batch, the same every epoch."""

    generator = np.random.default_rng(0)

    @property
    def split(self):
        return [row for batch in self for row in range(len(batch))]

    def batches(self, first=0):
        return iter(self[first:])


def test_own_edges_are_told_apart_by_their_plain_attributes():
    found = difference(bare(1.0).describe(), bare(2.0).describe())
    assert found == "layers 1 strength: saved 1.0, this network 2.0"
    assert difference(bare().describe(), bare().describe()) == ""
    deeper = ep.Network([ep.Linear((6,), 5)], 3, device="cpu", feedback=1.0)
    assert difference(bare().describe(), deeper.describe()) == "number of layers: saved 2, this network 1"
