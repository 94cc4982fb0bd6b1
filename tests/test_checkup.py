"""Real runs on tiny images: what fails is diagnosed in words in the run's output, what is healthy is left in peace.

Oracle: settings known to fail (and in which way) or to learn, from networks measured against BPTT and BP.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from quadrants import quadrant_data

from cupyep.diagnostics.checkup import check_trace
from cupyep.errors import CheckpointError
from cupyep.training import build, runs
from cupyep.training.config import make_config
from cupyep.training.display import Display
from cupyep.training.run_directory import RunDirectory

SMALL = {"arch": "vgg5", "width": 0.06, "batch_size": 16, "device": "cpu", "epochs": 1}


@pytest.fixture
def train(monkeypatch, tmp_path, capsys):
    """Train on the quadrants; return the trainer and the warnings that were shown."""
    dataset = quadrant_data(train=64)
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: dataset)

    def run(**options):
        capsys.readouterr()
        trainer = runs.start_run(make_config(SMALL, options), tmp_path / "run", Display(quiet=True))
        trainer.run()
        return trainer, capsys.readouterr().err.splitlines()

    return run


def signatures(trainer):
    return [{finding["signature"] for finding in record["findings"]} for record in trainer.records]


@pytest.mark.parametrize(
    "options",
    [{}, {"arch": "vgg7"}, {"feedback": 1.0}, {"aug": "le"}, {"algorithm": "bp"}, {"algorithm": "bptt"}],
    ids=["weak feedback", "weak feedback, VGG-7", "lambda 1", "local error", "bp", "bptt"],
)
def test_healthy_networks_are_not_warned_about(options, train):
    trainer, lines = train(**options)
    assert [record["findings"] for record in trainer.records] == [[]]
    assert lines == []


FAILING = {
    "one sweep is not enough": (
        {"feedback": 1.0, "free_steps": 1, "nudged_steps": 1}, "convergence", "raise --free-steps"),
    "a response that grows": (
        {"arch": "vgg7", "feedback": 0.3, "gain": 2.0}, "convergence",
        "grows all the time: lower --feedback or --gain"),
    "a nudge that has not arrived": (
        {"feedback": 1.0, "schedule": "synchronous", "free_steps": 40, "nudged_steps": 3}, "convergence",
        "the response of layer 1 would still change by 100%, too much in 100% of the samples (layer 1); raise "
        "--nudged-steps"),
    "a nudge that dies out": (
        {"arch": "vgg11", "feedback": 1.0, "gain": 0.5, "nudge": "classical"}, "vanishing",
        "add signals (--aug le or kd), or lower --feedback, or use --nudge deviation"),
    "a nudge lost in rounding": (
        {"arch": "vgg7", "nudge": "classical"}, "vanishing", "use --nudge deviation, or raise --beta"),
    "too high a gain": ({"gain": 5.0}, "collapse", "lower --gain"),
    "too high a kappa": (
        {"aug": "le", "kappa": 100.0, "learning_rate": 0.02, "epochs": 2}, "collapse", "lower --kappa"),
    "too high a learning rate": ({"learning_rate": 0.05, "epochs": 2}, "collapse", "lower --learning-rate"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILING)
def test_failing_networks_are_diagnosed_in_words(case, train):
    options, signature, words = FAILING[case]
    trainer, lines = train(**options)
    assert signature in signatures(trainer)[-1]
    texts = [f["message"] for f in trainer.records[-1]["findings"] if f["signature"] == signature]
    assert any(words in text for text in texts), texts
    for text in texts:
        assert f"Warning: epoch {trainer.epochs}: {text}" in lines


def test_what_does_not_settle_is_said_before_anything_is_trained(train, tmp_path, capsys):
    """And once: a run that was stopped in its first epoch does not say it again."""
    options = {"feedback": 1.0, "free_steps": 1, "nudged_steps": 1}
    _, lines = train(**options, epochs=2)
    told = "Warning: before training: the free phase does not settle: after 1 sweep layer "
    assert lines[0].startswith(told)
    assert sum(told in line for line in lines) == 1
    stopped = runs.start_run(make_config(SMALL, options), tmp_path / "stopped", Display(quiet=True))
    stopped.on_batch = lambda _: True
    stopped.run()
    assert told in capsys.readouterr().err
    runs.resume_run(tmp_path / "stopped", {}, Display(quiet=True)).run()
    assert "before training" not in capsys.readouterr().err


def test_a_checkup_leaves_the_training_as_it_is(train, monkeypatch, tmp_path):
    options = {"scheme": "random", "aug": "le", "epochs": 2, "crop": True}
    watched, _ = train(**options)
    trainer = runs.start_run(make_config(SMALL, options), tmp_path / "unwatched", Display(quiet=True))
    trainer.checkup = None
    trainer.run()
    for path, parameter in trainer.learner.parameters().items():
        np.testing.assert_array_equal(watched.learner.parameters()[path], parameter)
    assert "findings" not in trainer.records[0]
    assert not (tmp_path / "unwatched" / "settling.json").exists()


def test_settling_is_kept_for_the_last_epoch(train):
    trainer, _ = train(epochs=2, feedback=0.1, schedule="evenodd", free_steps=12, nudged_steps=3, tolerance=1e-3)
    trace = trainer.directory.settling()
    assert trace == check_trace(json.loads((trainer.directory.path / "settling.json").read_text()))
    assert (trace["epoch"], trace["images"], trace["schedule"], trace["tolerance"]) == (2, 32, "evenodd", 1e-3)
    assert np.shape(trace["free"]["residual"]) == (12 + 13, 4)
    assert np.shape(trace["nudged"]["residual"]) == (3 + 9, 4)
    assert trace["nudged"]["steps"] == 3
    assert 0 < trace["free"]["residual"][-1][0] < trace["free"]["residual"][0][0]


def test_an_algorithm_without_phases_leaves_an_empty_trace(train):
    trainer, _ = train(algorithm="bp")
    assert set(trainer.directory.settling()) == {"epoch", "images", "schedule", "tolerance"}


HEAD = '{"epoch": 1, "images": 2, "schedule": "sweeps", "tolerance": '


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        HEAD + '"x"}',
        HEAD + 'null, "free": {"steps": 3, "residual": [[1, 2]]}}',
        HEAD + 'null, "free": {"steps": 1, "residual": [[1], [1, 2]]}}',
        HEAD + 'null, "free": 7}',
    ],
)
def test_damaged_records_of_settling_are_one_clear_line(content, tmp_path):
    (tmp_path / "settling.json").write_text(content)
    with pytest.raises(CheckpointError, match="settling.json' is damaged, .*; remove it$") as error:
        RunDirectory(tmp_path, make_config({})).settling()
    assert "\n" not in str(error.value)


def test_no_record_of_settling(tmp_path):
    assert RunDirectory(tmp_path, make_config({})).settling() is None
