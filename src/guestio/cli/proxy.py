"""``guestio proxy``: what a front-end and a back-end say to each other, passed on and looked at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from guestio.cli.server import (
    RECORD_OPTIONS,
    SANDBOX_OPTION,
    fault_lines,
    make_sandbox,
    parse_faults,
    run_server,
    start_recording,
)
from guestio.faults.proxy.server import DEVICES, Notifications, Proxy

if TYPE_CHECKING:
    import contextlib

    from guestio.observe import Payload
    from guestio.sandbox import Mode as SandboxMode

HELP = """Pass on what a vhost-user front-end and a back-end say to each other, and look at it.

A front-end (QEMU, for example) connects to the socket of --listen, and is served by the back-end
that listens at --connect, whatever that is:

\b
  guestio blk disk.img --socket /tmp/blk.sock &
  guestio proxy --listen /tmp/proxy.sock --connect /tmp/blk.sock --device blk \\
    --control /tmp/proxy.control &
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=c0,path=/tmp/proxy.sock \\
    -device vhost-user-blk-pci,chardev=c0,num-queues=1 \\
    -kernel vmlinuz -initrd initrd -append "root=/dev/vda"
  guestio top /tmp/proxy.control

Messages and their descriptors pass in both directions; rings and data stay in guest memory, which
the proxy maps as well, to read it alone. With --control it is watched as any server is: what its
tracepoints write are requests and completions, translations and messages.

An ADDON is a Python file with any of these functions, which get what passes; message(m) may change
m.payload, or call m.drop() or m.answer(0):

\b
  def message(m): ...      def request(r): ...
  def completion(c): ...   def fault(f): ...

One front-end is served at a time. When the back-end goes, so does the front-end; the next one waits
up to 5 s for a back-end. SIGINT and SIGTERM end the service with status 0 and remove the socket.
"""


@click.command(help=HELP)
@click.option("--listen", required=True, metavar="PATH", help="Where front-ends connect to.")
@click.option("--connect", required=True, metavar="PATH", help="Where the back-end listens.")
@click.option(
    "--device",
    type=click.Choice(list(DEVICES)),
    help="What the back-end is: names features, and of a disk's requests shows kind and sector.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Cut the connection at the first rule of the protocol, or of a ring, that either side "
    "breaks; otherwise these are logged and counted.",
)
@click.option(
    "--addon",
    "addons",
    multiple=True,
    metavar="FILE",
    help="A Python file that sees, and may change, what passes; may be given several times.",
)
@click.option(
    "--notifications",
    type=click.Choice(["auto", "watch", "between", "relay"]),
    default="auto",
    show_default=True,
    help="watch: look at the same eventfds as the two sides, which hardly costs them time; a "
    "request may be over when it is looked at. between: pass kicks and calls on, so that each "
    "request is seen before the back-end is told of it. relay: the rings as well, so that nothing "
    "passes unseen. auto: watch, unless --strict, --fault or an addon that sees requests needs "
    "between, or --record with --record-payload needs relay.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="RULE",
    help="Have something go wrong on the way, such as 'no-reply op=GET_CONFIG once' or "
    "'skip-interrupt p=0.01'; may be given several times. 'none' is no rule: they may be switched "
    "on at run time. See docs/proxy.md for those that there are.",
)
@click.option(
    "--control",
    metavar="PATH",
    help="Where to listen for questions about the proxy (guestio top, /status, /metrics). Only "
    "this user may connect.",
)
@click.option(
    "--http",
    metavar="HOST:PORT",
    help="The same over TCP, [::1]:8080 for example. What other machines can reach needs a token, "
    "in GUESTIO_CONTROL_TOKEN.",
)
@RECORD_OPTIONS[0]
@RECORD_OPTIONS[1]
@SANDBOX_OPTION
def proxy(
    listen: str,
    connect: str,
    device: str | None,
    strict: bool,
    addons: Sequence[str],
    notifications: Notifications,
    faults: Sequence[str],
    control: str | None,
    http: str | None,
    record: str | None,
    record_payload: Payload,
    sandbox: SandboxMode,
) -> None:
    """Pass on what is said; the help text is ``HELP``."""
    rules = parse_faults(faults)
    if notifications == "auto" and record is not None and record_payload != "none":
        notifications = "relay"

    def open_server(_: contextlib.ExitStack) -> Proxy:
        return Proxy(
            listen,
            connect,
            strict=strict,
            addons=addons,
            faults=rules,
            device=device,
            notifications=notifications,
            control=control,
            http=http,
            http_token=os.environ.get("GUESTIO_CONTROL_TOKEN"),
        )

    def more() -> list[str]:
        return [] if rules is None else fault_lines(rules)

    run_server(
        open_server,
        "the proxy",
        started=lambda made, stack: start_recording(made, stack, record, record_payload),
        more=more,
        faults=rules,
        sandbox=lambda made: make_sandbox(sandbox, made, record),
    )
