"""``guestio explain``: what an address leads to."""

from __future__ import annotations

import json
import os
import sys

import click

from guestio.control.client import ControlClient
from guestio.control.summary import explanation_text
from guestio.errors import GuestioError

HELP = """Say what ADDRESS leads to for the device of the server with the control socket CONTROL:
what maps it and since when, what a read and a write would meet, and what happened to it last.

Behind an IOMMU it is an I/O virtual address, else a guest physical one; decimal, or 0x and
hexadecimal. If the server is a virtio-iommu, --endpoint says whose address it is, of the devices
behind it: then its domain, what else is attached to that, what is reserved, what clients hold, and
its faults are shown.

The first question has changes of translations recorded from then on, until none was asked for ten
minutes; the latest ten thousand or so are kept.

\b
  guestio explain /tmp/blk.control 0xfffff000
  guestio explain /tmp/iommu.control 0xfffff000 --endpoint 8
"""


class Number(click.ParamType[int]):
    """An integer below 2**64, decimal or with 0x."""

    name = "number"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """See `click.ParamType`."""
        try:
            number = int(str(value), 0)
        except ValueError:
            number = -1
        if not 0 <= number < 2**64:
            self.fail(f"{value!r} is no address: 0 to 2**64 - 1, as 4096 or 0x1000", param, ctx)
        return number


@click.command(help=HELP)
@click.argument("control")
@click.argument("address", type=Number())
@click.option("--length", type=Number(), default=1, show_default=True, help="Bytes, up to 1 MiB.")
@click.option(
    "--endpoint",
    type=Number(),
    metavar="N",
    help="The endpoint of a virtio-iommu whose address it is.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(control: str, address: int, length: int, endpoint: int | None, as_json: bool) -> None:
    """Say what an address leads to; the help text is ``HELP``."""
    client = ControlClient(control, token=os.environ.get("GUESTIO_CONTROL_TOKEN"))
    try:
        found = client.explain(address, length, endpoint=endpoint)
    except GuestioError as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
    click.echo(json.dumps(found, indent=1) if as_json else explanation_text(found))
