#!/usr/bin/env python3
"""Write docs/cli.md, the reference of the command line, from the commands themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from cupyep.cli import main as cupyep
from cupyep.cli.help import ALL
from cupyep.files import write_file

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
WIDTH = 100
HEAD = """# Command line

Written by `python tools/cli_reference.py` from the commands themselves; `cupyep COMMAND --help` says the same,
`--help-all` where a command has many options.

Exit codes: 0 done; 1 something failed (one line on stderr says what and what to do); 2 wrong usage; 130 interrupted
(SIGINT), 143 terminated (SIGTERM); 141 nobody reads the output (a closed pipe).

Environment: `CUPYEP_DATA` names the folder of data sets; without it `$XDG_CACHE_HOME/cupyep`, or `~/.cache/cupyep`.
`CUPYEP_CACHE` names the folder of teachers that were trained here; without it the same, or the platform's own
(`docs/formats.md`). `--threads`, else `CUPYEP_THREADS`, else
`OMP_NUM_THREADS` is the number of threads that take the parts of a batch on a CPU; the default is all usable CPUs. The
results are the same bits ([docs/scaling.md](scaling.md)).

## Shell completion

Commands, options, names (architectures, data sets, recipes, ...) and files are completed. Put one line into the shell's
start file:

```text
eval "$(_CUPYEP_COMPLETE=bash_source cupyep)"          # ~/.bashrc
eval "$(_CUPYEP_COMPLETE=zsh_source cupyep)"           # ~/.zshrc
_CUPYEP_COMPLETE=fish_source cupyep | source           # ~/.config/fish/config.fish
```
"""


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Yield (name, help text) of a command and of all commands below it."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, _context(inner, name, context))


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    return click.Context(command, parent, name, terminal_width=WIDTH, max_content_width=WIDTH)


def reference() -> str:
    """Return the page as Markdown."""
    parts = [HEAD]
    root = _context(cupyep, "cupyep")
    root.meta[ALL] = True
    for path, text in commands(cupyep, root):
        body = "\n".join(line.rstrip() for line in text.splitlines())
        parts.append(f"## {path}\n\n```text\n{body}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("usage: python tools/cli_reference.py")
    write_file(PAGE, reference().encode())
    print(f"written: {PAGE}")
