"""The help of commands with many options: ``--help`` shows those that a newcomer needs, ``--help-all`` all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from cupyep.cli.shared import OneLineErrors
from cupyep.training.config import OPTIONS

ALL = "cupyep.help_all"  # a key of `click.Context.meta`: whether all is shown
EXAMPLES = 3  # in the short help


class LongCommand(OneLineErrors):
    """A command whose ``--help`` lists its `common` options only, in that order, and its first examples."""

    def __init__(self, *, common: Sequence[str], epilog: str, **kwargs: Any):
        super().__init__(epilog=epilog, **kwargs)
        self.common, self.examples = common, epilog
        shown: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _show_all}
        self._help_all = click.Option(["--help-all"], help="Show all options and exit.", **shown)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), self._help_all]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.meta.get(ALL):
            self.format_all_options(ctx, formatter)
            return
        found = {param.name: param for param in self.get_params(ctx)}
        with formatter.section("Common options"):
            formatter.write_dl([line for name in self.common if (line := found[name].get_help_record(ctx))])

    def format_all_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.meta.get(ALL):
            super().format_epilog(ctx, formatter)
            return
        head, title, *examples = self.examples.splitlines()
        for text in ("\n".join([head, title, *examples[:EXAMPLES]]), f"All options: {ctx.command_path} --help-all"):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(text)


class SectionedCommand(LongCommand):
    """One that lists all options under the groups of `TrainConfig`."""

    def format_all_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {rule.metadata["group"]: [] for rule in OPTIONS.values()}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections[OPTIONS[param.name].metadata["group"] if param.name in OPTIONS else "Run"].append(record)
        for group, records in sections.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()
