"""Iterations replayed as graphs give the bits of plain launches, whatever changes between batches.

The same body runs on the stand-in for a GPU (fake_gpu.py) and, where there is one, on a real GPU.
"""

from __future__ import annotations

import contextlib
import os
import warnings

import numpy as np
import pytest
from fake_gpu import FakeGpu, FakeStream
from small import Teacher, batch_of, hosts, network, on_host

import cupyep as ep
from cupyep import settling
from cupyep.backend.cuda import identity
from cupyep.backend.graphs import Replayer
from cupyep.commands import predict

SCHEDULES = ("synchronous", "evenodd", "sweeps")
FORMS = ("classical", "deviation", "tangent")


class Gpu:
    """Makes devices with and without graphs."""

    def __init__(self, fake):
        self.fake = fake

    def device(self, graphs=True):
        device = FakeGpu() if self.fake else ep.get_device("cuda:0")
        if not graphs:
            device.graphs = None
        return device

    def stream(self):
        if self.fake:
            return FakeStream()
        return ep.get_device("cuda:0").xp.cuda.Stream(non_blocking=True)


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request):
    if request.param == "cuda":
        usable, reason = ep.gpu_status()
        if not usable:
            if os.environ.get("CUPYEP_REQUIRE_GPU") == "1":
                pytest.fail(f"CUPYEP_REQUIRE_GPU=1, but {reason}")
            pytest.skip(reason)
    else:
        request.getfixturevalue("fake_gpu")
    return Gpu(request.param == "fake")


def signals():
    return [
        ep.LocalError([1], pool=2),
        ep.LocalError([3], kappa=0.3, loss="squared_error"),
        ep.Distillation(Teacher(), [2], temperature=2.0, learned=True),
        ep.FeatureDistillation(Teacher(), {2: "middle"}),
    ]


def make(device, **options):
    defaults = {"pooling": "max", "activation": "hard_sigmoid", "feedback": 0.5, "precision": "float32"}
    return network("conv", device, **defaults | options)


def captured(net):
    """Return the graphs that a network holds."""
    return [graph for workspace in net.memory._workspaces.values() for graph in workspace.replayer.graphs()]


def train(device, form, schedule, batches=4, **options):
    """Return everything that some steps of training give: new images, labels, weights, kappa and beta in each."""
    net, own, found = make(device, **options), signals(), []
    learner = ep.EquilibriumPropagation(
        net,
        free_steps=5,
        nudged_steps=4,
        scheme="tangent" if form == "tangent" else "centered",
        nudge="deviation" if form == "tangent" else form,
        schedule=schedule,
        signals=own,
        relaxation=1.0,
    )
    optimizer = ep.SGD(learner.parameters(), 0.1)
    for number in range(batches):
        learner.beta = 0.1 + 0.1 * number
        for signal in own:
            signal.anneal(number / (batches + 1))
        batch = batch_of(net, samples=2 if number == 2 else 3, seed=number)
        batch.labels[0] = number % net.classes
        result = learner.step(batch)
        found += [result.free.per_sample, result.nudged.per_sample, *result.gradients.values()]
        found += [
            result.loss,
            result.nudge_response,
            *net.settle(batch, steps=3, schedule=schedule, relaxation=1.0).layers,
        ]
        optimizer.step(result.gradients)
    return net, [np.array(device.to_numpy(array)) for array in found]


def assert_same_bits(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_replays_equal_plain_launches_bit_for_bit(gpu, monkeypatch, schedule, form):
    """And they are replays: the host goes through two iterations of each kind a batch size, not through all."""
    inner, calls = settling._iterate, []
    monkeypatch.setattr(settling, "_iterate", lambda *how: calls.append(how[1]) or inner(*how))
    plain, expected = train(gpu.device(graphs=False), form, schedule)
    iterations = len(calls)
    assert iterations == 4 * (5 + 4 + 3)
    calls.clear()
    net, found = train(gpu.device(), form, schedule)
    assert_same_bits(found, expected)
    assert captured(plain) == []
    # The learner's free and nudged phases and the free phase on its own, measured and not; with two samples, of which
    # there is one batch, only what is not measured repeats.
    assert len(captured(net)) == 6 + 3
    assert len(calls) == 2 * 9 + 3
    assert not net.device.graphs.failed


@pytest.mark.parametrize(
    ("precision", "pooling", "activation", "loss"),
    [
        ("float64", "average", "half_hard_sigmoid", "squared_error"),
        ("float32", "average", "sigmoid", "cross_entropy"),
        ("float64", "max", "relu", "squared_error"),
        ("float32", "max", "tanh", "cross_entropy"),
    ],
)
def test_replays_of_other_networks(gpu, precision, pooling, activation, loss):
    options = {"pooling": pooling, "activation": activation, "precision": precision, "loss": loss}
    for form in ("classical", "deviation"):
        _, expected = train(gpu.device(graphs=False), form, "evenodd", 2, **options)
        net, found = train(gpu.device(), form, "evenodd", 2, **options)
        assert_same_bits(found, expected)
        assert len(captured(net)) == 6


def test_run_to_run_bits(gpu):
    assert_same_bits(
        train(gpu.device(), "deviation", "synchronous")[1], train(gpu.device(), "deviation", "synchronous")[1]
    )


def test_other_streams(gpu):
    """Graphs made on one stream are replayed on another; the results stay those of plain launches."""
    _, expected = train(gpu.device(graphs=False), "deviation", "sweeps")
    device = gpu.device()
    with gpu.stream():
        assert_same_bits(train(device, "deviation", "sweeps")[1], expected)
    net, batch, states = make(device), None, []
    for stream in (contextlib.nullcontext(), gpu.stream(), contextlib.nullcontext()):
        device.synchronize()
        with stream:
            batch = batch_of(net) if batch is None else batch
            states.append(
                [np.array(device.to_numpy(s)) for s in net.settle(batch, steps=6, schedule="synchronous").layers]
            )
    assert_same_bits(states[1], states[0])
    assert_same_bits(states[2], states[0])


def with_new_weights(net):
    net.layers[1].weight = net.layers[1].weight * 0.5


def with_new_feedback(net):
    net.feedback = 0.25


def with_new_activation(net):
    net.activation = ep.get_activation("relu6")


def with_new_readout(net):
    net.readout.weight = net.readout.weight * 2


def with_new_temperature(net):
    net.readout.criterion.temperature = 3.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "change",
    [with_new_weights, with_new_feedback, with_new_activation, with_new_readout, with_new_temperature],
)
def test_what_is_exchanged_is_taken_up(gpu, change, form):
    """A graph holds addresses and numbers: what lies elsewhere, or is another number, asks for another graph."""
    ends = []
    for graphs in (True, False):
        net, arrays = make(gpu.device(graphs)), []
        batch = batch_of(net)
        for number in range(6):
            if number == 3:
                change(net)
            free = net.settle_free(batch, steps=4, schedule="synchronous")
            betas, nudges = ([1.0] if form == "tangent" else [0.3, -0.3]), net.nudges(batch)
            nudged = net.settle_nudged(batch, free, betas, nudges, form, steps=4, schedule="synchronous")
            arrays += nudged.layers or nudged.deviations
            arrays = [np.array(net.device.to_numpy(array)) for array in arrays]
        ends.append(arrays)
    assert_same_bits(*ends)
    per_batch = len(ends[0]) // 6
    assert any((a != b).any() for a, b in zip(ends[0][:per_batch], ends[0][-per_batch:], strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_relaxation_is_part_of_a_graph(gpu, form):
    """A launch holds its number: relaxed and plain iterations, and those of another relaxation, are other graphs."""
    ends = []
    for graphs in (True, False):
        net, arrays = make(gpu.device(graphs)), []
        batch = batch_of(net)
        for relaxation in (1.0, 1.6, 1.2, 1.6):
            how = {"steps": 7, "schedule": "evenodd", "relaxation": relaxation}
            free = net.settle_free(batch, **how)
            betas, nudges = ([1.0] if form == "tangent" else [0.3, -0.3]), net.nudges(batch)
            nudged = net.settle_nudged(batch, free, betas, nudges, form, **how)
            found = [*(nudged.layers or nudged.deviations), nudged.stats.per_sample]
            arrays.append([np.array(net.device.to_numpy(array)) for array in found])
        ends.append(arrays)
    for replayed, plain in zip(*ends, strict=True):
        assert_same_bits(replayed, plain)
    first, relaxed, _, again = ends[0]
    assert_same_bits(relaxed, again)
    assert any((a != b).any() for a, b in zip(first, relaxed, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_free_state_elsewhere_is_not_taken_for_the_networks_own(gpu, form):
    """Copies of free states, one after the other and then the network's own, in buffers that graphs know already."""
    ends = []
    for graphs in (True, False):
        net, arrays = make(gpu.device(graphs)), []
        batches = [batch_of(net, seed=seed) for seed in range(3)]
        kept = [net.settle(batch, steps=6, schedule="synchronous").copy() for batch in batches]
        for _ in range(2):
            for batch, free in zip(batches, kept, strict=True):
                own = net.settle_free(batch, steps=5, schedule="synchronous")
                for start in (own, free, own):
                    betas, nudges = ([1.0] if form == "tangent" else [0.3, -0.3]), net.nudges(batch)
                    how = {"steps": 3, "schedule": "synchronous"}
                    nudged = net.settle_nudged(batch, start, betas, nudges, form, **how)
                    arrays += [np.array(net.device.to_numpy(a)) for a in nudged.layers or nudged.deviations]
                again = net.settle_free(batch, free, steps=3, schedule="evenodd")
                arrays += [np.array(net.device.to_numpy(a)) for a in again.layers]
        ends.append(arrays)
    assert_same_bits(*ends)


class Quartic(ep.Augmenter):
    """A user's signal, of whose inside nothing is known."""

    def target(self, layer, batch):
        return self.device.asarray(np.asarray(batch.labels, np.float64) / 4, self.dtype)

    def gradient(self, layer, state, target):
        return (state - target.reshape(-1, *[1] * (state.ndim - 1))) ** 3


class OwnConv(ep.Conv2d):
    """A user's edge; it does the same, but who could know?"""


class OpenConv(OwnConv):
    """One that says on what its work depends."""

    def capture_key(self):
        return ("open", identity(self.weight), identity(self.bias))


class OwnClip(ep.Clip):
    def __init__(self):
        super().__init__("own", 1.0, 0.0, 1.0)
        self.code = None


@pytest.mark.parametrize("form", ["classical", "tangent"])
@pytest.mark.parametrize("kind", ["signal", "edge", "activation"])
def test_a_users_own_parts_are_launched_plainly(gpu, kind, form):
    """Their code may do another thing every time: it is never replayed. The tangent has done with signals before."""
    ends = []
    for graphs in (True, False):
        options = {"activation": OwnClip()} if kind == "activation" else {}
        net = make(gpu.device(graphs), **options)
        if kind == "edge":
            net.layers[1].__class__ = OwnConv
        own = [Quartic([1, 3])] if kind == "signal" else [ep.LocalError([1])]
        batch, arrays = batch_of(net), []
        for _ in range(3):
            free = net.settle(batch, steps=4, schedule="synchronous", copy=False)
            nudged = net.settle(
                batch, free, targets=batch, beta=[0.3, -0.3], nudge=form, signals=own, steps=4, schedule="synchronous"
            )
            arrays += [np.array(net.device.to_numpy(a)) for a in nudged.deviations or nudged.layers]
        ends.append(arrays)
        replayed = {"classical": [2], "tangent": [4, 5]}[form]  # free phases know none; memory grows once
        assert len(captured(net)) in (replayed if graphs and kind == "signal" else [0])
    assert_same_bits(*ends)


def test_a_users_edge_may_ask_to_be_captured(gpu):
    ends = []
    for graphs in (True, False):
        net = make(gpu.device(graphs))
        net.layers[1].__class__ = OpenConv
        batch, arrays = batch_of(net), []
        for number in range(4):
            if number == 2:
                net.layers[1].weight = net.layers[1].weight * 0.5
            arrays += [
                np.array(net.device.to_numpy(s)) for s in net.settle(batch, steps=3, schedule="synchronous").layers
            ]
        ends.append(arrays)
        assert len(captured(net)) == (4 if graphs else 0)
    assert_same_bits(*ends)


def spans(arrays):
    return [(a.ctypes.data, a.ctypes.data + (a.nbytes if a.flags.c_contiguous else reach(a))) for a in arrays]


def reach(array):
    return sum((n - 1) * abs(stride) for n, stride in zip(array.shape, array.strides, strict=True)) + array.itemsize


def arrays_in(value):
    """Return the device arrays in an object's attributes, in lists too."""
    if hasattr(value, "_host"):
        return [value._host]
    if isinstance(value, (list, tuple)):
        return [array for item in value for array in arrays_in(item)]
    return []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_key_names_all_memory_that_a_graph_touches(fake_gpu, monkeypatch, schedule, form):
    """But for what lives and dies with the graphs themselves: the scratch of the operations."""
    of, seen = Replayer.of, {}

    def watched(self, key):
        replays = of(self, key)
        seen[id(replays)] = (self, key, replays)
        return replays

    monkeypatch.setattr(Replayer, "of", watched)
    net, _ = train(fake_gpu, form, schedule)
    found = [(*others, graph) for *others, replays in seen.values() for graph in replays.graphs.values() if graph]
    assert len(found) == 9
    owners = {id(workspace.replayer): workspace for workspace in net.memory._workspaces.values()}
    for replayer, key, graph in found:
        workspace = owners[id(replayer)]
        own = [net.memory._arena.block._host]
        own += [array for ops in workspace.ops for value in vars(ops).values() for array in arrays_in(value)]
        named = [part for part in flattened(key) if isinstance(part, Identity)]
        assert len(named) > 15
        known = spans(own) + [(part.address, part.address + part.nbytes) for part in named]
        for start, end in spans(graph.tape.touched):
            assert any(low <= start and end <= high for low, high in known)


class Identity:
    """An array as a key names it."""

    def __init__(self, address, shape, strides, dtype):
        self.address, self.nbytes = address, int(np.prod(shape)) * np.dtype(dtype).itemsize


def flattened(key):
    """Return the parts of a key, arrays as `Identity`."""
    if isinstance(key, tuple):
        if len(key) == 4 and isinstance(key[0], int) and isinstance(key[1], tuple) and isinstance(key[3], str):
            return [Identity(*key)]
        return [part for item in key for part in flattened(item)]
    return [key]


@pytest.mark.parametrize(("tolerance", "reads"), [(None, 0), (1e-30, 3)])
def test_the_host_waits_only_for_a_tolerance(fake_gpu, monkeypatch, tolerance, reads):
    """Every `check_every` steps and at the end, where it also learns whether the states oscillate."""
    net = make(fake_gpu)
    batch, crossings = batch_of(net), []
    net.settle_free(batch, steps=2, schedule="evenodd")
    to_numpy = FakeGpu.to_numpy
    monkeypatch.setattr(FakeGpu, "to_numpy", lambda self, array: crossings.append(array.shape) or to_numpy(self, array))
    expectation = contextlib.nullcontext() if tolerance is None else pytest.warns(ep.ConvergenceWarning)
    with expectation:
        net.settle_free(batch, steps=12, schedule="evenodd", tolerance=tolerance, check_every=5)
    assert crossings == [(net.depth, len(batch))] * reads


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_network_in_halves_takes_batches_of_float32(fake_gpu, name):
    """A loader's batches are float32; kernels that expect halves would refuse them, wherever they come in."""
    pytest.importorskip("ml_dtypes")
    net = network("conv", fake_gpu, pooling="max", activation="hard_sigmoid", precision=name)
    raw = batch_of(net)
    fit = net.batch(raw)
    assert (raw.images.dtype, fit.images.dtype) == (np.float32, net.precision.stored)
    phases = {"free_steps": 3, "nudged_steps": 2, "schedule": "sweeps"}
    learner = ep.EquilibriumPropagation(net, 0.3, **phases)
    unrolled = ep.BackpropagationThroughTime(net, 3, unrolled_steps=2, schedule="synchronous")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ep.PrecisionWarning)
        classical = ep.EquilibriumPropagation(net, 0.3, nudge="classical", **phases)

    def gradients(step):
        return lambda batch: on_host(net, step(batch, learner.settle_free(batch).copy()).gradients)

    def nudged(batch):
        free = classical.settle_free(batch).copy()
        return dict(enumerate(hosts(net, classical.settle_nudged(batch, free, [0.3], net.nudges(batch)).layers)))

    for call in (
        nudged,
        gradients(learner.step_from),
        gradients(unrolled.step_from),
        gradients(lambda *arguments: unrolled.step_from_equilibrium(*arguments, max_iterations=3)[0]),
        lambda batch: dict(enumerate(hosts(net, ep.Backpropagation(net).settled(batch).layers))),
        lambda batch: {0: hosts(net, [net.scores(batch, steps=2, schedule="synchronous")])[0]},
        lambda batch: dict(enumerate(predict._settle(learner, batch)[:2])),
    ):
        found, expected = call(raw), call(fit)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)


def test_a_real_device_asks_environment_and_card(monkeypatch):
    """Graphs can be switched off when it is made; chunks are made for the L2 cache that is there."""
    from cupyep.backend import device as device_module

    class Cupy:
        class cuda:
            class runtime:
                getDeviceCount = staticmethod(lambda: 1)
                cudaDevAttrL2CacheSize = 38
                deviceGetAttribute = staticmethod(lambda attribute, index: {38: l2}[attribute])

            class Device:
                def __init__(self, index):
                    assert index == 0

                def use(self):
                    pass

    l2 = 50 << 20
    monkeypatch.setattr(device_module, "_import_cupy", lambda: (Cupy, ""))
    monkeypatch.delenv("CUPYEP_GRAPHS", raising=False)
    assert ep.get_device("cuda:0").graphs is not None
    monkeypatch.setenv("CUPYEP_GRAPHS", "0")
    assert ep.get_device("cuda:0").graphs is None
    assert ep.get_device("cuda:0").scratch_bytes == 40 << 20, "an H100's"
    l2 = 4 << 20
    assert ep.get_device("cuda:0").scratch_bytes == 16 << 20, "a T4's is too small to matter"
