"""A back-end is killed amid requests; the next one goes on with what the region says."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import pytest

from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user import Frontend
from guestio.vhost_user.frontend import PROTOCOL_FEATURES
from guestio.vhost_user.messages import ProtocolFeature
from guestio.virtio.layout import RingLayout
from tests.kit.peer import nothing_left
from tests.kit.rings import PAGE, WRITE, Desc, HandRing
from tests.kit.serving import OK, VERSION_1, WAIT, Mirror, Serving, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 16
DESC, AVAIL, USED, BUFFERS = 0x1000, 0x2000, 0x3000, 0x10000
TRACKING = int(PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD)

# Serves what it is asked to serve, and keeps the rest in flight for ever.
MORTAL = """
import sys
from concurrent.futures import Future
from guestio.vhost_user import Backend
from guestio.virtio.device import Device

class Mortal(Device):
    device_id = 4

    def process(self, queue, chain):
        if chain.readable.read().startswith(b"keep"):
            return Future()
        chain.writable.write(bytes(chain.writable.total - 1) + b"\\x55")
        return chain.writable.total

with Backend(Mortal(), sys.argv[1]) as backend:
    backend.serve()
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield


class Guest:
    """Memory with one ring in it, which stays when back-ends come and go."""

    def __init__(self) -> None:
        self.backing = Backing.memfd(1 << 20)
        self.memory = GuestRegionCollection.from_regions([MmapRegion(0, self.backing)])
        self.ring = HandRing(self.memory, size=SIZE, desc=DESC, avail=AVAIL, used=USED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self.ring, self.memory
        self.backing.close()

    def submit(self, word: bytes) -> None:
        """Make a request available: a word to read, and a byte for the status."""
        number = self.ring.offered
        place = BUFFERS + 2 * PAGE * number
        self.memory.write(place, word)
        request = Desc(place, len(word)), Desc(place + PAGE, 1, WRITE)
        self.ring.offer(self.ring.put_chain(2 * number % SIZE, *request))

    def status(self, number: int) -> int:
        """The byte that the device wrote for a request."""
        return self.memory.read(BUFFERS + 2 * PAGE * number + PAGE, 1)[0]

    def used(self) -> list[int]:
        """Heads of the used ring, in order."""
        return [self.ring.used_entry(number)[0] for number in range(self.ring.used_idx)]

    @contextmanager
    def connected(self, path: Path) -> Iterator[Frontend]:
        """A front-end that shares the memory and tracks requests in flight."""
        with Frontend(str(path), timeout=WAIT, connect_wait=WAIT) as made:
            made.negotiate(VERSION_1, TRACKING)
            made.set_memory(self.memory)
            try:
                yield made
            finally:
                made.iotlb.memory = None


LAYOUT = RingLayout(SIZE, DESC, AVAIL, USED)


@contextmanager
def killed(
    guest: Guest, path: Path, *words: bytes, shown: int
) -> Iterator[Callable[[Frontend], None]]:
    """Have a back-end take requests and kill it; what gives its region to another one."""
    process = subprocess.Popen([sys.executable, "-c", MORTAL, str(path)])
    fd = -1
    try:
        with guest.connected(path) as frontend:
            region, fd = frontend.get_inflight(1, SIZE)
            frontend.set_inflight(region, fd)
            queue = frontend.start_queue(0, LAYOUT)
            for word in words:
                guest.submit(word)
            queue.kick()
            until(lambda: guest.ring.used_idx == shown)
            left = len(words) - shown
            until(lambda: sum(os.pread(fd, 16 * SIZE, 16)[::16]) == left)
            process.kill()
            process.wait(WAIT)
        yield lambda frontend: frontend.set_inflight(region, fd)
    finally:
        process.kill()
        process.wait()
        if fd >= 0:
            os.close(fd)


def test_requests_in_flight_are_done_by_the_next_one(tmp_path: Path) -> None:
    """Those, in order, and no others; they are not announced again."""
    device = Mirror(1)
    words = [b"keep0", b"done1", b"keep2", b"done3", b"keep4"]
    with Guest() as guest, killed(guest, tmp_path / "s", *words, shown=2) as hand_over:
        assert guest.used() == [2, 6]
        guest.submit(b"new5")
        with Serving(device, tmp_path / "s"), guest.connected(tmp_path / "s") as frontend:
            hand_over(frontend)
            frontend.start_queue(0, LAYOUT, base=guest.ring.used_idx)
            until(lambda: guest.ring.used_idx == 6)
            assert guest.used() == [2, 6, 0, 4, 8, 10]
            assert [word for _, word in device.seen] == [b"keep0", b"keep2", b"keep4", b"new5"]
            assert [guest.status(number) for number in range(6)] == [OK] * 6
            assert frontend.stop_queue(0) == 6


def test_the_driver_is_told_what_its_last_back_end_may_have_kept_to_itself(tmp_path: Path) -> None:
    """It may have been killed after it stored the used index and before it notified the driver."""
    with (
        Guest() as guest,
        killed(guest, tmp_path / "s", b"done0", shown=1) as hand_over,
        Serving(Mirror(1), tmp_path / "s"),
        guest.connected(tmp_path / "s") as frontend,
    ):
        hand_over(frontend)
        queue = frontend.start_queue(0, LAYOUT, base=guest.ring.used_idx)
        assert queue.wait_call(WAIT)
