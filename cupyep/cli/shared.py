"""What the commands share: the options of `TrainConfig` as click's, errors as one line, exit codes, streams."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from cupyep.backend.threads import set_threads
from cupyep.cli.types import IntegerOr, Names, NewFile, Numbers
from cupyep.errors import (
    ConfigurationError,
    CupyepError,
    Interrupted,
    PrecisionWarning,
    choose,
    nearest,
    one_line,
    require,
)
from cupyep.parallel import join
from cupyep.plugins import load_plugin
from cupyep.recipes import find_recipe, read_recipe, recipe_names
from cupyep.training.config import OPTIONS, TrainConfig, make_config, option_name, require_used
from cupyep.training.display import SIGPIPE, silence
from cupyep.training.run_directory import CHECKPOINT_FILES

PLUGIN = "MODULE|FILE"


class OneLineErrors(click.Command):
    """Reports every error that a user can make as one line on stderr.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + signal (130, 143) interrupted, 141 (as by SIGPIPE) output that
    nobody reads.
    """

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        open_streams()
        streams = (sys.stdout, sys.stderr)
        for stream in streams:
            if hasattr(stream, "reconfigure"):  # names of files may hold what the terminal cannot show
                stream.reconfigure(errors="backslashreplace")
        with warnings.catch_warnings():
            warnings.showwarning = show_once(lambda text: click.echo(f"Warning: {text}", err=True))
            code, message = self._run_with_others(args, kwargs)
        text = f"Error: {' '.join(message.split())}\n" if message else ""
        for stream, last in zip(streams, ("", text), strict=True):
            try:
                stream.write(last)
                stream.flush()
            except OSError:  # nobody reads it, or the disk that it goes to is full
                silence(stream)
                code = code or 128 + SIGPIPE
        sys.exit(code)

    def _run_with_others(self, args: Any, kwargs: Any) -> tuple[int, str]:
        """Return (exit code, message), the same exit code on all ranks; only rank 0 is heard, and obeys Ctrl-C."""
        try:
            ranks = join()
        except ConfigurationError as error:
            return 2, str(error)
        if ranks.size == 1:
            return self._run(args, kwargs)
        if ranks.rank:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.ExitStack() as stack:
            if ranks.rank:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            try:
                code, message = self._run(args, kwargs)
            except BaseException as error:  # a defect: others must not wait for this rank
                traceback.print_exc(file=sys.__stderr__)
                code, message = 1, one_line(error)
        return ranks.leave(code, message)

    def _run(self, args: Any, kwargs: Any) -> tuple[int, str]:
        """Return (exit code, message)."""
        stdout = sys.stdout
        try:
            code = super().main(*args, **kwargs)
        except click.exceptions.NoSuchOption as error:
            params = error.ctx.command.get_params(error.ctx) if error.ctx else []
            known = [name for param in params for name in (*param.opts, *param.secondary_opts)]
            return 2, f"no such option '{error.option_name}'{_instead(error.option_name, known)}"
        except click.ClickException as error:
            return error.exit_code, error.format_message()
        except ConfigurationError as error:
            return 2, str(error)
        except Interrupted as error:
            return 128 + error.number, str(error)
        except CupyepError as error:
            return 1, str(error)
        except MemoryError as error:
            return 1, f"out of memory ({error}); lower --batch-size or --width"
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO) and error.filename is None:  # a reader, a terminal that has gone
                return 128 + SIGPIPE, ""
            place = error.filename2 or error.filename
            return 1, f"cannot use '{place}': {error.strerror}" if place else str(error)
        except SystemExit as error:  # a plugin's, or click's own, of a completion, or because nobody reads the output
            if sys.stdout is not stdout:
                return 128 + SIGPIPE, ""
            return (1, error.code) if isinstance(error.code, str) else (error.code or 0, "")
        except click.Abort:
            return 130, "interrupted"
        return code if isinstance(code, int) else 0, ""


def open_streams() -> None:
    """Put nowhere in the place of standard streams that are closed, or the next file opened would take their output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


SHARED = ("train", "info")  # commands that several processes run together


class Commands(OneLineErrors, click.Group):
    """A group of commands, listed in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        choose("command", args[0], self.commands)
        alone = f"cupyep {args[0]} is for one process: start it without mpirun, or srun (train and info take several)"
        require(self.commands[args[0]].name in SHARED or join().size == 1, alone)
        return super().resolve_command(ctx, args)


def show_once(write: Callable[[str], None]) -> Any:
    """Return a replacement of `warnings.showwarning`: `write` takes one line, the first of each kind only.

    What is said of a precision is said once, but all of it.
    """
    shown: set[Any] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        settings = issubclass(category, PrecisionWarning)
        kind = str(message) if settings else category
        if kind not in shown:
            shown.add(kind)
            write(str(message) if settings else f"{message} (more of this kind are not shown)")

    return show


def choice(flag: str, *names: str, among: Iterable[str], default: str | None = None, text: str) -> Any:
    """Return the decorator of an option whose value is one name `among` some; `names` are other names of it."""
    kind = Names(flag, tuple(among))
    return click.option(flag, *names, type=kind, default=default, show_default=default is not None, help=text)


def threads_option(command: Any) -> Any:
    """Add the option that sets the threads of this process: results do not depend on it, and no run remembers it."""
    text = "Threads that take the parts of a batch on a CPU; the results are the same bits.  [default: usable CPUs]"
    how: dict[str, Any] = {"type": click.IntRange(1), "expose_value": False, "help": text}
    return click.option("--threads", callback=lambda *values: set_threads(values[-1]), **how)(command)


def _load(context: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not context.resilient_parsing:  # a shell that completes runs nobody's code
        load_plugin(value)
    return value


def plugin_option(of: str) -> Any:
    """Return the decorator of an option that imports the plugin `of` a run, or of a file that names one."""
    text = f"The plugin {of}: a module or file .py, whose code is run.  [default: none]"
    how: dict[str, Any] = {"expose_value": False, "callback": _load, "metavar": PLUGIN, "help": text}
    return click.option("--plugin", is_eager=True, **how)


run_plugin_option = plugin_option("that the run was trained with")


def is_given(name: str) -> bool:
    """Return whether the parameter `name` of the command that is running stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def checkpoint_option(default: str, of: str = "the run's") -> Any:
    return choice("--checkpoint", among=sorted(CHECKPOINT_FILES), default=default, text=f"Which of {of} checkpoints.")


def recipe_option(text: str) -> Any:
    return click.option("--recipe", metavar="NAME|FILE", shell_complete=complete_recipe, help=text)


def complete_recipe(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return the recipes that begin with `incomplete`, for the shell."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


def json_option(what: str) -> Any:
    return click.option("--json", "json_path", type=NewFile(), help=f"Also write {what} to this file.")


def write_json(report: Any, path: Path | None) -> None:
    """Let `report` write itself to `path` if there is one, and say so."""
    if path is not None:
        report.write_json(path)
        click.echo(f"written to {path}")


def config_options(names: Iterable[str], defaults: Mapping[str, Any] | None = None) -> Any:
    """Return a decorator that adds the options called `names` of `TrainConfig`, in their order.

    The command takes those that are given as the mapping `given`; `defaults` only changes the help.
    """
    names = list(names)
    shown = {**{name: spec.default for name, spec in OPTIONS.items()}, **(defaults or {})}

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def call(**options: Any) -> Any:
            values = {name: options.pop(name) for name in names}
            return command(given={name: value for name, value in values.items() if value is not None}, **options)

        if "device" in names:
            call = threads_option(call)
        for name in reversed(names):
            call = _config_option(name, shown[name], names == list(OPTIONS))(call)
        return call

    return decorate


def run_options(*names: str) -> Any:
    """Return a decorator as `config_options` does, of options that are as the run has them unless they are given."""
    return config_options(names, dict.fromkeys(names, "as the run"))


#: Other spellings: of PyTorch's scripts, and of the papers.
ALIASES = {"learning_rate": ("--lr",), "feedback": ("--lambda",), "aug": ("--signal",)}

#: What options of PyTorch's scripts are called here.
FAMILIAR = {
    **dict.fromkeys(("--batch", "--batchsize", "--bs", "--mbs"), "--batch-size"),
    **dict.fromkeys(("--num-epochs", "--n-epochs", "--nepochs"), "--epochs"),
    **dict.fromkeys(("--lrs", "--learning-rates"), "--learning-rate"),
    **dict.fromkeys(("--lr-decay", "--lr-scheduler", "--scheduler"), "--lr-schedule"),
    **dict.fromkeys(("--wd", "--decay", "--l2"), "--weight-decay"),
    **dict.fromkeys(("--gpu", "--cuda", "--use-cuda"), "--device cuda"),
    **dict.fromkeys(("--cpu", "--no-cuda"), "--device cpu"),
    **dict.fromkeys(("--amp", "--fp16", "--half"), "--precision float16"),
    **dict.fromkeys(("--model", "--net", "--network"), "--arch"),
    **dict.fromkeys(("--data", "--data-path", "--root"), "--data-dir"),
    **dict.fromkeys(("--output", "--out", "--save-dir", "--log-dir"), "--run-dir"),
    **dict.fromkeys(("--workers", "--num-workers"), ""),
}


def _instead(option: str, known: Iterable[str]) -> str:
    """Return what to give instead of an unknown option, as the end of a message."""
    words = FAMILIAR.get(option.replace("_", "-"))
    if words == "":
        return "; leave it out: images are in memory, nothing waits for them"
    if words and words.split()[0] in known:
        return f"; did you mean '{words}'?"
    return nearest(option, known)


def _config_option(name: str, default: Any, with_word: bool) -> Any:
    rule, flag = OPTIONS[name].metadata, option_name(name)
    kind = rule["kind"]
    if kind is bool:
        no = option_name(f"no_{name}")
        text = rule["text"] + ("" if default is None else f"  [default: {flag if default else no}]")
        return click.option(f"{flag}/{no}", name, default=None, help=text)
    if name == "plugin":  # before the options whose names it registers
        return click.option(flag, is_eager=True, callback=_load, metavar=PLUGIN, help=rule["text"])
    text, unset, rest = rule["text"].partition("; unset:")
    text += (rule.get("word_text", "") if with_word else "") + unset + rest
    if default is not None:  # then what happens when it is unset says nothing
        text = f"{text.partition('; unset:')[0].rstrip('.')}.  [default: {default}]"
    return click.option(flag, *ALIASES.get(name, ()), name, type=value_type(name, with_word), default=None, help=text)


def value_type(name: str, with_word: bool = True) -> click.ParamType:
    """Return the type of the values of an option of `TrainConfig`; `with_word`, of a training, integers or a word."""
    rule = OPTIONS[name].metadata
    if with_word and "word" in rule:  # other commands have no epochs to learn from
        return IntegerOr(rule["word"])
    if "choices" in rule:
        return Names(option_name(name), rule["choices"], rule.get("check"))
    types: dict[type, click.ParamType] = {int: click.INT, float: click.FLOAT, bool: click.BOOL, str: click.STRING}
    return Numbers() if rule["kind"] is list else types[rule["kind"]]


def chosen_config(
    given: Mapping[str, Any],
    recipe: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    take: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> TrainConfig:
    """Return the configuration of the options on the command line, over those of a recipe, over `defaults`.

    `take` says which options of the recipe count. An option that would be ignored is refused; one of a recipe may have
    its effect in the recipe alone: the command line may switch off what it belongs to.
    """
    defaults, taken = defaults or {}, {} if recipe is None else take(read_recipe(recipe))
    config = make_config(defaults, taken, given)
    if recipe is not None:
        require_used(taken, {**defaults, **taken}, vars(config), where=f"'{find_recipe(recipe)}': ")
    require_used(given, vars(config))
    return config
