"""A front-end with requests for a disk that are laid out by hand."""

from __future__ import annotations

import struct

from guestio.virtio.blk import T_IN
from tests.kit.rings import WRITE, Desc
from tests.kit.serving import Driver

HEADERS = 0x40000
DATA = 0x1000000
MIB = 1 << 20


class DiskDriver(Driver):
    """A front-end with requests for a disk by hand; each queue's are numbered from 0."""

    SIZE = 96 * MIB

    def request(
        self, index: int, kind: int, sector: int = 0, length: int = 0, payload: bytes = b""
    ) -> int:
        """Offer a request without announcing it; its number. All share the data's memory."""
        ring = self.rings[index]
        number = ring.offered
        slot = number % (self.size // 3)
        place = HEADERS + (index * self.size + slot) * 1024
        self.memory.write(place, struct.pack("<IIQ", kind, 0, sector) + payload)
        self.memory.write(place + 1023, b"\xee")
        data = [Desc(DATA, length, WRITE if kind == T_IN else 0)] if length else []
        ring.offer(
            ring.put_chain(
                3 * slot, Desc(place, 16 + len(payload)), *data, Desc(place + 1023, 1, WRITE)
            )
        )
        return number

    def status(self, index: int, number: int) -> int:
        slot = number % (self.size // 3)
        return self.memory.read(HEADERS + (index * self.size + slot) * 1024 + 1023, 1)[0]

    def finish(self, index: int, number: int) -> int:
        """Announce what was offered, wait for a request, and return its status."""
        self.handles[index].kick()
        self.wait(index, number)
        return self.status(index, number)
