"""A disk behind a virtio-iommu, and what happens when the guest takes a mapping away.

Everything runs in this process. The guest is a script that does what a kernel's drivers do: it
writes requests into rings in its memory and reads the answers. The host is a virtio-iommu on two
rings, and a block device that sits behind endpoint 8 of it: its ring and its buffers are at
addresses that only the guest's own mappings give a meaning to.

Run it with ``python examples/virtio_iommu.py``.
"""

from __future__ import annotations

import struct
import tempfile

from guestio import GuestRegionCollection
from guestio.virtio.blk import S_OK, T_IN, BlockDevice
from guestio.virtio.driver import DriverQueue
from guestio.virtio.iommu import (
    EndpointQueue,
    FaultRecord,
    IommuQueues,
    Status,
    VirtioIommu,
    wire,
)
from guestio.virtio.layout import RingLayout

DISK = 8  # the endpoint that the disk is
DOMAIN = 1
PAGE = 4096

# Where the guest keeps things in its memory.
IOMMU_REQUESTS, IOMMU_EVENTS, IOMMU_BUFFERS = 0x1000, 0x2000, 0x3000
DISK_RING, DISK_BUFFERS = 0x8000, 0x10000
# Where it lets the disk see them.
RING_IOVA, BUFFERS_IOVA = 0x4000_0000, 0x7000_0000
STATUS = 0x800  # in the page of the ring: the disk can always say that it failed


class Host:
    """The devices, on rings that the guest has set up."""

    def __init__(self, memory: GuestRegionCollection, image: str) -> None:
        self.interrupts: list[int | str] = []
        self.iommu = VirtioIommu(endpoints=[DISK])
        self.iommu_queues = IommuQueues.in_memory(
            self.iommu, memory, layout(IOMMU_REQUESTS), layout(IOMMU_EVENTS), self.interrupts.append
        )
        self.disk = BlockDevice(image)
        self.disk_queue = EndpointQueue(
            self.disk,
            0,
            self.iommu.endpoint(DISK).memory(memory),
            layout(RING_IOVA),
            notify=lambda: self.interrupts.append("disk"),
        )


class Guest:
    """A kernel with a driver for the virtio-iommu and one for the disk."""

    def __init__(self, memory: GuestRegionCollection, host: Host) -> None:
        self.memory = memory
        self.host = host
        self.requests = DriverQueue(memory, layout(IOMMU_REQUESTS))
        self.events = DriverQueue(memory, layout(IOMMU_EVENTS))
        self.disk = DriverQueue(memory, layout(DISK_RING))
        for number in range(4):
            buffer = IOMMU_BUFFERS + 0x100 + number * FaultRecord.SIZE
            self.events.add([], [(buffer, FaultRecord.SIZE)], buffer)
        self.events.publish()

    def ask(self, request: wire.Request) -> None:
        """Send a request to the virtio-iommu and print what became of it."""
        readable = wire.pack(request)
        tail = IOMMU_BUFFERS + 0x80
        self.memory.write(IOMMU_BUFFERS, readable)
        self.requests.add([(IOMMU_BUFFERS, len(readable))], [(tail, wire.TAIL_BYTES)])
        self.requests.publish()
        self.host.iommu_queues.serve()
        self.requests.collect()
        print(f"{request} -> {Status(self.memory.read(tail, 1)[0]).name}")

    def read_sector(self, sector: int) -> None:
        """Read from the disk, by the addresses that the disk may use."""
        header, data = 0, 512
        self.memory.write(DISK_BUFFERS + header, struct.pack("<IIQ", T_IN, 0, sector))
        self.memory.fill(DISK_BUFFERS + data, 512, 0xFF)
        self.memory.write(DISK_RING + STATUS, b"\xff")
        self.disk.add(
            [(BUFFERS_IOVA + header, 16)],
            [(BUFFERS_IOVA + data, 512), (RING_IOVA + STATUS, 1)],
        )
        self.disk.publish()
        self.host.disk_queue.serve()
        self.disk.collect()
        if self.memory.read(DISK_RING + STATUS, 1)[0] == S_OK:
            text = self.memory.read(DISK_BUFFERS + data, 512).rstrip(b"\0").decode()
            print(f"sector {sector}: {text!r}")
        else:
            print(f"sector {sector}: the disk could not reach its memory")

    def take_events(self) -> None:
        """Print what the virtio-iommu reports."""
        self.host.iommu_queues.serve()
        for done in self.events.collect():
            record = FaultRecord(self.memory.read(done.token, done.written))
            print(f"fault: {record!r}")


def layout(base: int) -> RingLayout:
    """A ring of 8 entries in one piece."""
    return RingLayout.contiguous(base, 8)


def map_page(iova: int, gpa: int, flags: int) -> wire.Map:
    """A request to let the disk's domain reach a page."""
    return wire.Map(DOMAIN, iova, iova + PAGE - 1, gpa, flags)


def main() -> None:
    """Set up, read, take away, read again."""
    memory = GuestRegionCollection.from_ranges([(0, 1 << 20)])
    with tempfile.NamedTemporaryFile() as image:
        image.write(b"hello from behind an IOMMU".ljust(512, b"\0") * 8)
        image.flush()
        host = Host(memory, image.name)
        guest = Guest(memory, host)

        guest.ask(wire.Attach(DOMAIN, DISK, flags=0, reserved=bytes(4)))
        guest.ask(map_page(RING_IOVA, DISK_RING, wire.MAP_F_READ | wire.MAP_F_WRITE))
        guest.ask(map_page(BUFFERS_IOVA, DISK_BUFFERS, wire.MAP_F_READ | wire.MAP_F_WRITE))
        guest.read_sector(3)
        guest.take_events()

        guest.ask(wire.Unmap(DOMAIN, BUFFERS_IOVA, BUFFERS_IOVA + PAGE - 1, reserved=bytes(4)))
        guest.read_sector(3)
        guest.take_events()
        print(host.iommu.endpoint(DISK).explain(BUFFERS_IOVA, PAGE))
        host.disk_queue.close()
        host.iommu_queues.close()
        host.disk.close()


if __name__ == "__main__":
    main()
