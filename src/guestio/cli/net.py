"""``guestio net``: a network card."""

from __future__ import annotations

import logging
import signal

import click

from guestio.cli.server import Server, fail, server_options, vfio_user_help
from guestio.virtio.net import CaptureFile, NetDevice, Port, Responder, TapPort
from guestio.virtio.net.device import MAX_PAIRS
from guestio.virtio.net.features import MAX_MTU, MIN_MTU

log = logging.getLogger("guestio.cli.net")

HELP = """Serve a network card over vhost-user or vfio-user.

It is connected to a tap of the host or to a responder.

The socket is ready when one line on standard error says so. SIGINT, SIGTERM and SIGHUP end the
service with status 0 and remove the socket. SIGUSR1 takes the card's link down, and up again.

A complete QEMU command line for a guest with a virtual IOMMU in front of a card that answers pings
and DHCP by itself (QEMU 11.1):

\b
  guestio net --responder 10.0.2.1/24 --socket /tmp/net.sock &
  qemu-system-x86_64 -machine q35,memory-backend=mem,kernel-irqchip=off -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on \\
    -device virtio-iommu-pci \\
    -chardev socket,id=c0,path=/tmp/net.sock \\
    -netdev vhost-user,chardev=c0,id=n0 \\
    -device virtio-net-pci,netdev=n0,iommu_platform=on,disable-legacy=on,ats=on \\
    -kernel vmlinuz -initrd initrd -append "console=ttyS0"

Guest memory must be shared (share=on). Without an IOMMU leave out the virtio-iommu-pci line and
everything after netdev=n0. With N queue pairs, add queues=N to -netdev, and mq=on to -device. QEMU
shows the guest an address of its own (mac=... at -device), and answers its control commands.
"""
HELP += vfio_user_help("net", "net --responder 10.0.2.1/24", what="the card")


@click.command(help=HELP)
@click.option(
    "--tap",
    metavar="IFNAME",
    help="Connect the card to this tap, which is created if it does not exist, and gone afterwards "
    "then. With several queue pairs an existing one must be multi_queue.",
)
@click.option(
    "--responder",
    metavar="ADDRESS/PREFIX",
    help="Answer ARP, pings, DHCP and UDP echo (port 7) at this IPv4 address, with no network.",
)
@click.option(
    "--pcap",
    metavar="FILE",
    help="Record all frames in a pcapng file. They are moved by Python then, which is slower.",
)
@click.option("--mac", metavar="MAC", help="The card's address; a random one by default.")
@click.option(
    "--mtu",
    type=click.IntRange(MIN_MTU, MAX_MTU),
    metavar="BYTES",
    help="Longest packet that the guest should send, told to its driver.",
)
@click.option(
    "--queue-pairs",
    type=click.IntRange(1, MAX_PAIRS),
    default=1,
    show_default=True,
    metavar="N",
    help="Pairs of a receive and a transmit queue.",
)
@server_options
def net(
    tap: str | None,
    responder: str | None,
    pcap: str | None,
    mac: str | None,
    mtu: int | None,
    queue_pairs: int,
    server: Server,
) -> None:
    """Serve a network card; the help text is ``HELP``."""
    if (tap is None) == (responder is None):
        fail("say either --tap IFNAME or --responder ADDRESS/PREFIX")
    made: list[NetDevice] = []

    def port() -> Port:
        if tap is not None:
            return TapPort(tap, pairs=queue_pairs)
        assert responder is not None
        return Responder(responder, pairs=queue_pairs)

    def make() -> NetDevice:
        capture = None if pcap is None else CaptureFile(pcap)
        device = NetDevice(port(), mac=mac, mtu=mtu, capture=capture)
        made.append(device)
        return device

    def toggle_link() -> None:
        for device in made:
            device.link = not device.link
            log.info("the link is %s", "up" if device.link else "down")

    def report() -> None:
        for device in made:
            log.info("frames: %s", device.statistics())

    server.run(make, "the network card", signals={signal.SIGUSR1: toggle_link}, cleanup=report)
