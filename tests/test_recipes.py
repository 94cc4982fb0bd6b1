"""Recipes: complete, marked, valid; each makes a network that takes a step. Oracle: the published settings."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from quadrants import numbers

from cupyep.cli.shared import chosen_config
from cupyep.data import Dataset, Split, TeacherWriter
from cupyep.data.sources import SOURCES
from cupyep.errors import ConfigurationError
from cupyep.recipes import FOLDER, find_recipe, read_recipe, recipe_names, recipe_summary, recipe_text
from cupyep.training.build import build_learner, build_network, build_optimizer, build_signals
from cupyep.training.config import OPTIONS, make_config, read_toml
from cupyep.training.run_directory import RunDirectory

SOURCES_CITED = ("arXiv 2508.15989", "arXiv 2101.05536", "arXiv 2312.15103", "this project's own")


def load(name, **changes):
    return make_config(read_toml(find_recipe(name)), changes)


def tiny_data(config):
    """Two training and two test images of the right shape, with all classes of the recipe's data set."""
    source = SOURCES[config.dataset]
    size = config.image_size or source.shape[0]
    rng = np.random.default_rng(0)
    train, test = (
        Split(name, rng.integers(0, 256, (2, size, size, source.shape[2]), np.uint8), np.arange(2))
        for name in ("train", "test")
    )
    return Dataset.from_splits(config.dataset, source.classes, train, test, source.flip, source.pad)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_builds_its_network_and_takes_a_step(name, tmp_path):
    config = load(name, width=0.02, device="cpu")
    config.free_steps, config.nudged_steps = min(config.free_steps, 3), min(config.nudged_steps, 3)
    dataset = tiny_data(config)
    teacher = tmp_path / "teacher.h5"
    with TeacherWriter(teacher, dataset, "zeros", ("identity", "hflip")) as writer:
        for split in ("train", "test"):
            for view in ("identity", "hflip"):
                writer.write(split, view, 0, np.zeros((2, len(dataset.classes))))
    network = build_network(config, dataset, "cpu")
    signals = build_signals(config, network, dataset, teacher)
    assert bool(signals) == (config.aug != "none")
    learner = build_learner(config, network, signals, np.random.default_rng(0))
    optimizer = build_optimizer(config, learner.parameters())
    before = {path: array.copy() for path, array in learner.parameters().items()}
    images = np.random.default_rng(1).standard_normal((2, *dataset.image_shape)).astype(np.float32)
    index = np.arange(2)
    batch = network.batch(images, dataset.train.labels)
    batch = type(batch)(batch.images, batch.labels, index, np.zeros(2, np.uint8))
    result = learner.step(batch)
    optimizer.step(result.gradients)
    assert np.isfinite(float(result.loss))
    last = [path for path in network.parameters() if path.startswith("layers.") and path.endswith(".weight")][-1]
    assert (network.parameters()[last] != before[last]).any()
    assert all(np.isfinite(array).all() for array in learner.parameters().values())


@pytest.mark.parametrize("name", recipe_names())
def test_every_setting_says_where_it_is_from(name):
    text = recipe_text(name)
    head = recipe_summary(name)
    assert len(head) <= 100
    assert any(source in head for source in SOURCES_CITED)
    options = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in options:
        assert re.fullmatch(r"[a-z_]+ = [^#]+# \[(paper|own)\].*", line), line
    assert {line.split(" = ")[0] for line in options} <= set(OPTIONS)
    if "this project's own" in head:
        assert "# [paper]" not in text


def test_the_rows_to_be_compared_are_all_there():
    names = set(recipe_names())
    for arch in ("vgg7", "vgg11", "vgg12"):
        assert {f"{arch}-{aug}-{data}" for aug in ("none", "le", "kd") for data in ("cifar10", "cifar100")} <= names
    for row in ("vgg7-{}-cifar10", "vgg11-{}-cifar10", "vgg12-{}-cifar100"):
        assert {row.format(kind) for kind in ("feedback0.1", "feedback0.03", "bp")} <= names
    assert {"vgg5-plain", "vgg5-plain-mse", "vgg5-dchn", "vgg5-dchn-cifar100", "vgg5-bp-cifar10", "digits-kd"} <= names
    assert "vgg7-kd-cifar10-laptop" in names
    assert len(names) == len(list(FOLDER.glob("*.toml")))


def test_names_and_contents_agree():
    for name in recipe_names():
        config = load(name)
        for part in name.split("-"):
            if part in ("none", "le", "kd"):
                assert config.aug == part
            if part in ("cifar10", "cifar100"):
                assert config.dataset == part
            if part.startswith("feedback"):
                assert config.feedback == float(part.removeprefix("feedback"))
            assert part != "bp" or config.algorithm == "bp"
        assert config.arch in name or name.startswith("digits")


def test_rows_that_are_compared_differ_in_what_is_compared_only():
    plain, le, kd = (vars(load(f"vgg11-{aug}-cifar10")) for aug in ("none", "le", "kd"))
    assert {key for key in plain if plain[key] != le[key]} <= {"aug", "kappa"}
    assert {key for key in le if le[key] != kd[key]} == {"aug", "temperature", "learned_maps"}
    ep, bp = vars(load("vgg11-feedback0.1-cifar10")), vars(load("vgg11-bp-cifar10"))
    assert {key for key in ep if ep[key] != bp[key]} == {"algorithm", "scheme", "free_steps", "nudged_steps"}


def test_published_settings():
    """By hand, from the papers and the authors' commands."""
    mse = load("vgg5-plain-mse")
    assert (mse.loss, mse.beta, mse.free_steps, mse.nudged_steps, mse.epochs) == ("squared_error", 0.5, 250, 30, 120)
    assert mse.learning_rate == [0.25, 0.15, 0.1, 0.08, 0.05]
    assert (mse.momentum, mse.weight_decay, mse.batch_size, mse.activation) == (0.9, 3e-4, 128, "half_hard_sigmoid")
    hundred = load("vgg5-dchn-cifar100")
    assert (hundred.beta, hundred.free_steps, hundred.nudged_steps, hundred.schedule) == (0.25, 60, 15, "evenodd")
    assert hundred.gain == [0.5, 0.4, 0.5, 0.8, 0.5]
    assert hundred.learning_rate == [0.03, 0.04, 0.04, 0.04, 0.025]
    assert (hundred.weight_decay, hundred.momentum, hundred.batch_size) == (3.5e-4, 0.9, 128)
    for name, accuracy in (("vgg7-kd-cifar10", "89.67 %"), ("vgg12-kd-cifar100", "64.75 %"), ("vgg5-plain", "88.3 %")):
        assert accuracy in recipe_text(name)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_list_and_a_recipe(invoke):
    code, out, err = invoke("recipes")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == recipe_names()
    assert all(any(source in line for source in SOURCES_CITED) for line in out.splitlines())
    code, out, _ = invoke("recipes", "vgg5-dchn")
    assert (code, out) == (0, (FOLDER / "vgg5-dchn.toml").read_text())


def test_ones_own_recipe_is_checked_and_printed(invoke, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("beta = 0.25  # mine\n")
    assert invoke("recipes", path) == (0, "beta = 0.25  # mine\n", "")


WRONG = {
    "nearest": (["recipes", "vgg7-kd-cifar"], "no recipe and no file 'vgg7-kd-cifar'; did you mean 'vgg7-kd-cifar10"),
    "two": (["recipes", "vgg5-plain", "vgg5-dchn"], "unexpected extra argument (vgg5-dchn)"),
    "unknown key": (["recipes", "key.toml"], "'key.toml': unknown option 'widht'; did you mean 'width'?"),
    "wrong value": (["recipes", "value.toml"], "'value.toml': epochs must be at least 1 (got 0)"),
    "wrong kind": (["recipes", "kind.toml"], "'kind.toml': crop must be true or false (got 1)"),
    "contradiction": (["recipes", "both.toml"], "--nesterov needs a --momentum above 0"),
    "no TOML": (["recipes", "broken.toml"], "'broken.toml' is not valid TOML"),
    "a table": (["recipes", "table.toml"], "'table.toml': width must be a number (got {'a': 1})"),
    "a folder": (["recipes", "."], "no recipe and no file '.'"),
}
FILES = {
    "key.toml": "widht = 1",
    "value.toml": "epochs = 0",
    "kind.toml": "crop = 1",
    "both.toml": "nesterov = true\nmomentum = 0.0",
    "broken.toml": "width = ",
    "table.toml": "[width]\na = 1",
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_uses_are_one_line(case, invoke, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    args, message = WRONG[case]
    code, out, err = invoke(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def written(folder, **values):
    """Return the config.toml of a run with these options."""
    config = make_config(values)
    folder.mkdir(exist_ok=True)
    RunDirectory(folder, config).write_config()
    return config, folder / "config.toml"


CASES = {
    "default": {},
    "bp": {"algorithm": "bp", "gain": 1.4},
    "bptt": {"algorithm": "bptt", "nudged_steps": 9},
    "steps": {"free_steps": 2, "nudged_steps": "auto", "on_unsettled": "lower"},
    "tangent": {"scheme": "tangent", "feedback": 1.0, "schedule": "evenodd"},
    "signals": {"aug": "le", "kappa": 0.25, "signal_pool": 2, "signal_layers": "2-3"},
    "own data": {"dataset": "folder:/gone", "test_fraction": 0.3, "image_size": 16},
    "lists": {"gain": [0.4, 0.7, 0.6, 0.3, 0.4], "learning_rate": [1e-3, 1e-2, 1e-2, 1e-2, 1e-3]},
    "optimizer": {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "arch": "resnet9", "activation": "gelu"},
    **{name: read_toml(find_recipe(name)) for name in recipe_names()},
}


@pytest.mark.parametrize("name", CASES)
def test_the_options_of_a_run_are_a_recipe(name, tmp_path):
    """The run again: every option that the run had, though nobody may give those that have no effect in it."""
    config, path = written(tmp_path, **CASES[name])
    assert chosen_config({}, path) == config
    assert len(read_recipe(path)) < len(read_toml(path))
    bare = tmp_path / "mine.toml"
    bare.write_text(path.read_text().partition("\n")[2])
    with pytest.raises(ConfigurationError, match=r"mine.toml': --[a-z-]+ needs "):
        chosen_config({}, bare)


def test_what_follows_from_options_follows_from_other_ones(tmp_path):
    """By hand, from the documented defaults: steps and relaxation by schedule and feedback."""
    _, path = written(tmp_path)
    strong = chosen_config({"feedback": 1.0, "schedule": "evenodd"}, path)
    assert (strong.free_steps, strong.nudged_steps, strong.relaxation) == (60, 20, 1.6)
    residual = chosen_config({"arch": "resnet9", "optimizer": "adamw"}, path)
    assert (residual.activation, residual.weights, residual.weight_decay) == ("relu", "standardized", 0.01)
    assert chosen_config({"algorithm": "bptt"}, path).nudged_steps == make_config({"algorithm": "bptt"}).nudged_steps
    _, path = written(tmp_path, free_steps=7, activation="gelu", weight_decay=1e-4)
    kept = chosen_config({"feedback": 1.0, "arch": "resnet9", "optimizer": "adamw"}, path)
    assert (kept.free_steps, kept.activation, kept.weight_decay) == (7, "gelu", 1e-4), "what was chosen stays"


def test_what_had_no_effect_in_a_run_is_no_setting_of_it(tmp_path):
    """A recipe's kappa whose signals the command line had switched off; its own rate stays."""
    _, path = written(tmp_path, aug="none", kappa=0.25, learning_rate=0.01)
    found = chosen_config({"aug": "le"}, path)
    assert (found.kappa, found.learning_rate) == (0.1, 0.01)
    with pytest.raises(ConfigurationError, match=r"^--kappa needs --aug le or kd$"):
        chosen_config({"kappa": 0.5}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs = 10", "epoch = 10"), r"config.toml': unknown option 'epoch'; did you mean 'epochs'\?"),
        (("beta = 0.05", "beta = -1.0"), r"config.toml': beta must be above 0 \(got -1.0\)"),
        (("free_steps = 2", 'free_steps = "auto"\ntolerance = 0.1'), "--tolerance ends every phase by itself"),
        (("arch = ", "arch = = "), "config.toml' is not valid TOML"),
    ],
)
def test_a_damaged_one_is_refused(change, message, tmp_path):
    _, path = written(tmp_path)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ConfigurationError, match=message):
        chosen_config({}, path)


def test_a_run_by_the_options_of_a_run_is_that_run(cifar, invoke, tmp_path):
    """Bit for bit, by train and by a sweep; check takes its nudge."""
    tiny = [
        "--width",
        0.06,
        "--batch-size",
        25,
        "--device",
        "cpu",
        "--seed",
        3,
        "--aug",
        "le",
        "--epochs",
        1,
        "--beta",
        0.2,
    ]
    assert invoke("train", *tiny, "--run-dir", tmp_path / "run", "--quiet")[0] == 0
    recipe = ["--recipe", tmp_path / "run" / "config.toml"]
    code, _, err = invoke("train", *recipe, "--run-dir", tmp_path / "again", "--quiet")
    assert (code, err) == (0, "")
    code, _, err = invoke("train", *recipe, "--run-dir", tmp_path / "s", "--sweep", "kappa=0.1,0.2", "--quiet")
    assert (code, err) == (0, "")
    first, again, swept = (RunDirectory.open(tmp_path / name) for name in ("run", "again", "s/kappa=0.1"))
    assert numbers(first) == numbers(again) == numbers(swept)
    assert first.config == again.config == swept.config
    json_path = tmp_path / "check.json"
    assert invoke("check", *recipe, "--tolerance", 1e-3, "--json", json_path)[0] == 0
    assert json.loads(json_path.read_text())["options"]["beta"] == 0.2, "the run's, not the check's own"
    assert invoke("recipes", recipe[1]) == (0, recipe[1].read_text(), "")
