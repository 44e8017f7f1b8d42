"""Requests for a block device, laid out as they are told."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from guestio._core.virtio.split import SplitRing
from guestio.memory import AtomicBitmap, Backing, GuestRegionCollection, MmapRegion
from guestio.virtio.blk import (
    S_OK,
    T_IN,
    T_OUT,
    BlockDevice,
)
from guestio.virtio.device import settled
from tests.kit.rings import WRITE, Desc, Rig

SIZE = 1 << 20
SECTORS = SIZE // 512
UNTOUCHED = 0xEE
READ_AT, WRITE_AT = 0x100000, 0x800000


@dataclass
class Answer:
    """What came of a request: its status, what was written before it, and the used length."""

    status: int
    data: bytes
    used: int


class Disk:
    """A device and a driver that lays every request out as it is told.

    Args:
        device: The device.
        served: Whether requests are offered to the device's server first, as a back-end does.
    """

    def __init__(self, device: BlockDevice, *, served: bool = True) -> None:
        self.device = device
        self.served = served
        backing = Backing.memfd(16 << 20)
        assert backing.fd is not None
        self.memory_fd = backing.fd
        self.bitmap = AtomicBitmap(16 << 20)
        self.memory = GuestRegionCollection.from_regions(
            [MmapRegion(0, backing, bitmap=self.bitmap)]
        )
        self.rig = Rig(
            self.memory._space, self.memory, size=4096, desc=0, avail=0x20000, used=0x30000
        )

    def run(
        self,
        kind: int,
        sector: int = 0,
        payload: bytes = b"",
        *,
        reply: int = 0,
        readable: Sequence[int] = (),
        writable: Sequence[int] = (),
        gap: int = 0,
    ) -> Answer:
        """Run one request.

        Args:
            kind: Its type.
            sector: Its sector.
            payload: What the device reads after the header.
            reply: Bytes before the status.
            readable: Lengths of the readable descriptors; the last one takes the rest.
            writable: The same for the writable ones.
            gap: Bytes between the descriptors' memory.
        """
        header = struct.pack("<IIQ", kind, 0, sector)
        return self.run_raw(header + payload, reply + 1, readable, writable, gap)

    def run_raw(
        self,
        source: bytes,
        room: int,
        readable: Sequence[int] = (),
        writable: Sequence[int] = (),
        gap: int = 0,
    ) -> Answer:
        """Run a request that is any bytes."""
        descriptors, at = [], READ_AT
        pieces = []
        for done, length in _cut(len(source), readable):
            self.memory.write(at, source[done : done + length])
            descriptors.append(Desc(at, length))
            at += length + gap
        at = WRITE_AT
        for _, length in _cut(room, writable):
            self.memory.write(at - 1, bytes([UNTOUCHED]) * (length + 2))
            descriptors.append(Desc(at, length, WRITE))
            pieces.append((at, length))
            at += length + max(gap, 2)
        position = self.rig.offered
        self.rig.offer(self.rig.put_chain(0, *descriptors))
        self._serve(self.rig.ring)
        head, used = self.rig.used_entry(position)
        assert head == 0
        assert used <= room
        answer = b""
        for start, length in pieces:
            whole = self.memory.read(start - 1, length + 2)
            assert whole[0] == whole[-1] == UNTOUCHED, "the device wrote beside its memory"
            answer += whole[1:-1]
        return Answer(answer[-1] if answer else -1, answer[:-1], used)

    def _serve(self, ring: SplitRing) -> None:
        if self.served:
            chains, misses, served, _ = ring.run_once(self.device.server)
            assert served + len(chains) == 1
        else:
            chains, misses = ring.pop()
        assert not misses
        for chain in chains:
            assert chain.fault is None
            ring.complete(chain, settled(self.device.process(0, chain)))
        ring.publish()

    def read(self, sector: int, length: int, **shape: Sequence[int]) -> bytes:
        """Read, which must succeed."""
        answer = self.run(T_IN, sector, reply=length, **shape)
        assert (answer.status, answer.used) == (S_OK, length + 1)
        return answer.data

    def write(self, sector: int, data: bytes, **shape: Sequence[int]) -> None:
        """Write, which must succeed."""
        assert self.run(T_OUT, sector, data, **shape) == Answer(S_OK, b"", 1)

    def trim(self, kind: int, *segments: tuple[int, int, int]) -> int:
        """Discard or write zeroes; the status."""
        payload = b"".join(struct.pack("<QII", *segment) for segment in segments)
        return self.run(kind, 0, payload).status


def _cut(length: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    at = 0
    for size in cuts:
        if min(size, length - at) > 0:
            yield at, min(size, length - at)
            at += min(size, length - at)
    if at < length:
        yield at, length - at
