"""``guestio top``: what a server is doing, in the terminal."""

from __future__ import annotations

import json
import os
import sys
import time

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from guestio.cli.seconds import Seconds
from guestio.control.client import ControlClient
from guestio.control.schema import Status
from guestio.control.summary import COLUMNS, SORT_KEYS, lines_of, rows_of, text_of, title_of
from guestio.errors import GuestioError

HELP = """Show what the server with the control socket CONTROL is doing.

CONTROL is the path that was given to a server as --control, or http://HOST:PORT.

\b
  guestio blk disk.img --socket /tmp/blk.sock --control /tmp/blk.control &
  guestio top /tmp/blk.control

The table is drawn anew each second until Ctrl-C. Times are from a request being found with all
that it needs to its being given back: behind an IOMMU what it waits for translations is not in them
but in the line about the IOTLB, and in the recordings of `guestio record`.

A server whose token is in GUESTIO_CONTROL_TOKEN is asked with it.
"""


@click.command(help=HELP)
@click.argument("control")
@click.option("--once", is_flag=True, help="Print plain lines once, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON once, and end.")
@click.option(
    "--sort",
    type=click.Choice(list(SORT_KEYS)),
    default="index",
    show_default=True,
    help="What queues are sorted by.",
)
@click.option(
    "--interval",
    type=Seconds(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
def top(control: str, once: bool, as_json: bool, sort: str, interval: float) -> None:
    """Show what a server is doing; the help text is ``HELP``."""
    client = ControlClient(control, token=os.environ.get("GUESTIO_CONTROL_TOKEN"))
    try:
        if as_json:
            click.echo(json.dumps(client.status(), indent=1))
        elif once:
            click.echo(text_of(client.status(), sort))
        else:
            _watch(client, sort, interval)
    except GuestioError as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        pass


def _watch(client: ControlClient, sort: str, interval: float) -> None:
    with Live(console=Console(), auto_refresh=False, screen=sys.stdout.isatty()) as live:
        while True:
            live.update(picture(client.status(), sort), refresh=True)
            time.sleep(interval)


def picture(status: Status, sort: str) -> Group:
    """The table and the lines below it."""
    table = Table(*COLUMNS, title=Text(title_of(status)))
    for column in table.columns:
        column.justify = "right"
    for row in rows_of(status, sort):
        table.add_row(*(Text(cell) for cell in row))
    return Group(table, *(Text(line) for line in lines_of(status)))
