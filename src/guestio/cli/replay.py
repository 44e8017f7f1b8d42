"""``guestio replay``: a recording's requests once more, and what differs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from guestio.cli.extras import observing
from guestio.cli.seconds import Seconds
from guestio.errors import GuestioError

if TYPE_CHECKING:
    from guestio.observe.player import ReplayIommu, ReplayResult, Tick

HELP = """Repeat the requests of the recording FILE against the vhost-user back-end at SOCKET, and
compare its answers with the recorded ones: status, length, and data where they were recorded.

Requests come in their recorded order, with their layout in memory. Those that overlapped may
overlap; what was found after the answer to another request waits for that answer here as well.

\b
  cp disk.img disk-as-it-was.img
  guestio blk disk.img --socket /tmp/blk.sock --record boot.parquet \
    --record-payload all
  guestio blk disk-as-it-was.img --socket /tmp/blk2.sock &
  guestio replay boot.parquet /tmp/blk2.sock

The back-end may be any: `qemu-storage-daemon`, say, with --iommu off. Its disk must hold what the
recorded one did when recording began. The recording needs what requests carried: --payload all, or
headers if its requests only read.

Ends with status 0 if every answer was the recorded one, 1 if one was not, or if the back-end breaks
the protocol or does not answer.
"""


class Speed(click.ParamType[float | None]):
    """A factor, or ``max`` for none."""

    name = "X|max"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | None:
        """See `click.ParamType`."""
        if value == "max":
            return None
        try:
            number = float(str(value))
        except ValueError:
            number = 0.0
        if not 0.001 <= number <= 1e6:
            self.fail(f"{value!r} is neither max nor a number from 0.001 to 1e6", param, ctx)
        return number


@click.command(help=HELP)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("socket", type=click.Path())
@click.option(
    "--speed",
    type=Speed(),
    default="1",
    show_default=True,
    help="How much faster than recorded requests come; max: as fast as they are answered.",
)
@click.option(
    "--iommu",
    type=click.Choice(["as-recorded", "off", "strict"]),
    default="as-recorded",
    show_default=True,
    help="as-recorded: memory is mapped when a request first uses it, and unmapped when it was "
    "revoked in the recording. off: none. strict: memory is mapped for each request.",
)
@click.option(
    "--timeout",
    type=Seconds(0.1, 3600),
    default=30.0,
    show_default=True,
    help="Seconds that the back-end has for anything.",
)
@click.option(
    "--differences",
    type=click.IntRange(0, 1000),
    default=20,
    show_default=True,
    help="How many differences to show.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than a table.")
def replay(
    file: str,
    socket: str,
    speed: float | None,
    iommu: ReplayIommu,
    timeout: float,
    differences: int,
    as_json: bool,
) -> None:
    """Repeat a recording; the help text is ``HELP``."""
    with observing():
        from guestio.observe import replay as repeat

    try:
        with _progress() as tick:
            result = repeat(file, socket, speed=speed, iommu=iommu, timeout=timeout, tick=tick)
    except (GuestioError, OSError) as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(1)
    if as_json:
        found = dataclasses.asdict(result) | {"ok": result.ok}
        found["differences"] = found["differences"][:differences]
        click.echo(json.dumps(found, indent=1))
        sys.exit(0 if result.ok else 1)
    click.echo(result.text(0))
    if not result.ok and differences:
        Console().print(picture(result, differences))
    sys.exit(0 if result.ok else 1)


@contextlib.contextmanager
def _progress() -> Iterator[Tick]:
    columns = (TextColumn("replay"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("replay", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def picture(result: ReplayResult, most: int) -> Table:
    """The first differences as a table."""
    columns = ("queue", "request", "operation", "offset", "differs", "recorded", "here")
    table = Table(*columns, title=f"first {min(most, len(result.differences))} differences")
    for each in result.differences[:most]:
        offset = "" if each.offset is None else f"{each.offset:#x}"
        cells = (
            *(str(each.queue), str(each.sequence), each.operation, offset),
            *(each.what, each.recorded, each.replayed),
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table
