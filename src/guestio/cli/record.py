"""``guestio record``: what a running server does, written to a file."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guestio.budgets import RECORD_BYTES
from guestio.cli.extras import observing
from guestio.cli.seconds import Seconds
from guestio.errors import GuestioError

if TYPE_CHECKING:
    from guestio.observe import Payload

HELP = """Record what the server with the control socket CONTROL does, until Ctrl-C or its end.

\b
  guestio blk disk.img --socket /tmp/blk.sock --control /tmp/blk.control &
  guestio record /tmp/blk.control -o disk.parquet --seconds 10
  guestio report disk.parquet

Each request, translation and fault is recorded, with what requests carry if --payload says so. The
server must be one of the same user on this machine: its records are read from its memory. FILE is a
Parquet file in the end; as long as this runs, and after a crash, `guestio report` reads it too.
"""

PAYLOAD = click.option(
    "--payload",
    type=click.Choice(["none", "headers", "all"]),
    default="none",
    show_default=True,
    help="What requests carry: nothing of it; the layout of their memory, their first 64 bytes, "
    "status and a hash of the answer; or all bytes as well, up to 8 MiB each way.",
)


@click.command(help=HELP)
@click.argument("control")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The file to write. It must not be there yet.",
)
@click.option(
    "--seconds", type=Seconds(0, 1e7, min_open=True), metavar="N", help="End after so long."
)
@PAYLOAD
@click.option(
    "--most-bytes",
    type=click.IntRange(1),
    default=RECORD_BYTES,
    show_default=True,
    metavar="BYTES",
    help="End when the file is so large, while it is written; it becomes smaller at the end.",
)
def record(
    control: str, output: Path, seconds: float | None, payload: Payload, most_bytes: int
) -> None:
    """Record a server; the help text is ``HELP``."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    with observing():
        from guestio.observe import Recorder
    try:
        recorder = Recorder(
            control,
            output,
            payload=payload,
            most_bytes=most_bytes,
        )
    except (GuestioError, OSError) as error:
        _fail(error)
    click.echo(f"guestio: recording to {output}", err=True)
    recorder.ending.add_done_callback(lambda _: stop.set())
    stop.wait(seconds)
    try:
        found = recorder.close()
    except OSError as error:
        _fail(error)
    if recorder.ended is not None:
        click.echo(f"guestio: {recorder.ended}", err=True)
    rows = found["rows"]
    lost = f"; {found['lost']:,} events were lost" if found["lost"] else ""
    click.echo(
        f"guestio: {output}: {rows['requests']:,} requests, {rows['mappings']:,} mappings, "
        f"{rows['events']:,} other events{lost}",
        err=True,
    )


def _fail(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{os.fsdecode(error.filename or '')}: {error.strerror}"
    click.echo(f"guestio: {text}", err=True)
    sys.exit(1)
