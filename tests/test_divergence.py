"""Runs that go wrong: named, stopped, taken back.

Oracles: defects planted at known layers and batches; hand counts; a straight run for a run that is taken back.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import small
from quadrants import SILENT, Recorder, assert_same_state, numbers, run

import cupyep as ep
from cupyep.errors import DivergenceError
from cupyep.learning.learner import StepResult
from cupyep.settling import SettleStats
from cupyep.training import runs
from cupyep.training.divergence import LossWatch, check_arrays
from cupyep.training.statistics import EpochStatistics, layer_names

LAYERS = ["layers.1", "layers.2", "readout"]
GOOD = {"loss": 2.0, "activity": [0.5, 0.5], "response": [0.1, 0.1], "gradients": [1.0, 1.0, 1.0]}


def result(loss, activity, response, gradients):
    arrays = {f"{layer}.weight": np.array([g]) for layer, g in zip(LAYERS, gradients, strict=True)}
    stats, levels = SettleStats(1, np.zeros((2, 1))), (np.array(activity), np.zeros(2), np.zeros(2))
    return StepResult(
        small.gradients_of(arrays), np.asarray(loss), np.asarray(1), 2, *levels, stats, stats, np.asarray(response)
    )


@pytest.mark.parametrize(
    ("epoch", "bad", "message"),
    [
        (2, {"activity": [0.5, math.inf], "loss": math.nan, "gradients": [math.nan] * 3},
         "the state of layer 2 is not finite in epoch 2, batch 3; lower --learning-rate"),
        (1, {"loss": math.inf, "gradients": [math.inf] * 3},
         "the loss is not finite in epoch 1, batch 3; lower --learning-rate"),
        (1, {"response": [math.nan, math.nan], "gradients": [math.nan] * 3},
         "the nudged state of layer 1 is not finite in epoch 1, batch 3; lower --beta"),
        (3, {"gradients": [1.0, 1.0, math.inf]},
         "the gradient of readout is not finite in epoch 3, batch 3; lower --beta"),
    ],
)  # fmt: skip
def test_the_first_bad_thing_is_named_even_when_noticed_later(epoch, bad, message):
    statistics = EpochStatistics(ep.get_device("cpu"), epoch, LAYERS)
    with np.errstate(invalid="ignore"):
        for number in range(1, 7):
            worse = bad if number == 3 else {"activity": [math.nan] * 2} if number == 5 else {}
            statistics.add(result(**(GOOD | worse)))
    with pytest.raises(DivergenceError) as error:
        statistics.read()
    assert str(error.value) == message


def test_the_very_first_batch_blames_the_gain():
    statistics = EpochStatistics(ep.get_device("cpu"), 1, LAYERS)
    with np.errstate(invalid="ignore"):
        statistics.add(result(**(GOOD | {"loss": math.inf})))
    with pytest.raises(DivergenceError, match="the loss is not finite in epoch 1, batch 1; lower --gain"):
        statistics.read()


def test_statistics_go_on_from_their_state():
    rng = np.random.default_rng(0)
    results = [result(*rng.random(1), rng.random(2), rng.random(2), rng.random(3)) for _ in range(5)]
    straight, broken = (EpochStatistics(ep.get_device("cpu"), 1, LAYERS) for _ in range(2))
    for number, one in enumerate(results):
        straight.add(one)
        broken.add(one)
        state = broken.state_dict()
        broken = EpochStatistics(ep.get_device("cpu"), 1, LAYERS)
        broken.load_state_dict(state)
        assert broken.read() == straight.read(), number
    assert (broken.count, broken.batches) == (10, 5)


def test_arrays_that_are_not_finite_are_named():
    check_arrays({"a": np.ones(2), "steps": np.asarray(3)}, 1)
    with pytest.raises(DivergenceError, match="'mean.b' is not finite after an update in epoch 7; lower --learning-r"):
        check_arrays({"a": np.ones(2), "mean.b": np.array([1, -math.inf])}, 7)


# --- a loss far above its start ------------------------------------------------------------------------------------


def feed(losses, watch=None):
    watch = watch or LossWatch(ep.get_device("cpu"))
    for loss in losses:
        watch.add(np.float32(loss))
    return watch


def batches_until_noticed(start, loss):
    """mean_n = loss - (loss - start) (1 - 1/100)^n reaches 3 max(start, 1) at this n."""
    limit = 3 * max(start, 1)
    return math.ceil(math.log((loss - limit) / (loss - start)) / math.log(0.99))


@pytest.mark.parametrize("beta", [0.5, 1e-6])
@pytest.mark.parametrize(("gain", "free_steps", "knob"), [(3.0, 10, "--gain or --feedback"), (0.4, 60, "--beta")])
def test_a_small_nudge_is_no_remedy_for_a_network_that_never_rests(gain, free_steps, knob, beta):
    """ReLU and a high gain: the nudged phase overflows first, with any beta; the free one grows all the same."""
    net = small.network("dense", activation="relu", gain=gain, precision="float32")
    learner = ep.EquilibriumPropagation(net, beta, free_steps=free_steps, nudged_steps=300, schedule="synchronous")
    statistics = EpochStatistics(net.device, 1, layer_names(learner.parameters()))
    with np.errstate(all="ignore"):
        step = learner.step(small.batch_of(net))
        if knob == "--beta":  # such a network does not diverge by itself
            assert np.isfinite(step.nudge_response).all()
            step.nudge_response = np.full_like(step.nudge_response, np.inf)
        statistics.add(step)
    with pytest.raises(DivergenceError, match=f"the nudged state of layer 1 .*; lower {knob}"):
        statistics.read()


@pytest.mark.parametrize(("start", "loss"), [(2, 10), (2, 6.5), (0.25, 10), (2, 1e4)])
def test_a_loss_that_stays_far_above_its_start_is_noticed(start, loss):
    count = batches_until_noticed(start, loss)
    watch = feed([start, *[loss] * (count - 1)])
    watch.check(1)
    feed([loss, *[0.1] * 500], watch)  # that it has fallen since does not help
    with pytest.raises(DivergenceError, match=f"above {3 * max(start, 1):g}, 3 times its start, .* up to epoch 3; low"):
        watch.check(3)


@pytest.mark.parametrize("losses", [[], [2], [2, *[5.9] * 5000], [2, *[30] * 15, *[2] * 500], [2, *[9, 1] * 500]])
def test_a_loss_that_is_bad_or_peaks_is_let_alone(losses):
    feed(losses).check(1)


def test_the_watch_goes_on_from_its_state():
    straight, broken = feed([2]), feed([2])
    for loss in [7, 8, 9] * 60:
        feed([loss], straight)
        again = LossWatch(ep.get_device("cpu"))
        again.load_state_dict(broken.state_dict())
        broken = feed([loss], again)
    for name, value in straight.state_dict().items():
        assert broken.state_dict()[name] == value
    with pytest.raises(DivergenceError):
        broken.check(1)
    broken.forgive()
    broken.check(1)
    feed([9] * batches_until_noticed(2, 9), broken)
    with pytest.raises(DivergenceError):
        broken.check(1)


# --- runs ----------------------------------------------------------------------------------------------------------


def poison(trainer, epoch, halvings=0):
    """Make a gradient NaN in the second batch of `epoch` as long as the learning rate was halved fewer times."""
    step = trainer.learner.step

    def poisoned(batch):
        result = step(batch)
        if (trainer.epochs_done, trainer.batches_done) == (epoch - 1, 1) and trainer.halvings <= halvings:
            result.gradients["layers.1.weight"][...] = math.nan
        return result

    trainer.learner.step = poisoned


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(quadrants, tmp_path):
    trainer = run({"epochs": 2, "checkpoint_minutes": 0}, tmp_path / "run")
    poison(trainer, 2)
    with pytest.raises(DivergenceError, match=r"the gradient of layers\.1 is not finite in epoch 2, batch 2"):
        trainer.run()
    last = trainer.directory.load()
    assert (last.epoch, last.batch) == (1, 1)
    assert len(trainer.directory.metrics()) == 1


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("loss", "the loss is not finite in epoch 2, batch 2"),
        ("activity", "the state of layer 2 is not finite in epoch 2, batch 2"),
        ("saturated", "'saturated' of layer 2 is not finite in epoch 2; lower --learning-rate"),
        ("dead", "'dead' of layer 2 is not finite in epoch 2; lower --learning-rate"),
        ("nudge_response", "the nudged state of layer 2 is not finite in epoch 2, batch 2"),
        ("free", "'free_residual' of layer 2 is not finite in epoch 2; lower --learning-rate"),
        ("nudged", "'nudged_residual' of layer 2 is not finite in epoch 2; lower --learning-rate"),
    ],
)
def test_whatever_is_not_finite_ends_the_run_and_leaves_valid_json(place, message, value, quadrants, tmp_path):
    trainer = run({"epochs": 3}, tmp_path / "run")
    step = trainer.learner.step

    def poisoned(batch):
        result = step(batch)
        if (trainer.epochs_done, trainer.batches_done) == (1, 1):
            found = getattr(result, place)
            array = np.array(found.measured if place in ("free", "nudged") else found)
            array[(1,) * bool(array.ndim)] = value
            if place in ("free", "nudged"):
                found.measured = array
            else:
                result = dataclasses.replace(result, **{place: array})
        return result

    trainer.learner.step = poisoned
    with pytest.raises(DivergenceError, match=message):
        trainer.run()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["epoch"] for line in lines] == [1]
    json.loads((tmp_path / "run" / "settling.json").read_text(), parse_constant=pytest.fail)
    assert trainer.directory.load().epoch == 1


def test_a_huge_learning_rate_ends_in_a_divergence_error(quadrants, tmp_path):
    with pytest.raises(DivergenceError, match="in epoch 1.* lower --"):
        run({"algorithm": "bp", "activation": "relu", "learning_rate": 1e30}, tmp_path / "run").run()


def test_an_update_that_is_not_finite_is_not_saved(quadrants, tmp_path):
    """In the last batch of all, where no later loss could tell."""
    trainer = run({"epochs": 1, "algorithm": "bp"}, tmp_path / "run")
    update = trainer.optimizer.step

    def overflowing(gradients, factor):
        update(gradients, factor)
        if trainer.batches_done == 2:
            trainer.optimizer.state_dict()["square.readout.weight"][0] = math.inf

    trainer.optimizer.step = overflowing
    with pytest.raises(DivergenceError, match=r"'square\.readout\.weight' is not finite after an update in epoch 1"):
        trainer.run()
    assert (trainer.directory.load().epoch, trainer.directory.metrics()) == (0, [])


HALVED = {"algorithm": "bp", "epochs": 3, "on_divergence": "halve-lr", "optimizer": "sgd", "learning_rate": 0.02}


def test_the_rate_is_halved_from_the_last_epoch_on(quadrants, tmp_path):
    """As a run whose rate is half as large from epoch 2 on; the epochs before are the same."""
    halved = run({**HALVED, "lr_schedule": "constant"}, tmp_path / "halved")
    halved.display = recorder = Recorder()
    poison(halved, 2)
    seen, add = {}, halved.watch.add

    def added(loss):
        seen.setdefault(halved.halvings, halved.watch.state_dict() if halved.epochs_done else {})
        add(loss)

    halved.watch.add = added
    halved.run()
    assert seen[1]["mean"] == seen[1]["peak"] == seen[1]["start"], "what the loss had come to is forgiven"
    assert recorder.texts("warning") == [
        "the gradient of layers.1 is not finite in epoch 2, batch 2; lower --beta; back to the end of epoch 1 with "
        "half the learning rate (time 1 of at most 5)"
    ]
    straight = run({**HALVED, "lr_schedule": "constant"}, tmp_path / "straight")
    step = straight.optimizer.step
    straight.optimizer.step = lambda gradients, factor: step(gradients, factor * (0.5 if straight.epochs_done else 1))
    straight.run()
    assert [r["learning_rate"] for r in halved.directory.metrics()] == [0.02, 0.01, 0.01]
    assert [r["halvings"] for r in halved.directory.metrics()] == [0, 1, 1]
    for name, array in straight.directory.load().parameters.items():
        np.testing.assert_array_equal(halved.directory.load().parameters[name], array)
    for one, two in zip(halved.directory.metrics(), straight.directory.metrics(), strict=True):
        assert one["train_loss"] == two["train_loss"]


@pytest.mark.parametrize("minutes", [0, 10])
def test_a_halved_run_that_is_killed_ends_like_one_that_is_not(minutes, quadrants, tmp_path):
    """Killed before, between and after two divergences in different epochs."""
    values = {**HALVED, "checkpoint_minutes": minutes, "scheme": "random"}
    straight = run(values, tmp_path / "straight")
    poison(straight, 1)
    poison(straight, 2, 1)
    straight.run()
    assert straight.halvings == 2
    for place in (2, 5, 9, 12):
        broken = run(values, tmp_path / f"broken{place}")
        poison(broken, 1)
        poison(broken, 2, 1)
        step, calls = broken.learner.step, []

        def kill(batch, step=step, calls=calls, place=place):
            calls.append(1)
            if len(calls) == place:
                raise KeyboardInterrupt
            return step(batch)

        broken.learner.step = kill
        with pytest.raises(KeyboardInterrupt):
            broken.run()
        resumed = runs.resume_run(tmp_path / f"broken{place}", {}, display=SILENT)
        poison(resumed, 1)
        poison(resumed, 2, 1)
        resumed.run()
        assert numbers(resumed.directory) == numbers(straight.directory)
        for which in ("last", "best"):
            assert_same_state(resumed.directory.load(which), straight.directory.load(which))


def test_halving_ends_after_some_times(quadrants, tmp_path):
    trainer = run({**HALVED, "epochs": 1}, tmp_path / "run")
    poison(trainer, 1, 99)
    with pytest.raises(DivergenceError, match="in epoch 1, batch 2; lower --beta"):
        trainer.run()
    assert trainer.halvings == 5


def test_an_epoch_whose_end_is_not_finite_leaves_no_record(quadrants, tmp_path):
    """Found by the snapshot, after the record was made."""
    trainer = run({**HALVED, "lr_schedule": "constant"}, tmp_path / "run")
    evaluate, poisoned = trainer._evaluate, []

    def poisoning(epoch):
        found = evaluate(epoch)
        if epoch == 2 and not poisoned:
            poisoned.append(trainer.learner.parameters()["readout.bias"])
            poisoned[0][...] = math.inf
        return found

    trainer._evaluate = poisoning
    trainer.run()
    assert poisoned
    assert [record["epoch"] for record in trainer.records] == [1, 2, 3]
    assert [record["epoch"] for record in trainer.directory.metrics()] == [1, 2, 3]
