"""The configuration: its table, its TOML form, recipes.

Oracles: the TOML parser, published settings.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest

from cupyep.errors import ConfigurationError
from cupyep.recipes import find_recipe, recipe_names
from cupyep.training import config
from cupyep.training.config import OPTIONS, TrainConfig, make_config, parse_layers, read_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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
    ("values", "relaxation"),
    [
        ({}, 1.0),
        ({"feedback": 1.0}, 1.0),
        ({"feedback": 1.0, "schedule": "evenodd"}, 1.6),
        ({"feedback": 0.3, "schedule": "evenodd"}, 1.0),
        ({"feedback": 1.0, "schedule": "synchronous"}, 1.0),
        ({"feedback": 1.0, "schedule": "evenodd", "relaxation": 1.2}, 1.2),
    ],
)
def test_relaxation_that_is_not_given_follows_schedule_and_feedback(values, relaxation):
    assert TrainConfig(**values).relaxation == relaxation


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


def test_the_default_options_are_listed_once():
    assert set(OPTIONS) == {spec.name for spec in dataclasses.fields(TrainConfig)}
    assert all(spec.metadata["text"].endswith(".") for spec in OPTIONS.values())
    assert config.option_name("free_steps") == "--free-steps"
