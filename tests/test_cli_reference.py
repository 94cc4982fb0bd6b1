"""docs/cli.md is what the commands say of themselves; their help reads well; the shell completes their names."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click
import pytest

from cupyep.cli import main
from cupyep.recipes import recipe_names

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
