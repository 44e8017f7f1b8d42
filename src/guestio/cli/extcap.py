"""``guestio extcap``: live servers as capture interfaces of Wireshark."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

import click

from guestio.cli.extras import observing
from guestio.errors import DeviceError, GuestioError

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


NAME: Final = "guestio"
"""The interface that asks for a control socket; others are ``guestio:PATH``."""

ENVIRONMENT: Final = "GUESTIO_CONTROL"
"""Names control sockets, separated by colons."""

DLT: Final = "dlt {number=147}{name=USER0}{display=guestio events}"

_VERSION: Final = "1.0"


# Wireshark asks these each time it starts, so they load nothing of recordings.
def interfaces() -> list[str]:
    """Sentences that name the interfaces: one for each known control socket, and one for any."""
    known = [
        f"interface {{value={NAME}:{path}}}{{display=guestio server at {path}}}"
        for path in os.environ.get(ENVIRONMENT, "").split(":")
        if re.fullmatch(r"[^{}\s]+", path)
    ]
    return [
        f"extcap {{version={_VERSION}}}{{display=guestio}}",
        *known,
        f"interface {{value={NAME}}}{{display=guestio server}}",
    ]


def control_of(interface: str) -> str:
    """The control socket that an interface names.

    Raises:
        DeviceError: It names none.
    """
    name, _, path = interface.partition(":")
    if name != NAME or not path:
        raise DeviceError(
            f"the interface {interface!r} names no control socket: set its option, in tshark with "
            f"-o extcap.{NAME}.control:PATH"
        )
    return path


def options(interface: str) -> list[str]:
    """Sentences that describe the options of an interface."""
    found = []
    if interface == NAME:
        found.append(
            "arg {number=0}{call=--control}{display=Control socket}{type=string}{required=true}"
            "{tooltip=The path that was given to a server as --control}"
        )
    found.append(
        "arg {number=1}{call=--events}{display=Events}{type=selector}{default=all}"
        "{tooltip=Which events are captured}"
    )
    for name, text in (
        ("all", "Everything"),
        ("requests", "What becomes of requests"),
        ("translations", "IOTLB and DMA mappings"),
        ("life", "Connections, messages, memory, errors"),
    ):
        chosen = "true" if name == "all" else "false"
        found.append(f"value {{arg=1}}{{value={name}}}{{display={text}}}{{default={chosen}}}")
    return found


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
    try:
        if install or dissector:
            with observing():
                from guestio.observe.extcap import install as install_all
                from guestio.observe.pcapng import DISSECTOR
            for path in install_all() if install else (DISSECTOR,):
                click.echo(path)
        elif extcap_interfaces:
            click.echo("\n".join(interfaces()))
        elif extcap_dlts:
            click.echo(DLT)
        elif extcap_config:
            click.echo("\n".join(options(extcap_interface or "")))
        elif capture:
            if fifo is None or extcap_interface is None:
                raise click.UsageError("--capture needs --extcap-interface and --fifo")
            if extcap_capture_filter:
                raise click.UsageError("there is no capture filter; use a display filter")
            where = control or control_of(extcap_interface)
            with observing():
                from guestio.observe.extcap import capture as capture_from
            capture_from(where, Path(fifo), events)
        else:
            raise click.UsageError("say what to do: --install, --dissector, or Wireshark's options")
    except (GuestioError, OSError) as error:
        click.echo(f"guestio: {error}", err=True)
        sys.exit(1)
