"""``guestio rng``: random bytes."""

from __future__ import annotations

import click

from guestio.cli.server import Server, server_options, vfio_user_help
from guestio.virtio.rng import EntropyDevice

HELP = """Serve random bytes over vhost-user or vfio-user.

The socket is ready when one line on standard error says so. SIGINT, SIGTERM and SIGHUP end the
service with status 0 and remove the socket.

A complete QEMU command line:

\b
  guestio rng --socket /tmp/rng.sock &
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=c0,path=/tmp/rng.sock \\
    -device vhost-user-rng-pci,chardev=c0 \\
    -kernel vmlinuz -initrd initrd -append "console=ttyS0"

Guest memory must be shared (share=on). In a Linux guest, /dev/hwrng is the device (virtio_rng).
Behind a virtual IOMMU use QEMU 11.1 or later with "-device virtio-iommu-pci" and

\b
  -device vhost-user-test-device-pci,chardev=c0,virtio-id=4,num_vqs=1,\\
vq_size=64,iommu_platform=on,ats=on

With a regular file as --source, the guest gets the same bytes each time.
"""
HELP += vfio_user_help("rng", "rng", what="the device")


@click.command(help=HELP)
@click.option(
    "--source",
    type=click.Path(),
    default="/dev/urandom",
    show_default=True,
    metavar="FILE",
    help="Where the bytes come from: a device, a pipe or a file, which begins again at its end.",
)
@server_options
def rng(source: str, server: Server) -> None:
    """Serve random bytes; the help text is ``HELP``."""
    server.run(lambda: EntropyDevice(source), "the entropy device")
