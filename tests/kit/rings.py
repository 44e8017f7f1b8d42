"""Split rings written by hand, byte by byte, and the device's side of them.

Layout of the three areas: virtio 1.3 section 2.7.5 (descriptors), 2.7.6 (available ring), 2.7.8
(used ring).
"""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.virtio.chain import Chain
from guestio._core.virtio.split import SplitRing
from guestio.addr import IovaRange, Permissions
from guestio.iommu import Iotlb
from guestio.memory import GuestRegionCollection, MmapRegion

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PAGE = 4096
NEXT, WRITE, INDIRECT = 1, 2, 4
RW = Permissions.READ_WRITE

_DESC = struct.Struct("<QIHH")
_USED = struct.Struct("<II")


class Desc(NamedTuple):
    """A descriptor."""

    addr: int
    length: int
    flags: int = 0
    next: int = 0


def table(*descriptors: Desc) -> bytes:
    """The bytes of a descriptor table."""
    return b"".join(_DESC.pack(*each) for each in descriptors)


def linked(*descriptors: Desc) -> list[Desc]:
    """The descriptors as one chain in a table of their own."""
    last = len(descriptors) - 1
    return [
        each._replace(flags=each.flags | NEXT, next=i + 1) if i < last else each
        for i, each in enumerate(descriptors)
    ]


class View(Protocol):
    """Memory as the driver's addresses have it."""

    def read(self, addr: int, length: int) -> bytes: ...
    def write(self, addr: int, data: bytes) -> None: ...


class HandRing:
    """A ring whose driver is the test.

    Args:
        view: Memory as the driver reaches it.
        size: Entries.
        desc, avail, used: Where the areas are.
        base: Index of the first entry.
        event_idx: Whether VIRTIO_F_EVENT_IDX was negotiated.
    """

    def __init__(
        self,
        view: View,
        *,
        size: int = 8,
        desc: int = 0x1000,
        avail: int = 0x2000,
        used: int = 0x3000,
        base: int = 0,
        event_idx: bool = False,
    ) -> None:
        self.view = view
        self.size = size
        self.desc, self.avail, self.used = desc, avail, used
        self.event_idx = event_idx
        self.offered = base

    def put(self, index: int, descriptor: Desc) -> None:
        """Write a descriptor into the ring's table."""
        self.view.write(self.desc + 16 * index, _DESC.pack(*descriptor))

    def put_chain(self, first: int, *descriptors: Desc) -> int:
        """Write a chain into consecutive descriptors; its head."""
        for i, each in enumerate(linked(*descriptors)):
            self.put(first + i, each._replace(next=first + i + 1 if each.flags & NEXT else 0))
        return first

    def put_table(self, index: int, addr: int, descriptors: Sequence[Desc]) -> int:
        """Write an indirect table and the descriptor that refers to it; the head."""
        self.view.write(addr, table(*descriptors))
        self.put(index, Desc(addr, 16 * len(descriptors), INDIRECT))
        return index

    def offer(self, *heads: int) -> None:
        """Make chains available."""
        for head in heads:
            slot = self.avail + 4 + 2 * (self.offered % self.size)
            self.view.write(slot, head.to_bytes(2, "little"))
            self.offered = (self.offered + 1) & 0xFFFF
        self.set_avail_idx(self.offered)

    def set_avail_idx(self, value: int) -> None:
        """Write the available index."""
        self.view.write(self.avail + 2, value.to_bytes(2, "little"))

    def set_avail_flags(self, value: int) -> None:
        """Write the available ring's flags."""
        self.view.write(self.avail, value.to_bytes(2, "little"))

    def set_used_event(self, value: int) -> None:
        """Write the index at which the driver wants to be notified."""
        self.view.write(self.avail + 4 + 2 * self.size, value.to_bytes(2, "little"))

    def _word(self, addr: int) -> int:
        return int.from_bytes(self.view.read(addr, 2), "little")

    @property
    def used_flags(self) -> int:
        """The used ring's flags."""
        return self._word(self.used)

    @property
    def used_idx(self) -> int:
        """The used index."""
        return self._word(self.used + 2)

    @property
    def avail_event(self) -> int:
        """The index at which the device wants to be notified."""
        return self._word(self.used + 4 + 8 * self.size)

    def used_entry(self, position: int) -> tuple[int, int]:
        """Head and number of bytes written of a used entry."""
        data = self.view.read(self.used + 4 + 8 * (position % self.size), 8)
        head, written = _USED.unpack(data)
        return head, written


class Rig(HandRing):
    """A ring whose driver is the test, and its device's side.

    Args:
        space: What the device can reach.
        view: The same memory as the driver reaches it.
        indirect: Whether VIRTIO_F_INDIRECT_DESC was negotiated.
        options: Those of :class:`HandRing`.
    """

    def __init__(
        self, space: AddressSpace, view: View, *, indirect: bool = False, **options: Any
    ) -> None:
        super().__init__(view, **options)
        self.space = space
        self.indirect = indirect
        self.ring = self.device(self.offered)

    def device(self, base: int) -> SplitRing:
        """Another device's side of the same ring."""
        return SplitRing(
            self.space,
            self.size,
            self.desc,
            self.avail,
            self.used,
            base=base,
            event_idx=self.event_idx,
            indirect=self.indirect,
        )

    def pop_one(self) -> Chain:
        """Take the only request that is available; nothing is missing."""
        chains, misses = self.ring.pop()
        assert misses == []
        (chain,) = chains
        return chain

    def finish(self, chain: Chain, written: int = 0) -> bool | None:
        """Complete one request and show it."""
        self.ring.complete(chain, written)
        return self.ring.publish()


def physical(room: int = 0x40000, **options: Any) -> tuple[GuestRegionCollection, Rig]:
    """One region of memory and a ring in it."""
    memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, room)])
    return memory, Rig(memory._space, memory, **options)


class Tables:
    """A guest's IOMMU: its pages lie anywhere, and the device knows those it was told of.

    Attributes:
        memory: Physical memory.
        iotlb: What the device knows.
        space: What the device can reach.
    """

    def __init__(self, size: int = 0x80000, seed: int = 0) -> None:
        self.memory = GuestRegionCollection.from_regions([MmapRegion.memfd(0, size)])
        self.iotlb = Iotlb()
        self.space = AddressSpace(self.memory._space.regions, self.iotlb._map)
        self.pages: dict[int, int] = {}
        self._free = list(range(0, size, PAGE))
        random.Random(seed).shuffle(self._free)

    def map(self, iova: int, length: int) -> None:
        """Give every page of a range some physical page."""
        for page in _pages(iova, length):
            if page not in self.pages:
                self.pages[page] = self._free.pop()

    def tell(self, iova: int, length: int, perm: Permissions = RW) -> None:
        """Map a range and let the device know."""
        self.map(iova, length)
        for page in _pages(iova, length):
            self.iotlb.set_mapping(page, self.pages[page], PAGE, perm)

    def tell_missing(self, misses: Iterable[tuple[IovaRange, int]]) -> None:
        """Answer what a ring reported."""
        for (base, length), _ in misses:
            self.tell(base, length)

    def move(self, iova: int) -> int:
        """Put a page's contents elsewhere, fill the old one with rubbish; its old address.

        The device is told that the old translation is gone, and not where the page is now.
        """
        page = iova - iova % PAGE
        old, self.pages[page] = self.pages[page], self._free.pop()
        self.iotlb.invalidate_mapping(page, PAGE)
        self.memory.write(self.pages[page], self.memory.read(old, PAGE))
        self.memory.write(old, b"\xa5" * PAGE)
        return old

    def read(self, addr: int, length: int) -> bytes:
        """Read as the driver, through its page tables."""
        return b"".join(self.memory.read(at, size) for at, size in self._pieces(addr, length))

    def write(self, addr: int, data: bytes) -> None:
        """Write as the driver, through its page tables."""
        done = 0
        for at, size in self._pieces(addr, len(data)):
            self.memory.write(at, data[done : done + size])
            done += size

    def _pieces(self, addr: int, length: int) -> list[tuple[int, int]]:
        self.map(addr, length)
        pieces = []
        while length:
            size = min(length, PAGE - addr % PAGE)
            pieces.append((self.pages[addr - addr % PAGE] + addr % PAGE, size))
            addr, length = addr + size, length - size
        return pieces

    def rig(self, **options: Any) -> Rig:
        """A ring at addresses of this IOMMU."""
        return Rig(self.space, self, **options)


def _pages(iova: int, length: int) -> range:
    return range(iova - iova % PAGE, iova + max(length, 1), PAGE)
