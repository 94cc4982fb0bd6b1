"""`cupyep data`: which data sets there are, whether they are whole, and getting them."""

from __future__ import annotations

from pathlib import Path

import click

from cupyep.cli.shared import Commands, config_options
from cupyep.cli.types import Names
from cupyep.data import DATASETS, data_directory
from cupyep.data.download import fetch
from cupyep.data.formats import layouts_found
from cupyep.data.sources import SOURCES, Source
from cupyep.data.verify import verify
from cupyep.errors import DataError, few

EXAMPLES = """\b
Examples:
  cupyep data list                        all data sets, and which of them are here
  cupyep data list cifar100               with the names of all classes
  cupyep data verify                      whatever is here: whole, and the originals?
  cupyep data download fashion-mnist --data-dir ~/images
"""
SHOWN = 10  # classes named in the list of all data sets


@click.group(cls=Commands, invoke_without_command=True, epilog=EXAMPLES)
@click.pass_context
def data(context: click.Context) -> None:
    """List, verify and download data sets."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@data.command("list")
@click.argument("names", nargs=-1, metavar="[NAME]...", type=Names("data set", DATASETS))
@config_options(("data_dir",))
def list_(names: tuple[str, ...], given: dict[str, str]) -> None:
    """Show classes, sizes, places, licences.

    NAME is a data set; all of them if none is given.
    """
    folder = data_directory(**given)
    for name in names or DATASETS:
        source = SOURCES[name]
        shape = " x ".join(map(str, source.shape))
        click.echo(f"{name}: {shape}, {source.train_count} training and {source.test_count} test images")
        count = len(source.classes)
        details = {
            "classes": f"{count}: {few(source.classes, count if names else SHOWN)}",
            "found": _found(source, folder),
            "licence": source.licence,
            "source": source.homepage,
        }
        for title, text in details.items():
            click.echo(f"  {title:<9} {text}")


def _found(source: Source, folder: Path) -> str:
    if not source.remotes:
        return "comes with scikit-learn"
    layouts, note = layouts_found(source.name, folder)
    missing = f"not in {folder}" + (f" ({note[:-2]})" if note else "")
    return ", ".join(str(layout.place) for layout in layouts) or missing


@data.command("verify")
@click.argument("names", nargs=-1, metavar="[NAME]...", type=Names("data set", DATASETS))
@config_options(("data_dir",))
def verify_(names: tuple[str, ...], given: dict[str, str]) -> None:
    """Check that data sets are whole.

    Reads every file: lengths, labels, images of each class, MD5 sums where some are published.

    NAME is a data set that must be there; without any, those are read that are. Exit code 1 if anything is wrong.
    """
    folder, wrong = data_directory(**given), 0
    for name in names or DATASETS:
        findings = 0
        for finding in verify(name, folder):
            findings += 1
            wrong += not finding.good
            click.echo(f"{name}  {f'ok: {finding.place}, ' if finding.good else 'WRONG: '}{finding.text}")
        if not findings:
            click.echo(f"{name}  not {f'in {folder}' if SOURCES[name].remotes else 'installed: extra demo'}")
            wrong += bool(names)
    if wrong:
        raise DataError(f"{wrong} of the data sets looked at are wrong or missing; see above")


@data.command()
@click.argument("name", metavar="NAME", type=Names("data set", DATASETS))
@config_options(("data_dir",))
def download(name: str, given: dict[str, str]) -> None:
    """Fetch the original archives.

    Nothing is done if the data set is there already. MD5 sums are compared with the published ones. Needs the extra
    download: pip install "cupyep[download]".
    """
    source, folder = SOURCES[name], data_directory(**given)
    if not source.remotes:
        click.echo(f'{name} comes with scikit-learn: pip install "cupyep[demo]"')
        return
    layouts, _ = layouts_found(name, folder)
    if layouts:
        click.echo(f"{name} is there already: {layouts[0].place}")
        return
    reason = fetch(source, folder)
    if reason:
        raise DataError(f"cannot get {name}: {reason}; or put into {folder} {source.accepts}")
    click.echo(f"{name}: {layouts_found(name, folder)[0][0].place}, MD5 sums as published; {source.licence}")
