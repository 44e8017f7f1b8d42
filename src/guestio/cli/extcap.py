"""``guestio extcap``: live servers as capture interfaces of Wireshark."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from guestio.cli.extras import observing
from guestio.errors import GuestioError

HELP = """Have Wireshark and tshark show what running servers do, as it happens.

--install puts the capture interface and the dissector where the Wireshark of this user looks for
them. After that each control socket that GUESTIO_CONTROL names (paths separated by colons) is an
interface of its own, and "guestio" asks for the path of one:

\b
  guestio extcap --install
  guestio blk disk.img --socket /tmp/blk.sock --control /tmp/blk.control &
  GUESTIO_CONTROL=/tmp/blk.control tshark -i guestio:/tmp/blk.control

The server must run on this machine, as the same user. Wireshark gives the other options.
"""


@click.command(help=HELP)
@click.option("--install", is_flag=True, help="Install for this user, and say where.")
@click.option("--dissector", is_flag=True, help="Print the path of the dissector.")
@click.option("--extcap-interfaces", is_flag=True, help="List the interfaces.")
@click.option("--extcap-dlts", is_flag=True, help="Say what packets an interface has.")
@click.option("--extcap-config", is_flag=True, help="Say which options an interface has.")
@click.option("--extcap-interface", metavar="NAME", help="The interface.")
@click.option("--extcap-version", metavar="VERSION", help="Wireshark's version.")
@click.option("--extcap-capture-filter", metavar="TEXT", help="Not supported: must be empty.")
@click.option("--extcap-reload-option", metavar="TEXT", hidden=True)
@click.option("--capture", is_flag=True, help="Capture, to --fifo.")
@click.option("--fifo", type=click.Path(), help="Where packets go.")
@click.option("--control", type=click.Path(), help="The control socket of the server.")
@click.option(
    "--events",
    type=click.Choice(["all", "requests", "translations", "life"]),
    default="all",
    show_default=True,
    help="Which events.",
)
def extcap(
    install: bool,
    dissector: bool,
    extcap_interfaces: bool,
    extcap_dlts: bool,
    extcap_config: bool,
    extcap_interface: str | None,
    extcap_version: str | None,
    extcap_capture_filter: str | None,
    extcap_reload_option: str | None,
    capture: bool,
    fifo: str | None,
    control: str | None,
    events: str,
) -> None:
    """Speak Wireshark's extcap interface; the help text is ``HELP``."""
    del extcap_version, extcap_reload_option
    with observing():
        from guestio.observe import extcap as interface
        from guestio.observe.pcapng import DISSECTOR

    try:
        if install:
            for path in interface.install():
                click.echo(path)
        elif dissector:
            click.echo(DISSECTOR)
        elif extcap_interfaces:
            click.echo("\n".join(interface.interfaces()))
        elif extcap_dlts:
            click.echo(interface.DLT)
        elif extcap_config:
            click.echo("\n".join(interface.options(extcap_interface or "")))
        elif capture:
            if fifo is None or extcap_interface is None:
                raise click.UsageError("--capture needs --extcap-interface and --fifo")
            if extcap_capture_filter:
                raise click.UsageError("there is no capture filter; use a display filter")
            where = control or interface.control_of(extcap_interface)
            interface.capture(where, Path(fifo), events)
        else:
            raise click.UsageError("say what to do: --install, --dissector, or Wireshark's options")
    except (GuestioError, OSError) as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
