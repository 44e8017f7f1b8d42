"""A ring by hand whose device side may order and note its requests."""

from __future__ import annotations

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.virtio.chain import Chain
from guestio._core.virtio.inflight import InflightQueue
from guestio._core.virtio.split import SplitRing
from guestio.addr import Permissions
from guestio.iommu import Iotlb
from guestio.memory import GuestRegionCollection, MmapRegion
from guestio.vhost_user.inflight import InflightRegion
from tests.kit.rings import PAGE, WRITE, Desc, HandRing

RW = Permissions.READ_WRITE
DESC, AVAIL, USED = 0x10000, 0x20000, 0x30000
AREAS = 0x40000
BUFFERS = 0x100000
ROOM = 32
"""Bytes that each request has for an answer."""


class Bench(HandRing):
    """A ring by hand, one descriptor for each request, each with a page of its own.

    Args:
        size: Entries.
        base: Index of the first entry.
        order: ``"ordered"``, ``"done"``, ``"noted"``, or ``"both"``: noted and ordered.
    """

    def __init__(self, size: int = 8, *, base: int = 0, order: str = "ordered") -> None:
        self.memory = GuestRegionCollection.from_regions(
            [MmapRegion.memfd(0, BUFFERS + size * PAGE)]
        )
        super().__init__(self.memory, size=size, desc=DESC, avail=AVAIL, used=USED, base=base)
        self.iotlb = Iotlb()
        self.iotlb.set_mapping(0, 0, AREAS, RW)
        self.space = AddressSpace(self.memory._space.regions, self.iotlb._map)
        self.order = order
        self.region = InflightRegion.create(1, size) if order in ("noted", "both") else None
        self.memory.write(USED + 2, base.to_bytes(2, "little"))
        self.memory.write(AVAIL + 2, base.to_bytes(2, "little"))
        for head in range(size):
            self.put(head, Desc(self.page(head), ROOM, WRITE))
        self.ring = self.device(base)

    def close(self) -> None:
        """Let go of the region."""
        if self.region is not None:
            self.region.close()

    def noted(self) -> InflightQueue | None:
        """The region's part."""
        return None if self.region is None else self.region.queue(0)

    def device(self, base: int) -> SplitRing:
        """Another device's side of the same ring."""
        return SplitRing(
            self.space,
            self.size,
            *(DESC, AVAIL, USED),
            base=base,
            ordered=self.order in ("ordered", "both"),
            inflight=self.noted(),
        )

    def page(self, head: int) -> int:
        """The memory of a request."""
        return BUFFERS + head * PAGE

    def tell(self, *heads: int) -> None:
        """Let the device know where requests are."""
        for head in heads:
            self.iotlb.set_mapping(self.page(head), self.page(head), PAGE, RW)

    def forget(self, *heads: int) -> None:
        """Take that back."""
        for head in heads:
            self.iotlb.invalidate_mapping(self.page(head), PAGE)

    def published(self, first: int) -> list[tuple[int, int]]:
        """The used entries from an index on."""
        count = (self.used_idx - first) & 0xFFFF
        return [self.used_entry((first + i) & 0xFFFF) for i in range(count)]

    def take(self) -> list[Chain]:
        """Take what is there; nothing is missing."""
        chains, misses = self.ring.pop()
        assert misses == []
        return chains
