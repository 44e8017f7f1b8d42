"""``guestio convert``: a recording for other programs."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guestio.cli.extras import observing
from guestio.errors import GuestioError

if TYPE_CHECKING:
    from guestio.observe.recording import Recording

HELP = """Write the recording FILE as other programs read it.

--perfetto makes a trace for https://ui.perfetto.dev: a track for each queue, its requests with
their stages, arrows from requests to the notifications that told the driver of them, translations
and the depth of queues.

--pcapng makes a file for Wireshark and tshark, a packet for each event, which the dissector shows
that `guestio extcap --install` puts in its place:

\b
  guestio convert boot.parquet --pcapng boot.pcapng
  tshark -X lua_script:$(guestio extcap --dissector) -r boot.pcapng

What requests carried is in the packets as far as it was recorded.
"""


@click.command(help=HELP)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--perfetto", type=click.Path(), metavar="OUT", help="Write a Perfetto trace.")
@click.option("--pcapng", type=click.Path(), metavar="OUT", help="Write packets for Wireshark.")
def convert(file: str, perfetto: str | None, pcapng: str | None) -> None:
    """Convert a recording; the help text is ``HELP``."""
    if perfetto is None and pcapng is None:
        raise click.UsageError("say what to write: --perfetto OUT, --pcapng OUT")
    with observing():
        from guestio.observe import convert as conversions
        from guestio.observe import open_recording

    try:
        with open_recording(file) as recording:
            for path, write in (
                (perfetto, conversions.write_perfetto),
                (pcapng, conversions.write_pcapng),
            ):
                if path is not None:
                    count = _replaced(recording, Path(path), write)
                    click.echo(f"{path}: {count} events")
    except (GuestioError, OSError) as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)


def _replaced(recording: Recording, path: Path, write: Callable[[Recording, Path], int]) -> int:
    """Write a file and put it in its place once it is whole."""
    if path.exists() and not path.is_file():
        return write(recording, path)  # a pipe, say
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    made = Path(name)
    try:
        count = write(recording, made)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    return count
