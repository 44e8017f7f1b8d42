"""A driver of a virtio-iommu whose rings are in the memory of this process."""

import select
from itertools import pairwise

import pytest

from guestio import CannotResolveError, GuestRegionCollection
from guestio.virtio.driver import DriverQueue
from guestio.virtio.iommu import FaultRecord, IommuQueues, VirtioIommu
from guestio.virtio.layout import RingLayout
from tests.kit.iommu_driver import MSI, PAGE

RINGS = 0x10000
BUFFERS = 0x20000
SIZE = 16


class Guest:
    """A driver of a virtio-iommu: rings, and buffers cut as one likes."""

    def __init__(self, *, event_idx=False, **settings):
        self.physical = GuestRegionCollection.from_ranges([(0, 0x100000)])
        settings = {"endpoints": [8, 9], "revoke_after": None, "reserved": [MSI], **settings}
        self.iommu = VirtioIommu(**settings)
        self.notified = []
        self.interrupt = self.notified.append
        layouts = [RingLayout.contiguous(RINGS + number * PAGE, SIZE) for number in range(2)]
        self.driver = [
            DriverQueue(self.physical, layout, event_idx=event_idx) for layout in layouts
        ]
        self.queues = IommuQueues.in_memory(
            self.iommu,
            self.physical,
            *layouts,
            lambda queue: self.interrupt(queue),
            event_idx=event_idx,
        )
        self.next = BUFFERS

    def place(self, length):
        addr, self.next = self.next, self.next + length + 64
        return addr

    def send(self, request, room=4, *, cuts=(), room_cuts=()):
        """Make a request available, its buffers cut at these offsets."""
        addr, answer = self.place(len(request)), self.place(room)
        self.physical.write(addr, request)
        self.physical.fill(answer, room, 0xEE)
        self.driver[0].add(
            pieces(addr, len(request), cuts), pieces(answer, room, room_cuts), (answer, room)
        )
        self.driver[0].publish()

    def answers(self):
        return [
            (self.physical.read(token[0], done.written), done.written)
            for done in self.driver[0].collect()
            for token in [done.token]
        ]

    def add_event_buffer(self, length=FaultRecord.SIZE):
        addr = self.place(length)
        self.driver[1].add([], [(addr, length)], addr)
        self.driver[1].publish()

    def events(self):
        return [self.physical.read(done.token, done.written) for done in self.driver[1].collect()]

    def wakes(self):
        return bool(select.select([self.queues], [], [], 0)[0])

    def fault(self, iova=0x5000):
        with pytest.raises(CannotResolveError):
            self.iommu.endpoint(8).memory(self.physical).read(iova, 1)


def pieces(addr, length, cuts):
    edges = pairwise([0, *cuts, length])
    return [(addr + start, end - start) for start, end in edges if end > start]
