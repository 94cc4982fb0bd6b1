"""Wrong input on the command line: each one line on stderr, the right exit code, nothing half-written.

Oracle: the documented contract: exit 2 for wrong usage, 1 for whatever else stands in the way.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from data_files import cifar_binary_files, random_arrays, write_archive, write_files

import cupyep as ep
from cupyep.cli import main
from cupyep.cli.shared import FAMILIAR

TINY = ["--width", "0.02", "--free-steps", "4", "--nudged-steps", "3", "--batch-size", "25", "--device", "cpu"]

WRONG = {
    "command misspelt": (["trian"], 2, "unknown command 'trian'; did you mean 'train'?"),
    "option misspelt": (["train", "--epoch", "3"], 2, "no such option '--epoch'; did you mean '--epochs'?"),
    "option of another command": (["check", "--epochs", "3"], 2, "no such option '--epochs'"),
    "choice misspelt": (["train", "--aug", "kdd"], 2, "unknown --aug 'kdd'; did you mean 'kd'?"),
    "unknown arch": (["train", "--arch", "vgg8"], 2, "unknown --arch 'vgg8'; did you mean 'vgg"),
    "unknown dataset": (["train", "--dataset", "cifar11"], 2, "did you mean 'cifar10"),
    "unknown recipe": (["train", "--recipe", "vgg5-dhcn"], 2, "did you mean 'vgg5-dchn'?"),
    "layer index": (
        ["train", "--aug", "le", "--signal-layers", "5"],
        2,
        "names layer 5, but the network has layers 1 to 4",
    ),
    "beta 0": (["train", "--beta", "0"], 2, "--beta must be above 0 (got 0.0)"),
    "negative steps": (["train", "--free-steps", "-1"], 2, "--free-steps must be at least 1 (got -1)"),
    "negative kappa": (["train", "--aug", "le", "--kappa", "-0.1"], 2, "--kappa must be at least 0 (got -0.1)"),
    "layers backwards": (["train", "--aug", "le", "--signal-layers", "9-2"], 2, "upwards from 1 (got '9-2')"),
    "a file on the way": (
        ["train", "--run-dir", "../data/cifar-10-batches-bin/test_batch.bin/run"],
        1,
        "cannot write run directory",
    ),
    "misspelt choice of evaluate": (["evaluate", "none", "--checkpoint", "bst"], 2, "did you mean 'best'?"),
    "not a number": (["train", "--epochs", "many"], 2, "'many' is not a valid integer"),
    "not numbers": (["train", "--gain", "0.1,a"], 2, "'0.1,a' is neither a number nor numbers with commas"),
    "image size": (["train", "--image-size", "7"], 2, "image-size is 7"),
    "image too small": (["train", "--image-size", "4"], 2, "too small for vgg5"),
    "limit": (["train", "--limit-train", "51"], 2, "cifar10 has 50 train images"),
    "validation of everything": (["train", "--validation", "50"], 2, "validation is 50: cifar10 has 50 train images"),
    "nothing left to train on": (
        ["train", "--validation", "40", "--limit-train", "20"],
        2,
        "limit-train is 20: cifar10 has 50 train images, 40 of them held out, choose from 1 to 10",
    ),
    "split misspelt": (["evaluate", "none", "--split", "valid"], 2, "unknown --split 'valid'; did you mean 'valid"),
    "resume without folder": (["train", "--resume"], 2, "--resume needs --run-dir"),
    "resume nothing": (
        ["train", "--resume", "--run-dir", "none"],
        1,
        "'none' is not a run directory: nothing is there; leave out --resume",
    ),
    "evaluate nothing": (["evaluate", "none"], 1, "'none' is not a run directory"),
    "evaluate without folder": (["evaluate"], 2, "Missing argument 'RUN'"),
    "missing data": (["train", "--data-dir", "empty"], 1, "/empty (no "),
    "missing teacher": (["train", "--aug", "kd", "--teacher", "t.h5"], 1, "teacher file t.h5 does not exist"),
    "layers without signals": (["train", "--signal-layers", "2"], 2, "--signal-layers needs --aug le or kd"),
    "checked layers without signals": (["check", "--signal-layers", "2"], 2, "--signal-layers needs --aug le or kd"),
    "kappa without signals": (["train", "--kappa", "0.5"], 2, "--kappa needs --aug le or kd"),
    "checked kappa without signals": (["check", "--kappa", "0.5"], 2, "--kappa needs --aug le or kd"),
    "temperature without kd": (["train", "--aug", "le", "--temperature", "2"], 2, "--temperature needs --aug kd"),
    "maps without kd": (["train", "--no-learned-maps"], 2, "--no-learned-maps needs --aug le or kd"),
    "beta of backpropagation": (["train", "--algorithm", "bp", "--beta", "0.1"], 2, "--beta needs --algorithm ep"),
    "steps of backpropagation": (
        ["info", "--algorithm", "bp", "--nudged-steps", "3"],
        2,
        "needs --algorithm ep or bptt",
    ),
    "beta of no nudge": (["check", "--scheme", "tangent", "--beta", "0.1,0.2"], 2, "Error: --beta needs --scheme"),
    "the second beta": (["check", "--beta", "0.1,nan"], 2, "--beta must be a number (got nan)"),
    "test images of another split": (
        ["evaluate", "none", "--split", "train", "--limit-test", "5"],
        2,
        "--limit-test needs --split test",
    ),
    "seeds of a report": (
        ["reproduce", "signals", "--report-only", "--seeds", "2"],
        2,
        "--report-only measures nothing: leave it or --seeds out",
    ),
    "stretching a new run": (["train", "--stretch-schedule"], 2, "--stretch-schedule needs --resume and --epochs"),
    "momentum of adam": (["train", "--momentum", "0.5"], 2, "--momentum needs --optimizer sgd"),
    "epochs of a teacher that is there": (
        ["train", "--aug", "kd", "--teacher", "t.h5", "--teacher-epochs", "3"],
        2,
        "--teacher-epochs needs no --teacher",
    ),
    "json into a folder": (["check", "--json", "."], 2, "--json: '.' is a folder, not a file"),
    "a device to write to": (["check", "--json", "/dev/null"], 2, "--json: '/dev/null' is not the name of a file"),
    "standard output of a table": (["compare", "x", "--csv", "-"], 2, "--csv: '-' is not the name of a file"),
    "nobody's home": (["train", "--data-dir", "~nobody-here/data"], 2, "whose home that is, is not known"),
    "half a character": (["train", "--data-dir", "\udcff"], 2, "--data-dir must be a text of valid characters"),
    "teacher without kd": (["train", "--teacher", "t.h5"], 2, "--teacher needs --aug kd"),
    "a report of nothing": (
        ["reproduce", "signals", "--report-only", "--output", "no"],
        1,
        "'no' holds no report: it has no results.json; leave out --report-only",
    ),
    "a file for the data": (
        ["train", "--data-dir", "../data/cifar-10-batches-bin/test_batch.bin"],
        1,
        "/data/cifar-10-batches-bin/test_batch.bin",
    ),
    "unknown device": (["train", "--device", "gpu"], 2, "unknown device 'gpu'"),
    "json nowhere": (["check", "--json", "no/check.json"], 2, "there is no folder 'no'"),
    "check with kd": (["check", "--aug", "kd"], 2, "knows --aug none and le"),
    "check of a recipe with kd": (["check", "--recipe", "vgg7-kd-cifar10"], 2, "knows --aug none and le"),
    "check of backpropagation": (["check", "--recipe", "vgg7-bp-cifar10"], 2, "the recipe trains by bp and not by EP"),
    "check of no recipe": (["check", "--recipe", "vgg7-kd"], 2, "no recipe and no file 'vgg7-kd'; did you mean"),
    "tangent as states": (["train", "--scheme", "tangent", "--nudge", "classical"], 2, "use nudge 'deviation'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(case, cifar, invoke, tmp_path, monkeypatch):
    monkeypatch.setattr("cupyep.data.loading.fetch", lambda *_: "no network")
    args, wanted, message = WRONG[case]
    tiny = TINY[:2] if args[0] in ("train", "check") else []
    code, _, err = invoke(args[0], *tiny, *args[1:])
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err
    assert code == wanted
    assert list((tmp_path / "work").iterdir()) == []


def test_no_gpu_is_said_with_the_reason(cifar, invoke, tmp_path, monkeypatch):
    monkeypatch.setattr("cupyep.backend.device._import_cupy", lambda: (None, "the reason"))
    code, _, err = invoke("train", *TINY, "--device", "cuda")
    assert code == 1
    assert err.startswith("Error: device 'cuda:0' cannot be used: the reason")
    assert err.count("\n") == 1
    assert not (tmp_path / "work" / "runs").exists()
    assert "device cpu: the reason" in invoke("train", *TINY[:-2], "--limit-train", 5, "--epochs", 1)[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("svhn", "is a teacher for data set svhn, not cifar10"),
        ("cifar10", "train labels disagree with data set cifar10"),
    ],
)
def test_a_teacher_for_other_data_is_refused(name, message, cifar, invoke, tmp_path):
    """Of another data set, or of the same with other labels."""
    teacher = tmp_path / "t.h5"
    dataset = dataclasses.replace(ep.load_dataset("cifar10", cifar), name=name)
    with ep.TeacherWriter(teacher, dataset, "zeros", views=("identity",)) as writer:
        writer.write("train", "identity", 0, np.zeros((50, 10)))
        writer.write("test", "identity", 0, np.zeros((10, 10)))
    (images, labels), test = random_arrays((32, 32, 3), 10)
    write_files(cifar / "cifar-10-batches-bin", cifar_binary_files("cifar10", ((images, labels * 0), test)))
    code, _, err = invoke("train", *TINY, "--aug", "kd", "--teacher", teacher)
    assert (code, err.count("\n")) == (1, 1)
    assert message in err
    assert not (tmp_path / "work" / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("widht = 0.1", "'../mine.toml': unknown option 'widht'; did you mean 'width'?"),
        ("width = 'a'", "'../mine.toml': width must be a number (got 'a')"),
        ("beta = -1", "'../mine.toml': beta must be above 0 (got -1)"),
        ("arch = 'vgg8'", "'../mine.toml': unknown arch 'vgg8'; did you mean 'vgg"),
        ("width =", "'../mine.toml' is not valid TOML"),
    ],
)
def test_a_wrong_recipe(content, message, cifar, invoke, tmp_path):
    (tmp_path / "mine.toml").write_text(content)
    code, _, err = invoke("train", "--recipe", "../mine.toml")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_a_truncated_archive(size, cifar, invoke, tmp_path):
    archive = tmp_path / "archive" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    write_archive(archive, "cifar-10-batches-bin", {p.name: p.read_bytes() for p in cifar.glob("*/*")})
    archive.write_bytes(archive.read_bytes()[:size])
    code, _, err = invoke("train", *TINY, "--data-dir", archive.parent)
    assert (code, err.count("\n")) == (1, 1)
    assert str(archive) in err
    assert "get it again" in err
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        ["--signal-layers", "9"],
        ["--signal-pool", "99"],
        ["--learning-rate", "1,2"],
        ["--scheme", "tangent", "--nudge", "classical"],
    ],
)
def test_wrong_options_are_said_before_a_teacher_is_trained(wrong, cifar, cache, invoke):
    code, out, err = invoke("train", *TINY, "--aug", "kd", *wrong)
    assert (code, err.count("\n")) == (2, 1)
    assert "teacher" not in out
    assert not cache.exists()


def test_a_teacher_that_cannot_be_kept_is_not_trained(cifar, cache, invoke, tmp_path):
    cache.mkdir()
    (cache / "teachers").write_text("in the way")
    code, out, err = invoke("train", *TINY, "--aug", "kd")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"Error: cannot keep a teacher in {cache / 'teachers'}")
    assert "CUPYEP_CACHE" in err
    assert "teacher" not in out
    assert not (tmp_path / "work" / "runs").exists()


DAMAGE = {
    "cut": ("config.toml", b"arch = 'vgg5", 2, "run/config.toml' is not valid TOML"),
    "no text": ("config.toml", b"\xff\xfe\x00", 2, "run/config.toml' is not valid TOML"),
    "number for a name": ("config.toml", b"arch = 7", 2, "run/config.toml': arch must be a text (got 7)"),
    "other network": (
        "config.toml",
        b"width = 0.02\nfeedback = 0.3",
        1,
        "another network: feedback: saved 0.01, this network 0.3",
    ),
    "no metrics": ("metrics.jsonl", b"\xff\n\xfe", 1, "metrics.jsonl' line 1 is not a record of an epoch"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_refused_and_left_alone(case, cifar, invoke, tmp_path):
    name, content, wanted, message = DAMAGE[case]
    path = tmp_path / "run"
    assert invoke("train", *TINY, "--run-dir", path, "--epochs", 1, "--limit-train", 10, "--quiet")[0] == 0
    (path / name).write_bytes(content)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    commands = [["train", "--run-dir", path, "--resume", "--epochs", 2, "--stretch-schedule", "--device", "cpu"]]
    commands += [["evaluate", path, "--checkpoint", "last"]] * (name != "metrics.jsonl")
    for command in commands:
        code, _, err = invoke(*command)
        assert (code, err.count("\n")) == (wanted, 1)
        assert message in err
        assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_resuming_with_too_few_epochs_changes_nothing(cifar, invoke, tmp_path):
    path = tmp_path / "run"
    assert invoke("train", *TINY, "--run-dir", path, "--epochs", 2, "--limit-train", 10, "--quiet")[0] == 0
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    code, _, err = invoke("train", "--run-dir", path, "--resume", "--epochs", 1)
    assert (code, err) == (2, "Error: all 1 epochs are done; give more --epochs to go on\n")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_a_damaged_checkpoint_is_refused(cifar, invoke, tmp_path):
    path = tmp_path / "run"
    assert invoke("train", *TINY, "--run-dir", path, "--epochs", 1, "--limit-train", 10, "--quiet")[0] == 0
    content = (path / "checkpoint.h5").read_bytes()
    (path / "checkpoint.h5").write_bytes(content[: len(content) // 2])
    code, _, err = invoke("evaluate", path, "--checkpoint", "last")
    assert (code, err.count("\n")) == (1, 1)
    assert "truncated or damaged" in err
    (path / "checkpoint.previous.h5").write_bytes(content[: len(content) // 2])
    code, _, err = invoke("train", "--run-dir", path, "--resume", "--epochs", 2)
    assert (code, err.count("\n")) == (1, 1)
    assert "truncated or damaged" in err
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 1


def test_no_traceback_and_the_exit_code_from_a_shell():
    command = [sys.executable, "-m", "cupyep.cli", "train", "--epochs", "0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "Error: --epochs must be at least 1 (got 0)\n"


def test_files_of_the_system_that_fail_are_named(invoke, tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "locked"))

    monkeypatch.setattr("cupyep.cli.reports.system_report", fail)
    assert invoke("info")[::2] == (1, f"Error: cannot use '{tmp_path / 'locked'}': Permission denied\n")


@pytest.mark.parametrize(("alias", "value", "option"), [("--lambda", 2, "--feedback"), ("--lr", -1, "--learning-rate")])
def test_other_spellings_are_the_options(invoke, alias, value, option):
    code, _, err = invoke("train", alias, value)
    assert code == 2
    assert err.startswith(f"Error: {option} must be ")


SPELLINGS = {
    "--batch": "--batch-size", "--bs": "--batch-size", "--wd": "--weight-decay", "--gpu": "--device cuda",
    "--lr-decay": "--lr-schedule", "--num-epochs": "--epochs", "--num_epochs": "--epochs",
    "--amp": "--precision float16",
}  # fmt: skip


@pytest.mark.parametrize("option", SPELLINGS)
def test_options_of_other_programs_are_named_as_here(invoke, option):
    wanted = f"Error: no such option '{option}'; did you mean '{SPELLINGS[option]}'?\n"
    assert invoke("train", option, 3)[::2] == (2, wanted)


def test_an_option_that_this_command_has_not_is_not_suggested(invoke):
    assert invoke("evaluate", "run", "--wd", 1)[::2] == (2, "Error: no such option '--wd'\n")
    assert "; leave it out: images are in memory" in invoke("train", "--workers", 4)[2]


def test_an_option_of_another_program_may_be_near_to_one_here(invoke):
    """--out is --run-dir of a training; where something is written to a file it is --output."""
    for command, option in (("train", "--run-dir"), ("export", "--output"), ("teacher", "--output")):
        wanted = f"Error: no such option '--out'; did you mean '{option}'?\n"
        assert invoke(command, "--out", "x")[::2] == (2, wanted)


def test_every_suggestion_is_an_option_with_a_right_value():
    train = {name: param for param in main.commands["train"].params for name in param.opts}
    for option, words in FAMILIAR.items():
        assert option not in train
        name, *value = words.split() or ["--arch"]
        for word in value:
            train[name].type.convert(word, train[name], None)


@pytest.mark.parametrize(
    ("command", "option"), [("evaluate", ()), ("predict", ("--free-steps", 3)), ("diagnose", ("--beta", 0.1))]
)
def test_what_a_run_does_not_use_cannot_be_changed(cifar, invoke, tmp_path, command, option):
    """Of a run of backpropagation; evaluate has no such option."""
    path, picture = tmp_path / "run", tmp_path / "a.ppm"
    picture.write_bytes(b"P6 1 1 255 abc")
    small = [*TINY[:2], *TINY[6:], "--run-dir", path, "--epochs", 1, "--limit-train", 10, "--quiet"]
    assert invoke("train", *small, "--algorithm", "bp")[0] == 0
    code, _, err = invoke(command, path, *([picture] if command == "predict" else []), *option)
    assert (code, "needs --algorithm ep" in err) == ((2, True) if option else (0, False))
    code, _, err = invoke("train", "--run-dir", path, "--resume", "--beta", 0.05)
    assert (code, err) == (2, "Error: --beta needs --algorithm ep\n")
