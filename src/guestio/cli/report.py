"""``guestio report``: what happened in a recording."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from guestio.budgets import REPORT_LEAST_BYTES, REPORT_MEMORY_BYTES
from guestio.cli.extras import observing
from guestio.control.summary import printable
from guestio.errors import GuestioError

HELP = """Say what happened in the recording FILE, or in all recordings of a directory or URL.

\b
  guestio record /tmp/blk.control -o disk.parquet --seconds 10
  guestio report disk.parquet
  guestio report disk.parquet --html > disk.html
  guestio report disk.parquet --sql "SELECT operation, avg(completed - taken) FROM requests
    GROUP BY operation"

A directory's files named *.parquet are one set of data; those that cannot be read are named, and
left out. URLs are fsspec's, as s3://bucket/recordings. With --scheduler the workers of a Dask
cluster look at the recordings. A recording that is still written, or that a crash has left, is read
up to its last fraction of a second. SQL is DuckDB's; docs/recordings.md
lists the columns of the views requests, mappings and events. `read_parquet` of any other tool reads
FILE as well.
"""


@click.command(help=HELP)
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
@click.option("--html", "as_html", is_flag=True, help="Print a page with plots.")
@click.option("--sql", metavar="QUERY", help="Print the answer to a question of your own.")
@click.option(
    "--finish",
    is_flag=True,
    help="Make what a server or a crash has left unfinished a Parquet file, in its place.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Of a Dask cluster, as tcp://host:8786. Its workers reach FILE under the same name.",
)
@click.option(
    "--memory",
    type=click.IntRange(REPORT_LEAST_BYTES >> 20, 1 << 20),
    default=REPORT_MEMORY_BYTES >> 20,
    show_default=True,
    metavar="MIB",
    help="MiB for the rows that are looked at: here, or in each worker. More goes to files.",
)
def report(
    file: str,
    as_json: bool,
    as_html: bool,
    sql: str | None,
    finish: bool,
    scheduler: str | None,
    memory: int,
) -> None:
    """Report on recordings; the help text is ``HELP``."""
    if sum((as_json, as_html, sql is not None, finish)) > 1:
        _refuse("give one of --json, --html, --sql and --finish")
    if scheduler is not None and (sql is not None or finish):
        _refuse("--sql and --finish run on this machine: give no --scheduler")
    with observing():
        from guestio.observe.finish import finish as finish_file
        from guestio.observe.page import page
        from guestio.observe.report import report as report_on
        from guestio.observe.report import table, text
    try:
        if finish:
            try:
                finish_file(Path(file))
            except ValueError as error:
                _fail(f"{file} is no unfinished recording: {error}")
        elif sql is not None:
            names, rows, unreadable = table(file, sql, memory=memory << 20)
            for each in unreadable:
                click.echo(printable(f"guestio: left out: {each.path}: {each.why}"), err=True)
            click.echo("\t".join(names))
            for row in rows:
                click.echo("\t".join(_cell(value) for value in row))
        else:
            with _progress() as progress, observing():
                found = report_on(file, scheduler=scheduler, memory=memory << 20, progress=progress)
            with observing():
                click.echo(
                    json.dumps(found) if as_json else page(found) if as_html else text(found)
                )
    except BrokenPipeError:
        sys.exit(0)
    except GuestioError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{file}: {error.strerror or error}")


def _cell(value: Any) -> str:
    """A value without what a terminal, or a reader of tabs and lines, would obey."""
    return printable(value.hex() if isinstance(value, bytes) else str(value))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows rows that were looked at, if a terminal is there."""
    with Progress(
        TextColumn("looking at rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    ) as shown:  # fmt: skip
        task = shown.add_task("", total=None)

        def progress(done: int, whole: int) -> None:
            shown.update(task, completed=done, total=whole)

        yield progress


def _refuse(message: str) -> None:
    click.echo(f"guestio: {message}", err=True)
    sys.exit(2)


def _fail(message: str) -> None:
    click.echo(f"guestio: {message}", err=True)
    sys.exit(1)
