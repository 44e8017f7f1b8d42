"""``guestio report``: what happened in a recording."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from guestio.cli.extras import observing
from guestio.control.summary import printable
from guestio.errors import GuestioError

HELP = """Say what happened in the recording FILE, or in all recordings of a directory.

\b
  guestio record /tmp/blk.control -o disk.parquet --seconds 10
  guestio report disk.parquet
  guestio report disk.parquet --html > disk.html
  guestio report disk.parquet --sql "SELECT operation, avg(completed - taken) FROM requests
    GROUP BY operation"

A directory's files named *.parquet are one set of data. A recording that is still written, or that
a crash has left, is read up to its last fraction of a second. SQL is DuckDB's; docs/recordings.md
lists the columns of the views requests, mappings and events. `read_parquet` of any other tool reads
FILE as well.
"""


@click.command(help=HELP)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
@click.option("--html", "as_html", is_flag=True, help="Print a page with plots.")
@click.option("--sql", metavar="QUERY", help="Print the answer to a question of your own.")
@click.option(
    "--finish",
    is_flag=True,
    help="Make what a server or a crash has left unfinished a Parquet file, in its place.",
)
def report(file: Path, as_json: bool, as_html: bool, sql: str | None, finish: bool) -> None:
    """Report on recordings; the help text is ``HELP``."""
    if sum((as_json, as_html, sql is not None, finish)) > 1:
        click.echo("guestio: give one of --json, --html, --sql and --finish", err=True)
        sys.exit(2)
    with observing():
        from guestio.observe.finish import finish as finish_file
        from guestio.observe.page import page
        from guestio.observe.report import report as report_on
        from guestio.observe.report import table, text
    try:
        if finish:
            try:
                finish_file(file)
            except ValueError as error:
                _fail(f"{file} is no unfinished recording: {error}")
        elif sql is not None:
            names, rows = table(file, sql)
            click.echo("\t".join(names))
            for row in rows:
                click.echo("\t".join(_cell(value) for value in row))
        else:
            found = report_on(file)
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


def _fail(message: str) -> None:
    click.echo(f"guestio: {message}", err=True)
    sys.exit(1)
