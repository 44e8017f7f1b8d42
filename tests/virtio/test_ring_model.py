"""Rings right and wrong, walked by the core and by a model that only knows the specification.

The model works on bytes and dictionaries. Both must agree on every request: what it holds, where
its last writable byte is, what is missing, and which rings are broken.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

import pytest

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.virtio.chain import Chain
from guestio._core.virtio.split import SplitRing
from guestio.addr import Permissions
from guestio.errors import QueueError
from guestio.iommu import Iotlb
from guestio.memory import GuestRegionCollection, MmapRegion
from tests.kit.rings import INDIRECT, NEXT, PAGE, WRITE

SIZE = 8
MEMORY = 0x10000
DESC, AVAIL, USED = 0x1000, 0x2000, 0x3000
TABLES, BUFFERS = 0x4000, 0x8000
TOP = 2**64
CASES = 4000
BATCHES = 4


class BrokenRingError(Exception):
    """The driver broke a rule."""


@dataclass
class Request:
    """A request as the model sees it: pieces of ``(address, length)`` and their bytes."""

    head: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)
    source: bytes = b""
    faulty: bool = False
    tail: int | None = None


class Model:
    """The device's side of a ring, by the book.

    Args:
        memory: Physical memory.
        pages: What the IOMMU maps: page to page and permissions; None without an IOMMU.
        indirect: Whether indirect tables were negotiated.
    """

    def __init__(
        self, memory: bytes, pages: dict[int, tuple[int, int]] | None, *, indirect: bool
    ) -> None:
        self.memory = memory
        self.pages = pages
        self.indirect = indirect
        self.missing: set[tuple[int, int]] = set()

    def pieces(self, addr: int, length: int, access: int) -> list[tuple[int, int, int]] | None:
        """``(address, physical, length)``; None, and what is missing noted, without translation."""
        if self.pages is None:
            return [(addr, addr, length)]
        found, lacking = [], set()
        end = addr + length
        for page in range(addr - addr % PAGE, end, PAGE):
            target, perm = self.pages.get(page, (0, 0))
            if page not in self.pages or access & ~perm:
                lacking.add((page, access))
                continue
            first, last = max(addr, page), min(end, page + PAGE)
            found.append((first, target + first - page, last - first))
        self.missing |= lacking
        return None if lacking else found

    def reach(
        self, addr: int, length: int, access: int
    ) -> tuple[list[tuple[int, int]], bytes, bool] | None:
        """What can be reached of a range, its bytes, and whether that is all of it."""
        pieces = self.pieces(addr, length, access)
        if pieces is None:
            return None
        reached: list[tuple[int, int]] = []
        data = b""
        for start, at, size in pieces:
            here = min(size, max(MEMORY - at, 0))
            if here:
                reached.append((start, here))
                data += self.memory[at : at + here]
            if here < size:
                return reached, data, False
        return reached, data, True

    def pop(self, next_avail: int) -> tuple[list[Request], set[tuple[int, int]]]:
        """The requests that may be taken, and what the others lack."""
        (avail,) = struct.unpack_from("<H", self.memory, AVAIL + 2)
        waiting = (avail - next_avail) & 0xFFFF
        if waiting > SIZE:
            raise BrokenRingError("ahead")
        taken = []
        for i in range(waiting):
            slot = AVAIL + 4 + 2 * ((next_avail + i) % SIZE)
            (head,) = struct.unpack_from("<H", self.memory, slot)
            request = self.walk(head)
            if not self.missing:
                taken.append(request)
        return taken, self.missing

    def walk(self, head: int) -> Request:
        request = Request(head)
        sizes = [0, 0]
        table, index, entries, nested = self.memory[DESC : DESC + 16 * SIZE], head, SIZE, False
        visited: set[int] = set()
        while True:
            if index >= entries:
                raise BrokenRingError("index")
            if index in visited:
                raise BrokenRingError("loop")
            visited.add(index)
            addr, length, flags, following = struct.unpack_from("<QIHH", table, 16 * index)
            if flags & INDIRECT:
                if not self.indirect or nested or flags & NEXT:
                    raise BrokenRingError("indirect")
                if not length or length % 16 or length > 16 * 1024 or addr + length > TOP:
                    raise BrokenRingError("table")
                found = self.reach(addr, length, 1)
                if found is None or not found[2]:
                    request.faulty = True
                    return request
                table, index, entries, nested = found[1], 0, length // 16, True
                visited = set()
                continue
            writes = int(bool(flags & WRITE))
            if not length or addr + length > TOP or (not writes and sizes[1]):
                raise BrokenRingError("buffer")
            sizes[writes] += length
            if sum(sizes) > 2**32:
                raise BrokenRingError("long")
            self.add(request, addr, length, writes)
            if not flags & NEXT:
                return request
            index = following

    def add(self, request: Request, addr: int, length: int, writes: int) -> None:
        found = self.reach(addr, length, 2 if writes else 1)
        request.faulty |= found is None or not found[2]
        if found is not None:
            (request.writable if writes else request.readable).extend(found[0])
            request.source += b"" if writes else found[1]
        if writes:
            # Whether it is missing counts only if it is asked for.
            before = set(self.missing)
            last = self.reach(addr + length - 1, 1, 2)
            self.missing = before
            request.tail = addr + length - 1 if last is not None and last[0] else None


def merged(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighboring pieces as one."""
    result: list[tuple[int, int]] = []
    for start, size in pieces:
        if result and result[-1][0] + result[-1][1] == start:
            result[-1] = (result[-1][0], result[-1][1] + size)
        else:
            result.append((start, size))
    return result


def address(rng: random.Random) -> int:
    return rng.choice(
        (
            BUFFERS + rng.randrange(0x4000),
            BUFFERS + rng.randrange(0x4000),
            BUFFERS + PAGE * rng.randrange(1, 4) - rng.randrange(4),
            MEMORY - rng.randrange(8),
            TOP - rng.randrange(1, 20),
            rng.getrandbits(64),
        )
    )


def descriptor(rng: random.Random, count: int) -> bytes:
    length = rng.choice((1, 1, 2, 16, 100, 511, PAGE, 2 * PAGE + 1, 0, rng.getrandbits(15)))
    flags = rng.choice((0, NEXT, NEXT, WRITE, WRITE | NEXT, WRITE | NEXT, 4, 5, 0xFFF8))
    return struct.pack("<QIHH", address(rng), length, flags, rng.randrange(count + 1))


def chain(rng: random.Random, first: int, count: int) -> bytes:
    """A chain without a mistake in its order, over descriptors in a row."""
    reads = rng.randrange(count + 1)
    data = b""
    for i in range(count):
        flags = (0 if i < reads else WRITE) | (NEXT if i < count - 1 else 0)
        where = BUFFERS + rng.randrange(0x6000)
        data += struct.pack("<QIHH", where, rng.choice((1, 16, 512, 4097)), flags, first + i + 1)
    return data


def build(rng: random.Random, next_avail: int) -> bytearray:
    """Memory with a ring in it: mostly in order, then spoiled in some places."""
    memory = bytearray(rng.randbytes(MEMORY))
    at = 0
    heads = []
    while at < SIZE:
        count = rng.randrange(1, min(4, SIZE - at) + 1)
        if count == 1 and rng.random() < 0.5:
            rows = rng.randrange(1, 8)
            place = TABLES + rng.choice((0, 8, PAGE - 24, rng.randrange(0x2000)))
            memory[place : place + 16 * rows] = chain(rng, 0, rows)
            data = struct.pack("<QIHH", place, 16 * rows, INDIRECT, 0)
        else:
            data = chain(rng, at, count)
        memory[DESC + 16 * at : DESC + 16 * (at + count)] = data
        heads.append(at)
        at += count
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 8))):
        table = rng.choice((DESC, TABLES))
        spot = table + 16 * rng.randrange(SIZE)
        memory[spot : spot + 16] = descriptor(rng, SIZE)
    offered = rng.choice((0, 1, len(heads), len(heads), SIZE, SIZE + rng.randrange(3)))
    memory[AVAIL : AVAIL + 6 + 2 * SIZE] = bytes(6 + 2 * SIZE)
    struct.pack_into("<H", memory, AVAIL + 2, (next_avail + offered) & 0xFFFF)
    for i in range(min(offered, SIZE)):
        head = rng.choice(heads) if rng.random() < 0.97 else rng.getrandbits(16)
        struct.pack_into("<H", memory, AVAIL + 4 + 2 * ((next_avail + i) % SIZE), head)
    return memory


def mappings(rng: random.Random) -> dict[int, tuple[int, int]]:
    """Pages that lie elsewhere, some of them missing, some of them for one access only."""
    pages = {page: (page, 3) for page in (DESC, AVAIL, USED)}
    for page in range(TABLES, MEMORY + 2 * PAGE, PAGE):
        if rng.random() < 0.9:
            target = page if page < BUFFERS or rng.random() < 0.5 else _elsewhere(rng)
            pages[page] = (target, rng.choice((3, 3, 3, 3, 1, 2)))
    if rng.random() < 0.3:
        pages[TOP - PAGE] = (_elsewhere(rng), 3)
    return pages


def _elsewhere(rng: random.Random) -> int:
    return PAGE * rng.randrange(BUFFERS // PAGE, MEMORY // PAGE + 1)


def compare(chain: Chain, request: Request) -> None:
    assert chain.head == request.head
    assert (chain.fault is not None) == request.faulty
    assert merged(chain.readable.fragments()) == merged(request.readable)
    assert merged(chain.writable.fragments()) == merged(request.writable)
    assert chain.readable.read() == request.source
    tail = None if chain.tail is None else chain.tail.fragments()
    assert tail == (None if request.tail is None else [(request.tail, 1)])


def touched(misses: list[tuple[tuple[int, int], int]]) -> set[tuple[int, int]]:
    return {
        (page, access)
        for (base, length), access in misses
        for page in range(base - base % PAGE, base + length, PAGE)
    }


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.capacity(RING_LOOK_WORK=1024)
def test_core_and_model_agree(batch: int) -> None:
    region = MmapRegion.anonymous(0, MEMORY)
    memory = GuestRegionCollection.from_regions([region])
    seen = {"broken": 0, "missing": 0, "faulty": 0, "good": 0}
    for case in range(CASES // BATCHES):
        rng = random.Random(1_000_000 * batch + case)
        next_avail = rng.choice((0, 1, 7, 0xFFFC, rng.getrandbits(16)))
        content = build(rng, next_avail)
        pages = mappings(rng) if rng.random() < 0.5 else None
        indirect = rng.random() < 0.9
        memory.write(0, bytes(content))
        iotlb = None
        if pages is not None:
            iotlb = Iotlb()
            for page, (target, perm) in pages.items():
                iotlb.set_mapping(page, target, PAGE, Permissions(perm))
        ring = SplitRing(
            AddressSpace(memory._space.regions, iotlb and iotlb._map),
            *(SIZE, DESC, AVAIL, USED),
            base=next_avail,
            indirect=indirect,
        )
        model = Model(bytes(content), pages, indirect=indirect)
        _check(ring, model, next_avail, seen)
        assert memory.read(0, MEMORY) == content, "looking changes nothing"
        if iotlb is not None and ring.broken is None:
            iotlb.invalidate_all()
    assert min(seen.values()) > CASES // BATCHES // 20, seen


def _check(ring: SplitRing, model: Model, next_avail: int, seen: dict[str, int]) -> None:
    try:
        requests, missing = model.pop(next_avail)
    except BrokenRingError:
        seen["broken"] += 1
        with pytest.raises(QueueError):
            ring.pop()
        return
    chains, misses = ring.pop()
    assert touched(misses) == missing
    assert len(chains) == len(requests)
    for chain, request in zip(chains, requests, strict=True):
        compare(chain, request)
        seen["faulty" if request.faulty else "good"] += 1
        ring.complete(chain, 0)
    if not missing:
        return
    # What lacks translations can still be taken, to be failed.
    seen["missing"] += 1
    (head,) = struct.unpack_from(
        "<H", model.memory, AVAIL + 4 + 2 * ((next_avail + len(chains)) % SIZE)
    )
    chain = ring.pop_faulty()
    assert chain is not None
    compare(chain, model.walk(head))
    ring.complete(chain, 0)
