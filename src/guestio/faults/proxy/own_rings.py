"""Memory of a proxy in which a back-end has its rings, instead of those of the driver.

It is one more region of the front-end's memory, far from all others. Its addresses are the same
whether they are guest physical, the front-end's own or I/O virtual, so where a ring is does not
depend on what was negotiated.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence
from typing import Final

from guestio._core.iommu.address_space import AddressSpace
from guestio.budgets import PROXY_OWN_QUEUES
from guestio.errors import ProtocolError
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user.messages import (
    MAX_TABLE_REGIONS,
    VHOST_F_LOG_ALL,
    IotlbMessage,
    IotlbType,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    VringAddr,
)
from guestio.virtio.device import VIRTIO_F_EVENT_IDX

PLACE: Final = 1 << 62
"""Where it is: above what the addresses of processes, guests and IOMMUs reach."""
_ROOM: Final = 1 << 19
"""Bytes for a queue: the parts of a ring of 32,768 entries are smaller."""
_USED: Final = 0x11000
"""Where its used ring begins."""
SIZE: Final = PROXY_OWN_QUEUES * _ROOM

HIDDEN: Final = (
    ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.LOG_SHMFD | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.DEVICE_STATE | ProtocolFeature.INBAND_NOTIFICATIONS
)  # fmt: skip
"""Protocol features that a front-end is not offered: what is noted of a ring would be about rings
that it does not know."""
HIDDEN_FEATURES: Final = 1 << VIRTIO_F_EVENT_IDX | 1 << 34 | 1 << VHOST_F_LOG_ALL
"""Features that it is not offered: indices of notifications, packed rings, dirty logs."""


class OwnRings:
    """The rings that the back-end of one connection has; their memory lives as long as this.

    Attributes:
        space: Where they are, for :class:`RingObserver`.
    """

    def __init__(self) -> None:
        backing = Backing.memfd(SIZE, "guestio-proxy")
        self._backing: Backing | None = backing
        self._memory = GuestRegionCollection.from_regions([MmapRegion(PLACE, backing)])
        self.space: AddressSpace = self._memory._space

    def avail(self, index: int) -> int:
        """Where the available ring of a queue is.

        Raises:
            ProtocolError: There is no room for the rings of this queue.
        """
        if index >= PROXY_OWN_QUEUES:
            raise ProtocolError(
                f"queue {index}: a proxy that relays has rings for {PROXY_OWN_QUEUES} queues"
            )
        return PLACE + index * _ROOM

    def used(self, index: int) -> int:
        """Where its used ring is; as :meth:`avail`."""
        return self.avail(index) + _USED

    def reset(self, index: int, base: int) -> None:
        """Have both rings of a queue be empty, and go on at an index."""
        for ring in (self.avail(index), self.used(index)):
            self._memory.write(ring, struct.pack("<HH", 0, base & 0xFFFF))

    def table(self, payload: bytes) -> bytes:
        """A memory table with this memory behind what the front-end shares.

        Raises:
            ProtocolError: It is none, or full, or has memory in the same place.
        """
        regions = MemoryTable.decode(payload).regions
        if len(regions) >= MAX_TABLE_REGIONS:
            raise ProtocolError(
                f"SET_MEM_TABLE: {len(regions)} regions leave no room for the rings of a proxy"
            )
        for region in regions:
            for address in (region.guest_addr, region.user_addr):
                if address < PLACE + SIZE and address + region.size > PLACE:
                    raise ProtocolError(
                        f"SET_MEM_TABLE: {address:#x}+{region.size:#x} is where a proxy has its "
                        "rings"
                    )
        return MemoryTable((*regions, MemoryRegion(PLACE, SIZE, PLACE, 0))).encode()

    def file(self) -> int:
        """A descriptor of this memory; the caller's to close."""
        assert self._backing is not None
        assert self._backing.fd is not None
        return os.dup(self._backing.fd)

    def address(self, payload: bytes) -> bytes:
        """A SET_VRING_ADDR with these rings in place of the driver's."""
        given = VringAddr.decode(payload)
        used, avail = self.used(given.index), self.avail(given.index)
        return VringAddr(given.index, 0, given.desc, used, avail, 0).encode()

    def translation(self, address: int) -> IotlbMessage | None:
        """The answer to a miss about this memory; None for one about other memory."""
        if not PLACE <= address < PLACE + SIZE:
            return None
        return IotlbMessage(PLACE, SIZE, PLACE, 3, int(IotlbType.UPDATE))

    def close(self) -> None:
        """Give the memory back; nothing may use a ring any more. Again, it does nothing."""
        self._memory = GuestRegionCollection()
        self.space = self._memory._space
        backing, self._backing = self._backing, None
        if backing is not None:
            # An observer that is on its way out may still refer to it, and has it go at its end.
            with contextlib.suppress(BufferError):
                backing.close()


def pages(misses: Sequence[tuple[int, int, int]], page: int = 4096) -> list[tuple[int, int]]:
    """Misses as the pages that they are about, each with its access: front-ends answer one each."""
    found = []
    for address, length, access in misses:
        first = address - address % page
        found += [(each, access) for each in range(first, address + length, page)]
    return found
