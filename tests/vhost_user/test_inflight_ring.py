"""A ring whose back-end is killed between any two machine instructions, and the one that goes on.

The order of the stores into the used ring and of those into the region that notes the requests in
flight is the ring's own here; `test_inflight` has the steps made one by one.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct

import pytest

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.mapping import HostMapping
from guestio._core.virtio.inflight import InflightQueue, part_size
from guestio._core.virtio.split import SplitRing
from guestio.addr import Permissions
from guestio.iommu import Iotlb
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from tests.kit.traced import Traced

SIZE = 4
BASE = 65534  # the index wraps
ROOM = 0x4000
DESC, AVAIL, USED, BUFFER = 0x0, 0x1000, 0x2000, 0x3000
ORDER = (2, 0, 3, 1)
"""Heads in the order in which they are made available."""

PLAY = """
import os, signal, sys, ctypes
from guestio._core.iommu.address_space import AddressSpace
from guestio._core.virtio.inflight import InflightQueue
from guestio._core.memory.mapping import HostMapping
from guestio._core.virtio.split import SplitRing
from guestio.memory import Backing, GuestRegionCollection, MmapRegion

region, ram = int(sys.argv[1]), int(sys.argv[2])
memory = GuestRegionCollection.from_regions([MmapRegion(0, Backing.from_fd(ram, 0x4000))])
queue = InflightQueue(HostMapping(region, 0, 4096), 0, 4)
ring = SplitRing(memory._space, 4, 0, 0x1000, 0x2000, base=65534, inflight=queue)
ring.enable_kicks()
if ctypes.CDLL(None).ptrace(0, 0, None, None):  # PTRACE_TRACEME
    sys.exit(77)
os.kill(os.getpid(), signal.SIGSTOP)
(a, b, c), _ = ring.pop(3)
ring.complete(c, 1)
ring.complete(a, 1)
ring.publish()
(d,), _ = ring.pop()
ring.complete(d, 1)
ring.publish()
ring.complete(b, 1)
ring.publish()
os.kill(os.getpid(), signal.SIGSTOP)
"""


def prepare() -> bytes:
    """Memory with four requests available."""
    ram = bytearray(ROOM)
    for head in range(SIZE):
        struct.pack_into("<QIHH", ram, DESC + 16 * head, BUFFER + 16 * head, 16, 2, 0)
    struct.pack_into("<HH", ram, AVAIL, 0, (BASE + SIZE) & 0xFFFF)
    for i, head in enumerate(ORDER):
        struct.pack_into("<H", ram, AVAIL + 4 + 2 * ((BASE + i) % SIZE), head)
    struct.pack_into("<HH", ram, USED, 0, BASE)
    return bytes(ram)


def states() -> list[tuple[bytes, bytes]]:
    """The region and the used ring after each instruction that changed them."""
    with Backing.memfd(4096) as region, Backing.memfd(ROOM) as ram:
        assert region.fd is not None
        assert ram.fd is not None
        os.pwrite(ram.fd, prepare(), 0)
        with (
            mmap.mmap(region.fd, 4096, prot=mmap.PROT_READ) as notes,
            mmap.mmap(ram.fd, ROOM, prot=mmap.PROT_READ) as memory,
        ):
            length, used = part_size(SIZE), slice(USED, USED + 4 + 8 * SIZE)
            traced = Traced(PLAY, region.fd, ram.fd, arguments=())
            try:
                if traced.wait() != signal.SIGSTOP:
                    pytest.skip("this process may not trace others")
                seen = [(notes[:length], memory[used])]
                while (stopped := traced.step()) == signal.SIGTRAP:
                    if (now := (notes[:length], memory[used])) != seen[-1]:
                        seen.append(now)
                assert stopped == signal.SIGSTOP, "the back-end failed"
            finally:
                traced.kill()
    return seen


def test_each_request_is_completed_once_wherever_it_is_killed() -> None:
    found = states()
    assert len(found) > 16, "every store that changes something makes one"
    for notes, used in found:
        memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, ROOM)])
        memory.write(0, prepare())
        memory.write(USED, used)
        shown = (int.from_bytes(used[2:4], "little") - BASE) & 0xFFFF
        before = [_element(memory, i) for i in range(shown)]
        mapping = HostMapping(-1, 0, 4096)
        memoryview(mapping)[: len(notes)] = notes
        ring = SplitRing(
            AddressSpace(memory._space.regions, _everything()._map),
            SIZE,
            DESC,
            AVAIL,
            USED,
            inflight=InflightQueue(mapping, 0, SIZE),
        )
        chains, misses = ring.pop()
        assert misses == []
        for chain in chains:
            ring.complete(chain, 1)
        ring.publish()
        elements = [_element(memory, i) for i in range(SIZE)]
        assert elements[:shown] == before
        assert sorted(elements) == [(head, 1) for head in range(SIZE)], (notes.hex(" ", 8), used)
        assert memory.read(USED + 2, 2) == ((BASE + SIZE) & 0xFFFF).to_bytes(2, "little")


def _everything() -> Iotlb:
    iotlb = Iotlb()
    iotlb.set_mapping(0, 0, ROOM, Permissions.READ_WRITE)
    return iotlb


def _element(memory: GuestRegionCollection, position: int) -> tuple[int, int]:
    """A used element, by its place among those of this play."""
    at = USED + 4 + 8 * ((BASE + position) % SIZE)
    head, written = struct.unpack("<II", memory.read(at, 8))
    return head, written
