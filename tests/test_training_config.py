"""The configuration: its table, its TOML form, recipes.

Oracles: the TOML parser, published settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
from quadrants import SILENT, TIMES, quadrant_data

import cupyep as ep
from cupyep.cli.shared import chosen_config
from cupyep.data.sources import SOURCES
from cupyep.errors import ConfigurationError
from cupyep.recipes import find_recipe, recipe_names
from cupyep.training import build, config
from cupyep.training.config import OPTIONS, TrainConfig, make_config, parse_layers, read_toml, require_used
from cupyep.training.teacher import teacher_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_toml_holds_every_kind_of_value():
    text = '/a "quoted" \\ back\nslash \x7f é \U0001f600'
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
        ({"epochs": np.float64(1)}, "--epochs must be an integer"),
        ({"epochs": np.True_}, "--epochs must be an integer"),
        ({"epochs": np.ones(3, int)}, r"--epochs must be an integer \(got an array \(ndarray\) of shape \(3,\)\)"),
        ({"epochs": 2**63}, "--epochs must be an integer"),
        ({"epochs": 10**5000}, r"--epochs must be an integer \(got a huge int\)"),
        ({"beta": np.float32("nan")}, "--beta must be a number"),
        ({"beta": 10**400}, "--beta must be a number"),
        ({"beta": math.inf}, "--beta must be a number"),
        ({"beta": math.nan}, "--beta must be a number"),
        ({"crop": 1}, "--crop must be true or false"),
        ({"device": 3}, "--device must be a text"),
        ({"learning_rate": []}, "--learning-rate must hold at least one number"),
        ({"learning_rate": [0.1, "x"]}, "--learning-rate must be a number or a list of numbers"),
        ({"learning_rate": [0.1, -0.1]}, "--learning-rate must be above 0"),
        ({"arch": "vgg6"}, "unknown --arch 'vgg6'; did you mean"),
        ({"arch": "32 64x"}, "'64x' is no layer or block; write layers as in"),
        ({"readout_pool": "0"}, "--readout-pool must be global or the side of a window"),
        ({"readout_pool": "whole"}, "--readout-pool must be global or the side of a window"),
        ({"weights": "standard"}, "unknown --weights 'standard'; did you mean 'standardized'"),
        ({"loss": "squared_error", "beta": 1.0}, "squared error needs beta between -1 and 1, not 1.0"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov needs a --momentum above 0"),
        ({"signal_layers": "2..4"}, "--signal-layers must be like"),
    ],
)
def test_wrong_values_are_refused_in_one_line(values, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        TrainConfig(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("integer", [np.int64, np.uint8])
@pytest.mark.parametrize("real", [np.float64, np.float32])
def test_numbers_of_numpy_are_those_of_python(integer, real):
    """Wherever the table has a number or a boolean: 3, 0.5 and True; what is kept can be written as TOML and JSON."""
    twins = {int: (3, integer(3)), float: (0.5, real(0.5)), list: ([0.5, 3], [real(0.5), integer(3)])}
    twins |= {bool: (True, np.True_)}
    for name, spec in OPTIONS.items():
        if spec.metadata["kind"] in twins:
            plain, of_numpy = (TrainConfig(**{name: value}) for value in twins[spec.metadata["kind"]])
            assert of_numpy.to_toml() == plain.to_toml()
            assert json.loads(json.dumps(dataclasses.asdict(of_numpy))) == dataclasses.asdict(plain)
    assert TrainConfig(beta=integer(3), learning_rate=real(0.5)) == TrainConfig(beta=3, learning_rate=0.5)


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({}, (2, 1)),
        ({"feedback": 0.03}, (2, 1)),
        ({"feedback": 0.1}, (2, 2)),
        ({"feedback": 1.0}, (6, 4)),
        ({"schedule": "synchronous"}, (60, 20)),
        ({"schedule": "evenodd", "nudged_steps": 7}, (60, 7)),
        ({"algorithm": "bptt"}, (2, 20)),
        ({"free_steps": 3}, (3, 1)),
    ],
)
def test_steps_that_are_not_given_follow_schedule_and_feedback(values, steps):
    settings = TrainConfig(**values)
    assert (settings.free_steps, settings.nudged_steps) == steps
    assert tomllib.loads(settings.to_toml())["free_steps"] == steps[0], "config.toml says what was run"


@pytest.mark.parametrize(
    ("values", "beta"),
    [({}, 0.05), ({"feedback": 0.3}, 0.05), ({"feedback": 0.31}, 0.5), ({"feedback": 1.0, "beta": 0.2}, 0.2)],
)
def test_beta_that_is_not_given_follows_feedback(values, beta):
    settings = TrainConfig(**values)
    assert settings.beta == tomllib.loads(settings.to_toml())["beta"] == beta
    net = ep.Network([ep.Linear((4,), 3)], 2, device="cpu", feedback=settings.feedback)
    assert ep.EquilibriumPropagation(net, values.get("beta")).beta == beta


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
        (b"\xff\xfe\x00", "is not valid TOML"),
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


# --- every option has an effect, or is refused ----------------------------------------------------------------------

GRID = [
    {}, {"algorithm": "bptt", "feedback": 1.0, "schedule": "synchronous", "free_steps": 12}, {"algorithm": "bp"},
    {"algorithm": "bp", "gain": 0.9, "aug": "le"}, {"scheme": "tangent"}, {"scheme": "onesided", "nudge": "classical"},
    {"loss": "squared_error", "scheme": "random"}, {"aug": "kd"}, {"aug": "kd", "teacher": "t.h5", "optimizer": "sgd"},
    {"aug": "kd", "signal_loss": "squared_error"}, {"aug": "kd", "teacher_features": True, "crop": False},
    {"aug": "le", "teacher_features": True, "schedule": "evenodd"}, {"dataset": "mnist", "teacher": "t.h5"},
]  # fmt: skip
#: Two values of every option, one of them other than a configuration has; a new option belongs here.
VALUES = {
    "scratch_mb": (1.0, 2.0), "lsuv": (False, True), "exact": (False, True),
    "weights": ("plain", "standardized"), "readout_pool": ("2", "global"),
    "arch": ("vgg5", "vgg7"), "width": (0.02, 0.03), "activation": ("sigmoid", "tanh"), "pooling": ("max", "average"),
    "loss": ("cross_entropy", "squared_error"), "gain": (0.7, 0.9), "feedback": (1.0, 0.1),
    "dataset": ("cifar10", "mnist"), "data_dir": ("a", "b"), "image_size": (8, 16), "limit_train": (5, 6),
    "limit_test": (5, 6), "validation": (5, 6), "crop": (True, False), "flip": (True, False),
    "cutout": (None, 4), "ema": (None, 0.5),
    "warmup": (0.0, 1.0), "label_smoothing": (0.0, 0.2), "clip_unit_norm": (None, 1e-3), "patience": (None, 2),
    "init_from": (None, "net.h5"),
    "algorithm": ("ep", "bp"), "beta": (0.2, 0.3), "free_steps": (1, 2), "nudged_steps": (1, 2),
    "schedule": ("sweeps", "evenodd"), "relaxation": (0.6, 0.7), "tolerance": (6.0, 1e-12),
    "scheme": ("centered", "onesided"), "nudge": ("deviation", "classical"), "aug": ("none", "le"),
    "signal_layers": ("all", "2"), "kappa": (0.2, 0.3), "kappa_annealing": ("cosine", "constant"),
    "signal_loss": ("cross_entropy", "squared_error"), "signal_pool": (2, 3), "temperature": (2.0, 3.0),
    "learned_maps": (True, False), "teacher_features": (True, False), "teacher": ("t.h5", "u.h5"),
    "teacher_epochs": (1, 2), "epochs": (2, 3), "batch_size": (4, 3), "micro_batch": (2, 3),
    "optimizer": ("adam", "sgd"), "learning_rate": (0.01, 0.02), "lr_schedule": ("cosine", "constant"),
    "momentum": (0.4, 0.5), "nesterov": (True, False), "weight_decay": (0.01, 0.02), "seed": (0, 1),
    "device": ("cpu", "auto"), "precision": ("float32", "float64"), "checkpoint_minutes": (1.0, 2.0),
    "on_divergence": ("stop", "halve-lr"), "on_unsettled": ("warn", "stop"),
    "test_fraction": (0.1, 0.3),
    "class_weights": ("none", "balanced"), "plugin": (None, "mine.py"),
}  # fmt: skip
SMALL = {"width": 0.02, "epochs": 1, "batch_size": 4, "device": "cpu", "activation": "sigmoid", "learning_rate": 0.01,
         "free_steps": 2, "nudged_steps": 2}  # fmt: skip


class Teacher:
    """Logits and features of any network for two classes."""

    def __init__(self, network):
        self.feature_layers = {f"layer{n}": shape for n, shape in enumerate(network.state_shapes, 1)}

    def logits(self, split, index, view):
        return np.stack([3 * np.sin(index), view], axis=1)

    def feature(self, name, split, index, view):
        return np.full((len(index), *self.feature_layers[name]), 0.5)


def outcome(values, monkeypatch):
    """Return what a short run with these values comes to, and what it is told that leaves no trace in numbers."""
    settings, asked = TrainConfig(**values), []

    def load(*args, **options):
        asked.append((args, options))
        return quadrant_data(8, 4, SOURCES[args[0]].flip)

    monkeypatch.setattr(build, "load_dataset", load)
    dataset = build.build_dataset(settings)
    network = build.build_network(settings, dataset, "cpu")
    signals = build.make_signals(settings, network, Teacher(network))
    trainer = build.build_trainer(settings, dataset, network, signals, display=SILENT)
    trainer.checkup = None
    trainer.run()
    told = [
        settings.device,
        settings.scratch_mb,
        trainer.checkpoint_s,
        trainer.on_divergence,
        trainer.patience,
        settings.init_from,
        settings.plugin,
        settings.init_from or (settings.lsuv, settings.gain),
        trainer.learner.micro_batch,
        settings.exact,  # which this small network is anyway
    ]
    if settings.aug == "kd":
        told.append(settings.teacher or teacher_config(settings).epochs)
    numbers = [{key: value for key, value in record.items() if key not in TIMES} for record in trainer.records]
    parameters = {path: array.tolist() for path, array in trainer.learner.parameters().items()}
    return repr((asked, told, numbers, parameters))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cupyep.errors.ConvergenceWarning")
@pytest.mark.parametrize("base", GRID, ids=lambda base: "-".join(map(str, base.values())) or "default")
def test_an_option_has_an_effect_or_is_refused(base, monkeypatch):
    """And what is refused has none: a run with another value of it is the same, number for number."""
    base = SMALL | base
    before, now = outcome(base, monkeypatch), vars(TrainConfig(**base))
    for name, pair in VALUES.items():
        case = base | {name: next(value for value in pair if value != now[name])}
        try:
            changes = outcome(case, monkeypatch) != before
        except ConfigurationError:  # a contradiction, which is refused anyway
            continue
        assert changes != bool(refusal(name, case)), f"{name}: {'has an' if changes else 'no'} effect"


def refusal(name, values):
    """Return why an option is refused that is given beside some values, or an empty text."""
    try:
        require_used({name: values.get(name, OPTIONS[name].default)}, values)
    except ConfigurationError as error:
        return str(error)
    return ""


SGD, EP_ONLY, KD_ONLY = {"momentum", "nesterov"}, {"beta", "scheme", "nudge"}, {"temperature"}
PHASES = {"free_steps", "nudged_steps", "schedule", "relaxation", "tolerance"}
LE, TEACHER = {"signal_layers", "kappa", "kappa_annealing"}, {"teacher_features", "teacher", "teacher_epochs"}
MAPS = {"signal_loss", "signal_pool", "learned_maps"}
NO_SIGNALS = LE | MAPS | KD_ONLY | TEACHER


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({}, SGD | NO_SIGNALS),
        ({"algorithm": "bptt"}, SGD | NO_SIGNALS | EP_ONLY),
        ({"algorithm": "bp"}, SGD | NO_SIGNALS | EP_ONLY | PHASES),
        ({"algorithm": "bp", "gain": 1.0}, SGD | NO_SIGNALS | EP_ONLY | PHASES | {"feedback"}),
        ({"loss": "squared_error"}, SGD | NO_SIGNALS | {"readout_pool"}),
        ({"scheme": "tangent", "dataset": "digits"}, SGD | NO_SIGNALS | {"beta", "flip"}),
        ({"aug": "le", "optimizer": "sgd", "dataset": "svhn"}, KD_ONLY | TEACHER | {"flip"}),
        ({"aug": "kd", "dataset": "cifar100"}, SGD),
        ({"aug": "kd", "teacher": "t.h5", "signal_loss": "squared_error"}, SGD | {"teacher_epochs", "temperature"}),
        ({"aug": "kd", "teacher_features": True, "crop": False}, SGD | KD_ONLY | MAPS),
    ],
)
def test_options_that_are_refused(values, refused):
    """By hand; every option has two values in the table of the test that runs them all."""
    assert set(VALUES) == set(OPTIONS)
    found = {name: refusal(name, values) for name in OPTIONS}
    assert all(re.fullmatch(r"--[a-z-]+ needs (no )?--[^;]+", text) for text in found.values() if text)
    assert {name for name in found if found[name]} == refused | {"test_fraction", "on_unsettled"}


def test_options_of_a_users_own_data():
    for kind, refused in (("file", {"image_size"}), ("folder", set())):
        values = {"dataset": f"{kind}:x.npz", "aug": "kd", "optimizer": "sgd"}
        assert {name for name in OPTIONS if refusal(name, values)} == refused | {"on_unsettled"}


def test_an_option_of_a_recipe_must_have_an_effect_with_or_without_the_command_line(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('aug = "le"\nkappa = 0.1\n')
    assert chosen_config({"aug": "none"}, recipe).aug == "none", "what the recipe alone uses may be switched off"
    with pytest.raises(ConfigurationError, match="--kappa needs --aug le or kd"):
        chosen_config({"aug": "none", "kappa": 0.1}, recipe)
    recipe.write_text('algorithm = "bp"\nbeta = 0.5\n')  # its default
    with pytest.raises(ConfigurationError, match=r"mine.toml': --beta needs --algorithm ep$"):
        chosen_config({}, recipe)
    assert chosen_config({"algorithm": "ep"}, recipe).beta == 0.5


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_set_only_what_has_an_effect(name):
    chosen_config({}, name)
