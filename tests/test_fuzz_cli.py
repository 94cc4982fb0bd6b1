"""Any command line: exit code 0, 1 or 2, one line on stderr, no traceback, nothing written outside of its folders.

The commands and their options are taken from the command line itself, so that new ones are tried, too.
"""

from __future__ import annotations

import shutil
import sys

import click
import pytest
from data_files import shrink_source
from fuzzing import amounts, contents, explore
from hypothesis import strategies as st

from cupyep.cli import main
from cupyep.data import DATASETS
from cupyep.training.config import OPTIONS
from cupyep.training.results import TrainSummary
from cupyep.training.trainer import Trainer

TINY = {"--width": "0.02", "--free-steps": "2", "--nudged-steps": "1", "--device": "cpu", "--dataset": "cifar10"}
PATHS = [
    "",
    ".",
    "/",
    "run",
    "run/config.toml",
    "none/deeper",
    "/proc/none",
    "x" * 300,
    "\udcff",
    "a\nb",
    "~none",
]
TEXTS = ["", " ", "all", "1-2", "1-99999999999", "9" * 5000, "digits-kd", "٣", "x" * 3000, "--", "-1", *PATHS]
INTEGERS = ["-1", "0", "1", "2", "3", "1.5", "x", "", "nan", "1" + "0" * 18, "1" + "0" * 30, "9" * 5000, "٣"]
NUMBERS = ["-1", "0", "1e-320", "0.02", "0.5", "1", "2", "1e9", "1e308", "nan", "inf", "x", "", "0,5", "9" * 5000]
LISTS = [*NUMBERS, "0.1,0.2", "1," * 4 + "1", ",", "0.1,,0.2", "1," * 5000 + "1"]
LONG = {"epochs", "teacher_epochs", "free_steps", "nudged_steps", "jobs", "seeds"}  # what would only take time


def leaves(command, names=()):
    if isinstance(command, click.Group):
        return [leaf for name, sub in command.commands.items() for leaf in leaves(sub, (*names, name))]
    return [(names, command)]


def values(param):
    """Strings for an option or argument: odd ones, those of another kind, and every third time one that is right."""
    default = OPTIONS[param.name].default if param.name in OPTIONS else None
    right = st.just("run" if default is None else str(default))
    return st.one_of(right, odd_values(param), odd_values(param))


def odd_values(param):
    if param.name in LONG:
        return st.sampled_from(["-1", "0", "1", "2", "x", "1" + "0" * 30])
    if isinstance(param.type, click.Path):
        return st.sampled_from(PATHS)
    kind = OPTIONS[param.name].metadata["kind"] if param.name in OPTIONS else None
    names = list(getattr(param.type, "names", ()))
    if names:
        return st.sampled_from(["", "x", names[0][:-1], *names])
    if kind is list or param.type.name.startswith("number["):
        return st.sampled_from(LISTS)
    if kind is int or isinstance(param.type, (click.IntRange, click.types.IntParamType)):
        return st.sampled_from(INTEGERS)
    if kind is float or isinstance(param.type, (click.FloatRange, click.types.FloatParamType)):
        return st.sampled_from(NUMBERS)
    return st.sampled_from(TEXTS)


def arguments(param):
    """One use of an option, or of an argument."""
    if isinstance(param, click.Argument):
        return values(param).map(lambda text: [text])
    flags = st.sampled_from([*param.opts, *param.secondary_opts])
    if param.is_flag:
        return flags.map(lambda flag: [flag])
    return st.tuples(flags, values(param)).map(list) | st.tuples(flags, values(param)).map(
        lambda pair: ["=".join(pair)]
    )


def command_lines(names, command):
    """Some options of a command in any order, now and then one that does not exist; else the work is small."""
    params = command.params
    odd = st.sampled_from([["--nonsense"], ["-x"], ["extra"], ["--help"], ["--help-all"], ["--epoch", "3"]])
    given = st.lists(st.one_of(*map(arguments, params), *map(arguments, params), odd), max_size=4)

    def line(parts):
        words = [word for part in parts for word in part]
        known = {flag for param in params for flag in param.opts}
        small = [w for flag, value in TINY.items() if flag in known and flag not in words for w in (flag, value)]
        return [*names, *small, *words]

    return given.map(line)


@pytest.fixture
def work(cifar, invoke, monkeypatch):
    """The working folder, with a run of one epoch in it; from now on nothing is trained, downloaded or measured."""
    for name in DATASETS[1:-1]:
        shrink_source(monkeypatch, name)
    tiny = [word for pair in TINY.items() for word in pair]
    assert invoke("train", *tiny, "--limit-train", 10, "--epochs", 1, "--run-dir", "run", "--quiet")[0] == 0
    monkeypatch.setitem(sys.modules, "sklearn", None)  # which takes seconds to import
    monkeypatch.setattr(Trainer, "run", lambda self: TrainSummary(1, 0.5, 1.0, 0.5, 1, 0.5, "test", 2.0, None))
    monkeypatch.setattr("cupyep.data.loading.fetch", lambda *_: "no network")
    monkeypatch.setattr("cupyep.cli.data.fetch", lambda *_: "no network")
    monkeypatch.setattr("cupyep.cli.reproduce.run_experiment", lambda *_, **__: None)
    monkeypatch.setattr("cupyep.commands.memory.measured_step", lambda *_: 1)
    return cifar.parent / "work"


@amounts(6, 300)
@pytest.mark.filterwarnings("default")  # they are shown as lines
@pytest.mark.parametrize("command", leaves(main), ids=lambda leaf: "-".join(leaf[0]))
def test_any_command_line(amount, command, work, invoke):
    kept, before, line = work.parent / "kept", contents(work.parent / "data"), []
    shutil.copytree(work, kept)
    codes = set()

    def prepare(words):
        line[:] = words
        for path in work.iterdir():  # not the folder itself, which the process is in
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(kept, work, dirs_exist_ok=True)

    def run():
        code, out, err = invoke(*line)
        codes.add(code)
        assert code in (0, 1, 2), err
        assert "Traceback" not in out + err
        errors = [text for text in err.splitlines() if not text.startswith("Warning: ")]
        assert len(errors) == (code != 0), err
        assert all(text.startswith("Error: ") and text.isprintable() for text in errors)
        found = [entry for entry in contents(work.parent / "data") if "teachers" not in entry[0]]
        assert [entry for entry in found if entry[0] != str(work.parent / "data")] == before
        assert {path.name for path in work.parent.iterdir()} - {"cache"} == {"data", "kept", "work"}

    explore(command_lines(*command), amount, prepare, run, memory=256 << 20)
    assert codes - {0} or len(codes) == 1
