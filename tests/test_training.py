"""Statistics, trainer, whole runs.

Oracles: closed forms and hand values for schedules, means and records; a straight run for a resumed one.
"""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from quadrants import SILENT, FakeBatches, Recorder, assert_same_state, fake_trainer, run
from small import gradients_of

import cupyep as ep
from cupyep.errors import CheckpointError, ConfigurationError, DivergenceError
from cupyep.learning.learner import StepResult
from cupyep.losses import log_softmax
from cupyep.memory.workspace import Workspace
from cupyep.settling import SettleStats
from cupyep.training import build, runs
from cupyep.training import trainer as trainer_module
from cupyep.training.config import TrainConfig
from cupyep.training.results import evaluate
from cupyep.training.run_directory import RunDirectory
from cupyep.training.schedules import Schedules
from cupyep.training.statistics import EpochStatistics
from cupyep.training.trained import load_trained

# --- statistics ----------------------------------------------------------------------------------------------------


def fake_result(count, loss, correct, gradient, residual=(0.0, 0.0), response=(0.0, 0.0), tolerance=None, learned=None):
    residual = np.asarray(residual)  # a layer; half as large for one sample, for the other half as large again
    stats = SettleStats(1, np.outer(residual, [0.5, 1.5]), tolerance=tolerance)
    gradients = {"layers.1.weight": np.asarray(gradient, np.float64), "layers.1.bias": np.array([4.0])}
    if learned is not None:
        gradients["signals.0.layer1.weight"] = np.array([learned])
    return StepResult(
        gradients_of(gradients),
        np.asarray(loss),
        np.asarray(correct),
        count,
        np.array([0.5, loss]),
        np.array([0.25, 0.5]) * loss,
        np.array([0.0, 0.1]) * loss,
        stats,
        None,
        np.asarray(response),
    )


def test_means_are_weighted_by_images():
    statistics = EpochStatistics(ep.get_device("cpu"), 1, ["layers.1"])
    statistics.add(fake_result(3, 2.0, 1, [[3.0, 0.0]], (0.1, 0.4), (1.0, 2.0), 0.3))
    statistics.add(fake_result(1, 6.0, 1, [[0.0, 0.0]], (0.5, 0.0), (5.0, 6.0), 0.3))
    means = statistics.read()
    assert means["loss"] == pytest.approx((3 * 2 + 6) / 4)
    assert means["accuracy"] == 2 / 4
    assert means["free_residual"] == pytest.approx(max((3 * 0.1 + 0.5) / 4, 3 * 0.4 / 4))
    assert means["free_residual_per_layer"] == pytest.approx([(3 * 0.1 + 0.5) / 4, 3 * 0.4 / 4])
    assert means["free_unsettled"] == pytest.approx([0.5 / 4, 3 * 0.5 / 4])
    for name in ("nudged_residual", "nudged_residual_per_layer", "nudged_unsettled"):
        assert means[name] is None
    assert means["saturated"] == pytest.approx([0.25 * 3, 0.5 * 3])
    assert means["dead"] == pytest.approx([0.0, 0.1 * 3])
    assert means["nudge_response"] == pytest.approx([2.0, 3.0])
    assert means["activity"] == pytest.approx([0.5, 3.0])
    assert means["gradient_norm"] == pytest.approx([(3 * 5 + 4) / 4])


def test_statistics_go_on_from_a_checkpoint():
    """The means of a batch before and one after are those of both, weighted by hand."""
    first = EpochStatistics(ep.get_device("cpu"), 1, ["layers.1"])
    first.add(fake_result(3, 2.0, 1, [[3.0, 0.0]], (0.1, 0.4), (1.0, 2.0), 0.3))
    second = EpochStatistics(ep.get_device("cpu"), 1, ["layers.1"])
    second.load_state_dict(first.state_dict())
    second.add(fake_result(1, 6.0, 1, [[0.0, 0.0]], (0.5, 0.0), (5.0, 6.0), 0.3))
    assert (second.count, second.batches) == (4, 2)
    means = second.read()
    assert (means["loss"], means["accuracy"]) == (pytest.approx((3 * 2 + 6) / 4), 2 / 4)
    assert means["gradient_norm"] == pytest.approx([(3 * 5 + 4) / 4])
    assert means["nudge_response"] == pytest.approx([2.0, 3.0])


def test_nobody_is_unsettled_without_a_tolerance_to_reach():
    statistics = EpochStatistics(ep.get_device("cpu"), 1, ["layers.1"])
    statistics.add(fake_result(2, 1.0, 1, [3.0], (0.5, 0.5)))
    assert statistics.read()["free_unsettled"] is None


def test_gradient_norm_joins_weight_and_bias_of_a_layer():
    arrays = {"a.weight": np.array([[1.0, 2.0]]), "a.bias": np.array([2.0]), "b.weight": np.array([-7.0])}
    np.testing.assert_allclose(gradients_of(arrays).norms(), [3.0, 7.0])


def test_learned_maps_of_signals_are_no_layers_but_must_be_finite():
    statistics = EpochStatistics(ep.get_device("cpu"), 1, ["layers.1", "signals.0.layer1"])
    statistics.add(fake_result(2, 1.0, 1, [3.0], learned=7.0))
    assert statistics.read()["gradient_norm"] == [5.0]
    statistics.add(fake_result(2, 1.0, 1, [3.0], learned=math.nan))
    with pytest.raises(DivergenceError, match=r"the gradient of signals\.0\.layer1 is not finite in epoch 1, batch 2"):
        statistics.read()


# --- trainer, with a learner whose numbers are known --------------------------------------------------------------


def test_schedules_follow_the_fraction_of_steps_done():
    """3 epochs of 2 steps: the cosine is taken at 0, 1/6, ..., 5/6, for the learning rate and for kappa."""
    trainer = fake_trainer(lr_schedule="cosine")
    trainer.run()
    factors = [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    np.testing.assert_allclose(trainer.learner.parameter, -0.1 * sum(factors), rtol=1e-12)
    np.testing.assert_allclose(trainer.learner.kappas, [0.8 * f for f in factors], rtol=1e-12)


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_warmup_rises_linearly_under_every_schedule(name):
    """3 epochs of 2 steps, 2 of them warm: a quarter, two, three, then the schedule alone; kappa is not warmed."""
    trainer = fake_trainer(lr_schedule=name, warmup=2)
    moves, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda gradients, factor: (moves.append(factor), step(gradients, factor))
    trainer.run()
    schedule = {
        "constant": [1.0] * 6,
        "cosine": [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)],
        "step": [1.0, 1.0, 1.0, 0.1, 0.1, 0.01],
    }[name]
    warm = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    np.testing.assert_allclose(moves, [s * w for s, w in zip(schedule, warm, strict=True)], rtol=1e-12)
    np.testing.assert_allclose([r["learning_rate"] for r in trainer.records], 0.1 * np.array(moves[::2]), rtol=1e-12)
    cosine = [0.8 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    np.testing.assert_allclose(trainer.learner.kappas, cosine, rtol=1e-12)


def test_a_callback_sees_a_batch_when_its_update_is_done():
    """Gradient 1, rate 0.1, 3 epochs of 2 steps."""
    seen = []
    trainer = fake_trainer(on_batch=lambda result: seen.append(float(trainer.learner.parameter[0])))
    trainer.run()
    np.testing.assert_allclose(seen, -0.1 * np.arange(1, 7), rtol=1e-12)


def test_every_split_is_judged_by_the_average():
    """Gradient 1, rate 0.1, 2 epochs of 2 steps: after step t the parameter is -0.1 t."""
    trainer = fake_trainer((0.5,) * 4, validation=FakeBatches([range(4)]), epochs=2)
    trainer.optimizer = ep.SGD(trainer.learner.parameters(), 0.1, momentum=0.0, ema=0.6)
    seen, judge = [], trainer.learner.evaluate
    trainer.learner.evaluate = lambda batch: seen.append(float(trainer.learner.parameter[0])) or judge(batch)
    trainer.run()
    average, wanted = 0.0, []
    for t in range(1, 5):
        d = min(0.6, (1 + t) / (10 + t))
        average = d * average + (1 - d) * -0.1 * t
        wanted += [average, average] if t % 2 == 0 else []  # validation and test
    np.testing.assert_allclose(seen, wanted, rtol=1e-12)


def test_kappas_of_several_signals_are_recorded_one_by_one():
    """After a third of a half cosine, 3/4 is left."""
    optimizer = ep.SGD({"layers.1.weight": np.zeros(1)}, 0.1)

    def recorded(*signals):
        return Schedules(SimpleNamespace(signals=signals), optimizer, "constant").values(2, 6)["kappa"]

    first, second = ep.LocalError([1], kappa=0.8), ep.LocalError([1], kappa=0.4, annealing="constant")
    assert recorded(first, second) == pytest.approx([0.6, 0.4])
    assert recorded(first, ep.LocalError([1], kappa=0.8)) == pytest.approx(0.6)
    assert recorded() is None


def test_patience_ends_a_run_and_more_of_it_goes_on(tmp_path):
    """Accuracies 0.5, 0.75, 0.75, 0.5, 0.25, 1: epochs 3 and 4 are no better than 2."""
    display = Recorder()
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    accuracies = (0.5, 0.75, 0.75, 0.5, 0.25, 1.0)
    summary = fake_trainer(accuracies, directory=directory, patience=2, display=display).run()
    assert (summary.epoch, summary.best_epoch, summary.test_accuracy) == (4, 2, 0.5)
    assert display.texts("note") == ["stopped after epoch 4: no better test accuracy since 2"]
    with pytest.raises(ConfigurationError, match="has stopped after epoch 4: .*; give more --patience to go on"):
        fake_trainer(accuracies, directory=RunDirectory.open(tmp_path / "run"), patience=2).resume()
    longer = fake_trainer((0.25, 1.0), directory=RunDirectory.open(tmp_path / "run"), patience=4, epochs=6)
    longer.resume()
    summary = longer.run()
    assert (summary.epoch, summary.best_epoch) == (6, 6)


def test_patience_looks_at_what_chooses_the_best_epoch():
    """Validation and test accuracy by turns: 0.5 on validation is never beaten, on test it rises all the time."""
    held = FakeBatches([range(4)])
    trainer = fake_trainer((0.5, 0.25, 0.5, 0.5, 0.25, 0.75, 0.5, 1.0), validation=held, patience=2, epochs=4)
    assert trainer.run().epoch == 3
    assert "no better validation accuracy since 1" in trainer._ending()


def test_records_best_epoch_and_summary(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    generator = np.random.default_rng(3)
    trainer = fake_trainer(directory=directory, lr_schedule="cosine", generators={"learner": generator})
    summary = trainer.run()
    records = directory.metrics()
    assert list(records[0]) == [
        "epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy",
        "learning_rate", "kappa", "halvings", "free_residual", "nudged_residual", "free_residual_per_layer",
        "nudged_residual_per_layer", "free_unsettled", "nudged_unsettled", "activity", "saturated", "dead",
        "nudge_response", "gradient_norm", "images_per_s", "threads", "elapsed_s", "peak_memory_bytes",
    ]  # fmt: skip
    assert [r["test_accuracy"] for r in records] == [0.5, 0.75, 0.75]
    assert [r["test_loss"] for r in records] == [2.0, 2.0, 2.0]
    np.testing.assert_allclose([r["learning_rate"] for r in records], [0.1, 0.075, 0.025], rtol=1e-12)
    np.testing.assert_allclose([r["kappa"] for r in records], [0.8, 0.6, 0.2], rtol=1e-12)
    assert (summary.test_accuracy, summary.best_accuracy, summary.best_epoch) == (0.75, 0.75, 2)
    assert directory.load("best").epoch == 2
    last = directory.load("last")
    assert (last.epoch, last.best_accuracy, last.best_epoch) == (3, 0.75, 2)
    data = FakeBatches.generator.bit_generator.state
    assert last.generators == {"data": data, "learner": generator.bit_generator.state}
    np.testing.assert_array_equal(last.parameters["layers.1.weight"], trainer.learner.parameter)
    assert str(summary) == (
        "test accuracy 75.00% after the last epoch, 3; 75.00% after epoch 2 (best.h5, chosen by test accuracy 75.00%); "
        "0.0 minutes, run directory "
        f"{directory.path}"
    )
    assert records[0]["validation_loss"] is None


def test_the_best_epoch_is_chosen_on_validation_where_there_is_one(tmp_path):
    """Validation and test accuracy by turns: the test images alone would choose epoch 3."""
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    learner_accuracies = (0.25, 0.25, 0.75, 0.5, 0.5, 1.0)
    trainer = fake_trainer(learner_accuracies, directory=directory, validation=FakeBatches([range(4)]), epochs=3)
    summary = trainer.run()
    assert (summary.best_split, summary.best_epoch, summary.best_accuracy) == ("validation", 2, 0.75)
    assert summary.test_accuracy == 1.0
    assert [r["validation_accuracy"] for r in directory.metrics()] == [0.25, 0.75, 0.5]
    assert [r["test_accuracy"] for r in directory.metrics()] == [0.25, 0.5, 1.0]
    assert (directory.load("best").epoch, directory.load("last").best_accuracy) == (2, 0.75)
    assert summary.best_test_accuracy == 0.5
    assert (
        "100.00% after the last epoch, 3; 50.00% after epoch 2 (best.h5, chosen by validation accuracy 75.00%)"
        in str(summary)
    )


def test_a_finished_run_does_not_go_on(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    fake_trainer(directory=directory).run()
    for _ in range(2):  # the first refusal holds no lock
        with pytest.raises(ConfigurationError, match="all 3 epochs are done; give more --epochs"):
            fake_trainer(directory=RunDirectory.open(directory.path)).resume()


def test_a_foreign_checkpoint_is_not_resumed(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", TrainConfig(seed=4))
    fake_trainer(directory=directory).run()
    other = fake_trainer(directory=directory)
    other.network.describe = lambda: {"classes": 10}
    with pytest.raises(CheckpointError, match="belongs to another network: classes: saved 3, this network 10"):
        other.resume()
    other = fake_trainer(directory=directory, generators={"learner": np.random.default_rng()})
    with pytest.raises(CheckpointError, match="lacks the state of a random generator"):
        other.resume()
    directory.config = TrainConfig(seed=5)
    with pytest.raises(CheckpointError, match="belongs to a run with --seed 4, not 5"):
        fake_trainer(directory=directory).resume()


# --- whole runs on tiny images -------------------------------------------------------------------------------------


def test_more_epochs_and_no_other_change_on_resume(quadrants, tmp_path):
    values = {"lr_schedule": "constant", "aug": "le", "kappa_annealing": "constant"}
    straight = run({**values, "epochs": 3}, tmp_path / "straight")
    straight.run()
    run({**values, "epochs": 1}, tmp_path / "short").run()
    longer = runs.resume_run(tmp_path / "short", {"epochs": 3, "beta": 0.05}, display=SILENT, stretch=True)
    longer.run()
    assert_same_state(longer.directory.load(), straight.directory.load())
    assert RunDirectory.open(tmp_path / "short").config.epochs == 3
    with pytest.raises(
        ConfigurationError, match="--beta 0.3 is not the run's 0.05; a resumed run may only change --epo"
    ):
        runs.resume_run(tmp_path / "short", {"beta": 0.3}, display=SILENT)


def test_a_list_of_one_number_is_that_number_on_resume(quadrants, tmp_path):
    """As the command line gives such options."""
    run({"epochs": 1, "gain": 0.9}, tmp_path / "run").run()
    same = {"epochs": 2, "learning_rate": [1e-3], "gain": [0.9]}
    runs.resume_run(tmp_path / "run", same, display=SILENT, stretch=True).run()
    with pytest.raises(ConfigurationError, match=r"--gain 0\.8 is not the run's 0\.9"):
        runs.resume_run(tmp_path / "run", {"epochs": 3, "gain": [0.8]}, display=SILENT)


def test_labels_are_smoothed_in_training_only(quadrants, tmp_path):
    """Oracle: the cross-entropy of the last batch of the test images with smoothed targets, of the same network."""
    values = {"epochs": 1, "algorithm": "bp", "learning_rate": 1e-9, "crop": False, "flip": False, "batch_size": 40}
    plain = run(values, tmp_path / "plain")
    smooth = run({**values, "label_smoothing": 0.3}, tmp_path / "smooth")
    batch = next(iter(plain.train))
    scores = log_softmax(plain.learner.scores(batch))
    target = np.full(scores.shape, 0.3 / 2)
    target[np.arange(40), batch.labels] += 0.7
    plain.run()
    smooth.run()
    wanted = -(target * scores).sum(axis=1).mean()
    np.testing.assert_allclose(smooth.records[0]["train_loss"], wanted, rtol=1e-5)
    assert smooth.records[0]["train_loss"] > plain.records[0]["train_loss"] + 1e-4
    for key in ("train_accuracy", "test_loss", "test_accuracy"):
        np.testing.assert_allclose(smooth.records[0][key], plain.records[0][key], rtol=1e-6)


def test_the_gradient_norms_of_a_record_are_those_before_a_clip(quadrants, tmp_path):
    """One step of plain SGD: a unit moves by the rate times the limit, in terms of its length, and not further."""
    values = {"epochs": 1, "algorithm": "bp", "batch_size": 40, "crop": False, "flip": False, "optimizer": "sgd"}
    values |= {"learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    plain, clipped = run(values, tmp_path / "plain"), run({**values, "clip_unit_norm": 1e-3}, tmp_path / "clipped")
    start = plain.network.parameters()["layers.1.weight"].copy()
    plain.run()
    clipped.run()
    np.testing.assert_allclose(clipped.records[0]["gradient_norm"], plain.records[0]["gradient_norm"], rtol=1e-6)
    moved = [trainer.network.parameters()["layers.1.weight"] - start for trainer in (plain, clipped)]
    free, held, length = (np.linalg.norm(a.reshape(-1, a.shape[-1]).astype(float), axis=0) for a in (*moved, start))
    assert (free > 2e-3 * length).any()
    np.testing.assert_allclose(held, np.minimum(free, 1e-3 * length), rtol=1e-3)


def test_an_average_is_judged_and_used_and_the_parameters_go_on(quadrants, tmp_path):
    """Oracle: the run without an average, whose parameters after every batch are averaged here."""
    values = {"epochs": 2, "optimizer": "sgd", "learning_rate": 0.05, "algorithm": "bp"}
    plain = run(values, tmp_path / "plain")
    start = {path: p.copy() for path, p in plain.network.parameters().items()}
    history, step = [], plain.optimizer.step

    def stepped(*arguments):
        step(*arguments)
        history.append({path: p.copy() for path, p in plain.network.parameters().items()})

    plain.optimizer.step = stepped
    plain.run()
    average = start
    for t, parameters in enumerate(history, start=1):
        d = min(0.6, (1 + t) / (10 + t))
        average = {path: d * a + (1 - d) * parameters[path] for path, a in average.items()}
    other = run({**values, "ema": 0.6}, tmp_path / "averaged")
    other.run()
    saved, used = other.directory.load(), load_trained(tmp_path / "averaged", "last")
    for path, p in plain.network.parameters().items():
        np.testing.assert_array_equal(saved.parameters[path], p)
        np.testing.assert_array_equal(other.network.parameters()[path], p)
        np.testing.assert_allclose(used.network.parameters()[path], average[path], rtol=1e-5, atol=1e-6)
    loss, _ = evaluate(used.learner, other.test)
    record, without = other.records[-1], plain.records[-1]
    assert (record["test_loss"], record["train_loss"]) == (loss, without["train_loss"])
    assert record["test_loss"] != without["test_loss"]


def test_scratch_may_differ_on_resume_and_changes_nothing_but_rounding(quadrants, tmp_path):
    values = {"epochs": 2, "lr_schedule": "constant", "optimizer": "sgd"}
    straight = run(values, tmp_path / "straight")
    straight.run()
    run({**values, "epochs": 1, "scratch_mb": 0.01}, tmp_path / "short").run()
    assert RunDirectory.open(tmp_path / "short").config.scratch_mb == 0.01
    longer = runs.resume_run(tmp_path / "short", {"epochs": 2, "scratch_mb": 0.5}, display=SILENT)
    assert longer.network.device.scratch_bytes == 500_000
    longer.run()
    for path, array in straight.network.parameters().items():
        np.testing.assert_allclose(longer.network.parameters()[path], array, rtol=1e-3, atol=1e-5, err_msg=path)


def test_an_epoch_makes_no_workspace_that_another_has_made(quadrants, tmp_path, monkeypatch):
    """Parts of two lengths, ragged last batches of three splits, the checkup: a graph is lost with its workspace."""
    made, begin = [Counter() for _ in range(4)], Workspace.__init__

    def counted(self, edges, batch, *others):
        made[trainer.epochs_done][batch] += 1
        begin(self, edges, batch, *others)

    monkeypatch.setattr(Workspace, "__init__", counted)
    monkeypatch.setenv("CUPYEP_THREADS", "1")  # of several, each makes its own for the parts that it happens to take
    values = {"epochs": 3, "batch_size": 13, "micro_batch": 7, "validation": 12, "limit_test": 20}
    trainer = run(values, tmp_path / "run")
    trainer.run()
    assert len(made[0]) > 6
    assert max((made[0] + made[1]).values()) <= 2, "made anew when the checkup's many images have taken more scratch"
    assert not any(made[2:]), made


def test_a_run_without_any_checkpoint_resumes_from_the_start(quadrants, tmp_path):
    straight = run({"epochs": 1}, tmp_path / "straight")
    straight.run()
    run({"epochs": 1}, tmp_path / "killed")  # prepared, and never begun
    resumed = runs.resume_run(tmp_path / "killed", {}, display=SILENT)
    resumed.run()
    assert_same_state(resumed.directory.load(), straight.directory.load())


def test_ep_learns_the_quadrants(quadrants, tmp_path):
    values = {"epochs": 6, "optimizer": "adam", "learning_rate": 5e-3, "width": 0.05, "gain": 1.0, "batch_size": 8}
    trainer = run({**values, "feedback": 0.3}, tmp_path / "run")
    summary = trainer.run()
    losses = [r["train_loss"] for r in trainer.directory.metrics()]
    assert losses[-1] < 0.5 * losses[0]
    assert summary.test_accuracy >= 0.9


def test_evaluation_repeats_the_record_of_its_epoch(quadrants, tmp_path):
    trainer = run({"epochs": 2, "aug": "le", "algorithm": "bp"}, tmp_path / "run")
    trainer.run()
    for which in ("best", "last"):
        epoch = trainer.directory.load(which).epoch
        wanted = trainer.directory.metrics()[epoch - 1]
        first, second = runs.evaluate_run(tmp_path / "run", which, {}, display=SILENT)
        note = "best, chosen by test accuracy" if which == "best" else which
        assert first == f"vgg5 on the 20 test images of cifar10, epoch {epoch} ({note})"
        assert second == f"test accuracy {wanted['test_accuracy']:.2%}, loss {wanted['test_loss']:.4f}"


def test_evaluation_says_what_is_left_at_rest(quadrants, tmp_path, monkeypatch):
    """Of one sweep at lambda 1, which is not the same; the first images of each class."""
    monkeypatch.setattr(build.rest_batches, "__defaults__", ("test", (0, 1), 16))
    values = {"epochs": 5, "optimizer": "adam", "learning_rate": 1e-2, "batch_size": 16}
    summary = run({**values, "feedback": 1.0, "gain": 1.5, "free_steps": 1}, tmp_path / "run").run()
    lines = []
    for split in ("test", "train"):
        *_, line = runs.evaluate_run(tmp_path / "run", "last", {}, display=SILENT, split=split)
        trained = load_trained(tmp_path / "run", "last")
        batch = next(iter(build.rest_batches(trained.config, trained.dataset(), trained.network, split)))
        first = getattr(trained.dataset(), split).balanced(16)
        np.testing.assert_array_equal(batch.labels, first.labels)
        right = [(trained.network.predict(batch.images, steps=steps) == first.labels).mean() for steps in (10, 1)]
        lines.append(line)
        assert line == f"at rest {right[0]:.2%} of 16 images (10 times the steps; {right[1]:.2%} as trained)"
    assert len(set(right)) == len(set(lines)) == 2
    assert f"; {lines[0]}; " in str(summary), "the run has said so at its end"


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_a_run_says_of_rest_is_of_the_network_that_it_judges(ema, quadrants, tmp_path, monkeypatch):
    """All 20 test images, as the last epoch's accuracy: of the average, where there is one."""
    seen, look = [], trainer_module.at_rest

    def watch(learner, *others):
        seen.append({path: array.copy() for path, array in learner.network.parameters().items()})
        return look(learner, *others)

    monkeypatch.setattr(trainer_module, "at_rest", watch)
    trainer = run({"epochs": 2, "ema": ema}, tmp_path / "run")
    summary, (judged,) = trainer.run(), seen
    saved = trainer.directory.load()
    for path, array in saved.weights().items():
        np.testing.assert_array_equal(judged[path], array)
    alike = all(np.array_equal(judged[path], saved.parameters[path]) for path in judged)
    assert alike == (ema is None), "the average is another network"
    assert (summary.rest["images"], summary.rest["as_trained"]) == (20, summary.test_accuracy)
    assert summary.values()["rest"] == summary.rest
    assert trainer.learner.free_steps == 6
    assert run({"epochs": 1, "algorithm": "bp"}, tmp_path / "bp").run().rest is None


def test_layer_wise_rates_need_one_number_a_layer(quadrants, tmp_path):
    trainer = run({"learning_rate": [0.5, 0.4, 0.3, 0.2, 0.1]}, tmp_path / "run")
    assert trainer.optimizer.rates["layers.2.bias"] == 0.4
    assert trainer.optimizer.rates["readout.weight"] == 0.1
    assert trainer.schedules.values(0, 2)["learning_rate"] == [0.5, 0.4, 0.3, 0.2, 0.1], "as given, input side first"
    with pytest.raises(
        ConfigurationError, match="--learning-rate has 2 numbers, but the layers are layers.1, .*readout"
    ):
        run({"learning_rate": [0.5, 0.4]}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_top_k_accuracy_by_hand():
    scores = np.array([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0], [0.0, 9.0, 1.0, 2.0]])
    learner = SimpleNamespace(
        scores=lambda batch: scores[batch.index],
        judge=lambda scores, batch: (scores.sum(), 0),
        network=SimpleNamespace(device=ep.get_device("cpu")),
    )
    batches = [
        ep.Batch(np.zeros((len(labels), 1, 1, 1)), np.array(labels), np.array(index))
        for labels, index in (([1, 0], [0, 1]), ([3], [2]))
    ]
    assert [evaluate(learner, batches, top=k)[2] for k in (1, 2, 3, 4)] == [0, 2 / 3, 2 / 3, 1]
    assert evaluate(learner, batches, top=1)[:2] == (scores.sum() / 3, 0)
    for place in (0, 3):  # the label's is 3
        for wrong in (np.nan, np.inf):
            spoilt = scores.copy()
            spoilt[2, place] = wrong
            learner.scores = lambda batch, spoilt=spoilt: spoilt[batch.index]
            assert evaluate(learner, batches, top=4)[2] == 2 / 3, "a row that is not finite has no right answer"
            assert evaluate(learner, batches, top=3)[2] == 1 / 3
