"""`cupyep train --sweep`. Oracle: the product of the values by hand, and the same runs trained one by one."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import pytest
from quadrants import SILENT, TINY, numbers

from cupyep.cli.train import swept_values
from cupyep.errors import ConfigurationError
from cupyep.experiments.sweep import grid, sweep, train_point
from cupyep.parallel import Communicator
from cupyep.training import runs, trainer
from cupyep.training.config import make_config
from cupyep.training.run_directory import RunDirectory

WORDS = ["--arch", "vgg5", "--width", 0.02, "--free-steps", 3, "--nudged-steps", 2, "--batch-size", 16, "--device",
         "cpu"]  # fmt: skip


def metrics(path):
    return numbers(RunDirectory.open(path))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the grid --------------------------------------------------------------------------------------------------------


def test_every_combination_in_a_folder_named_by_its_values(tmp_path):
    values = {"aug": ["le"], "kappa": [0.1, 1.0], "learning_rate": [[0.5, 0.25], 1e-5], "crop": [False],
              "arch": ["32 32p", "vgg5"], "tolerance": [None, 1e-4]}  # fmt: skip
    points = grid(values, tmp_path, {"epochs": 3}, {"seed": 7})
    assert len(points) == 16
    assert points[0].folder == tmp_path / (
        "aug=le,kappa=0.1,learning_rate=0.5_0.25,crop=false,arch=32_32p,tolerance=unset"
    )
    assert points[-1].name == "aug=le,kappa=1,learning_rate=1e-05,crop=false,arch=vgg5,tolerance=0.0001"
    assert len({point.name for point in points}) == 16
    for point, combination in zip(points, itertools.product(*values.values()), strict=True):
        config = {"epochs": 3, "seed": 7, **dict(zip(values, combination, strict=True))}
        assert point.config == make_config(config)


def test_numbers_that_look_alike_have_folders_of_their_own(tmp_path):
    beta = [0.1, 0.1000000001, 0.5]
    assert [point.name for point in grid({"beta": beta}, tmp_path)] == ["beta=0.1", "beta=0.1000000001", "beta=0.5"]


@pytest.mark.parametrize(
    ("values", "given", "text"),
    [
        ({"kappa": [0.1]}, {}, "kappa=0.1: --kappa needs --aug le or kd"),
        ({"aug": ["none", "le"], "kappa": [0.1]}, {}, "aug=none,kappa=0.1: --kappa needs --aug le or kd"),
        ({"warmup": [1.0, 5.0]}, {"epochs": 2}, "warmup=5: --warmup must be at most the 2 --epochs (got 5)"),
        ({"beta": [0.1, 2.0]}, {"momentum": 0.5}, "--momentum needs --optimizer sgd"),
        ({"arch": ["32 32p", "32_32p"]}, {}, "unknown --arch"),
        ({"arch": ["32 32p", "32  32p"]}, {}, "would be called 'arch=32_32p'"),
    ],
)
def test_all_is_checked_before_anything_starts(values, given, text, tmp_path):
    with pytest.raises(ConfigurationError) as error:
        grid(values, tmp_path, given)
    assert text.replace("unknown --arch", "arch=32_32p: ") in str(error.value)


def test_what_has_an_effect_in_one_run_may_be_given(tmp_path):
    points = grid({"optimizer": ["sgd", "adam"]}, tmp_path, {"momentum": 0.5})
    assert [point.config.momentum for point in points] == [0.5, 0.5]


def test_values_are_read_as_the_options_are():
    texts = ["lambda=0.1, 1", "free-steps=2,3", "crop=true,no", "gain=0.5,0.6;1", "--signal-layers=2,3;all",
             "tolerance=unset,1e-4", "dataset=digits,svhn", "lr=0.1"]  # fmt: skip
    assert swept_values(texts, {}) == {
        "feedback": [0.1, 1.0], "free_steps": [2, 3], "crop": [True, False], "gain": [[0.5, 0.6], 1.0],
        "signal_layers": ["2,3", "all"], "tolerance": [None, 1e-4], "dataset": ["digits", "svhn"],
        "learning_rate": [0.1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["kapa=1"], "unknown option 'kapa'; did you mean 'kappa'?"),
        (["kappa"], "--sweep must be like kappa=0.1,0.3 (got 'kappa')"),
        (["kappa="], "--sweep must be like kappa=0.1,0.3 (got 'kappa=')"),
        (["kappa=0.1,x"], "--sweep kappa: 'x' is not a valid float"),
        (["kappa=-1"], "--kappa must be at least 0 (got -1.0)"),
        (["seed=0,unset"], "--sweep seed: 'unset' is not a valid integer"),
        (["beta=0.1,0.10"], "--sweep beta holds 0.10 twice"),
        (["beta=0.1", "--sweep", "beta=0.2"], "--sweep names beta twice"),
        (["scheme=centred"], "did you mean 'centered'?"),
        (["beta=0.1", "--beta", "0.2"], "--beta is swept, leave it out; or leave out its --sweep"),
        (["beta=0.1,nan"], "--beta must be a number (got nan)"),
        (["plugin=a,b"], "--plugin cannot be swept"),
    ],
)
def test_wrong_sweeps_are_one_line(words, text, invoke, tmp_path):
    code, out, err = invoke("train", "--run-dir", tmp_path / "s", "--sweep", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert text in err
    assert not (tmp_path / "s").exists()


def test_what_a_sweep_needs(invoke, tmp_path):
    assert "--sweep needs --run-dir" in invoke("train", "--sweep", "seed=0,1")[2]
    json = ["--log-format", "json"]
    assert "--sweep writes no" in invoke("train", "--run-dir", tmp_path / "s", "--sweep", "seed=0,1", *json)[2]
    assert "--jobs needs --sweep" in invoke("train", "--jobs", 2)[2]
    code, _, err = invoke("train", "--sweep", "seed=0,1", "--run-dir", tmp_path / "none", "--resume")
    assert (code, "there is no sweep in" in err) == (1, True)


def test_one_process_sweeps(invoke, tmp_path, monkeypatch):
    """Of two that mpirun starts, each would train every run."""
    two = Communicator()
    two.size = 2
    monkeypatch.setattr("cupyep.cli.train.join", lambda: two)
    code, out, err = invoke("train", "--sweep", "seed=0,1", "--run-dir", tmp_path / "s")
    told = "Error: --sweep is for one process: start it without mpirun; --jobs runs several\n"
    assert (code, out, err) == (2, "", told)
    assert not (tmp_path / "s").exists()


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_its_runs_one_by_one(quadrants, invoke, tmp_path):
    words = [*WORDS, "--epochs", 1, "--sweep", "beta=0.25,0.5", "--sweep", "seed=0,1", "--run-dir", tmp_path / "s"]
    code, out, err = invoke("train", *words)
    assert (code, err) == (0, "")
    runs_ = ["beta=0.25,seed=0", "beta=0.25,seed=1", "beta=0.5,seed=0", "beta=0.5,seed=1"]
    lines = out.splitlines()
    assert names(tmp_path / "s") == runs_
    assert len(lines) == 4 + 5, "a line a run, the table's head, and its lines"
    assert [line.split(": ")[0] for line in lines[:4]] == [f"[{k}/4] {name}" for k, name in enumerate(runs_, start=1)]
    assert [line.split()[:4] for line in lines[4:6]] == [["run", "beta", "seed", "done"], [runs_[0], "0.25", "0", "1"]]
    options = {"arch": "vgg5", "width": 0.02, "free_steps": 3, "nudged_steps": 2, "batch_size": 16, "device": "cpu"}
    alone = runs.start_run(make_config(options, {"epochs": 1, "beta": 0.25, "seed": 1}), tmp_path / "one", SILENT)
    alone.run()
    assert metrics(tmp_path / "s" / runs_[1]) == metrics(tmp_path / "one")

    code, _, err = invoke("train", *words)
    assert code == 1
    assert "holds runs of such a sweep; go on with --resume" in err
    code, out, _ = invoke("train", *words, "--resume")
    assert code == 0
    assert out.count("finished before, test accuracy") == 4
    code, _, err = invoke("train", *words, "--resume", "--width", 0.03)
    assert (code, err.count("\n")) == (2, 1)
    assert "was trained with another --width" in err


def test_interrupted_a_sweep_goes_on_where_it_stopped(quadrants, invoke, tmp_path, monkeypatch):
    """In the second run's second epoch: the first is left alone, the second goes on, the third begins."""
    words = [*WORDS, "--epochs", 2, "--sweep", "seed=0,1,2", "--run-dir", tmp_path / "s"]
    evaluate, calls = trainer.evaluate, []

    def stop(*how):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*how)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", stop)
        code, _, err = invoke("train", *words)
    assert code == 143
    assert "1 of 3 runs are finished; go on with the same command and --resume" in err
    assert names(tmp_path / "s") == ["seed=0", "seed=1"]
    first = {path.name: path.read_bytes() for path in (tmp_path / "s" / "seed=0").iterdir()}
    code, out, _ = invoke("train", *words, "--resume")
    assert code == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "s" / "seed=0").iterdir()} == first
    assert [len(metrics(tmp_path / "s" / f"seed={k}")) for k in range(3)] == [2, 2, 2]
    for k in (1, 2):
        straight = runs.start_run(RunDirectory.open(tmp_path / "s" / f"seed={k}").config, tmp_path / f"r{k}", SILENT)
        straight.run()
        assert metrics(tmp_path / "s" / f"seed={k}") == metrics(tmp_path / f"r{k}")
    assert "finished before" in out


def test_a_run_that_fails_leaves_the_others(quadrants, invoke, tmp_path):
    words = [*WORDS, "--epochs", 1, "--aug", "le", "--sweep", "signal-layers=9,2", "--run-dir", tmp_path / "s"]
    code, out, err = invoke("train", *words)
    assert code == 1
    assert err.splitlines()[0].startswith("Warning: [1/2] signal_layers=9: failed: --signal-layers names layer 9")
    assert err.splitlines()[1] == "Error: 1 of 2 runs failed, see above; the same command with --resume goes on"
    assert names(tmp_path / "s") == ["signal_layers=2"]
    assert out.splitlines()[-1].startswith("signal_layers=2")


@pytest.mark.parametrize(
    "config",
    [
        {"patience": 1, "learning_rate": 1e-12},
        {"free_steps": "auto", "on_unsettled": "stop", "feedback": 1.0, "gain": 3.0},
    ],
    ids=["its patience is at an end", "it does not settle"],
)
def test_a_run_that_ended_early_is_finished(config, quadrants, tmp_path):
    (point,) = grid({"seed": [0]}, tmp_path / "s", {**TINY, **config, "epochs": 9})
    assert train_point(point, {})[1]
    assert len(metrics(point.folder)) < 9
    assert train_point(point, {})[2].startswith("finished before")


@pytest.mark.slow
def test_side_by_side_as_in_turn(tmp_path):
    pytest.importorskip("sklearn")
    given = {**TINY, "dataset": "digits", "image_size": 16, "limit_train": 20, "limit_test": 20, "epochs": 1}
    folders = [tmp_path / "one", tmp_path / "two"]
    for jobs, folder in enumerate(folders, start=1):
        assert sweep(grid({"seed": [0, 1]}, Path(folder), given), jobs, display=SILENT) == 0
    for name in ("seed=0", "seed=1"):
        assert metrics(folders[0] / name) == metrics(folders[1] / name)
