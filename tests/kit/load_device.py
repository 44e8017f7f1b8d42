"""A block device played by hand against the compiled load: right, or wrong in a chosen way."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

from guestio.guest._load.iotlb_front import IotlbFront
from guestio.guest._load.load import LoadDriver

PAGE = 4096
SECTOR = 512
BLOCK = 4096
DEVICE_BASE = 0x7000_0000
WINDOW = 0x4000_0000
MISS, UPDATE, INVALIDATE = 1, 2, 3
NEXT, WRITE, INDIRECT = 1, 2, 4
IOTLB = struct.Struct("=IIIQQQBB6x")
ACK = struct.Struct("=IIIQ")

TIME_OVER, DONE, SIGNAL, TROUBLE = range(4)


class Memory:
    """Pages of this process, each at a device address of its own, in another order."""

    def __init__(self, pages: int) -> None:
        self.map = mmap.mmap(-1, pages * PAGE)
        self._export = ctypes.c_char.from_buffer(self.map)
        self.base = ctypes.addressof(self._export)
        self.pages = pages
        self._next = 0

    def take(self, count: int, *, contiguous: bool = False) -> tuple[list[int], list[int], int]:
        """A row of pages: for the device, for the host, and from the first byte on."""
        first, self._next = self._next, self._next + count
        assert self._next <= self.pages
        pages = list(range(first, first + count))
        if not contiguous:
            # Neighbors in the row are not neighbors in memory.
            pages = pages[::2] + pages[1::2][::-1]
        return [DEVICE_BASE + p * PAGE for p in pages], [self.base + p * PAGE for p in pages], 0

    def at(self, address: int, length: int) -> slice:
        """The part of the map at a host address."""
        start = address - self.base
        assert 0 <= start <= start + length <= self.pages * PAGE, hex(address)
        return slice(start, start + length)

    def close(self) -> None:
        del self._export
        self.map.close()


@dataclass
class Chain:
    """A request as the device found it."""

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    indirect: bool

    @property
    def pieces(self) -> list[tuple[int, int]]:
        return self.readable + self.writable


class Rig:
    """A load driver with one queue, and the device on its other side.

    Attributes:
        disk: What the disk holds.
        chains: Chains served so far.
        spoil: Called with the kind of a request (0 read), its sector, and what a read returns or a
            write stores; returns that, or None to store nothing.
        stale: Whether the device never forgets a translation.
    """

    def __init__(
        self,
        *,
        size: int = 64,
        depth: int = 8,
        blocks: int = 256,
        block: int = BLOCK,
        verify: bool = False,
        strict: bool = False,
        event_idx: bool = True,
        indirect: bool = True,
        stale: bool = False,
        **options: object,
    ) -> None:
        self.memory = Memory(2048)
        self.size = size
        self.event_idx = event_idx
        self.disk = bytearray(blocks * block)
        self.chains: list[Chain] = []
        self.spoil: Callable[[int, int, bytes], bytes | None] = lambda kind, sector, data: data
        self.extra = b""
        self.stale = stale
        self.front, self.front_peer = socket.socketpair()
        self.back, self.back_peer = socket.socketpair()
        self.kick, self.call, self.err = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
        self._tlb: dict[int, tuple[int, int]] = {}
        self.taken = self.used = 0
        data = -(-(block + 16 + PAGE - 1) // PAGE) if verify else -(-block // PAGE)
        stride = 2 * data + 40
        self.iotlb = None
        if strict:
            self.iotlb = IotlbFront(WINDOW, 4096, self.front.fileno(), self.back.fileno())
        self.driver = LoadDriver(
            block,
            blocks,
            self.front.fileno(),
            self.back.fileno() if strict else -1,
            iotlb=self.iotlb,
            strict=strict,
            stride=stride if strict else 0,
            indirect=indirect,
            verify=verify,
            **options,  # type: ignore[arg-type]
        )
        self._rings = [
            self.memory.take(-(-length // PAGE), contiguous=True)[1]
            for length in (16 * size, 6 + 2 * size, 6 + 8 * size)
        ]
        fds = self.kick, self.call, self.err
        assert self.driver.add_queue(size, depth, *self._rings, *fds, event_idx=event_idx) == 0
        for _ in range(2 * depth if verify else depth):
            first = self.memory.take(data if verify else 1)
            self.driver.add_slot(
                0, first, self.memory.take(data), self.memory.take(2, contiguous=True)
            )
        if strict:
            for n in range(depth):
                self.driver.add_stride(0, 1 + n * (stride + 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self.driver, self.iotlb
        self.memory.close()
        for sock in (self.front, self.front_peer, self.back, self.back_peer):
            sock.close()
        for fd in (self.kick, self.call, self.err):
            os.close(fd)

    # The device's side of the ring

    def _ring(self, part: int, layout: str, offset: int, *values: int) -> tuple[int, ...]:
        where = self.memory.at(
            self._rings[part][offset // PAGE] + offset % PAGE, struct.calcsize(layout)
        )
        if values:
            self.memory.map[where] = struct.pack(layout, *values)
        return struct.unpack(layout, self.memory.map[where])

    def available(self) -> int:
        """The available index."""
        return self._ring(1, "<H", 2)[0]

    def used_event(self) -> int:
        return self._ring(1, "<H", 4 + 2 * self.size)[0]

    def avail_flags(self) -> int:
        return self._ring(1, "<H", 0)[0]

    def set_avail_event(self, value: int) -> None:
        self._ring(2, "<H", 4 + 8 * self.size, value)

    def set_used_flags(self, value: int) -> None:
        self._ring(2, "<H", 0, value)

    def set_used(self, value: int) -> None:
        """Move the used index."""
        self._ring(2, "<H", 2, value & 0xFFFF)

    def complete(self, head: int, written: int) -> None:
        """Put an entry into the used ring, and move its index."""
        self._ring(2, "<II", 4 + 8 * (self.used % self.size), head, written)
        self.used += 1
        self.set_used(self.used)

    def kicks(self) -> int:
        try:
            return os.eventfd_read(self.kick)
        except BlockingIOError:
            return 0

    def take(self) -> Chain | None:
        """The next request, if there is one."""
        if self.taken & 0xFFFF == self.available():
            return None
        (head,) = self._ring(1, "<H", 4 + 2 * (self.taken % self.size))
        self.taken += 1
        addr, length, flags, _ = self._ring(0, "<QIHH", 16 * head)
        table = None
        if flags & INDIRECT:
            raw = self.gather(addr, length, 1)
            table = [struct.unpack_from("<QIHH", raw, at) for at in range(0, length, 16)]
        chain = Chain(head, [], [], table is not None)
        index = 0 if table is not None else head
        while True:
            entry = table[index] if table is not None else self._ring(0, "<QIHH", 16 * index)
            addr, length, flags, following = entry
            assert length > 0
            if not flags & WRITE:
                assert not chain.writable, "the device reads after it writes"
            (chain.writable if flags & WRITE else chain.readable).append((addr, length))
            if not flags & NEXT:
                return chain
            index = following

    def serve(self, limit: int | None = None) -> int:
        """Do what was asked, as a disk does; the number of requests."""
        count = 0
        while (limit is None or count < limit) and (chain := self.take()) is not None:
            self.chains.append(chain)
            count += 1
            self._serve_one(chain)
        return count

    def _serve_one(self, chain: Chain) -> None:
        request = b"".join(self.gather(addr, length, 1) for addr, length in chain.readable)
        kind, _, sector = struct.unpack_from("<IIQ", request)
        room = sum(length for _, length in chain.writable)
        at = sector * SECTOR
        answer = b""
        if kind == 1:
            stored = self.spoil(kind, sector, request[16:])
            if stored is not None:
                self.disk[at : at + len(stored)] = stored
        else:
            data = self.spoil(kind, sector, bytes(self.disk[at : at + room - 1]))
            answer = b"" if data is None else data
        answer += b"\0" + self.extra
        self.scatter(chain.writable, answer)
        self.complete(chain.head, min(len(answer), room))

    def scatter(self, pieces: list[tuple[int, int]], data: bytes) -> None:
        """Write over pieces; what is left over goes right behind the last."""
        lengths = [length for _, length in pieces]
        starts = [0, *accumulate(lengths)]
        for (addr, _), (start, end) in zip(pieces, pairwise(starts), strict=True):
            last = end == starts[-1]
            self.put(addr, data[start:] if last else data[start:end])

    def gather(self, addr: int, length: int, access: int) -> bytes:
        return b"".join(self.memory.map[part] for part in self._parts(addr, length, access))

    def put(self, addr: int, data: bytes) -> None:
        at = 0
        for part in self._parts(addr, len(data), 2):
            step = part.stop - part.start
            self.memory.map[part] = data[at : at + step]
            at += step

    def _parts(self, addr: int, length: int, access: int) -> Iterator[slice]:
        while length:
            step = min(length, PAGE - addr % PAGE)
            page = self.translate(addr - addr % PAGE, access)
            yield self.memory.at(page + addr % PAGE, step)
            addr, length = addr + step, length - step

    # Translation

    def translate(self, page: int, access: int) -> int:
        """Where a page of the device's is."""
        if self.iotlb is None:
            return page - DEVICE_BASE + self.memory.base
        self.listen()
        known = self._tlb.get(page)
        if known is None or access & ~known[1]:
            self.back_peer.sendall(IOTLB.pack(1, 9, 32, page, PAGE, 0, access, MISS))
            status = self._answer()
            assert status == 0, f"{page:#x} is not mapped"
            known = self._tlb[page]
        return known[0]

    def _answer(self) -> int:
        self.back_peer.setblocking(False)
        for _ in range(100):
            self.driver.run(0)
            self.listen()
            try:
                return int(ACK.unpack(self.back_peer.recv(ACK.size))[3])
            except BlockingIOError:
                continue
        raise AssertionError("a miss is not answered")

    def listen(self) -> None:
        """Take UPDATEs and INVALIDATEs, and acknowledge them."""
        self.front_peer.setblocking(False)
        while True:
            try:
                raw = self.front_peer.recv(IOTLB.size)
            except BlockingIOError:
                return
            _, _, _, iova, size, uaddr, perm, kind = IOTLB.unpack(raw)
            if kind == UPDATE:
                self._tlb[iova] = uaddr, perm
            elif not self.stale:
                for page in range(iova, iova + size, PAGE):
                    self._tlb.pop(page, None)
            self.front_peer.sendall(ACK.pack(22, 5, 8, 0))

    # Both sides

    def play(self, rounds: int = 10000) -> int:
        """Let driver and device take turns until the driver is done or finds a fault."""
        outcome = TIME_OVER
        while outcome == TIME_OVER and rounds:
            outcome = self.driver.run(0)
            self.serve()
            if self.iotlb is not None:
                self.listen()
            rounds -= 1
        return outcome
