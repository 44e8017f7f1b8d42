"""``guestio console``: a guest's terminal, and named ports."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from guestio.cli.server import Server, fail, server_options, vfio_user_help
from guestio.peer.endpoint import listen_on
from guestio.virtio.console import ConsoleDevice, open_again

HELP = """Serve a console over vhost-user or vfio-user: a guest's terminal, and named ports.

The terminal is that of this command (--stdio, left by typing Ctrl-]), a new pseudoterminal whose
path is printed (--pty), or a client of a Unix socket, one at a time (--listen).
The size of the terminal reaches the guest, and its changes with --stdio.

The socket is ready when one line on standard error says so. SIGINT, SIGTERM and SIGHUP end the
service with status 0 and remove the sockets.

A complete QEMU command line (11.1 or later, which has a front-end for any type of device):

\b
  guestio console --listen /tmp/tty.sock --socket /tmp/console.sock &
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=c0,path=/tmp/console.sock \\
    -device vhost-user-test-device-pci,chardev=c0,\\
virtio-id=3,num_vqs=2,vq_size=64,config_size=12 \\
    -kernel vmlinuz -initrd initrd -append "console=hvc0"
  socat -,raw,echo=0 UNIX-CONNECT:/tmp/tty.sock

Guest memory must be shared (share=on). Behind a virtual IOMMU add "-device virtio-iommu-pci" before
the device, and iommu_platform=on,ats=on to it. With N more ports (--port) num_vqs is 4 + 2 * N.
"""
HELP += vfio_user_help("console", "console --listen /tmp/tty.sock", what="the console")

HANG_UP = 0x1D
"""What ends ``--stdio``: Ctrl-]."""


class _Size(click.ParamType[tuple[int, int]]):
    """Columns and rows, 80x25."""

    name = "COLSxROWS"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """See `click.ParamType.convert`."""
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(value))
        if match is None:
            self.fail(f"{value!r} is no size; say 80x25", param, ctx)
        return int(match[1]), int(match[2])


@click.command(help=HELP)
@click.option("--stdio", is_flag=True, help="Use this terminal, or standard input and output.")
@click.option("--pty", is_flag=True, help="Use a new pseudoterminal and print its path.")
@click.option("--listen", metavar="SOCK", help="Let one client at a time connect to SOCK.")
@click.option(
    "--port",
    "ports",
    multiple=True,
    metavar="NAME=SOCK",
    help="One more port, /dev/virtio-ports/NAME in the guest, for clients of SOCK; may be given "
    "several times.",
)
@click.option(
    "--size",
    type=_Size(),
    metavar="COLSxROWS",
    help="Size of the terminal.  [default: that of --stdio, or 80x25]",
)
@server_options
def console(
    stdio: bool,
    pty: bool,
    listen: str | None,
    ports: Sequence[str],
    size: tuple[int, int] | None,
    server: Server,
) -> None:
    """Serve a console; the help text is ``HELP``."""
    if stdio + pty + (listen is not None) != 1:
        fail("say one of --stdio, --pty and --listen SOCK")
    sockets: dict[str, str] = {}
    for port in ports:
        name, equals, path = port.partition("=")
        if not equals or not path:
            fail(f"--port {port}: say NAME=SOCK")
        if name in sockets:
            fail(f"--port {port}: {name} is given twice")
        sockets[name] = path
    terminal = _Terminal() if stdio else None
    made: list[ConsoleDevice] = []
    listening: list[str] = []
    said: list[str] = []

    def make() -> ConsoleDevice:
        device = ConsoleDevice(sockets, size=size or (terminal and terminal.size()) or (80, 25))
        made.append(device)
        with contextlib.ExitStack() as undo:
            undo.callback(device.close)
            for port, path in zip(device.ports, [listen, *sockets.values()], strict=True):
                if path is not None:
                    port.listen(listen_on(path))
                    listening.append(path)
            if pty:
                said.append(f"console at {device.ports[0].open_pty()}")
            if terminal is not None:
                terminal.attach(device)
            undo.pop_all()
        return device

    def cleanup() -> None:
        if terminal is not None:
            terminal.restore()
        for path in listening:
            Path(path).unlink(missing_ok=True)

    changes: dict[int, Callable[[], object]] = {}
    if terminal is not None and size is None:
        changes[signal.SIGWINCH] = lambda: made[0].resize(*(terminal.size() or (80, 25)))
    server.run(
        make,
        "the console",
        signals=changes,
        cleanup=cleanup,
        more=lambda: said,
        removes=lambda: listening,
    )


class _Terminal:
    """The terminal of the command, or what stands in for it."""

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def size(self) -> tuple[int, int] | None:
        """Columns and rows; None if it is no terminal, or does not know."""
        try:
            size = os.get_terminal_size(0)
        except OSError:
            return None
        return (size.columns, size.lines) if size.columns and size.lines else None

    def attach(self, device: ConsoleDevice) -> None:
        """Connect the console to standard input and output."""
        terminal = os.isatty(0)
        if terminal:
            if os.tcgetpgrp(0) != os.getpgrp():
                raise ValueError("--stdio needs the terminal, and runs in the background")
            self._before = termios.tcgetattr(0)
            _make_raw(0)
        owned = open_again(0, os.O_RDONLY), open_again(1, os.O_WRONLY)
        device.ports[0].attach(
            *owned,
            owned=owned,
            ended=lambda: os.kill(os.getpid(), signal.SIGTERM),
            hang_up=HANG_UP if terminal else None,
        )

    def restore(self) -> None:
        """Leave the terminal as it was."""
        before, self._before = self._before, None
        if before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, before)


def _make_raw(fd: int) -> None:
    """Have every key go to the guest; lines of the log still end as lines do."""
    mode = termios.tcgetattr(fd)
    mode[0] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSANOW, mode)
