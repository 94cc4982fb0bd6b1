"""The command line: whole commands on tiny CIFAR-10 files; wrong input is in test_cli_wrong.py.

Oracle: the documented contract (exit 0 done, 1 failed, 2 wrong usage, 130 interrupted), the files that a run leaves.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import warnings

import numpy as np
import pytest
from data_files import cifar_binary_files, random_arrays, shrink_source, write_files

import cupyep as ep
from cupyep.cli import main
from cupyep.errors import ConvergenceWarning
from cupyep.training import trainer
from cupyep.training.config import OPTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TINY = ["--width", "0.06", "--free-steps", "4", "--nudged-steps", "3", "--batch-size", "25", "--device", "cpu"]
FILES = [".lock", "best.h5", "checkpoint.h5", "checkpoint.previous.h5", "config.toml", "metrics.jsonl",
         "settling.json"]  # fmt: skip
METRICS = {
    "epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy",
    "learning_rate", "kappa", "free_residual", "nudged_residual", "images_per_s", "elapsed_s", "peak_memory_bytes",
    "activity", "nudge_response", "gradient_norm", "halvings", "free_residual_per_layer", "nudged_residual_per_layer",
    "free_unsettled", "nudged_unsettled", "free_distance", "nudged_distance", "saturated", "dead", "findings",
    "free_steps", "nudged_steps", "feedback", "free_contraction", "nudged_contraction", "nonlinearity", "threads",
}  # fmt: skip


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("aug", ["none", "le", "kd"])
def test_train_leaves_a_complete_run_directory(aug, cifar, cache, invoke, tmp_path):
    options = (
        ["--epochs", 2, "--seed", 3] + ["--kappa", 0.25] * (aug != "none") + ["--teacher-epochs", 1] * (aug == "kd")
    )
    code, out, err = invoke("train", *TINY, "--aug", aug, *options)
    assert (code, err) == (0, "")
    path = tmp_path / "work" / "runs" / f"vgg5-{aug}-cifar10-seed3"
    own = ["teacher.h5", "teacher.sha256"] if aug == "kd" else []
    assert sorted(p.name for p in path.iterdir()) == FILES + own
    settings = tomllib.loads((path / "config.toml").read_text())
    assert (settings["aug"], settings["epochs"], settings["width"], settings["seed"]) == (aug, 2, 0.06, 3)
    assert set(settings) | {"gain", "data_dir", "image_size", "limit_train", "limit_test", "validation", "tolerance",
                            "signal_pool", "teacher", "micro_batch", "scratch_mb",
                            "readout_pool", "init_from", "cutout", "ema", "clip_unit_norm",
                            "patience", "plugin"} == set(OPTIONS)  # fmt: skip
    lines = records(path)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert set(lines[0]) == METRICS
    assert [len(lines[0][name]) for name in ("activity", "nudge_response", "gradient_norm")] == [4, 4, 5]
    assert lines[0]["kappa"] == (None if aug == "none" else 0.25)
    assert f"test accuracy {lines[1]['test_accuracy']:.2%} after the last epoch, 2; " in out.splitlines()[-1]
    assert f"run directory {path.relative_to(tmp_path / 'work')}" in out.splitlines()[-1]
    assert out.count("epoch 1/2") == 1
    assert ("trained by backpropagation" in out) == (aug == "kd")
    assert (cache / "teachers").exists() == (aug == "kd")
    assert [p.name for p in cifar.iterdir()] == ["cifar-10-batches-bin"]


def test_quiet_prints_no_line_an_epoch(cifar, invoke):
    _, out, err = invoke("train", *TINY, "--epochs", 1, "--quiet")
    assert "epoch 1/1" not in out
    assert out.splitlines()[-1].startswith("test accuracy")
    assert err == ""


def test_run_folders_get_numbers_and_given_ones_are_not_overwritten(cifar, invoke, tmp_path):
    for _ in range(2):
        assert invoke("train", *TINY, "--epochs", 1, "--limit-train", 10, "--quiet")[0] == 0
    assert {p.name for p in (tmp_path / "work" / "runs").iterdir()} == {
        "vgg5-none-cifar10-seed0", "vgg5-none-cifar10-seed0-2"}  # fmt: skip
    path = tmp_path / "work" / "runs" / "vgg5-none-cifar10-seed0"
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    code, out, err = invoke("train", *TINY, "--run-dir", path)
    assert (code, out) == (1, "")
    assert err == f"Error: '{path}' holds another run; resume that or choose another folder\n"
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_resume_and_evaluate(cifar, invoke, tmp_path):
    path = tmp_path / "run"
    assert invoke("train", *TINY, "--run-dir", path, "--epochs", 1, "--quiet")[0] == 0
    code, _, err = invoke("train", "--run-dir", path, "--resume")
    assert (code, err) == (2, "Error: all 1 epochs are done; give more --epochs to go on\n")
    code, out, _ = invoke("train", "--run-dir", path, "--resume", "--epochs", 2, "--stretch-schedule")
    assert code == 0
    assert "resuming" in out
    assert [line["epoch"] for line in records(path)] == [1, 2]
    code, out, _ = invoke("evaluate", path, "--checkpoint", "last")
    assert code == 0
    last = records(path)[-1]
    assert f"test accuracy {last['test_accuracy']:.2%}, loss {last['test_loss']:.4f}" in out
    assert "top-5" not in out
    code, out, _ = invoke("evaluate", path, "--limit-test", 4)
    assert "on the 4 test images" in out


def test_a_finished_run_goes_on_with_a_stretched_schedule_only_where_that_is_asked_for(cifar, invoke, tmp_path):
    """By hand: 2 of 3 epochs done, a cosine is at (1 + cos(2 pi / 3)) / 2 = 1/4."""
    path, more = tmp_path / "run", ("--resume", "--epochs", 3)
    options = ["--epochs", 2, "--aug", "le", "--kappa", 0.4, "--learning-rate", 0.002, "--run-dir", path]
    assert invoke("train", *TINY, *options, "--quiet")[0] == 0
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    text = "3 epochs in place of 2 stretch the schedules: learning rate 0 -> 0.0005, kappa 0 -> 0.1"
    code, _, err = invoke("train", "--run-dir", path, *more)
    wanted = f"Error: the run has finished; {text}; add --stretch-schedule if that is what you want\n"
    assert (code, err) == (2, wanted)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    code, out, err = invoke("train", "--run-dir", path, *more, "--stretch-schedule")
    assert code == 0, err
    assert text in out
    assert [line["learning_rate"] for line in records(path)] == pytest.approx([0.002, 0.001, 0.0005])


@pytest.mark.parametrize(("schedule", "told"), [("cosine", "0.001 -> 0.0015"), ("constant", "")])
def test_an_unfinished_run_says_what_stretching_does(schedule, told, cifar, invoke, tmp_path, monkeypatch):
    """Half of 2 epochs is a third of 3: a cosine is at 1/2 and at 3/4; where nothing changes nothing is said."""
    path, evaluate = tmp_path / "run", trainer.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", lambda *how: signal.raise_signal(signal.SIGINT) or evaluate(*how))
        options = ["--epochs", 2, "--lr-schedule", schedule, "--learning-rate", 0.002, "--run-dir", path]
        assert invoke("train", *TINY, *options)[0] == 130
    code, _, err = invoke("train", "--run-dir", path, "--resume", "--epochs", 3)
    text = f"Warning: 3 epochs in place of 2 stretch the schedules: learning rate {told}\n"
    assert code == 0
    assert (text in err, "stretch" in err) == (bool(told), bool(told))
    assert len(records(path)) == 3


def test_validation_is_recorded_chooses_the_best_and_can_be_evaluated(cifar, invoke, tmp_path):
    path = tmp_path / "run"
    code, out, err = invoke("train", *TINY, "--epochs", 2, "--validation", 20, "--aug", "kd", "--teacher-epochs", 1,
                            "--run-dir", path)  # fmt: skip
    assert (code, err) == (0, "")
    assert "30 training, 20 validation and 10 test images" in out
    assert "  validation loss " in out
    lines = records(path)
    best = max(lines, key=lambda line: line["validation_accuracy"])
    assert f"after epoch {best['epoch']} (best.h5, chosen by validation accuracy" in out
    code, out, _ = invoke("evaluate", path, "--split", "validation")
    assert code == 0
    assert f"vgg5 on the 20 validation images of cifar10, epoch {best['epoch']} (best, chosen by validation" in out
    assert f"validation accuracy {best['validation_accuracy']:.2%}, loss {best['validation_loss']:.4f}" in out
    assert "on the 30 train images" in invoke("evaluate", path, "--split", "train")[1]


def test_evaluate_shows_top_5_for_many_classes(invoke, tmp_path, monkeypatch):
    shrink_source(monkeypatch, "cifar100")
    arrays = random_arrays((32, 32, 3), 100)
    write_files(tmp_path / "cifar-100-binary", cifar_binary_files("cifar100", arrays))
    options = ["--dataset", "cifar100", "--data-dir", tmp_path, "--run-dir", tmp_path / "run", "--quiet"]
    assert invoke("train", *TINY, *options, "--epochs", 1)[0] == 0
    settled, settle = [], ep.EquilibriumPropagation.settled
    monkeypatch.setattr(
        ep.EquilibriumPropagation, "settled", lambda self, batch: settled.append(len(batch)) or settle(self, batch)
    )
    line, rest = invoke("evaluate", tmp_path / "run")[1].splitlines()[1:]
    assert sum(settled) == 3 * len(arrays[1][0]), "every image once, then as trained and for longer"
    assert re.fullmatch(r"at rest [0-9.]+% of 10 images \(10 times the steps; [0-9.]+% as trained\)", rest)
    record = records(tmp_path / "run")[-1]
    assert f"accuracy {record['test_accuracy']:.2%}, loss {record['test_loss']:.4f}, top-5 accuracy " in line


def test_a_recipe_fills_what_is_not_given(cifar, invoke, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('width = 0.03\nbeta = 0.2\nschedule = "evenodd"\nepochs = 1\nlimit_train = 10\n')
    path = tmp_path / "run"
    assert invoke("train", *TINY, "--recipe", recipe, "--run-dir", path, "--no-crop")[0] == 0
    settings = tomllib.loads((path / "config.toml").read_text())
    assert (settings["width"], settings["beta"], settings["schedule"]) == (0.06, 0.2, "evenodd")
    assert (settings["crop"], settings["flip"]) == (False, True)


def test_numbers_with_commas(cifar, invoke, tmp_path):
    path = tmp_path / "run"
    rates = "0.25,0.15,0.1,0.08,0.05"
    assert invoke("train", *TINY, "--learning-rate", rates, "--gain", "0.5", "--epochs", 1, "--run-dir", path)[0] == 0
    settings = tomllib.loads((path / "config.toml").read_text())
    assert settings["learning_rate"] == [0.25, 0.15, 0.1, 0.08, 0.05]
    assert settings["gain"] == 0.5


@pytest.mark.parametrize(
    ("signals", "maps"), [([], []), (["--aug", "le", "--learned-maps"], [f"signals.0.layer{n}" for n in range(1, 5)])]
)
def test_check_prints_both_forms_and_writes_json(cifar, invoke, tmp_path, signals, maps):
    path = tmp_path / "check.json"
    options = ["--width", 0.02, "--batch-size", 4, "--precision", "float64", "--beta", 0.01, "--pooling", "average"]
    code, out, err = invoke("check", *options, *signals, "--activation", "sigmoid", "--json", path)
    assert (code, err) == (0, "")
    assert "deviation form" in out
    assert "classical form" in out
    content = json.loads(path.read_text())
    names = ["layers.1", "layers.2", "layers.3", "layers.4", "readout"]
    assert [row["name"] for row in content["layers"]] == names + maps
    assert (content["nudge"], content["other"]["nudge"]) == ("deviation", "classical")
    for row in content["layers"] + content["other"]["layers"]:
        assert row["cosine"] > 0.99, "smooth activation and pooling: both forms are close to the truth"
        assert 0 <= row["relative_error"] < 0.1
        assert 0.9 < row["sign_agreement"] <= 1
        assert f"{row['cosine']:.4g}" in out
    assert content["options"]["beta"] == 0.01


def test_check_of_a_precision_prints_a_table_for_every_beta(cifar, invoke, tmp_path):
    """Smooth activation and pooling: in TF32 both forms stay close to BPTT in float64 and to EP in float32."""
    path = tmp_path / "check.json"
    options = ["--width", 0.02, "--batch-size", 4, "--precision", "tf32", "--pooling", "average", "--aug", "le"]
    options += ["--device", "cpu"]  # which rounds what it multiplies for certain
    code, out, err = invoke("check", *options, "--activation", "sigmoid", "--beta", "0.1,0.02", "--json", path)
    assert (code, err) == (0, "")
    assert out.index("beta 0.1 ") < out.index("beta 0.02 ")
    assert out.count("to float32") == out.count("from zeros") == 4
    content = json.loads(path.read_text())
    assert [part["beta"] for part in content["betas"]] == [0.1, 0.02]
    assert content["layers"] == content["betas"][0]["forms"]["deviation"]
    for part in content["betas"]:
        for row in part["forms"]["deviation"]:
            assert 0.99 < row["cosine"] < 1 - 1e-9
            assert 0.999 < row["cosine_float32"] < 1 - 1e-9
            assert 0.999 < row["cosine_from_zeros"] < 1 - 1e-9
    for beta in ("0.1,-0.02", "-0.02"):
        code, _, err = invoke("check", "--beta", beta)
        assert (code, err) == (2, "Error: --beta must be above 0 (got -0.02)\n")


def test_check_of_a_recipe_takes_what_it_nudges_but_not_how_it_settles(cifar, invoke, tmp_path):
    recipe, path = tmp_path / "mine.toml", tmp_path / "check.json"
    nudge = 'aug = "le"\nsignal_layers = "1-2"\nsignal_pool = 2\nkappa = 0.7\nbeta = 0.03\n'
    network = 'feedback = 0.4\nactivation = "sigmoid"\nwidth = 0.05\n'
    recipe.write_text(nudge + network + 'schedule = "sweeps"\nfree_steps = 3\nbatch_size = 7\nepochs = 9\n')
    code, out, err = invoke("check", "--recipe", recipe, "--width", 0.02, "--free-steps", 90, "--json", path)
    assert (code, err) == (0, "")
    assert "beta 0.03 " in out
    options = json.loads(path.read_text())["options"]
    taken = {"aug": "le", "signal_layers": "1-2", "kappa": 0.7, "signal_pool": 2, "beta": 0.03, "feedback": 0.4}
    assert options | taken == options
    own = {"width": 0.02, "free_steps": 90, "schedule": "evenodd", "batch_size": 4, "tolerance": 1e-6}
    assert options | own == options


def test_info_names_device_libraries_and_data_folder(invoke, tmp_path):
    code, out, _ = invoke("info", "--data-dir", tmp_path)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["numpy"] == np.__version__
    assert lines["cupyep"] == ep.__version__
    usable, reason = ep.gpu_status()
    assert usable or reason in out
    assert str(tmp_path) in out


def test_info_of_a_device_is_of_the_machine(invoke):
    """A plan of some network is not what was asked for."""
    machine = invoke("info")[1].splitlines()
    code, out, err = invoke("info", "--device", "cpu")
    changed = [line for line in out.splitlines() if line not in machine]
    assert (code, err) == (0, "")
    assert [line.split() for line in changed] == [["device", "cpu", "cpu"]]
    assert out.count("\n") == len(machine)
    code, out, err = invoke("info", "--device", "tpu")
    assert (code, out) == (2, "")
    assert "tpu" in err


def test_version_help_and_no_command(invoke):
    assert invoke("--version")[:2] == (0, f"cupyep {ep.__version__}\n")
    code, out, _ = invoke("--help")
    assert code == 0
    assert "cupyep train --arch vgg7 --aug kd" in out
    assert invoke()[1] == out
    code, out, err = invoke("data")
    assert (code, err) == (0, "")
    assert out == invoke("data", "--help")[1]


@pytest.mark.parametrize("command", ["train", "evaluate", "check", "memory", "info"])
def test_every_option_has_a_help_line_and_its_default(command):
    for param in main.commands[command].params:
        if param.param_type_name == "option":
            assert param.help.rstrip("]").strip(), param.name
            unset = any(word in param.help for word in ("unset", "[default", "state over", "a recipe", "Also write"))
            assert unset or param.is_flag or param.show_default, f"{param.name} does not say its default: {param.help}"


def test_help_names_one_default_only():
    groups = [command for command in main.commands.values() if hasattr(command, "commands")]
    for command in [*main.commands.values(), *(inner for group in groups for inner in group.commands.values())]:
        for param in command.params:
            help_text = getattr(param, "help", None) or ""
            assert not ("unset:" in help_text and "[default:" in help_text), f"{command.name} {param.name}: {help_text}"


def test_train_has_every_option_of_the_configuration():
    names = {param.name for param in main.commands["train"].params}
    assert names == set(OPTIONS) | {
        "recipe", "run_dir", "resume", "stretch_schedule", "quiet", "log_format", "tensorboard", "threads",
        "sweeps", "jobs"}  # fmt: skip


@pytest.mark.parametrize(("number", "wanted"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_saves_and_says_how_to_go_on(number, wanted, cifar, invoke, tmp_path, monkeypatch):
    evaluate = trainer.evaluate

    def interrupt(*args):
        signal.raise_signal(number)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", interrupt)
        path = tmp_path / "run"
        code, _, err = invoke("train", *TINY, "--run-dir", path, "--epochs", 1)
    assert (code, err) == (wanted, f"Error: interrupted; go on with: cupyep train --run-dir {path} --resume\n")
    assert records(path) == []
    code, out, err = invoke("train", "--run-dir", path, "--resume")
    assert (code, err) == (0, "")
    assert "after epoch 0 of 1, batch 2 of 2" in out
    assert len(records(path)) == 1


def test_an_interruption_with_nothing_to_save(invoke, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cupyep.cli.reports.system_report", interrupt)
    code, _, err = invoke("info")
    assert (code, err.strip()) == (130, "Error: interrupted")


def test_warnings_are_one_line_and_come_once_a_kind(cifar, invoke):
    options = ["--tolerance", "1e-12", "--free-steps", 3, "--nudged-steps", 3, "--batch-size", 2, "--width", 0.02]
    with warnings.catch_warnings():
        warnings.simplefilter("always", ConvergenceWarning)
        code, _, err = invoke("check", *options)
    assert code == 0
    assert err.startswith("Warning: the free phase did not settle in 3 steps")
    assert err.count("\n") == 1


def test_training_says_once_an_epoch_what_is_wrong_and_what_to_turn(cifar, invoke, tmp_path):
    options = ["--tolerance", "1e-12", "--schedule", "evenodd", "--epochs", 2, "--run-dir", tmp_path / "run"]
    code, _, err = invoke("train", *TINY, *options)
    assert code == 0
    found = [
        (record["epoch"], finding["message"]) for record in records(tmp_path / "run") for finding in record["findings"]
    ]
    assert [epoch for epoch, text in found if text.startswith("the free phase does not settle: after 4 steps")] == [
        1,
        2,
    ]
    assert found[0][1].endswith("raise --free-steps, or lower --feedback or --gain, or raise --tolerance")
    assert err.splitlines() == [f"Warning: epoch {epoch}: {text}" for epoch, text in found]


def test_the_digits_recipe_needs_no_files(invoke, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    less = ["--limit-train", 50, "--limit-test", 20, "--epochs", 1, "--teacher-epochs", 1, "--width", 0.05]
    code, out, err = invoke("train", "--recipe", "digits-kd", "--data-dir", tmp_path / "data", "--device", "cpu", *less)
    assert (code, err) == (0, "")
    assert "digits 16x16x1, 50 training and 20 test images" in out
