"""Cards and consoles hop from one server to another and back, with all that they know.

QEMU takes no console along at all, so what a VMM does is here: memory is copied as the dirty log
tells, all the time, and must be the same once the queues have stopped.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from guestio.virtio.console import PORT_OPEN, RESIZE, ConsoleDevice
from guestio.virtio.net import NetDevice
from guestio.virtio.net.features import ACK_OK, Class, LinkStatus
from tests.kit.console_driver import ConsoleDriver
from tests.kit.migration import Migration
from tests.kit.net_driver import MAC, PEER, Mirror, NetGuest, frame
from tests.kit.serving import WAIT, Driver, until
from tests.vhost_user.test_states_of_devices import ANNOUNCING, NEW_MAC, go_to, stop, two

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOPS = 20


def hop(driver: Driver | NetGuest, path: Path, work: Callable[[], object]) -> None:
    """Do some work while the guest migrates, stop, compare its memory, and go on there."""
    migration = Migration(driver)
    with migration:
        work()
        stopped = stop(driver)
    migration.harvest()
    assert migration.different() == []
    assert migration.logged
    go_to(driver, path, stopped)


class Stream:
    """Bytes that are known wherever one looks."""

    def __init__(self) -> None:
        self.sent = self.seen = 0

    def next(self, count: int) -> bytes:
        self.sent += count
        return self._at(self.sent - count, count)

    def check(self, data: bytes) -> None:
        """These are the bytes after those that were seen before."""
        assert data == self._at(self.seen, len(data))
        self.seen += len(data)

    @staticmethod
    def _at(start: int, count: int) -> bytes:
        first = start // 4
        words = b"".join(struct.pack("<I", first + i) for i in range(count // 4 + 2))
        return words[start % 4 :][:count]


@pytest.mark.parametrize("behind", [False, True], ids=["without an IOMMU", "behind an IOMMU"])
def test_a_console_hops(tmp_path: Path, behind: bool) -> None:
    """What has not been read goes along, in the right order; so do ports that are open."""
    typed, printed = Stream(), Stream()
    outputs: list[bytes] = []
    with (
        two(lambda: ConsoleDevice(("data",)), tmp_path) as (*devices, a, b),
        ConsoleDriver(a, ports=2, iommu=behind, tracked=True) as driver,
    ):
        for device in devices:
            device.ports[1].on_output(outputs.append)
        driver.set_up(2)
        driver.control(1, PORT_OPEN, 1)
        until(lambda: devices[0].ports[1].guest_open)

        def work() -> None:
            port = devices[number % 2].ports[1]
            for size in (1, 700, 4096):
                assert port.send(typed.next(size)) == size
                typed.check(driver.read(4, typed.sent - typed.seen))
                driver.write(5, printed.next(size))
            assert port.send(typed.next(50)) == 50

        for number in range(HOPS):
            hop(driver, (b, a)[number % 2], work)
            told = [driver.told()[:3] for _ in range(2)]
            assert sorted(told) == [(0, RESIZE, 0), (1, PORT_OPEN, 1)]
            assert devices[(number + 1) % 2].ports[1].guest_open
        typed.check(driver.read(4, typed.sent - typed.seen))
        until(lambda: sum(map(len, outputs)) == printed.sent)
        printed.check(b"".join(outputs))


@pytest.mark.parametrize("behind", [False, True], ids=["without an IOMMU", "behind an IOMMU"])
def test_a_card_hops(tmp_path: Path, behind: bool) -> None:
    """Its address goes along, and its driver announces it each time."""
    echoed = 0
    with (
        two(lambda: NetDevice(Mirror(), mac=MAC), tmp_path) as (*_, a, b),
        NetGuest(a, features=ANNOUNCING, iommu=behind, tracked=True) as guest,
    ):
        assert guest.control(Class.MAC, 1, NEW_MAC) == ACK_OK
        guest.post(2048)  # there is always one more than what comes

        def work() -> None:
            nonlocal echoed
            for size in (60, 700, 1514):
                guest.post(*[2048] * 4)
                for _ in range(4):
                    echoed += 1
                    guest.send(frame(size, to=PEER, of=NEW_MAC, seed=echoed))
                for back in range(echoed - 3, echoed + 1):
                    assert guest.receive()[1] == frame(size, to=NEW_MAC, of=PEER, seed=back)

        for number in range(HOPS):
            hop(guest, (b, a)[number % 2], work)
            assert guest.frontend.wait_config_change(WAIT)
            assert guest.frontend.get_config(6, 1)[0] & LinkStatus.ANNOUNCE
            assert guest.control(Class.ANNOUNCE, 0) == ACK_OK
        work()
        assert guest.frontend.get_config(0, 6) == NEW_MAC
