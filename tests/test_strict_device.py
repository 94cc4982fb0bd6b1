"""Nothing mixes host and device arrays, proven without a GPU: the strict device of strict.py, against the plain CPU.

Both compute with the same library, so results are equal bit for bit.
"""

import numpy as np
import pytest
import strict
from small import Teacher, batch_of, network
from strict import MixedDevices, StrictDevice

import cupyep as ep
from cupyep.training.statistics import EpochStatistics, layer_names

PAIR = ("cpu", StrictDevice())
SCHEDULES = ("synchronous", "evenodd", "sweeps")


def signals():
    return [
        ep.LocalError([1], pool=2),
        ep.LocalError([3], loss="squared_error"),
        ep.Distillation(Teacher(), [2], temperature=2.0, learned=True),
        ep.FeatureDistillation(Teacher(), {2: "middle"}),
    ]


def hosts(net, arrays):
    for array in arrays:
        if array is not None and net.device.name == "strict":
            assert type(array) is strict.DeviceArray
    return [None if a is None else np.array(net.device.to_numpy(a)) for a in arrays]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_the_strict_device_is_strict():
    """What it must refuse, it refuses: otherwise the tests below prove nothing."""
    a, host = PAIR[1].asarray(np.ones((2, 3))), np.ones((2, 3))
    attempts = [
        lambda: a + host,
        lambda: host * a,
        lambda: np.add(a, a),
        lambda: np.sum(a),
        lambda: np.asarray(a),
        lambda: np.stack([a, a]),
        lambda: strict.XP.maximum(a, host),
        lambda: a.__setitem__(0, host[0]),
        lambda: host.__setitem__(0, a[0]),
        lambda: a[np.array([0, 1])],
        lambda: a == host,
        lambda: a.clip(host, 2.0),
        lambda: strict.XP.concatenate([a, host]),
        lambda: np.add(host, host, out=a),
        lambda: strict.XP.add(host, host),
        lambda: a.__iadd__(host),
        lambda: host.__iadd__(a),
    ]
    for number, attempt in enumerate(attempts):
        with pytest.raises(MixedDevices):
            pytest.fail(f"attempt {number} was allowed: {attempt()}")
    with pytest.raises(AttributeError, match="use what CuPy has too"):
        strict.XP.einsum("ij->i", a)
    with strict.no_host_reads():
        for read in (lambda: float(a.sum()), lambda: bool(a[0, 0]), lambda: int(a.max()), lambda: a.sum().item()):
            with pytest.raises(MixedDevices, match="host reads"):
                read()
    assert float(a.sum()) == 6.0
    assert type(2.0 * a + np.float64(1)) is strict.DeviceArray


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("activation", ["hard_sigmoid", "half_hard_sigmoid", "sigmoid", "relu"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_settle(schedule, activation, pooling):
    ends = []
    for device in PAIR:
        net = network("conv", device, pooling=pooling, activation=activation, feedback=0.5, precision="float32")
        batch, own = batch_of(net), signals()
        how = {"steps": 3, "schedule": schedule, "relaxation": 1.0}
        free = net.settle(batch, **how)
        arrays = [*free.layers, *free.drives, *free.winners]
        warm = net.settle(batch, free, **how)
        arrays += warm.layers
        for nudge in ("classical", "deviation"):
            nudged = net.settle(batch, free, targets=batch, beta=[0.3, -0.3], nudge=nudge, signals=own, **how)
            arrays += nudged.layers
        tangent = net.settle(batch, free, targets=batch, beta=1.0, nudge="tangent", signals=own, **how)
        arrays += tangent.deviations
        ends.append(hosts(net, arrays))
        assert type(tangent.stats.per_sample) is np.ndarray
    assert_same(*ends)


def learners(net, own):
    yield ep.EquilibriumPropagation(net, 0.3, 3, 3, signals=own, schedule="synchronous")
    yield ep.EquilibriumPropagation(net, 0.3, 3, 3, nudge="classical", schedule="evenodd", signals=own, relaxation=1.0)
    yield ep.EquilibriumPropagation(net, 0.3, 3, 3, scheme="onesided", schedule="sweeps", signals=own)
    yield ep.EquilibriumPropagation(
        net, 0.3, 3, 3, scheme="onesided", nudge="classical", signals=own, schedule="synchronous"
    )
    yield ep.EquilibriumPropagation(net, 0.3, 3, 3, scheme="random", signals=own, schedule="synchronous")
    yield ep.EquilibriumPropagation(net, 0.3, 3, 3, scheme="tangent", signals=own, schedule="synchronous")
    yield ep.BackpropagationThroughTime(net, 3, 3, signals=own, schedule="synchronous")
    yield ep.Backpropagation(net, own)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_learners_and_optimizers(algorithm, pooling, loss):
    """Gradients, statistics and updated parameters of every algorithm, with local errors and distillation."""
    ends = []
    for device in PAIR:
        net = network("conv", device, pooling=pooling, loss=loss, feedback=0.5, precision="float32")
        batch, own, arrays = batch_of(net), signals(), []
        for learner in learners(net, own):
            result = learner.step(batch)
            arrays += [*result.gradients.values(), result.loss, result.activity, result.nudge_response]
            arrays.append(result.correct)
            for optimizer in (
                ep.SGD(learner.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
                ep.Adam(learner.parameters(), 0.01),
            ):
                optimizer.step(result.gradients)
            arrays += learner.parameters().values()
            arrays += learner.evaluate(batch)
        ends.append(hosts(net, arrays))
    assert_same(*ends)


def test_tolerance_checks_and_predictions():
    ends = []
    for device in PAIR:
        net = network("conv", device)
        batch = batch_of(net)
        state = net.settle(batch, steps=50, tolerance=1e-6, check_every=5, record=True, schedule="synchronous")
        assert state.stats.converged
        rows = ep.check_gradients(net, batch, free_steps=20, nudged_steps=5, signals=signals())
        table = np.array([[row["cosine"], row["relative_error"], row["gradient_norm"]] for row in rows])
        energy = net.energy.value(batch.images, state.layers, net.nudges(batch), 0.2)
        forces = net.energy.force(batch.images, state.layers, net.nudges(batch), 0.2)
        gradients = net.energy.parameter_gradient(batch.images, state.layers).values()
        ends.append([np.array(state.stats.trace), net.predict(batch, k=2, schedule="synchronous"), table])
        ends[-1] += hosts(net, [energy, *forces, *gradients])
    assert_same(*ends)


def test_loading_parameters_crosses_explicitly():
    source = network("conv", "cpu", seed=3)
    for given in (source.parameters(), network("conv", PAIR[1], seed=3).parameters()):
        net = network("conv", PAIR[1], seed=4)
        net.load_parameters(given)
        assert_same(hosts(net, net.parameters().values()), [np.array(p) for p in source.parameters().values()])


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "augment": True}])
def test_loader(options):
    """Batches are gathered, cropped, mirrored and normalised on the device; labels and indices stay on the host."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (10, 6, 6, 2), dtype=np.uint8), generator.integers(0, 3, 10)
    train, test = (ep.data.Split(name, images, labels) for name in ("train", "test"))
    dataset = ep.Dataset.from_splits("toy", ("a", "b", "c"), train, test, flip=True, pad=2)
    ends = []
    for device in PAIR:
        net = network("conv", device, precision="float32")
        loader = ep.Loader(dataset, "train", 4, net.device, np.float32, generator=np.random.default_rng(1), **options)
        batches = list(loader)
        assert [len(batch) for batch in batches] == [4, 4, 2]
        for batch in batches:
            assert {type(batch.labels), type(batch.index), type(batch.view)} == {np.ndarray}
        results = [
            ep.EquilibriumPropagation(net, 0.3, 2, 2, signals=signals(), schedule="synchronous").step(batch)
            for batch in batches
        ]
        arrays = [batch.images for batch in batches] + [g for result in results for g in result.gradients.values()]
        ends.append(hosts(net, arrays))
    assert_same(*ends)


@pytest.mark.parametrize("nudge", ["free", "classical", "deviation", "tangent"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loop_reads_nothing_back(monkeypatch, schedule, nudge):
    """Without a tolerance the host never waits for the device within the iterations, measured ones included."""
    from cupyep import settling

    net = network("conv", PAIR[1], pooling="max", feedback=0.5, activation="hard_sigmoid")
    batch, own = batch_of(net), signals()
    free = net.settle(batch, steps=2, schedule=schedule, relaxation=1.0)
    inner, calls = settling._iterate, []

    def watched(phase, measure):
        calls.append(measure)
        with strict.no_host_reads():
            inner(phase, measure)

    monkeypatch.setattr(settling, "_iterate", watched)
    if nudge == "free":
        net.settle(batch, steps=4, schedule=schedule, relaxation=1.0)
    else:
        beta = 1.0 if nudge == "tangent" else [0.3, -0.3]
        net.settle(
            batch, free, targets=batch, beta=beta, nudge=nudge, signals=own, steps=4, schedule=schedule, relaxation=1.0
        )
    assert calls == [False, False, False, True]


def residuals(result):
    phases = [stats for stats in (result.free, result.nudged) if stats is not None]
    return [found for stats in phases for found in (stats.per_sample, stats.residual)]


@pytest.mark.parametrize("algorithm", ["ep", "bptt", "bp"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_without_a_tolerance_a_step_reads_nothing(algorithm, micro_batch, monkeypatch):
    """Nor do its statistics; residuals asked for later are those of their own step, though memory is used anew."""
    read, to_numpy = [], StrictDevice.to_numpy
    monkeypatch.setattr(StrictDevice, "to_numpy", lambda device, array: read.append(array) or to_numpy(device, array))
    make, *phases = {
        "ep": (ep.EquilibriumPropagation, 0.3, 3, 3),
        "bptt": (ep.BackpropagationThroughTime, 3, 3),
        "bp": (ep.Backpropagation,),
    }[algorithm]
    ends = []
    for device in PAIR:
        net = network("conv", device, pooling="max", feedback=0.5, precision="float32")
        how = {} if algorithm == "bp" else {"schedule": "synchronous"}
        learner = make(net, *phases, signals=signals(), micro_batch=micro_batch, **how)
        statistics = EpochStatistics(net.device, 1, layer_names(learner.parameters()))
        batches = [net.batch(batch_of(net, seed=seed)) for seed in range(2)]
        read.clear()
        results, at_once = [], []
        with strict.no_host_reads():
            for batch in batches:
                results.append(learner.step(batch))
                statistics.add(results[-1])
                at_once += [np.array(found) for found in residuals(results[-1])] if device == "cpu" else []
        assert not read
        ends.append(at_once or [found for result in results for found in residuals(result)])
        ends[-1].append(np.array(statistics.read()["loss"]))
    assert_same(*ends)
