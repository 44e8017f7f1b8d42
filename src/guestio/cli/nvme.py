"""``guestio nvme``: images as the namespaces of an NVMe controller."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence

import click

from guestio.budgets import NVME_QUEUES
from guestio.cli.server import Server, pci_server_options
from guestio.errors import GuestioError
from guestio.pci.nvme.controller import (
    IO_QUEUES,
    IO_THREADS,
    MAX_IO_THREADS,
    NvmeController,
)

_log = logging.getLogger("guestio.cli.nvme")

HELP = """Serve IMAGE as namespace 1 of an NVMe controller, over vfio-user.

The socket is ready when one line on standard error says so. One client (QEMU 10.1 or newer) is
served at a time; when it goes away the next one may come. SIGINT and SIGTERM end the service with
status 0 and remove the socket. SIGHUP has it look at the sizes of the images again, which a running
guest then sees.

A complete QEMU command line for a guest with a virtual IOMMU in front of the disk:

\b
  guestio nvme disk.img --socket /tmp/nvme.sock &
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -device virtio-iommu-pci \\
    -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/nvme.sock"}}' \\
    -kernel vmlinuz -initrd initrd -append "root=/dev/nvme0n1"

Only the JSON form of -device works. Guest memory must be shared (share=on). Without an IOMMU leave
out the virtio-iommu-pci line. With intel-iommu, boot with intel_iommu=on and use

\b
  -device intel-iommu,intremap=off,caching-mode=on
"""


@click.command(help=HELP)
@click.argument("image", type=click.Path())
@click.option(
    "--namespace",
    "namespaces",
    multiple=True,
    type=click.Path(),
    metavar="IMAGE",
    help="One more namespace; may be given several times.",
)
@click.option(
    "--block-size",
    type=click.Choice(["512", "4096"]),
    default="512",
    show_default=True,
    help="Bytes of a block; each image is a multiple of it.",
)
@click.option("--read-only", is_flag=True, help="Refuse writes; the images may be read-only.")
@click.option(
    "--queues",
    type=click.IntRange(1, NVME_QUEUES),
    default=IO_QUEUES,
    show_default=True,
    metavar="N",
    help="I/O queue pairs offered; Linux takes one for each processor.",
)
@click.option(
    "--interrupts",
    type=click.Choice(["msix", "msi"]),
    default="msix",
    show_default=True,
    help="Interrupts offered, besides INTA. Hot-unplugging a device with MSI-X aborts QEMU 11.1; "
    "with MSI it works.",
)
@click.option(
    "--io-threads",
    type=click.IntRange(0, MAX_IO_THREADS),
    default=IO_THREADS,
    show_default=True,
    metavar="N",
    help="Threads that wait for the disk: for reads of what is not in the page cache, flushes and "
    "the like. 0: reads wait where they are fetched, and there is one thread for the others.",
)
@click.option("--serial", metavar="TEXT", help="Serial number, up to 20 ASCII characters.")
@pci_server_options
def nvme(
    image: str,
    namespaces: Sequence[str],
    block_size: str,
    read_only: bool,
    queues: int,
    interrupts: str,
    io_threads: int,
    serial: str | None,
    server: Server,
) -> None:
    """Serve images; the help text is ``HELP``."""
    made: list[NvmeController] = []

    def make() -> NvmeController:
        device = NvmeController(
            image,
            namespaces=namespaces,
            block_size=int(block_size),
            read_only=read_only,
            serial=serial,
            queues=queues,
            interrupts=interrupts,
            io_threads=io_threads,
        )
        made.append(device)
        return device

    def hang_up() -> None:
        for device in made:
            try:
                device.update_size()
            except GuestioError as error:
                _log.error("%s; the namespace keeps its size", error)

    server.run(make, "the NVMe controller", signals={signal.SIGHUP: hang_up})
