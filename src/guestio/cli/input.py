"""``guestio input``: a keyboard, a pointer or a tablet."""

from __future__ import annotations

from typing import IO, Literal

import click

from guestio.cli.server import Server, server_options, vfio_user_help
from guestio.virtio.input import InputDevice

HELP = """Serve a keyboard, a pointer (mouse) or a tablet over vhost-user or vfio-user.

Its events come from a script. The clock of a script starts when a guest's driver first takes
events. A line is a time in seconds (+ counts from the line before) and the events of one report,
with the names of linux/input-event-codes.h; a key without a value is pressed and released:

\b
  1.0  KEY_H
  +0.1 KEY_I
  +0.1 KEY_LEFTSHIFT 1         # goes down
  +0   KEY_1
  +0   KEY_LEFTSHIFT 0         # goes up
  2.5  REL_X 10 REL_Y -5       # of a pointer
  3    ABS_X 16000 ABS_Y 9000  # of a tablet, 0 to 32767

The socket is ready when one line on standard error says so. SIGINT, SIGTERM and SIGHUP end the
service with status 0 and remove the socket.

A complete QEMU command line:

\b
  guestio input keyboard --script keys.txt --socket /tmp/input.sock &
  qemu-system-x86_64 -machine q35,memory-backend=mem -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -chardev socket,id=c0,path=/tmp/input.sock \\
    -device vhost-user-input-pci,chardev=c0 \\
    -kernel vmlinuz -initrd initrd -append "console=ttyS0"

Guest memory must be shared (share=on). In a Linux guest the device is /dev/input/eventN
(virtio_input). Behind a virtual IOMMU use QEMU 11.1 or later with "-device virtio-iommu-pci" and

\b
  -device vhost-user-test-device-pci,chardev=c0,virtio-id=18,num_vqs=2,\\
vq_size=64,config_size=136,iommu_platform=on,ats=on
"""
HELP += vfio_user_help("input", "input keyboard --script keys.txt", what="the device")


@click.command("input", help=HELP)
@click.argument("kind", type=click.Choice(["keyboard", "pointer", "tablet"]))
@click.option(
    "--script",
    type=click.File(),
    metavar="FILE",
    help="What happens and when; - is standard input.",
)
@click.option("--name", metavar="TEXT", help="What the guest calls the device.")
@click.option("--serial", default="", metavar="TEXT", help="Its serial number.")
@server_options
def input_(
    kind: Literal["keyboard", "pointer", "tablet"],
    script: IO[str] | None,
    name: str | None,
    serial: str,
    server: Server,
) -> None:
    """Serve an input device; the help text is ``HELP``."""

    def make() -> InputDevice:
        made = {
            "keyboard": InputDevice.keyboard,
            "pointer": InputDevice.pointer,
            "tablet": InputDevice.tablet,
        }[kind]
        device = made(f"guestio {kind}" if name is None else name, serial=serial)
        if script is not None:
            try:
                device.play(device.parse_script(script.read()))
            except ValueError as error:
                raise ValueError(f"{script.name}: {error}") from None
        return device

    server.run(make, f"the {kind}")
