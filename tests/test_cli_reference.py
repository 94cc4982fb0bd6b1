"""docs/cli.md is what the commands say of themselves; their help reads well; the shell completes their names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import cupyep as ep
from cupyep.cli import main
from cupyep.cli.types import NewFile
from cupyep.recipes import recipe_names
from cupyep.training.config import OPTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cli.md"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setenv("COLUMNS", "60")  # the page does not depend on the terminal
    import cli_reference

    yield cli_reference
    sys.modules.pop("cli_reference")


def words(text):
    """Return the text without layout, which is click's and differs between its versions."""
    return re.sub(r"[\s│─]+", " ", text)


def test_the_reference_is_current(tool):
    assert words(PAGE.read_text(encoding="utf-8")) == words(tool.reference()), "run python tools/cli_reference.py"


def every_command():
    for name, command in main.commands.items():
        yield name, command
        for inner_name, inner in getattr(command, "commands", {}).items():
            yield f"{name} {inner_name}", inner


COMMANDS = dict(every_command())


def test_the_reference_has_every_command_and_option():
    page = PAGE.read_text(encoding="utf-8")
    for name, command in COMMANDS.items():
        assert f"## cupyep {name}\n" in page
        for param in command.params:
            assert param.param_type_name == "argument" or param.opts[0] in page


def test_what_all_commands_have_is_called_alike():
    """One word for what is written, with its other spelling where it was called so before; --json takes a path."""
    options = [(name, param) for name, command in COMMANDS.items() for param in command.params]
    assert {name: param.opts for name, param in options if param.name in ("out", "output")} == {
        "export": ["--output"],
        "plot": ["--output", "--out"],
        "reproduce": ["--output", "--out"],
        "teacher": ["--output"],
    }
    assert all(isinstance(param.type, NewFile) for _, param in options if "--json" in param.opts)


def test_auto_is_promised_where_it_is_taken():
    """Of the options that take a word in a training; what a training says of them besides is said everywhere."""
    words = {option: spec.metadata["word"] for option, spec in OPTIONS.items() if "word" in spec.metadata}
    assert words
    for name, command in COMMANDS.items():
        for param in command.params:
            if param.name in words:
                takes = words[param.name] in param.make_metavar(click.Context(command))
                assert takes == (name == "train")
                assert (f"or {words[param.name]}" in param.help) == takes


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_one_short_sentence(name):
    """The list of commands shows it whole: a sentence cut off by dots would end in '...'."""
    command = COMMANDS[name]
    first = command.help.splitlines()[0]
    assert first.endswith(".")
    assert not command.get_short_help_str().endswith("...")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("data list", "data download")])
def test_commands_with_choices_to_make_show_examples(name):
    group = name.split()[0]
    epilog = COMMANDS[name].epilog or COMMANDS[group].epilog or ""
    assert f"cupyep {name.split()[0]}" in epilog


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("cupyep pre", ["predict"]),
        ("cupyep data ver", ["verify"]),
        ("cupyep train --arch vgg1", ["vgg11", "vgg12", "vgg16"]),
        ("cupyep train --schedule ", ["synchronous", "evenodd", "sweeps"]),
        ("cupyep data verify fash", ["fashion-mnist"]),
        ("cupyep recipes vgg12-kd", ["vgg12-kd-cifar10", "vgg12-kd-cifar100"]),
        ("cupyep train --recipe dig", ["digits-kd"]),
        ("cupyep train --vali", ["--validation"]),
    ],
)
def test_the_shell_completes_names(line, wanted, monkeypatch, capsys):
    parts = line.split(" ")
    monkeypatch.setenv("_CUPYEP_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(parts) - 1))
    with pytest.raises(SystemExit) as end:
        main([], prog_name="cupyep")
    offered = [entry.partition(",")[2] for entry in capsys.readouterr().out.splitlines()]
    assert not end.value.code
    assert [name for name in offered if name.startswith(parts[-1])] == wanted


def test_the_script_for_the_shell(monkeypatch, capsys):
    monkeypatch.setenv("_CUPYEP_COMPLETE", "zsh_source")
    with pytest.raises(SystemExit):
        main([], prog_name="cupyep")
    assert "_CUPYEP_COMPLETE=zsh_complete" in capsys.readouterr().out


def test_every_recipe_can_be_completed():
    completions = COMMANDS["recipes"].params[0].shell_complete(click.Context(COMMANDS["recipes"]), "")
    assert [item.value for item in completions] == recipe_names()


def text_of(run, *args):
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    return out


def options_in(text):
    """Return the options that a help lists below its first heading: they stand at the margin."""
    return re.findall(r"^  (--[a-z-]+)", re.split(r"(?m)^[A-Z][a-z ]+:$", text, maxsplit=1)[1], re.MULTILINE)


LONG = {"train", "diagnose", "check", "memory", "info", "teacher"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_many_options_has_a_short_help(name, invoke):
    """By hand: a dozen options or so, examples, and where the others are; the others are those of the command."""
    command, words = COMMANDS[name], name.split()
    flags = {param.opts[0] for param in command.params if param.param_type_name == "option"}
    assert (len(flags) > 15) == (name in LONG)
    short = text_of(invoke, *words, "--help")
    if name not in LONG:
        assert set(options_in(short)) == flags | {"--help"}
        return
    assert len(options_in(short)) == len(set(options_in(short)))
    assert 6 <= len(options_in(short)) <= 14
    assert set(options_in(short)) < flags
    assert 2 <= len(re.findall(rf"^    cupyep {name} ", short, re.MULTILINE)) <= 3
    assert short.rstrip().splitlines()[-1].strip() == f"All options: cupyep {name} --help-all"
    whole = text_of(invoke, *words, "--help-all")
    assert set(options_in(whole)) == flags | {"--help", "--help-all"}
    assert set(re.findall(rf"^    cupyep {name} .*", short, re.M)) <= set(whole.splitlines())


def test_the_help_of_a_training_is_for_a_newcomer(invoke):
    """By hand: what one needs for a first run of one's own, in the groups' place; all groups in the long one."""
    short = text_of(invoke, "train", "--help")
    assert {"--recipe", "--arch", "--dataset", "--epochs", "--device", "--run-dir", "--resume"} <= set(
        options_in(short)
    )
    assert len(short.splitlines()) < 60 < 200 < len(text_of(invoke, "train", "--help-all").splitlines())
    for group in ("Network:", "Data:", "Gradient:", "Intermediate signals:", "Optimizer:", "Run:"):
        assert f"\n{group}\n" not in short
        assert f"\n{group}\n" in text_of(invoke, "train", "--help-all")


@pytest.mark.parametrize(
    ("words", "instead"),
    [(["train", "--help-al"], "--help-all"), (["evaluate", "--help-all"], "--help"), (["--help-all"], "--help")],
)
def test_a_help_that_is_not_there_is_answered_with_the_one_that_is(words, instead, invoke):
    wanted = f"Error: no such option '{words[-1]}'; did you mean '{instead}'?\n"
    assert invoke(*words) == (2, "", wanted)


@pytest.mark.parametrize("module", ["cupyep", "cupyep.cli"])
def test_the_command_line_is_a_module_too(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"cupyep {ep.__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", module, "train", "--epochs", "0"], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.count(b"\n") == 1
