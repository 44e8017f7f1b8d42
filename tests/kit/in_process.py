"""A transport in this process: no socket and no messages, only a host that is driven by calls.

It is the least that a transport consists of; see `DeviceHost` for the order of the calls.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

from guestio.addr import IovaRange, Permissions
from guestio.iommu import Iotlb
from guestio.memory import GuestRegionCollection
from guestio.virtio.device import Device
from guestio.virtio.host import DeviceHost
from guestio.virtio.layout import RingLayout
from guestio.virtio.loop import LoopThread
from guestio.virtio.statistics import Statistics
from guestio.virtio.translator import Miss, Page, PhysicalTranslator

PAGE = 4096
RING_FEATURES = 1 << 28 | 1 << 29 | 1 << 32
PLATFORM = 1 << 33
WAIT = 30.0

_T = TypeVar("_T")


class Bell:
    """An eventfd that a queue owns: a `Doorbell`."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


class Tables:
    """An IOMMU: the guest's page tables, and what the device was told of them. A `Translator`.

    Attributes:
        mappings: The guest's tables; they are complete.
        iotlb: What the device knows.
        asked: How often it asked.
    """

    feed = None
    patience = 5.0

    def __init__(self, wire: InProcess) -> None:
        self.mappings, self.iotlb = Iotlb(), Iotlb()
        self.asked = 0
        self._wire = wire
        self._refused: dict[int, set[Page]] = {}
        self._lock = threading.Lock()

    def request(self, waiter: int, missing: Iterable[Miss]) -> None:
        with self._lock:
            for (base, length), access in missing:
                for page in range(base & -PAGE, base + length, PAGE):
                    self.asked += 1
                    found = self.mappings._map.overlapping(page, PAGE)
                    if found and found[0][3] & access == access:
                        start, _, target, perm = found[0]
                        self.iotlb.set_mapping(page, target + page - start, PAGE, perm)
                    else:
                        self.refused(waiter).add((page, access))
        self._wire.host.wake([waiter])

    def refused(self, waiter: int) -> set[Page]:
        return self._refused.setdefault(waiter, set())

    def under_way(self, where: IovaRange, access: int) -> bool:
        return False

    def forget(self, waiter: int) -> None:
        self._refused.pop(waiter, None)

    def report_failed(self, lacking: list[Miss], forbidden: list[Miss]) -> None: ...

    def map(self, iova: int, gpa: int, length: int, perm: Permissions) -> None:
        self.mappings.set_mapping(iova, gpa, length, perm)

    def unmap(self, *ranges: tuple[int, int]) -> None:
        """Take mappings away; nothing uses them any more when this returns."""
        for start, length in ranges:
            self.mappings.invalidate_mapping(start, length)
        self._wire.call(lambda: [self._revoke(*each) for each in ranges])

    def _revoke(self, iova: int, length: int) -> None:
        host = self._wire.host
        # A queue's thread may be looking the same page up.
        with self._lock:
            self.iotlb._map.cut(iova, length)
        if not self.iotlb.drain(iova, length, host.stop_timeout):
            host.give_up(iova, length)
            assert self.iotlb.drain(iova, length, WAIT)


class InProcess:
    """A device's host, and calls in place of messages. A `Transport`."""

    tracked = False

    def __init__(
        self, device: Device, config_changed: Callable[[], None], *, queue_threads: bool = False
    ) -> None:
        self.offered = device.offered_features | RING_FEATURES | PLATFORM
        self.iommu = Tables(self)
        self.closed = False
        self.errors: list[BaseException] = []
        self._memory = GuestRegionCollection()
        self._layouts: dict[int, RingLayout] = {}
        self.config_changed = config_changed
        self._thread = LoopThread("in-process", self.errors.append)
        self.host = DeviceHost(
            device,
            self._thread.loop,
            Statistics(),
            stop_timeout=1.0,
            queue_threads=queue_threads,
            failed=self.errors.append,
        )
        device.attached(self.host)
        self.call(lambda: self.host.connect(self, PhysicalTranslator()))

    def call(self, function: Callable[[], _T]) -> _T:
        """Have a function called in the loop's thread; what it returns."""
        done: Future[_T] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        self._thread.loop.call_soon_threadsafe(run)
        return done.result(WAIT)

    def ring_layout(self, index: int, *, event_idx: bool) -> RingLayout | None:
        return self._layouts.get(index)

    def inflight_notes(self, index: int, size: int) -> None:
        return None

    def set_features(self, features: int) -> None:
        translator = self.iommu if features & PLATFORM else PhysicalTranslator()
        self.call(lambda: self.host.set_features(features))
        self.call(lambda: self.host.set_memory(self._memory, translator))

    def set_memory(self, memory: GuestRegionCollection) -> None:
        self._memory = memory
        self.call(lambda: self.host.set_memory(memory))

    def start(
        self, index: int, layout: RingLayout, base: int, kick: int, call: int, err: int
    ) -> None:
        """Start a queue; the eventfds stay the caller's."""
        queue = self.host.queue(index)
        self._layouts[index] = layout

        def start() -> None:
            self.host.start_over()
            queue.set_base(base)
            queue.set_call(Bell(call))
            queue.set_err(Bell(err))
            queue.set_kick(Bell(kick))
            queue.enable(True)

        self.call(start)

    def stop(self, index: int) -> int:
        return self.call(lambda: self.host.stop(index))

    def set_status(self, status: int) -> None:
        if not status:
            self.call(self.host.reset)
        self.host.status = status

    def close(self) -> None:
        """Let the device go. Calling it again does nothing."""
        if self.closed:
            return
        self.closed = True
        for step in self.call(self.host.disconnect):
            self.call(step)
        self._memory = GuestRegionCollection()
        self.host.close()
        self._thread.close()
        assert not self.errors, self.errors
