"""The walk of a ring that its driver fills with anything, with and without an IOMMU.

Whatever the driver does, memory changes only where it lent it: in the used ring and in buffers
that it gave for writing, and behind an IOMMU only in pages that are mapped for writing.
"""

from __future__ import annotations

import functools
import os
import struct

import numpy as np

from guestio import GuestioError, GuestRegionCollection, Iotlb, MmapRegion, Permissions
from guestio._core.iommu.address_space import AddressSpace
from guestio.virtio import SplitRing
from guestio.virtio.blk import BlockDevice
from tests.fuzz.choices import Choices
from tests.virtio import test_ring_fuzz as garbage

SIZE, DESC, AVAIL, USED = garbage.SIZE, garbage.DESC, garbage.AVAIL, garbage.USED
BUFFERS, TABLE, MEMORY = garbage.BUFFERS, garbage.TABLE, garbage.MEMORY
PAGE = 4096
MAX_STEPS = 40
HEADER, DATA, STATUS = BUFFERS, BUFFERS + 0x1000, BUFFERS + 0x3000
"""A request's header, data and status, where it is a good one."""


@functools.cache
def parts() -> tuple[BlockDevice, GuestRegionCollection]:
    """A disk and memory, for all runs."""
    image = os.memfd_create("disk")
    os.write(image, bytes(range(256)) * 256)
    device = BlockDevice(f"/proc/self/fd/{image}")
    return device, GuestRegionCollection.from_regions([MmapRegion.anonymous(0, MEMORY)])


class Run:
    """A driver, a ring and what may change.

    Args:
        rng: What decides.
    """

    def __init__(self, rng: Choices) -> None:
        self.rng = rng
        self.device, self.memory = parts()
        self.memory.fill(0, MEMORY, 0)
        self.iotlb = Iotlb() if rng.randrange(2) else None
        self.pages = {page: page for page in range(0, MEMORY, PAGE)}
        self.offered = 0
        for page in self.pages:
            self.map(page, page, Permissions.READ_WRITE)
        self.ring = self.make_ring()

    def make_ring(self, base: int = 0) -> SplitRing:
        return SplitRing(
            AddressSpace(self.memory._space.regions, self.iotlb and self.iotlb._map),
            *(SIZE, DESC, AVAIL, USED),
            base=base,
            event_idx=self.rng.randrange(2) == 0,
            indirect=self.rng.randrange(3) > 0,
        )

    def map(self, page: int, to: int, perm: Permissions) -> None:
        if self.iotlb is not None and to < MEMORY:
            self.iotlb.set_mapping(page, to, PAGE, perm)

    def write(self, addr: int, data: bytes) -> None:
        self.memory.write(addr, data[: max(MEMORY - addr, 0)])

    def descriptor(self) -> bytes:
        return garbage.descriptor(self.rng)

    def good_chain(self, at: int) -> bytes:
        """A disk's request in descriptors from ``at`` on."""
        kind = self.rng.choice((0, 0, 1, 4, 8, 11, 13, self.rng.getrandbits(8)))
        sector = self.rng.choice((0, 1, 127, 128, self.rng.getrandbits(64)))
        self.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
        length = self.rng.choice((512, 512, 4096, 8192, 513, 0))
        flags = 3 if kind in {0, 8} else 1
        return b"".join(
            (
                struct.pack("<QIHH", HEADER, 16, 1, at + 1),
                struct.pack("<QIHH", DATA, length, flags, at + 2),
                struct.pack("<QIHH", STATUS, 1, 2, 0),
            )
        )

    def step(self) -> None:
        rng = self.rng
        match rng.randrange(10):
            case 0:
                self.write(DESC + 16 * rng.randrange(SIZE), self.descriptor())
            case 1:
                self.write(TABLE + 16 * rng.randrange(64), self.descriptor())
            case 2 | 3:
                at = rng.randrange(SIZE - 2)
                self.write(DESC + 16 * at, self.good_chain(at))
                self.offer(at)
            case 4:
                at = rng.randrange(SIZE)
                self.write(TABLE, self.good_chain(0))
                length = rng.choice((48, 48, 16, 47, 64, 0))
                self.write(DESC + 16 * at, struct.pack("<QIHH", TABLE, length, 4, 0))
                self.offer(at)
            case 5:
                self.offer(rng.choice((rng.randrange(SIZE), rng.getrandbits(16))))
            case 6:
                self.offered = (self.offered + rng.choice((1, 2, SIZE, SIZE + 1))) & 0xFFFF
                self.write(AVAIL + 2, struct.pack("<H", self.offered))
                self.write(AVAIL + 4 + 2 * SIZE, struct.pack("<H", rng.getrandbits(16)))
            case 7 if self.iotlb is not None:
                page = rng.randrange(16) * PAGE
                if rng.randrange(2):
                    self.iotlb.invalidate_mapping(page, PAGE)
                else:
                    self.map(page, rng.randrange(16) * PAGE, Permissions(rng.randrange(4)))
            case _:
                self.serve()

    def offer(self, head: int) -> None:
        self.write(AVAIL + 4 + 2 * (self.offered % SIZE), struct.pack("<H", head))
        self.offered = (self.offered + 1) & 0xFFFF
        self.write(AVAIL + 2, struct.pack("<H", self.offered))

    def serve(self) -> None:
        before = self.snapshot()
        allowed = self.writable(before)
        try:
            garbage.serve(self.ring, self.device)
        except GuestioError:
            # As after a reset.
            self.ring = self.make_ring(self.offered)
        changed = np.flatnonzero(before != self.snapshot())
        assert allowed[changed].all(), [hex(at) for at in changed[~allowed[changed]]]
        assert self.ring.outstanding <= SIZE
        if self.iotlb is not None and not self.ring.outstanding:
            assert len(self.iotlb._map.leases) == 0

    def snapshot(self) -> np.ndarray:
        return np.frombuffer(self.memory.read(0, MEMORY), np.uint8)

    def writable(self, memory: np.ndarray) -> np.ndarray:
        """Which bytes of memory the device may change."""
        lent = np.zeros(MEMORY, bool)
        lent[USED : USED + 6 + 8 * SIZE] = True
        content = memory.tobytes()
        tables = [(DESC, SIZE), (TABLE, 64)]
        # A table may be wherever a descriptor says; so may be the ring, behind an IOMMU.
        found = list(self.buffers(content, tables))
        tables = [
            (addr % PAGE + page, 64)
            for addr, _, flags in found
            if flags & 4
            for page in range(0, MEMORY, PAGE)
        ]
        if self.iotlb is not None:
            tables += [(page, SIZE) for page in range(0, MEMORY, PAGE)]
        found += self.buffers(content, tables)
        for addr, length, flags in found:
            if flags & 2 and addr < MEMORY:
                lent[addr : addr + length] = True
        if self.iotlb is None:
            return lent
        moved = np.zeros(MEMORY, bool)
        for (base, length), (target, _), perm in self.iotlb:
            if perm.allows(Permissions.WRITE):
                moved[target : target + length] |= lent[base : base + length]
        return moved

    @staticmethod
    def buffers(content: bytes, tables: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        found = []
        for start, count in tables:
            rows = content[start : start + 16 * count]
            found += [row[:3] for row in struct.iter_unpack("<QIHH", rows[: len(rows) & ~15])]
        return found


def fuzz(data: bytes) -> None:
    """Steps of a driver, and batches of the device between them."""
    run = Run(Choices(data))
    for _ in range(MAX_STEPS):
        if not run.rng.left:
            break
        run.step()
    run.serve()
