"""A card on a real tap; each in a network namespace's worth of interfaces of its own names."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from guestio.errors import DeviceError
from guestio.virtio.net import CaptureFile, NetDevice, TapPort
from guestio.virtio.net.features import Net
from tests.kit.net_driver import MAC, MODERN, PEER, NetGuest, can_make_taps, frame
from tests.kit.serving import Serving, until

pytestmark = pytest.mark.skipif(
    not can_make_taps(), reason="it takes CAP_NET_ADMIN, /dev/net/tun and iproute2"
)

_numbers = itertools.count()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def name() -> Iterator[str]:
    """A name of an interface; it is gone afterwards."""
    made = f"gt{os.getpid() % 100000}-{next(_numbers)}"
    yield made
    subprocess.run(["ip", "link", "delete", made], check=False, capture_output=True)


def silence(name: str) -> None:
    """Have IPv6 send nothing on an interface."""
    with contextlib.suppress(FileNotFoundError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")


class Host:
    """The host's side of a tap that is up, below its protocols."""

    def __init__(self, name: str) -> None:
        # No packet of the host's own comes in between.
        silence(name)
        ip("link", "set", name, "arp", "off", "up")
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
        self._socket.bind((name, 0x88B5))
        self._socket.settimeout(10)

    def send(self, data: bytes) -> None:
        self._socket.send(data)

    def receive(self) -> bytes:
        while True:
            data, address = self._socket.recvfrom(1 << 17)
            if address[2] != socket.PACKET_OUTGOING:
                return data

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("captured", [False, True])
def test_frames_pass_a_tap(name: str, tmp_path: Path, captured: bool) -> None:
    capture = CaptureFile(tmp_path / "capture") if captured else None
    device = NetDevice(TapPort(name), mac=MAC, capture=capture)
    host = Host(name)
    with Serving(device, tmp_path / "net") as serving, NetGuest(serving.path) as guest:
        guest.post(*[600] * 40)
        for size in (14, 60, 1514):
            guest.send(frame(size, to=PEER, of=MAC))
            assert host.receive() == frame(size, to=PEER, of=MAC)
            host.send(frame(size))
            header, data = guest.receive()
            assert data == frame(size)
            assert header == bytes(10) + bytes([-(-(size + 12) // 600), 0])
        sent = [frame(100 + i, seed=i) for i in range(30)]
        for one in sent:
            host.send(one)
        assert [guest.receive()[1] for _ in sent] == sent
        assert device.statistics().receive_dropped == 0
    host.close()
    device.close()
    assert not Path("/sys/class/net", name).exists()


def test_offloads_follow_what_the_driver_takes(name: str, tmp_path: Path) -> None:
    """The kernel hands a checksum over to be completed only to a driver that said it can."""
    device = NetDevice(TapPort(name), mac=MAC)
    wanted = Net.CSUM | Net.GUEST_CSUM | Net.GUEST_TSO4 | Net.HOST_TSO4
    assert device.features & wanted == wanted
    ip("addr", "add", "10.93.9.1/24", "dev", name)
    silence(name)
    ip("link", "set", name, "up")
    ip("neigh", "add", "10.93.9.2", "lladdr", MAC.hex(":"), "dev", name)
    with Serving(device, tmp_path / "net") as serving:
        for features, unfinished in ((MODERN, False), (MODERN | wanted, True), (MODERN, False)):
            with NetGuest(serving.path, features=int(features)) as guest:
                guest.post(*[2000] * 30)
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                    sender.sendto(b"hello", ("10.93.9.2", 4242))
                while True:
                    header, data = guest.receive()
                    if data[36:38] == struct.pack(">H", 4242):
                        break
                flags, start, offset = header[0], *struct.unpack_from("<HH", header, 6)
                if unfinished:
                    assert (flags & 1, start, offset) == (1, 34, 6)
                else:
                    assert header[:10] == bytes(10)
            serving.let_go()
    device.close()


def test_a_checksum_that_the_driver_leaves_is_completed(name: str, tmp_path: Path) -> None:
    device = NetDevice(TapPort(name), mac=MAC)
    ip("addr", "add", "10.93.9.1/24", "dev", name)
    ip("link", "set", name, "up")
    packet = struct.pack(">BBHHHBBH", 0x45, 0, 33, 0, 0, 64, 17, 0) + bytes([10, 93, 9, 2])
    packet += bytes([10, 93, 9, 1])
    total = sum(struct.unpack(">10H", packet))
    total = (total & 0xFFFF) + (total >> 16)
    packet = packet[:10] + struct.pack(">H", ~total & 0xFFFF) + packet[12:]
    # The sum of the pseudo header stands where the whole one is to be.
    pseudo = 2 * ((10 << 8) + 93) + (9 << 8 | 2) + (9 << 8 | 1) + 17 + 13
    datagram = struct.pack(">HHHH", 1000, 4243, 13, pseudo) + b"hello"
    interface = Path("/sys/class/net", name, "address").read_text().strip()
    data = bytes.fromhex(interface.replace(":", "")) + MAC + b"\x08\0" + packet + datagram
    header = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        Serving(device, tmp_path / "net") as serving,
    ):
        receiver.bind(("10.93.9.1", 4243))
        receiver.settimeout(10)
        features = int(MODERN | Net.CSUM | Net.GUEST_CSUM)
        with NetGuest(serving.path, features=features) as guest:
            guest.send(data, header=header)
            assert receiver.recv(100) == b"hello"
    device.close()


def arrived(guest: NetGuest, pairs: int, came: set[int]) -> bool:
    """Whether frames of 30 lengths have come in all."""
    for pair in range(pairs):
        came.update(written for _, written in guest.queues[2 * pair].collect())
    return len(came) == 30


def test_queues_of_a_tap_are_those_that_the_driver_uses(name: str, tmp_path: Path) -> None:
    device = NetDevice(TapPort(name, pairs=3), mac=MAC)
    host = Host(name)
    features = int(MODERN | Net.MQ | Net.MRG_RXBUF)
    with Serving(device, tmp_path / "net") as serving:
        for used in (2, 1, 3):
            with NetGuest(serving.path, pairs=3, used_pairs=used, features=features) as guest:
                for pair in range(used):
                    guest.post(*[200] * 40, pair=pair)
                    guest.send(frame(to=PEER, of=MAC, seed=pair), pair)
                    assert host.receive() == frame(to=PEER, of=MAC, seed=pair)
                # Frames of many flows are spread over those queues, and none is lost.
                for i in range(30):
                    host.send(frame(60 + i, of=bytes([2, 0, 0, 0, 0, i])))
                until(partial(arrived, guest, used, set()))
            serving.let_go()
    host.close()
    device.close()


def test_a_tap_that_vanishes_takes_the_link_down(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = NetDevice(TapPort(name), mac=MAC)
    host = Host(name)
    with Serving(device, tmp_path / "net") as serving, NetGuest(serving.path) as guest:
        guest.post(*[200] * 4)
        host.send(frame())
        guest.receive()
        seen = guest.frontend.config_changes
        ip("link", "delete", name)
        assert guest.frontend.wait_config_change(10, seen=seen)
        assert not device.link
        guest.send(frame(to=PEER))
        assert device.statistics().send_dropped == 1
    assert f"tap {name}: reading failed" in caplog.text
    host.close()
    device.close()


def test_a_tap_that_is_down_loses_frames_and_comes_back(name: str, tmp_path: Path) -> None:
    device = NetDevice(TapPort(name), mac=MAC)
    host = Host(name)
    with Serving(device, tmp_path / "net") as serving, NetGuest(serving.path) as guest:
        guest.post(*[200] * 4)
        ip("link", "set", name, "down")
        guest.send(frame(to=PEER))
        assert device.statistics().send_dropped == 1
        ip("link", "set", name, "up")
        host.close()
        host = Host(name)
        guest.send(frame(90, to=PEER, of=MAC))
        assert host.receive() == frame(90, to=PEER, of=MAC)
        host.send(frame(91))
        assert guest.receive()[1] == frame(91)
        assert device.link
    host.close()
    device.close()


def test_taps_that_cannot_be_opened_are_named(name: str) -> None:
    for wrong in ("", "x" * 16, "a/b", "a\0b"):
        with pytest.raises(DeviceError, match="no name of an interface"):
            TapPort(wrong)
    with pytest.raises(DeviceError, match="cannot open the tap lo"):
        TapPort("lo")
    first = TapPort(name)
    with pytest.raises(DeviceError, match=f"{name}: .*(another process|multi_queue)"):
        TapPort(name)
    with pytest.raises(DeviceError, match="multi_queue"):
        TapPort(name, pairs=2)
    first.close()
    first.close()
