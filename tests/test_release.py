"""Runs to pass on. Oracle: the run itself with its parameters rounded by hand; what the card says, measured again."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from quadrants import SILENT, quadrant_data, run

from cupyep.commands import release
from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.learning import Backpropagation
from cupyep.persistence import load_checkpoint, save_checkpoint
from cupyep.plugins import SIGNALS
from cupyep.training.build import evaluation_batches
from cupyep.training.config import make_config
from cupyep.training.results import evaluate
from cupyep.training.run_directory import RunDirectory
from cupyep.training.trained import load_trained

OPTIONS = {"epochs": 2, "aug": "le", "learned_maps": True, "ema": 0.9, "optimizer": "adam", "learning_rate": 0.01}


@pytest.fixture
def made(quadrants, tmp_path):
    """Return a run, what was made of it and the lines about that."""

    def make(**options):
        run(OPTIONS | options, tmp_path / "run").run()
        lines = release.release_run(tmp_path / "run", tmp_path / "out", display=SILENT)
        return tmp_path / "run", tmp_path / "out", lines

    return make


def accuracy(trained, learner, images=20):
    data = quadrant_data(test=images)
    return evaluate(learner, evaluation_batches(trained.config, data, trained.network))[1]


def test_a_released_run_is_the_run_with_rounded_averages(made):
    path, out, lines = made()
    saved, given = load_checkpoint(path / "best.h5"), load_checkpoint(out / "best.h5")
    assert (given.optimizer, given.statistics, given.generators) == ({}, {}, {})
    assert set(given.parameters) == {name for name in saved.parameters if not name.startswith("signals.")}
    for name, array in given.parameters.items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, saved.optimizer[f"average.{name}"].astype(np.float16))
    assert 5 * (out / "best.h5").stat().st_size < (path / "best.h5").stat().st_size + 5 * 16000  # but for heads of HDF5
    expected = load_trained(path)
    for array in expected.network.parameters().values():
        array[...] = array.astype(np.float16)
    images = quadrant_data().test.images / np.float32(255)
    found = load_trained(out)
    np.testing.assert_array_equal(found.network.scores(images), expected.network.scores(images))
    assert RunDirectory.open(out).metrics() == RunDirectory.open(path).metrics()
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "best.h5", "config.toml", "metrics.jsonl", "settling.json",
    ]  # fmt: skip
    assert lines[0].startswith(f"{out}: ")


@pytest.mark.parametrize("algorithm", ["ep", "bptt", "bp"])
def test_the_card_says_what_can_be_measured_again(made, algorithm, monkeypatch):
    few = release.rest_batches
    monkeypatch.setattr(release, "rest_batches", lambda *of: few(*of, count=6))
    signals = {} if algorithm == "ep" else {"aug": "none", "learned_maps": False}
    path, out, lines = made(algorithm=algorithm, **signals)
    trained, card = load_trained(out), (out / "README.md").read_text()
    rows = dict(re.findall(r"\| (.+) \| ([0-9.]+)% \|", card))
    wanted = {"feed-forward": accuracy(trained, Backpropagation(trained.network))}
    if algorithm != "bp":
        wanted["settled as in training"] = accuracy(trained, trained.learner)
        wanted["the same, 6 of the images"] = accuracy(trained, trained.learner, 6)
        trained.learner.free_steps *= 10
        wanted["settled 10 times as long, these 6"] = accuracy(trained, trained.learner, 6)
    assert {name: float(value) for name, value in rows.items()} == {
        name: pytest.approx(100 * value, abs=0.005) for name, value in wanted.items()
    }
    assert [line.split("% ")[1] for line in lines[1:]] == list(wanted)
    record = RunDirectory.open(path).metrics()[load_checkpoint(path / "best.h5").epoch - 1]
    assert f"before rounding to float16: {record['test_accuracy']:.2%}" in card
    assert ("one pass up" in card) == (algorithm == "bp")
    assert f"{sum(a.size for a in trained.network.parameters().values()):,} parameters" in card
    assert "seed 0" in card
    assert ("local error" if algorithm == "ep" else "no intermediate signals") in card


def test_it_is_taken_by_the_commands_and_names_no_folder_of_the_machine(made, invoke, tmp_path):
    path, out, _ = made(data_dir=str(tmp_path / "secret"))
    assert "secret" not in (out / "config.toml").read_text()
    code, text, err = invoke("evaluate", out, "--quiet")
    assert (code, err) == (0, "")
    settled = re.search(r"\| settled as in training \| (.+) \|", (out / "README.md").read_text()).group(1)
    assert f"test accuracy {settled}" in text
    assert invoke("export", out, "--format", "npz", "--output", tmp_path / "again.npz")[0] == 0
    code, _, err = invoke("train", "--resume", "--run-dir", out)
    assert (code, err.count("\n")) == (1, 1)
    again = ["--recipe", out / "config.toml", "--init-from", out / "best.h5", "--run-dir", tmp_path / "on"]
    assert invoke("train", *again, "--quiet")[0] == 0
    code, _, err = invoke("export", path, "--format", "run", "--output", tmp_path / "o", "--steps", "3")
    assert (code, err) == (2, "Error: --steps is for --format onnx\n")


def test_nothing_is_half_written_or_written_over(made, tmp_path, monkeypatch):
    path, out, _ = made()
    with pytest.raises(CheckpointError, match="another run"):
        release.release_run(path, out, display=SILENT)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(release, "model_card", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="cannot write .*No space left"):
        release.release_run(path, tmp_path / "full", display=SILENT)
    large = load_checkpoint(path / "best.h5")
    large.optimizer["average.layers.1.bias"][0] = 1e5
    save_checkpoint(path / "best.h5", large)
    with pytest.raises(CheckpointError, match="beyond float16"):
        release.release_run(path, tmp_path / "large", display=SILENT)
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_without_a_finished_epoch_is_refused(quadrants, tmp_path):
    trainer = run(OPTIONS, tmp_path / "run")
    trainer.on_batch = lambda _: "stop"
    trainer.run()
    with pytest.raises(ConfigurationError, match="has not finished an epoch"):
        release.release_run(tmp_path / "run", tmp_path / "out", "last", SILENT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "done", "expected"),
    [
        ({"aug": "none", "feedback": 0.25}, 3, "Equilibrium Propagation at feedback weight lambda = 0.25, no "),
        ({"aug": "kd", "algorithm": "bp"}, 3, "backpropagation, knowledge distillation; 3 epochs, seed"),
        ({"aug": "sparse"}, 2, "the signal 'sparse' of a plugin; 2 of 3 epochs, seed"),
        ({"init_from": "a.h5"}, 3, "; 3 epochs, from weights of another training, seed"),
    ],
)
def test_the_card_says_how_it_was_trained(options, done, expected, monkeypatch):
    monkeypatch.setitem(SIGNALS, "sparse", object)
    assert expected in release._how(make_config({"epochs": 3} | options), options.get("feedback", 0.1), done)


def test_weights_of_another_run_and_of_an_unfinished_epoch_are_said(made, tmp_path):
    """Neither the file that a run began with nor the place of its images is there for who gets it."""
    path, _, _ = made()
    trainer = run(OPTIONS | {"init_from": str(path / "best.h5")}, tmp_path / "second")
    trainer.on_batch = lambda _: "stop" if trainer.records else None
    trainer.run()
    release.release_run(tmp_path / "second", tmp_path / "given", "last", SILENT)
    card, config = (tmp_path / "given" / "README.md").read_text(), RunDirectory.open(tmp_path / "given").config
    assert config.init_from is None
    assert "1 of 2 epochs, from weights of another training" in card
    assert "after epoch 1; these weights are 1 batch later" in card


NETWORKS = sorted((Path(__file__).parents[1] / "docs" / "networks").iterdir())


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.name)
def test_a_network_in_the_documents_is_small_and_ready_without_its_data(path):
    assert 100_000 < sum(file.stat().st_size for file in path.iterdir()) < 4_000_000
    trained = load_trained(path)
    names = ("arch", "width", "dataset", "feedback")
    arch, width, dataset, feedback = (getattr(trained.config, name) for name in names)
    card = (path / "README.md").read_text()
    assert card.startswith(f"# {arch}, width {width:g}, on {dataset}\n")
    assert f"lambda = {feedback:g}," in card
    x = np.random.default_rng(0).random((2, *trained.images.image_shape))
    scores = trained.network.scores(x)
    assert scores.shape == (2, len(trained.images.classes))
    assert abs(scores - trained.network.scores(x[::-1])[::-1]).max() < 1e-3 < np.ptp(scores)


@pytest.mark.parametrize("damaged", ["", '{"epoch": 1, "test_accuracy": 0.5}\n{"epo', '{"epoch": 2}\n'])
def test_a_run_whose_metrics_lack_its_epoch_is_one_line(quadrants, tmp_path, damaged):
    run(OPTIONS, tmp_path / "run").run()
    (tmp_path / "run" / "metrics.jsonl").write_text(damaged)
    with pytest.raises(CheckpointError, match=r"run/metrics.jsonl' lacks epoch 2, that of the weights"):
        release.release_run(tmp_path / "run", tmp_path / "out", "last", display=SILENT)
    assert not (tmp_path / "out").exists()
