"""Configuration, checkpoint and run directory: what a run writes, what it refuses to read.

Oracles: the TOML parser, HDF5 as h5py reads it, damage done by hand, published settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import h5py
import numpy as np
import pytest
from data_files import edited

import cupyep as ep
from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.recipes import find_recipe, recipe_names
from cupyep.training import config
from cupyep.training.checkpoint import Checkpoint, load_checkpoint, replacing, restore_parameters, save_checkpoint
from cupyep.training.config import OPTIONS, TrainConfig, make_config, parse_layers, read_toml
from cupyep.training.run_directory import RunDirectory, check_free, default_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# --- configuration -------------------------------------------------------------------------------------------------


def test_toml_holds_every_kind_of_value():
    text = 'a "quoted" \\ back\nslash \x7f é \U0001f600'
    changed = TrainConfig(data_dir=text, learning_rate=[0.25, 1e-5], gain=2, crop=False, limit_train=7, tolerance=1e-7)
    parsed = tomllib.loads(changed.to_toml())
    assert parsed["data_dir"] == text
    assert parsed["learning_rate"] == [0.25, 1e-5]
    assert parsed["gain"] == 2.0
    assert parsed["crop"] is False
    assert parsed["limit_train"] == 7
    assert "image_size" not in parsed, "an option that is unset is left out"
    assert TrainConfig(**parsed) == changed


def test_every_numeric_rule_of_the_table_is_enforced():
    """Generated from the table: a value just outside of each bound is refused, with the option's name."""
    checked = 0
    for name, spec in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        bounds = {"low": lambda v: v - 1, "above": lambda v: v, "high": lambda v: v + 1, "below": lambda v: v}
        for rule, outside in bounds.items():
            if rule in spec.metadata:
                with pytest.raises(ConfigurationError, match=f"{flag} must be "):
                    TrainConfig(**{name: outside(spec.metadata[rule])})
                checked += 1
        if "choices" in spec.metadata:
            with pytest.raises(ConfigurationError, match=f"unknown {flag} 'nonsense'"):
                TrainConfig(**{name: "nonsense"})
            checked += 1
    assert checked >= 30


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "three"}, r"--epochs must be an integer \(got 'three'\)"),
        ({"epochs": 1.5}, "--epochs must be an integer"),
        ({"epochs": True}, "--epochs must be an integer"),
        ({"epochs": None}, "--epochs must be an integer"),
        ({"beta": math.inf}, "--beta must be a number"),
        ({"beta": math.nan}, "--beta must be a number"),
        ({"crop": 1}, "--crop must be true or false"),
        ({"device": 3}, "--device must be a text"),
        ({"learning_rate": []}, "--learning-rate must hold at least one number"),
        ({"learning_rate": [0.1, "x"]}, "--learning-rate must be a number or a list of numbers"),
        ({"learning_rate": [0.1, -0.1]}, "--learning-rate must be above 0"),
        ({"arch": "vgg6"}, "unknown --arch 'vgg6'; did you mean"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov needs a --momentum above 0"),
        ({"teacher": "t.h5"}, "--teacher needs --aug kd"),
        ({"signal_layers": "2..4"}, "--signal-layers must be like"),
    ],
)
def test_wrong_values_are_refused_in_one_line(values, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        TrainConfig(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({}, (2, 2)),
        ({"feedback": 1.0}, (6, 4)),
        ({"schedule": "synchronous"}, (60, 20)),
        ({"schedule": "evenodd", "nudged_steps": 7}, (60, 7)),
        ({"algorithm": "bptt"}, (2, 20)),
        ({"free_steps": 3}, (3, 2)),
    ],
)
def test_steps_that_are_not_given_follow_schedule_and_feedback(values, steps):
    settings = TrainConfig(**values)
    assert (settings.free_steps, settings.nudged_steps) == steps
    assert tomllib.loads(settings.to_toml())["free_steps"] == steps[0], "config.toml says what was run"


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", [1, 2, 3, 4, 5, 6]), ("2,3,4", [2, 3, 4]), ("2-5", [2, 3, 4, 5]), ("6,1-2", [1, 2, 6]), (" 3 ", [3])],
)
def test_signal_layers(text, layers):
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize("text", ["", "0", "7", "2-", "-2", "4-2", "1,1", "2-3,3", "x", "1;2", "5-7"])
def test_wrong_signal_layers(text):
    with pytest.raises(ConfigurationError, match="--signal-layers"):
        parse_layers(text, 6)


def test_options_override_the_recipe_and_the_recipe_the_default(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("epochs = 3\nbeta = 0.25\n")
    merged = make_config(read_toml(find_recipe(recipe)), {"beta": 0.75})
    assert (merged.epochs, merged.beta, merged.momentum) == (3, 0.75, 0.9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "unknown option 'epoch'; did you mean 'epochs'?"),
        ("epochs = ", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
    ],
)
def test_wrong_toml_files(tmp_path, content, message):
    path = tmp_path / "wrong.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError, match=message.replace("?", r"\?")) as error:
        read_toml(path)
    assert "\n" not in str(error.value)


def test_missing_files_and_recipes(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot read .*gone.toml': No such file"):
        read_toml(tmp_path / "gone.toml")
    with pytest.raises(ConfigurationError, match="no recipe and no file 'vgg5-plan'; did you mean 'vgg5-plain'"):
        find_recipe("vgg5-plan")
    with pytest.raises(ConfigurationError, match="unknown option 'epoch'"):
        make_config({"epoch": 1})


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid(name):
    values = read_toml(find_recipe(name))
    recipe = make_config(values)
    assert recipe.arch in name or name.startswith("digits")
    for option in values:
        assert option in OPTIONS


def test_recipes_hold_the_published_settings():
    """Laborieux et al. 2021 and Scellier et al. 2023, by hand."""
    plain = make_config(read_toml(find_recipe("vgg5-plain")))
    assert (plain.free_steps, plain.nudged_steps, plain.beta, plain.epochs) == (250, 25, 1.0, 120)
    assert plain.learning_rate == [0.25, 0.15, 0.1, 0.08, 0.05]
    assert (plain.momentum, plain.weight_decay, plain.batch_size, plain.lr_schedule) == (0.9, 3e-4, 128, "cosine")
    dchn = make_config(read_toml(find_recipe("vgg5-dchn")))
    assert (dchn.schedule, dchn.free_steps, dchn.nudged_steps, dchn.beta) == ("evenodd", 60, 20, 0.1)
    assert (dchn.loss, dchn.gain, dchn.learning_rate) == ("squared_error", [0.4, 0.7, 0.6, 0.3, 0.4], 0.03)
    assert dchn.weight_decay == 2.5e-4


# --- checkpoint ----------------------------------------------------------------------------------------------------


def make_checkpoint(epoch=3):
    rng = np.random.default_rng(epoch)
    return Checkpoint(
        parameters={"layers.1.weight": rng.standard_normal((2, 3)).astype(np.float32), "layers.1.bias": np.zeros(3)},
        optimizer={"steps": np.asarray(7), "velocity.layers.1.weight": rng.standard_normal((2, 3))},
        network={"arch": "vgg5", "input_shape": [16, 16, 3], "gain": None},
        epoch=epoch,
        best_accuracy=0.1 + 0.2,
        best_epoch=2,
        generators={"data": rng.bit_generator.state},
    )


def test_checkpoint_round_trip_is_exact(tmp_path):
    path, saved = tmp_path / "c.h5", make_checkpoint()
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    for group in ("parameters", "optimizer"):
        old, new = getattr(saved, group), getattr(loaded, group)
        assert set(old) == set(new)
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])
            assert old[name].dtype == new[name].dtype
    for name in ("network", "epoch", "best_accuracy", "best_epoch", "generators"):
        assert getattr(loaded, name) == getattr(saved, name)
    again = np.random.default_rng(0)
    again.bit_generator.state = loaded.generators["data"]
    reference = np.random.default_rng(3)
    reference.standard_normal((2, 3))
    reference.standard_normal((2, 3))
    np.testing.assert_array_equal(again.random(5), reference.random(5))
    with h5py.File(path) as file:
        assert (file.attrs["format"], file.attrs["version"]) == ("cupyep-checkpoint", 1)


def damage_version(file):
    file.attrs["version"] = 99


def damage_format(file):
    file.attrs["format"] = "cupyep-teacher"


def damage_attribute(file):
    del file.attrs["epoch"]


def damage_json(file):
    file.attrs["generators"] = "{"


def damage_group(file):
    del file["optimizer"]


def damage_link(file):
    file["parameters/layers.2.weight"] = h5py.ExternalLink("other.h5", "/x")


def damage_kind(file):
    file["parameters/layers.2.weight"] = "text"


def damage_nan(file):
    file["parameters/layers.1.bias"][1] = math.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_version, "version 99; this cupyep reads version 1"),
        (damage_format, "not a cupyep checkpoint"),
        (damage_attribute, "truncated or damaged"),
        (damage_json, "truncated or damaged"),
        (damage_group, "truncated or damaged"),
        (damage_link, "truncated or damaged"),
        (damage_kind, "is not an array of numbers"),
        (damage_nan, "'layers.1.bias' holds numbers that are not finite"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage, message):
    path = tmp_path / "c.h5"
    save_checkpoint(path, make_checkpoint())
    with edited(path) as file:
        damage(file)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_truncated_and_foreign_checkpoints_are_refused(tmp_path):
    path = tmp_path / "c.h5"
    save_checkpoint(path, make_checkpoint())
    content = path.read_bytes()
    for size in (0, 10, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "gone.h5")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.h5"
    save_checkpoint(path, make_checkpoint(1))
    broken = make_checkpoint(2)
    broken.optimizer["velocity.layers.1.weight"] = np.array([object()])
    with pytest.raises(TypeError):
        save_checkpoint(path, broken)
    assert load_checkpoint(path).epoch == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.h5"]
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        save_checkpoint(tmp_path / "no" / "folder.h5", broken)


def test_parameters_are_restored_in_place_or_not_at_all():
    device = ep.get_device("cpu")
    own = {"a": np.zeros(2, np.float32), "b": np.zeros((1, 2), np.float32)}
    arrays = dict(own)
    restore_parameters("c.h5", {"a": np.array([1.0, 2.0]), "b": np.array([[3.0, 4.0]])}, own, device)
    assert own["a"] is arrays["a"]
    np.testing.assert_array_equal(arrays["b"], [[3.0, 4.0]])
    wrong = [
        ({"a": np.ones(2)}, "lacks the parameter 'b'"),
        ({"a": np.ones(2), "b": np.ones(2)}, r"'b' has shape \(2,\), the network needs \(1, 2\)"),
        ({"a": np.ones(2), "b": np.ones((1, 2)), "aa": np.ones(1)}, "'aa' is no parameter here"),
    ]
    for saved, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            restore_parameters("c.h5", saved, own, device)
    np.testing.assert_array_equal(own["a"], [1.0, 2.0])


# --- run directory -------------------------------------------------------------------------------------------------


def record(epoch, **more):
    return {"epoch": epoch, "elapsed_s": 10.0 * epoch, **more}


def test_run_directory_round_trip(tmp_path):
    created = RunDirectory.create(tmp_path / "a" / "run", TrainConfig(beta=0.3, limit_train=5))
    assert RunDirectory.open(created.path).config == created.config
    created.commit(record(1), make_checkpoint(1), True)
    created.commit(record(2), make_checkpoint(2), False)
    assert [r["epoch"] for r in created.metrics()] == [1, 2]
    assert (created.load("last").epoch, created.load("best").epoch) == (2, 1)
    assert sorted(p.name for p in created.path.iterdir()) == [
        "best.h5",
        "checkpoint.h5",
        "config.toml",
        "metrics.jsonl",
    ]


def test_a_taken_folder_is_refused(tmp_path):
    RunDirectory.create(tmp_path / "run", TrainConfig())
    with pytest.raises(CheckpointError, match="holds another run; continue it with --resume"):
        RunDirectory.create(tmp_path / "run", TrainConfig())
    (tmp_path / "other").mkdir()
    assert check_free(tmp_path / "other") == tmp_path / "other"
    (tmp_path / "other" / "thesis.txt").touch()
    for path in (tmp_path / "other", tmp_path / "other" / "thesis.txt"):
        with pytest.raises(CheckpointError, match="is not an empty folder"):
            check_free(path)
    with pytest.raises(CheckpointError, match="is not a run directory"):
        RunDirectory.open(tmp_path / "other")


def test_default_folders_are_numbered(tmp_path):
    settings = TrainConfig(arch="vgg7", aug="le", dataset="mnist", seed=4)
    names = []
    for _ in range(3):
        path = default_path(settings, tmp_path)
        path.mkdir()
        names.append(path.name)
    assert names == ["vgg7-le-mnist-seed4", "vgg7-le-mnist-seed4-2", "vgg7-le-mnist-seed4-3"]


def test_rewinding_drops_what_the_checkpoint_has_not_done(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    assert directory.rewind() == (None, 0.0)
    for epoch in (1, 2):
        directory.commit(record(epoch), make_checkpoint(epoch), False)
    metrics = directory.path / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write(json.dumps(record(3)) + "\n" + '{"epoch": 4, "elap')
    saved, elapsed = directory.rewind()
    assert (saved.epoch, elapsed) == (2, 20.0)
    assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == [1, 2]


def test_damaged_metrics_are_refused(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", TrainConfig())
    directory.commit(record(1), make_checkpoint(1), False)
    metrics = directory.path / "metrics.jsonl"
    metrics.write_text("nonsense\n" + json.dumps(record(1)) + "\n")
    with pytest.raises(CheckpointError, match="metrics.jsonl' line 1 is not a record"):
        directory.rewind()
    metrics.write_text("")
    with pytest.raises(CheckpointError, match="does not hold the epochs 1 to 1"):
        directory.rewind()


def test_replacing_cleans_up(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("new\ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_default_options_are_listed_once():
    assert set(OPTIONS) == {spec.name for spec in dataclasses.fields(TrainConfig)}
    assert all(spec.metadata["text"].endswith(".") for spec in OPTIONS.values())
    assert config.option_name("free_steps") == "--free-steps"
