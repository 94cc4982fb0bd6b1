"""The command line: options in, one call into `cupyep.training`, lines out. No numerics here."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click

from cupyep._version import __version__
from cupyep.errors import ConfigurationError, CupyepError, choose, nearest, require
from cupyep.recipes import find_recipe, recipe_names
from cupyep.training import diagnostics, runs
from cupyep.training.config import OPTIONS, make_config, option_name, read_toml

EXAMPLES = """\b
Examples:
  cupyep train --recipe digits-kd                  a first run, on bundled images
  cupyep train --arch vgg7 --aug kd                CIFAR-10, teacher included
  cupyep train --run-dir runs/mine --resume        go on where a run stopped
  cupyep check --arch vgg5 --dataset digits        is the gradient right?
  cupyep evaluate runs/mine                        test accuracy of its best epoch
"""

EVALUATE_DEFAULTS = dict.fromkeys(("data_dir", "limit_test", "batch_size", "device"), "as the run")


class Names(click.ParamType):
    """One of some names; a wrong one is answered with the nearest."""

    name = "name"

    def __init__(self, what: str, names: tuple[str, ...]):
        self.what = what
        self.names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self.names)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return choose(self.what, value, self.names)


class Numbers(click.ParamType):
    """A number, or several with commas between them."""

    name = "number[,number...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        try:
            return [float(part) for part in value.split(",")]
        except ValueError:
            return self.fail(f"'{value}' is neither a number nor numbers with commas between them", param, ctx)


class SectionedCommand(click.Command):
    """A command whose ``--help`` lists the options of `TrainConfig` under their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            group = OPTIONS[param.name].metadata["group"] if param.name in OPTIONS else "Run"
            sections.setdefault(group, []).append(param.get_help_record(ctx))
        for group, records in sections.items():
            with formatter.section(group):
                formatter.write_dl(records)


class OneLineErrors(click.Command):
    """Reports every error that a user can make as one line on stderr.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """

    def main(self, *args: Any, **kwargs: Any) -> None:
        kwargs["standalone_mode"] = False
        with warnings.catch_warnings():
            warnings.showwarning = _show_once()
            code, message = self._run(args, kwargs)
        if message:
            click.echo(f"Error: {' '.join(message.split())}", err=True)
        sys.exit(code)

    def _run(self, args: Any, kwargs: Any) -> tuple[int, str]:
        """Return (exit code, message)."""
        try:
            code = super().main(*args, **kwargs)
        except click.exceptions.NoSuchOption as error:
            known = [name for param in error.ctx.command.params for name in (*param.opts, *param.secondary_opts)]
            return 2, f"no such option '{error.option_name}'{nearest(error.option_name, known)}"
        except click.ClickException as error:
            return error.exit_code, error.format_message()
        except ConfigurationError as error:
            return 2, str(error)
        except CupyepError as error:
            return 1, str(error)
        except MemoryError as error:
            return 1, f"out of memory ({error}); lower --batch-size or --width"
        except OSError as error:
            return 1, str(error)
        except click.Abort:
            return 130, "interrupted"
        return code if isinstance(code, int) else 0, ""


class Commands(OneLineErrors, click.Group):
    """The group of commands."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        choose("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


def _show_once() -> Any:
    """Return a replacement of `warnings.showwarning`: one line on stderr, the first of each kind only."""
    shown: set[type] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if category not in shown:
            shown.add(category)
            click.echo(f"Warning: {message} (more of this kind are not shown)", err=True)

    return show


class Interrupted(click.ClickException):
    """Ctrl-C during a training that can be resumed."""

    exit_code = 130


def config_options(names: Any, defaults: dict[str, Any] | None = None) -> Any:
    """Return a decorator that adds the options called `names` of `TrainConfig`, in their order.

    An option that is not given arrives as None, so that a recipe can fill it; `defaults` only changes the help.
    """

    def decorate(command: Any) -> Any:
        for name in reversed(list(names)):
            command = _config_option(name, {**{n: f.default for n, f in OPTIONS.items()}, **(defaults or {})}[name])(
                command
            )
        return command

    return decorate


def _config_option(name: str, default: Any) -> Any:
    rule, flag = OPTIONS[name].metadata, option_name(name)
    kind = rule["kind"]
    if kind is bool:
        text = f"{rule['text']}  [default: {flag if default else flag.replace('--', '--no-', 1)}]"
        return click.option(f"{flag}/{flag.replace('--', '--no-', 1)}", name, default=None, help=text)
    types = {int: click.INT, float: click.FLOAT, list: Numbers(), str: click.STRING}
    value_type = Names(flag, rule["choices"]) if "choices" in rule else types[kind]
    text = rule["text"]
    if default is not None:  # then what happens when it is unset says nothing
        text = f"{text.partition('; unset:')[0].rstrip('.')}.  [default: {default}]"
    return click.option(flag, name, type=value_type, default=None, help=text)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@click.group(cls=Commands, invoke_without_command=True, epilog=EXAMPLES)
@click.version_option(__version__, prog_name="cupyep", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Train deep convolutional networks by Equilibrium Propagation, with intermediate learning signals."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command(cls=SectionedCommand, epilog=EXAMPLES)
@config_options(OPTIONS)
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help=f"Take the options that are not given from a recipe: {', '.join(recipe_names())}, or a TOML file.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Folder of this run.  [default: runs/ARCH-AUG-DATASET-seedSEED, numbered if taken]",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir after its last finished epoch.")
@click.option("--quiet", is_flag=True, help="No progress bar and no line an epoch; only the result.")
def train(recipe: str | None, run_dir: Path | None, resume: bool, quiet: bool, **options: Any) -> None:
    """Train a network in a new run directory.

    The directory holds config.toml, metrics.jsonl, checkpoint.h5 and best.h5.
    """
    given = _given(options)
    if resume:
        given_right = run_dir is not None and recipe is None
        require(given_right, "--resume needs --run-dir and takes no --recipe: options come from the run")
        run = runs.resume_run(run_dir, given, quiet=quiet, report=click.echo)
    else:
        config = make_config({} if recipe is None else read_toml(find_recipe(recipe)), given)
        run = runs.start_run(config, run_dir, quiet=quiet, report=click.echo)
    try:
        click.echo(run.run())
    except KeyboardInterrupt:
        path = run.directory.path
        raise Interrupted(f"interrupted; go on with: cupyep train --run-dir {path} --resume") from None


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=Names("--checkpoint", ("best", "last")),
    default="best",
    show_default=True,
    help="Which of the run's checkpoints.",
)
@config_options(EVALUATE_DEFAULTS, EVALUATE_DEFAULTS)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(run: Path, checkpoint: str, quiet: bool, **options: Any) -> None:
    """Show the test accuracy of a run.

    RUN is a run directory.
    """
    for line in runs.evaluate_run(run, checkpoint, _given(options), quiet=quiet):
        click.echo(line)


@main.command(cls=SectionedCommand)
@config_options(diagnostics.CHECK_OPTIONS, diagnostics.CHECK_DEFAULTS)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the table to this file.")
def check(json_path: Path | None, **options: Any) -> None:
    """Compare EP's gradient with BPTT's.

    Layer by layer, from the same settled free state, for the nudge form asked for and the other one.
    """
    if json_path is not None:
        require(json_path.parent.is_dir(), f"--json: there is no folder '{json_path.parent}'")
    config = make_config(diagnostics.CHECK_DEFAULTS, _given(options))
    report = diagnostics.check_gradient(config, report=click.echo)
    click.echo(report.table())
    if json_path is not None:
        report.write_json(json_path)
        click.echo(f"written to {json_path}")


@main.command()
@config_options(("data_dir",))
def info(data_dir: str | None) -> None:
    """Show device, libraries, data folder."""
    for name, value in diagnostics.system_report(data_dir):
        click.echo(f"{name:<14} {value}")


if __name__ == "__main__":
    main()
