"""``guestio blk``: an image as a disk."""

from __future__ import annotations

import logging
import os
import select
import signal
from typing import Literal

import click

from guestio.cli.server import Server, num_queues_option, server_options, vfio_user_help
from guestio.errors import GuestioError
from guestio.virtio.blk import IO_THREADS, MAX_IO_THREADS, BlockDevice

_log = logging.getLogger("guestio.cli.blk")

HELP = """Serve IMAGE as a disk over vhost-user or vfio-user.

The socket is ready when one line on standard error says so. One front-end is served at a time;
when it goes away the next one may come. SIGINT and SIGTERM end the service with status 0 and remove
the socket. SIGHUP has it look at the size of IMAGE again, which a running guest then sees:

\b
  truncate --size +1G disk.img && kill -HUP PID

It ends the service as well if its terminal was closed.

A complete QEMU command line for a guest with a virtual IOMMU in front of the disk:

\b
  guestio blk disk.img --socket /tmp/blk.sock &
  qemu-system-x86_64 -machine q35,memory-backend=mem,kernel-irqchip=off -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -device virtio-iommu-pci \\
    -chardev socket,id=c0,path=/tmp/blk.sock \\
    -device vhost-user-blk-pci,chardev=c0,num-queues=1,\\
iommu_platform=on,disable-legacy=on,ats=on \\
    -kernel vmlinuz -initrd initrd -append "root=/dev/vda"

Guest memory must be shared (share=on). Without an IOMMU leave out the virtio-iommu-pci line and
everything after num-queues. With intel-iommu, boot with intel_iommu=on, put the disk below a port
("-device pcie-root-port,id=port0" and bus=port0), and use

\b
  -device intel-iommu,intremap=off,device-iotlb=on
"""
HELP += vfio_user_help("blk", "blk disk.img", what="the disk")


@click.command(help=HELP)
@click.argument("image", type=click.Path())
@click.option("--read-only", is_flag=True, help="Refuse writes; the image may be read-only.")
@num_queues_option(1, "Request queues offered.")
@click.option(
    "--io-threads",
    type=click.IntRange(0, MAX_IO_THREADS),
    default=IO_THREADS,
    show_default=True,
    metavar="N",
    help="Threads that wait for the disk: for reads of what is not in the page cache, flushes and "
    "discards. Other requests are served meanwhile. 0: every request waits for each, which takes "
    "least CPU time. Cached reads, and writes, never need them.",
)
@click.option(
    "--migration",
    type=click.Choice(["hosts", "local"]),
    default="hosts",
    show_default=True,
    help="Where a guest goes when it migrates. hosts: what was acknowledged is on the medium "
    "(fdatasync) when the last queue has stopped. local: to another process on this host, with the "
    "same page cache; a stop is faster then.",
)
@click.option("--serial", metavar="TEXT", help="Serial number, up to 20 ASCII characters.")
@server_options
def blk(
    image: str,
    read_only: bool,
    num_queues: int,
    io_threads: int,
    migration: Literal["hosts", "local"],
    serial: str | None,
    server: Server,
) -> None:
    """Serve an image; the help text is ``HELP``."""
    made: list[BlockDevice] = []

    def make() -> BlockDevice:
        device = BlockDevice(
            image,
            read_only=read_only,
            num_queues=num_queues,
            serial=serial,
            io_threads=io_threads,
            migration=migration,
        )
        made.append(device)
        return device

    terminal = _open_terminal()

    def hang_up() -> None:
        if terminal is not None and _is_gone(terminal):
            os.kill(os.getpid(), signal.SIGTERM)
        for device in made:
            try:
                device.update_size()
            except GuestioError as error:
                _log.error("%s; the disk keeps its size", error)

    server.run(make, "the disk", signals={signal.SIGHUP: hang_up})


def _open_terminal() -> int | None:
    """The terminal that controls this process, whose end is announced by SIGHUP too; None without.

    It stays open: the sandbox lets nothing be opened later.
    """
    try:
        return os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None


def _is_gone(terminal: int) -> bool:
    """Whether a terminal has been closed."""
    look = select.poll()
    look.register(terminal, 0)
    return any(events & select.POLLHUP for _, events in look.poll(0))
