"""What a step sends to the device: labels once, a few numbers for the teacher, never its logits. Oracle: the host's."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import strict
from strict import StrictDevice, no_host_reads
from test_teacher import CLASSES, make_dataset, write_file

import cupyep as ep
import cupyep.batch
from cupyep.batch import one_hot
from cupyep.data import teacher as reader

INDEX, VIEW = np.array([3, 22, 0, 3, 7]), np.array([1, 0, 0, 1, 0], np.uint8)


@pytest.fixture
def sent(monkeypatch):
    """The shapes of the host arrays that cross to the strict device."""
    shapes, inner = [], strict.XP.asarray

    def asarray(array, dtype=None, order=None):
        if isinstance(array, np.ndarray):
            shapes.append(array.shape)
        return inner(array, dtype, order)

    monkeypatch.setattr(strict.XP, "asarray", asarray, raising=False)
    return shapes


def network(device):
    return ep.Network([ep.Conv2d((2, 2, 1), 4)], len(CLASSES), device=device, precision="float32", feedback=1.0)


def batch_on(net):
    images = np.random.default_rng(0).uniform(0, 1, (5, 2, 2, 1)).astype(np.float32)
    return ep.Batch(net.device.asarray(images), np.array([0, 1, 2, 0, 1]), INDEX, VIEW, checked=True)


@pytest.mark.parametrize("limit", [0, reader.MEMORY_LIMIT])
@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.parametrize("views", [("identity", "hflip"), ("hflip", "identity")])
def test_targets_are_the_logits_as_stored(tmp_path, monkeypatch, views, stored, limit):
    monkeypatch.setattr(reader, "MEMORY_LIMIT", limit)
    logits, _ = write_file(tmp_path / "t.h5", make_dataset(), views=views, dtype=stored)
    names = [("identity", "hflip")[code] for code in VIEW]
    rows = [logits["train"][views.index(name), n].astype(stored) for name, n in zip(names, INDEX, strict=True)]
    for device in ("cpu", StrictDevice()):
        net = network(device)
        signal = net.bind(ep.Distillation.from_file(tmp_path / "t.h5", [1], loss="squared_error"))
        (nudge,) = signal.nudges(batch_on(net))
        target = net.device.to_numpy(nudge.target)
        assert target.dtype == np.float32
        np.testing.assert_array_equal(target, np.stack(rows).astype(np.float32))
        assert signal.nbytes == (logits["train"].astype(stored).nbytes if limit else 0)


def test_the_table_is_that_of_the_signals_split(tmp_path):
    logits, _ = write_file(tmp_path / "t.h5", make_dataset())
    net = network("cpu")
    signal = net.bind(ep.Distillation.from_file(tmp_path / "t.h5", [1], loss="squared_error", split="test"))
    (nudge,) = signal.nudges(replace(batch_on(net), index=np.array([3, 6, 0, 3, 1])))
    np.testing.assert_array_equal(nudge.target, logits["test"][VIEW, [3, 6, 0, 3, 1]])


def test_a_step_sends_labels_and_places(tmp_path, sent):
    """From the second step on: labels, and which rows of the teacher's table; nothing with a number a class."""
    write_file(tmp_path / "t.h5", make_dataset())
    net = network(StrictDevice())
    signals = [ep.Distillation.from_file(tmp_path / "t.h5", [1], temperature=2.0), ep.LocalError([1])]
    learner, batch = (
        ep.EquilibriumPropagation(net, free_steps=2, nudged_steps=2, signals=signals, schedule="synchronous"),
        batch_on(net),
    )
    learner.step(batch)
    del sent[:]
    learner.step(batch)
    assert sent == [(5,), (5,)]
    del sent[:]
    learner.evaluate(batch)
    assert sent == [(5,)]


def test_draws_are_sent_once_an_epoch(sent):
    loader = ep.Loader(make_dataset(), "train", 5, StrictDevice(), np.float32, True, True, np.random.default_rng(0))
    del sent[:]
    assert [len(batch) for batch in loader] == [5, 5, 5, 5, 3]
    assert sent == [(23, 6)]


@pytest.mark.parametrize("placed", [False, True])
def test_labels_of_the_device_follow_those_of_the_host(placed):
    """Whoever changes a batch's labels, in place or by another batch, is not answered with the old ones."""
    net = network(StrictDevice())
    learner, batch = ep.EquilibriumPropagation(net, free_steps=2, nudged_steps=2, schedule="synchronous"), batch_on(net)
    before = float(net.device.to_numpy(learner.step(batch).loss))
    other = np.array([2, 2, 2, 2, 2])
    if placed:
        changed = replace(batch.placed(net.device), labels=other)
    else:
        batch.labels[...] = other
        changed = batch
    losses = [float(net.device.to_numpy(learner.step(b).loss)) for b in (changed, ep.Batch(batch.images, other))]
    assert losses[0] == losses[1] != before
    np.testing.assert_array_equal(net.device.to_numpy(net.nudges(changed)[0].target), np.eye(3)[other])


def test_placed_labels_go_with_the_parts():
    device = StrictDevice()
    part = batch_on(network(device)).placed(device).part(slice(1, 3))
    assert type(part.labels) is np.ndarray
    np.testing.assert_array_equal(part.labels, [1, 2])
    np.testing.assert_array_equal(device.to_numpy(part.nearest_labels), [1, 2])


def test_one_hot_of_labels_on_the_device():
    """They have been looked at before: nothing is read back."""
    device = StrictDevice()
    labels = device.asarray(np.array([2, 0, 3]))
    with no_host_reads():
        rows = one_hot(labels, 4, np.dtype(np.float32), device)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(device.to_numpy(rows), [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


def test_a_copied_signal_reads_its_teacher_again(tmp_path):
    write_file(tmp_path / "t.h5", make_dataset())
    net = network("cpu")
    signal = net.bind(ep.Distillation.from_file(tmp_path / "t.h5", [1]))
    target = signal.nudges(batch_on(net))[0].target
    copied = pickle.loads(pickle.dumps(signal))
    assert copied._table is None
    np.testing.assert_array_equal(copied.nudges(batch_on(net))[0].target, target)


@pytest.mark.parametrize("algorithm", ["ep", "bp", "bptt"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_one_hot_rows_are_made_once_a_part(monkeypatch, algorithm, micro_batch):
    """Whoever needs them: the readout's loss and nudge, every signal; and of the right labels, step by step."""
    net, made = network(StrictDevice()), []
    monkeypatch.setattr(cupyep.batch, "one_hot", lambda labels, *how: made.append(len(labels)) or one_hot(labels, *how))
    signals = [ep.LocalError([1]), ep.LocalError("all")]
    learner = {
        "ep": lambda: ep.EquilibriumPropagation(net, signals=signals, micro_batch=micro_batch, schedule="synchronous"),
        "bp": lambda: ep.Backpropagation(net, signals, micro_batch),
        "bptt": lambda: ep.BackpropagationThroughTime(
            net, 3, 2, signals=signals, micro_batch=micro_batch, schedule="synchronous"
        ),
    }[algorithm]()
    batch = batch_on(net)
    losses = []
    for labels in ([0, 1, 2, 0, 1], [1, 1, 1, 2, 2]):
        batch.labels[...] = labels
        del made[:]
        losses.append(float(net.device.to_numpy(learner.step(batch).loss)))
        assert made == ([5] if micro_batch is None else [2, 2, 1])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("places", [False, True])
def test_smoothed_rows_go_to_all_classes_alike(places):
    device = ep.get_device("cpu")
    batch = ep.Batch(np.zeros((3, 1)), np.array([2, 0, 1]), label_smoothing=0.25)
    batch = batch.placed(device) if places else batch
    wanted = [[0.0625, 0.0625, 0.8125, 0.0625], [0.8125, 0.0625, 0.0625, 0.0625], [0.0625, 0.8125, 0.0625, 0.0625]]
    for part, rows in ((batch, slice(None)), (batch.part(slice(1, 3)), slice(1, 3))):
        np.testing.assert_allclose(part.one_hot(4, np.float64, device), np.array(wanted)[rows], rtol=1e-15)


def test_one_hot_rows_of_a_batch_that_is_not_placed_follow_its_labels():
    device, batch = StrictDevice(), batch_on(network("cpu"))
    for labels in ([0, 1, 2, 0, 1], [1, 1, 1, 2, 2]):
        batch.labels[...] = labels
        rows = device.to_numpy(batch.one_hot(3, np.float64, device))
        np.testing.assert_array_equal(rows, np.eye(3)[labels])
    placed = batch.placed(device)
    assert placed.one_hot(3, np.float32, device) is placed.one_hot(3, np.float32, device)
    assert placed.one_hot(4, np.float32, device).shape == (5, 4)
    part = placed.part(slice(3, 5))
    np.testing.assert_array_equal(device.to_numpy(part.one_hot(3, np.float32, device)), np.eye(3)[[2, 2]])
