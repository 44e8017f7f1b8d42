"""``guestio inspect``: what a server is doing, in the browser."""

from __future__ import annotations

import os
import sys
import webbrowser

import click

from guestio.errors import DeviceError, GuestioError

HELP = """Show what the server with the control socket CONTROL is doing, as a web page.

CONTROL is the path that was given to a server as --control, or http://HOST:PORT.

\b
  guestio blk disk.img --socket /tmp/blk.sock --control /tmp/blk.control &
  guestio inspect /tmp/blk.control --open

The page is served on 127.0.0.1 until Ctrl-C, to those who have the token in its address, which is
printed. It needs no network. A server whose token is in GUESTIO_CONTROL_TOKEN is asked with it; one
that ends and comes again at CONTROL is found again.
"""


@click.command(help=HELP)
@click.argument("control")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default="any free one",
    help="Port on 127.0.0.1.",
)
@click.option("--open", "open_", is_flag=True, help="Open the page in the default browser.")
def inspect(control: str, port: int, open_: bool) -> None:
    """Show what a server is doing; the help text is ``HELP``."""
    try:
        try:
            from guestio.control.relay import Relay
        except ImportError as error:
            raise DeviceError(
                f"the inspector needs the extra 'control' (pip install 'guestio[control]'): {error}"
            ) from None
        relay = Relay(control, token=os.environ.get("GUESTIO_CONTROL_TOKEN"), port=port)
    except GuestioError as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)

    def ready() -> None:
        click.echo(relay.url)
        if open_:
            webbrowser.open(relay.url)

    try:
        relay.run(ready)
    finally:
        relay.close()
