"""Devices whose driver writes its ring byte by byte: in this process, or behind a socket.

Everything of the device's side is public: `Device`, `DeviceQueue`, `LocalTransport`, `Backend`.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Iterator
from typing import Any

from guestio.memory import GuestRegionCollection, MmapRegion
from guestio.testing import serving
from guestio.vhost_user import Frontend
from guestio.virtio import Chain, Device, DeviceId
from guestio.virtio.layout import RingLayout
from guestio.virtio.local import LocalTransport
from tests.kit.rings import Desc, HandRing
from tests.kit.serving import WAIT, until

VERSION_1, EVENT_IDX, INDIRECT_DESC = 1 << 32, 1 << 29, 1 << 28


class Holder(Device):
    """Its only queue is its own: nothing is taken from it but by the test."""

    device_id = DeviceId.CONSOLE
    device_queues = (0,)


class Answering(Device):
    """Each request is answered by a function of the test's."""

    device_id = DeviceId.CONSOLE

    def __init__(self, answer: Callable[[Chain], int]) -> None:
        self._answer = answer

    def process(self, queue: int, chain: Chain) -> int:
        return self._answer(chain)


class HandGuest(HandRing):
    """A ring whose driver is the test, with a device behind it.

    Args:
        device: What is served; None for a `Holder`.
        memory: The guest's; None for one region from 0 on.
        room: Bytes of that region.
        size: Entries of the ring.
        desc, avail, used: Where its areas are.
        indirect, event_idx, features: What was negotiated.
        index: Number of the queue.
        options: More arguments for the transport.

    Attributes:
        notified: How often the driver was notified.
        queue: The device's side of the queue.
    """

    def __init__(
        self,
        device: Device | None = None,
        *,
        memory: GuestRegionCollection | None = None,
        room: int = 0x20000,
        size: int = 16,
        desc: int = 0,
        avail: int = 0x200,
        used: int = 0x400,
        indirect: bool = False,
        event_idx: bool = False,
        features: int = 0,
        index: int = 0,
        **options: Any,
    ) -> None:
        self.memory = memory or GuestRegionCollection.from_ranges([(0, room)])
        super().__init__(
            self.memory, size=size, desc=desc, avail=avail, used=used, event_idx=event_idx
        )
        self.notified = 0
        self.transport = LocalTransport(
            device or Holder(),
            self.memory,
            {index: RingLayout(size, desc, avail, used)},
            self._notify,
            features=VERSION_1
            | (INDIRECT_DESC if indirect else 0)
            | (EVENT_IDX if event_idx else 0)
            | features,
            **options,
        )
        self.queue = self.transport.host.queue(index)

    def _notify(self, queue: int) -> None:
        self.notified += 1

    def serve(self) -> None:
        """Have the device look; what the driver broke raises QueueError."""
        while self.transport.serve():
            pass

    def finish(self) -> None:
        """Wait until the device has used everything."""
        until = time.monotonic() + WAIT
        self.serve()
        while self.used_idx != self.offered:
            assert time.monotonic() < until, "the device does not finish"
            select.select([self.transport.fileno()], [], [], self.transport.timeout() or 1.0)
            self.serve()

    def take(self) -> Chain:
        """The next buffer of a `Holder`."""
        chain = self.queue.take()
        if chain is None:
            self.serve()  # says why, if the ring is broken
            raise AssertionError("there is no buffer")
        return chain

    def run(self, chain: Chain, written: int = 0) -> None:
        """Complete a taken buffer, and let the driver be notified."""
        assert self.queue.complete(chain, written)
        self.serve()

    def notifications(self) -> int:
        """How often the driver was notified since the last call."""
        count, self.notified = self.notified, 0
        return count


class Remote(HandRing):
    """A ring of a back-end, with the driver's memory and its side of the connection."""

    def __init__(
        self,
        frontend: Frontend,
        memory: GuestRegionCollection,
        *,
        index: int = 0,
        **options: int,
    ) -> None:
        self.frontend = frontend
        self.index = index
        places = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000, "size": 16, "base": 0} | options
        base = places.pop("base")
        self.layout = RingLayout(**places)
        event_idx = bool(frontend.features & EVENT_IDX)
        super().__init__(memory, base=base, event_idx=event_idx, **places)
        self.handle = frontend.start_queue(index, self.layout, base=base)

    def wait(self) -> None:
        """Announce what was offered, and wait until all of it is used."""
        self.handle.kick()
        until(lambda: self.used_idx == self.offered, "it was not served")

    def run(self, count: int = 1) -> None:
        """Have requests of 8 bytes to read served."""
        for _ in range(count):
            self.put(self.offered % self.size, Desc(0x8000, 8))
            self.offer(self.offered % self.size)
            self.wait()


@contextlib.contextmanager
def remote(
    device: Device, features: int = VERSION_1, room: int = 0x20000, **options: Any
) -> Iterator[tuple[Frontend, GuestRegionCollection]]:
    """A connection to a back-end with these options, and memory that it has."""
    memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, room)])
    with serving(device, **options) as path, Frontend(path, timeout=WAIT) as frontend:
        frontend.negotiate(features)
        frontend.set_memory(memory)
        yield frontend, memory
