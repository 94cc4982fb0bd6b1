"""Damaged and odd configurations, recipes and metrics: see `fuzzing` for the contract that they are read under."""

from __future__ import annotations

import json
import math

import pytest
from fuzzing import amounts, damaged, explore, refused
from hypothesis import strategies as st

from cupyep.errors import CheckpointError, ConfigurationError
from cupyep.recipes import find_recipe, recipe_names, recipe_text
from cupyep.training.config import OPTIONS, TrainConfig, make_config, parse_layers, read_toml
from cupyep.training.run_directory import RunDirectory

ODD = [None, True, 0, -1, 1, 1 << 40, 1 << 63, -(1 << 63), 10**5000, 0.0, 1e-320, 1e308, math.nan, math.inf, 0.5]
TEXTS = ["", " ", "all", "2-5", "1-99999999999", "9" * 5000, "1,", "٣", "²", "\0", "\udc80", "a\nb", "x" * 5000, "~"]
OTHERS = [[], [0.1], [0.1, -1], [True], ["x"], [[1.0]], {"a": 1}, b"bytes", (0.1, 0.2), {1, 2}, [math.nan], [1 << 80]]


def options():
    """Some options: odd values, and values that are right for them or for another."""
    choices = sorted({name for spec in OPTIONS.values() for name in spec.metadata.get("choices", ())})
    defaults = [spec.default for spec in OPTIONS.values()]
    value = st.one_of(*map(st.sampled_from, (ODD, TEXTS, OTHERS, choices, defaults)), st.floats())
    right = st.sampled_from(
        [("arch", "vgg7"), ("beta", 0.125), ("gain", [0.1, 2.0]), ("data_dir", 'a "b" \\'), ("seed", 9)]
    )
    one = st.tuples(st.sampled_from(sorted(OPTIONS)), value)
    return st.lists(one | right, min_size=1, max_size=2).map(dict)


@amounts(80, 5000)
def test_values_of_options(amount, tmp_path):
    """What is accepted is written to a file and comes back the same."""
    path, current = tmp_path / "config.toml", []

    def read():
        config = TrainConfig(**current[-1])
        path.write_text(config.to_toml(), encoding="utf-8")
        assert make_config(read_toml(path)) == config
        path.unlink()

    found = explore(options(), amount, current.append, read, kind=ConfigurationError)
    assert min(found) > amount // 20


@amounts(60, 5000)
def test_signal_layers(amount):
    current = []
    texts = st.text("0123456789-, al٣²", max_size=30) | st.sampled_from(TEXTS)
    explore(texts, amount, current.append, lambda: parse_layers(current[-1], 6), kind=ConfigurationError)


@amounts(40, 3000)
def test_damaged_recipes(amount, tmp_path):
    path = tmp_path / "mine.toml"
    content = recipe_text(recipe_names()[0]).encode()

    def read():
        make_config(read_toml(find_recipe(path)))
        recipe_text(path)

    found = explore(damaged(content), amount, path.write_bytes, read, folder=tmp_path, kind=ConfigurationError)
    assert found[1] > amount // 4


TOML = {
    "arrays in each other": b"learning_rate = " + b"[" * 20000,
    "tables in each other": b"arch = " + b"{a = " * 5000,
    "a name of many parts": b"arch." + b"a." * 15000 + b"a = 1",
    "a name of many parts in a table": b"arch = {" + b"a." * 15000 + b"a = 1}",
    "many names of some parts": (b"arch = {" + b"a." * 199 + b"a = 1}\n") * 70,
    "a number of many digits": b"seed = " + b"9" * 5000,
    "a number of many digits, in hex": b"seed = 0x" + b"f" * 20000,
    "a number beyond 64 bits": b"seed = 99999999999999999999",
    "a number without end": b"beta = 1e999",
    "a date": b"epochs = 2020-01-01",
    "a text with a zero": b'data_dir = "\\u0000"',
    "half a character": b'data_dir = "\\ud800"',
    "a file without end": b"#" * (3 << 20),
    "many unknown names": b"".join(b"a%d = 1\n" % n for n in range(3000)),
    "no text": b"\xff\xfe\x00",
    "many layers": b'signal_layers = "1-99999999999"',
}


@pytest.mark.parametrize("case", TOML)
def test_recipes_that_once_did_harm(case, tmp_path):
    """RecursionError, ValueError, OverflowError, gigabytes: one line that names the file each."""
    path = tmp_path / "mine.toml"
    path.write_bytes(TOML[case])
    assert refused(lambda: make_config(read_toml(path)), folder=tmp_path, kind=ConfigurationError)


@pytest.fixture
def directory(tmp_path):
    return RunDirectory.create(tmp_path / "run", TrainConfig())


def lines():
    """Records as JSON, and what is none."""
    odd = ["", "null", "[]", "1", '"text"', "{", "[" * 50000, '{"a":' * 50000, "\ufffd", "\x85", "\u2028"]
    odd += [f'{{"epoch": {text}}}' for text in ("1e999", "NaN", '"1"', "true", "[1]", "1" + "0" * 5000)]
    good = st.integers(-1, 4).map(lambda n: json.dumps({"epoch": n, "elapsed_s": 1.5}))
    return st.lists(st.sampled_from(odd) | good, max_size=4).map(lambda parts: "\n".join(parts).encode())


@amounts(60, 5000)
def test_metrics(amount, directory):
    path = directory.path / "metrics.jsonl"
    records = [{"epoch": n, "elapsed_s": 0.5, "activity": [0.1, 0.2]} for n in (1, 2, 3)]
    good = "".join(json.dumps(record) + "\n" for record in records).encode()

    def read():
        for record in directory.metrics():
            assert isinstance(record["epoch"], int)

    explore(damaged(good) | lines(), amount, path.write_bytes, read, folder=directory.path, kind=CheckpointError)


def test_metrics_of_any_size_are_refused(directory, monkeypatch):
    monkeypatch.setattr("cupyep.training.run_directory.METRICS_BYTES", 1 << 20)
    with open(directory.path / "metrics.jsonl", "wb") as file:
        file.truncate(1 << 40)
    assert refused(directory.metrics, folder=directory.path, kind=CheckpointError)
