"""Threads that share a network, and what goes to other processes: the right answer is that of one thread here."""

import copy
import pickle
import sys
import threading

import numpy as np
import pytest
from small import Teacher, batch_of, network

import cupyep as ep


@pytest.fixture
def nervous():
    """Threads that are switched between as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(*calls, repeats=30):
    """Call each function in a thread of its own, over and over; return the results a function."""
    results = [[] for _ in calls]

    def work(k):
        for _ in range(repeats):
            results[k].append(calls[k]())

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(row) for row in results] == [repeats] * len(calls)
    return results


def test_threads_that_share_a_network_take_turns(nervous):
    net = network("dense")
    batches = [batch_of(net, samples, seed) for seed, samples in enumerate((3, 3, 5))]
    learner = ep.EquilibriumPropagation(net, free_steps=8, nudged_steps=4, schedule="synchronous")
    calls = [
        lambda: net.scores(batches[0], steps=8, schedule="synchronous"),
        lambda: net.settle(batches[1], steps=8, schedule="synchronous").layers[0],
        lambda: float(learner.step(batches[2]).loss),
        lambda: float(learner.evaluate(batches[1])[0]),
    ]
    expected = [call() for call in calls]
    for found, right in zip(in_threads(*calls), expected, strict=True):
        for value in found:
            np.testing.assert_array_equal(value, right)


COPIES = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "deepcopy": copy.deepcopy}
LEARNERS = {
    "ep": lambda net, signals: ep.EquilibriumPropagation(
        net, signals=signals, free_steps=6, nudged_steps=4, schedule="synchronous"
    ),
    "bptt": lambda net, signals: ep.BackpropagationThroughTime(net, 6, 4, signals=signals, schedule="synchronous"),
    "bp": lambda net, signals: ep.Backpropagation(net, signals=signals),
}


def signals_of():
    return [
        ep.LocalError("all", pool=2),
        ep.Distillation(Teacher(), [2, 3], learned=True, temperature=2.0),
        ep.FeatureDistillation(Teacher(), {2: "middle"}),
    ]


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", LEARNERS)
def test_a_copied_learner_goes_on_bit_for_bit(kind, how):
    net = network(pooling="max", precision="float32")
    learner = LEARNERS[kind](net, signals_of())
    optimizer = ep.Adam(learner.parameters(), 0.01)
    batch = batch_of(net)
    optimizer.step(learner.step(batch).gradients)
    other, other_optimizer = COPIES[how]((learner, optimizer))
    for _ in range(2):
        for one, way in ((learner, optimizer), (other, other_optimizer)):
            way.step(one.step(batch).gradients)
    assert other.network is not net
    for path, array in learner.parameters().items():
        np.testing.assert_array_equal(other.parameters()[path], array, err_msg=path)
    np.testing.assert_array_equal(other.scores(batch), learner.scores(batch))


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_network_is_the_same_and_another(how, tmp_path):
    net = network(activation="tanh")
    batch = batch_of(net)
    before = net.scores(batch, schedule="synchronous")
    other = COPIES[how](net)
    np.testing.assert_array_equal(other.scores(batch, schedule="synchronous"), before)
    assert other.describe() == net.describe()
    other.save(tmp_path / "net.h5")  # its activation is one of cupyep's
    other.parameters()["layers.1.weight"][...] = 0
    np.testing.assert_array_equal(net.scores(batch, schedule="synchronous"), before)


def test_memory_is_left_behind():
    net = network()
    small = len(pickle.dumps(net))
    net.settle(batch_of(net, 64), steps=2, schedule="synchronous")
    assert len(pickle.dumps(net)) == small


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_view_of_memory_is_no_view(how):
    net = network(pooling="max")
    batch = batch_of(net)
    free = net.settle(batch, steps=5, copy=False, schedule="synchronous")
    other = COPIES[how](free)
    kept = [s.copy() for s in free.layers]
    assert other.buffers is None
    net.settle(batch_of(net, seed=4), steps=5, schedule="synchronous")
    for s, right in zip(other.layers, kept, strict=True):
        np.testing.assert_array_equal(s, right)
    nudge = {"targets": batch, "beta": 0.1, "nudge": "deviation", "steps": 3, "schedule": "synchronous"}
    one = net.settle(batch, net.settle(batch, steps=5, schedule="synchronous"), **nudge)
    for s, right in zip(net.settle(batch, other, **nudge).layers, one.layers, strict=True):
        np.testing.assert_array_equal(s, right)


@pytest.mark.parametrize("how", COPIES)
def test_copied_batches_data_sets_and_loaders(how):
    pytest.importorskip("sklearn")
    net = network("dense")
    dataset = ep.load_dataset("digits", limit_train=40, limit_test=10)
    loader = ep.Loader(dataset, "train", 8, net.device, net.dtype, shuffle=True, generator=np.random.default_rng(1))
    other = COPIES[how](loader)
    for one, two in zip(loader, other, strict=True):
        copied = COPIES[how](two)
        np.testing.assert_array_equal(one.images, copied.images)
        np.testing.assert_array_equal(one.index, copied.index)
    np.testing.assert_array_equal(COPIES[how](dataset).train.images, dataset.train.images)


class Told(ep.Device):
    """A device that notes when it is unpickled, as a GPU becomes the current one then."""

    events: list = []

    def __reduce__(self):
        return _told, ("device", "cpu")


class Placed(np.ndarray):
    """An array that notes when it is unpickled; one of CuPy's is made on the current GPU then."""

    def __reduce__(self):
        return _told, ("array", np.array(self))


def _told(what, value):
    Told.events.append(what)
    return Told(value) if what == "device" else value


def test_the_device_of_a_network_is_unpickled_before_its_arrays():
    net = network("dense", Told("cpu"))
    for edge in net.layers:
        edge.weight = edge.weight.view(Placed)
    for thing in (net, ep.Backpropagation(net)):
        Told.events.clear()
        pickle.loads(pickle.dumps(thing))
        assert Told.events == ["device", *["array"] * len(net.layers)]
