"""How long a run will take is said before it has taken that long.

Oracle: a clock of our own that the batches move on, and the sum by hand.
"""

from __future__ import annotations

import dataclasses

import pytest
from quadrants import FakeBatches, Recorder, fake_trainer

import cupyep as ep
from cupyep.training import display, outlook, trainer
from cupyep.training.build import build_network
from cupyep.training.config import TrainConfig
from cupyep.training.outlook import smaller_settings

TINY = ["--width", "0.06", "--free-steps", "4", "--nudged-steps", "3", "--batch-size", "10", "--device", "cpu"]
NAMES = ["--width", "--epochs"]


@pytest.fixture
def trained(monkeypatch):
    """Train 10 epochs of 20 batches of 4 images with a clock, and return the events ``estimate`` and ``epoch``."""

    def run(batch_s, first_s=None, evaluation_s=0.0, epochs_done=0, advises=True, every_s=0.0):
        now = [1000.0]
        monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(display, "LINE_S", every_s)
        recorder = Recorder()
        recorder.advises = advises
        found = fake_trainer([0.5] * 10, epochs=10, display=recorder)
        found.train = FakeBatches([range(4)] * 20)
        found.schedules.batches = 20
        found.epochs_done, found.outlook.smaller = epochs_done, NAMES
        found.elapsed_s = 100.0 * epochs_done
        step, evaluate, left = found.learner.step, found.learner.evaluate, [first_s or batch_s]

        def slow_step(batch):
            now[0] += left.pop() if left else batch_s
            return step(batch)

        def slow_evaluate(batch):
            now[0] += evaluation_s
            return evaluate(batch)

        found.learner.step, found.learner.evaluate = slow_step, slow_evaluate
        found.records = [{"epoch": n, "test_accuracy": 0.0} for n in range(1, epochs_done + 1)]
        found.run()
        return [(name, text, values) for name, text, values in recorder.events if name in ("estimate", "epoch")]

    return run


def test_the_estimate_is_the_measured_rate_times_the_images_left(trained):
    """The first batch, of 100 s, is not counted; three more of 8 s are 0.5 images/s; 800 - 16 images are left."""
    events = trained(8.0, first_s=100.0)
    assert [name for name, *_ in events] == ["estimate"] + ["epoch"] * 10, "once, within the first epoch"
    _, text, values = events[0]
    assert text == "about 26:08 left: 10 epochs at 0.5 images/s, evaluation not counted"
    assert values == {"left_s": 784 / 0.5, "images_per_s": 0.5, "epochs": 10, "smaller": []}


def test_it_is_said_where_a_line_is_due(trained):
    """Lines every 30 s, for which the device is waited: after batch 1 (100 s), then after batch 5."""
    (_, _, values), *_ = trained(8.0, first_s=100.0, every_s=30.0)
    assert values["left_s"] == (800 - 20) / 0.5


def test_three_batches_are_not_enough_where_they_are_short(trained):
    """Of batches of 2 s it takes six to have 10 s that count (the first one does not)."""
    (_, _, values), *_ = trained(2.0)
    assert values["left_s"] == (800 - 24) / 2
    assert all(name == "epoch" for name, *_ in trained(0.25)), "an epoch of 5 s says it in its own line"


def test_more_than_an_hour_names_smaller_settings(trained):
    """784 images at 0.1 a second are 7840 s; 0.25 a second are 3136 s."""
    (_, text, values), *_ = trained(40.0)
    long = "about 2:10:40 left: 10 epochs at 0.1 images/s, evaluation not counted"
    assert text == f"{long}; for less, lower --width, --epochs"
    assert values["smaller"] == NAMES
    assert "for less" not in trained(16.0)[0][1]
    assert trained(40.0, advises=False)[0][1] == long, "who gave no such options is not told of any"


def test_evaluation_counts_as_soon_as_it_is_known(trained):
    """20 batches of 10 s and 600 s are 800 s an epoch: nine of them two hours, without evaluation half an hour."""
    events = trained(10.0, evaluation_s=600.0)
    assert [name for name, *_ in events] == ["estimate", "epoch", "estimate"] + ["epoch"] * 9
    assert "for less" not in events[0][1]
    assert events[2][1] == "about 2:00:00 left: 9 epochs with evaluation; for less, lower --width, --epochs"
    assert events[2][2]["left_s"] == events[1][2]["left_s"] == 7200.0
    events = trained(40.0, evaluation_s=600.0)
    assert [name for name, *_ in events].count("estimate") == 1, "said once"


@pytest.mark.parametrize(("done", "told"), [(9, False), (8, True)])
def test_a_resumed_run_that_is_nearly_over_says_nothing(done, told, trained):
    """After 16 images of the last epoch 64 of 800 are left, less than a tenth; of the last two, 144."""
    events = trained(40.0, epochs_done=done)
    assert [name for name, *_ in events][0] == ("estimate" if told else "epoch")
    if told:
        assert events[0][2]["left_s"] == 1440.0


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["--width", "--limit-train", "--image-size", "--epochs"]),
        ({"epochs": 1}, ["--width", "--limit-train", "--image-size"]),
        ({"arch": "8p 8p 8p 8p 8p"}, ["--width", "--limit-train", "--epochs"]),  # its last map is 1 x 1 already
        ({"arch": "mlp:9,9"}, ["--width", "--limit-train", "--image-size", "--epochs"]),
        ({"init_from": "net.h5"}, ["--limit-train", "--epochs"]),  # of the file's sizes
        ({"dataset": "file:x.npz"}, ["--width", "--limit-train", "--epochs"]),  # is not resized
    ],
)
def test_the_settings_that_apply(options, wanted):
    config = TrainConfig(**{"width": 0.02, **options})
    images = ep.data.ImageFormat("x", tuple("abc"), (32, 32, 3), [0.0] * 3, [1.0] * 3)
    assert smaller_settings(config, build_network(config, images, "cpu")) == wanted
    if "--image-size" in wanted:  # what is named can be lowered
        half = dataclasses.replace(images, image_shape=(16, 16, 3))
        build_network(config, half, "cpu")


def test_the_command_line_says_it(cifar, invoke, tmp_path, monkeypatch):
    """Of 50 images in batches of 10 the second to fourth are measured; a run that goes on is of one size."""
    monkeypatch.setattr(display, "LINE_S", 0.0)
    monkeypatch.setattr(outlook, "LEAST_S", 0.0)
    monkeypatch.setattr(outlook, "LONG_S", 0.0)
    options = ["--epochs", 2, "--run-dir", tmp_path / "run", "--aug", "kd", "--teacher-epochs", 2]
    evaluate, calls = trainer.evaluate, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:  # of the first epoch of the run itself
            raise KeyboardInterrupt
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", stop)
        assert invoke("train", *TINY, *options)[0] == 130
    code, out, err = invoke("train", "--run-dir", tmp_path / "run", "--resume")
    assert (code, err) == (0, "")
    told = [line for line in out.splitlines() if "for less" in line]
    assert not told
    code, out, err = invoke("train", *TINY, *options[:2], "--aug", "kd", "--teacher-epochs", 2)
    assert code == 0
    told = [line for line in out.splitlines() if "about " in line]
    assert len(told) == 1, "the teacher is kept from before"
    assert told[0].endswith("evaluation not counted; for less, lower --width, --limit-train, --image-size, --epochs")
    more = ["--seed", 1, "--aug", "kd", "--teacher-epochs", 2, "--epochs", 2]
    out = invoke("train", *TINY, *more)[1]
    told = [line for line in out.splitlines() if line.startswith("teacher: about ")]
    assert len(told) == 1
    assert told[0].endswith("; for less, lower --width, --limit-train, --image-size, --teacher-epochs")
    assert "about " not in invoke("train", *TINY, "--epochs", 2, "--quiet")[1]
