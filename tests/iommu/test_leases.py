"""Every way to memory holds a lease while it is used, and none afterwards, whatever happened."""

import contextlib
import ctypes
import fcntl
import os
import termios
import threading
import time

import pytest

from guestio import (
    AccessError,
    AtomicBitmap,
    DirtyMode,
    GuestRegionCollection,
    InvalidAddressError,
    Iommu,
    IommuMemory,
    Iotlb,
    MmapRegion,
    Permissions,
)
from guestio._core.iommu.address_space import AddressSpace
from guestio._core.virtio.split import SplitRing

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
PAGE = 4096
LONG = 1 << 20  # takes a copy without the GIL in every build of the core


class Tables(Iommu):
    def __init__(self):
        self._iotlb = Iotlb()

    @property
    def iotlb(self):
        return self._iotlb


@pytest.fixture
def memory():
    """1 MiB at 0x100000, the half of it that follows at the end mapped to no memory."""
    physical = GuestRegionCollection.from_regions([MmapRegion.memfd(0, LONG)])
    memory = IommuMemory(physical, Tables())
    memory.iommu.iotlb.set_mapping(0x100000, 0, LONG, RW)
    memory.iommu.iotlb.set_mapping(0x300000, 0x2000, PAGE, R)
    memory.iommu.iotlb.set_mapping(0x400000, LONG - PAGE, 2 * PAGE, RW)
    return memory


ACCESSES = {
    "read": lambda m, at, n: m.read(at, n),
    "readinto": lambda m, at, n: m.readinto(at, bytearray(n)),
    "read_some": lambda m, at, n: m.read_some(at, bytearray(n)),
    "write": lambda m, at, n: m.write(at, bytes(n)),
    "write_some": lambda m, at, n: m.write_some(at, bytes(n)),
    "fill": lambda m, at, n: m.fill(at, n),
    "load": lambda m, at, n: m.load(at, 8),
    "store": lambda m, at, n: m.store(at, 1, 8),
    "exchange": lambda m, at, n: m.compare_exchange(at, 0, 1, 8),
    "check": lambda m, at, n: m.check_range(at, n, RW),
    "slices": lambda m, at, n: list(m.slices(at, n, RW)),
    "gather": lambda m, at, n: m.gather(at, n, RW).close(),
    "guard": lambda m, at, n: m.iommu.translate(at, n, RW).close(),
}


@pytest.mark.parametrize("way", ACCESSES)
@pytest.mark.parametrize(
    ("at", "length"),
    [
        (0x100008, 64),
        (0x100008, LONG - 8),
        (0x200000 - 8, 16),  # ends unmapped
        (0x500000, 8),  # is unmapped
        (0x300000, 8),  # forbids writing
        (0x400000, 2 * PAGE),  # leads out of memory
        (0x400000 + PAGE, 8),
    ],
)
def test_no_lease_is_left(memory, way, at, length):
    """Also where the first bytes were translated, or moved, before it failed."""
    leases = memory.iommu.iotlb._map.leases
    with contextlib.suppress(AccessError):
        ACCESSES[way](memory, at, length)
    assert len(leases) == 0


def holding(memory, fd, wanted):
    """Wait until a pipe holds bytes that a thread put there, or lacks them."""
    count = ctypes.c_int()
    end = time.monotonic() + 30
    while True:
        fcntl.ioctl(fd, termios.FIONREAD, count)
        if count.value >= wanted:
            return
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_copy_without_the_interpreter_is_held(memory):
    """The quick way of `write`: the thread that copies holds a lease on all it copies to."""
    iotlb = memory.iommu.iotlb
    seen, stop = [], threading.Event()
    # One lease, over the first byte and the last.
    held = (1, True, True)

    def watch():
        # Another thread gets the interpreter during a copy only if that lets go of it.
        while not stop.is_set():
            first, last = (not iotlb.drain(at, 1, 0.0) for at in (0x100000, 0x100000 + LONG - 1))
            seen.append((len(iotlb._map.leases), first, last))

    watcher = threading.Thread(target=watch)
    watcher.start()
    end = time.monotonic() + 30
    data, buffer = bytes(LONG), bytearray(LONG)
    try:
        while held not in seen and time.monotonic() < end:
            memory.write(0x100000, data)
        wrote, seen[:] = held in seen, []
        while held not in seen and time.monotonic() < end:
            memory.readinto(0x100000, buffer)
    finally:
        stop.set()
        watcher.join()
    assert wrote
    assert held in seen
    assert {count for count, _, _ in seen} <= {0, 1}


@pytest.mark.parametrize("way", ["vector", "slices"])
def test_a_revocation_waits_for_a_transfer_to_a_pipe(memory, way):
    """What is held is exactly the range that was asked for."""
    iotlb = memory.iommu.iotlb
    reader, writer = os.pipe()
    try:
        moved = []
        with memory.gather(0x100000 + PAGE, LONG - 2 * PAGE, R) as vector:
            thread = threading.Thread(target=lambda: moved.append(vector.to_file(writer)))
            thread.start()
            holding(memory, reader, 65536)
            assert len(iotlb._map.leases) == 1
            # Beside it nothing is waited for.
            assert iotlb.drain(0x100000, PAGE, 0.0)
            assert iotlb.drain(0x100000 + LONG - PAGE, PAGE, 0.0)
            done = []
            for at, size in ((PAGE, 1), (LONG - PAGE - 1, 1), (0, LONG)):
                other = threading.Thread(
                    target=lambda at=at, size=size: done.append(
                        iotlb.drain(0x100000 + at, size, 0.02)
                    )
                )
                other.start()
                other.join(30)
            assert done == [False] * 3
            left = LONG - 2 * PAGE
            while left:
                left -= len(os.read(reader, 1 << 16))
            thread.join(30)
            assert moved == [LONG - 2 * PAGE]
        assert iotlb.drain(0, 1 << 64, 0.0)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_failed_translation_of_a_ring_keeps_nothing(memory):
    """Nor one that was only looked at: the request stays in the ring, without a lease."""
    physical, iotlb = memory.backend, memory.iommu.iotlb
    iotlb.set_mapping(0, 0, 3 * PAGE, RW)
    ring = SplitRing(AddressSpace(physical._space.regions, iotlb._map), 8, 0, PAGE, 2 * PAGE)
    for i, (at, size, flags) in enumerate(
        ((0x104000, PAGE, 1), (0x200000 - 8, 16, 1), (0x300000, 8, 2))
    ):
        link = flags.to_bytes(2, "little") + (i + 1).to_bytes(2, "little")
        physical.write(16 * i, at.to_bytes(8, "little") + size.to_bytes(4, "little") + link)
    physical.store(PAGE + 2, 1, 2)
    chains, misses = ring.pop()
    assert chains == []
    assert [(tuple(where), access) for where, access in misses] == [
        ((0x200000, 8), 1),
        ((0x300000, 8), 2),
    ]
    assert len(iotlb._map.leases) == 0
    assert ring.lacking() == misses
    assert len(iotlb._map.leases) == 0
    # Given up, it holds what could be translated, and nothing of what could not.
    other = SplitRing(AddressSpace(physical._space.regions, iotlb._map), 8, 0, PAGE, 2 * PAGE)
    faulty = other.pop_faulty()
    assert faulty.fault is not None
    assert [size for _, size in faulty.readable.fragments()] == [PAGE]
    assert len(iotlb._map.leases) == 1
    other.complete(faulty, 0)
    assert len(iotlb._map.leases) == 0
    iotlb.set_mapping(0x200000, 0x5000, PAGE, R)
    iotlb.set_mapping(0x300000, 0x2000, PAGE, RW)
    (chain,), misses = ring.pop()
    assert len(iotlb._map.leases) == 3
    with pytest.raises(RuntimeError, match="itself"):
        iotlb.check_drain(0x300000, 1)
    # Then another thread has it, which this one may wait for.
    chain.hand_over()
    iotlb.check_drain(0, 1 << 64)
    assert not iotlb.drain(0x300000, 1, 0.0)
    ring.complete(chain, 0)
    assert len(iotlb._map.leases) == 0


def test_a_vector_of_memory_that_ends_holds_what_comes_before(memory):
    with pytest.raises(InvalidAddressError) as caught:
        memory.gather(0x400000, 2 * PAGE, RW)
    assert (caught.value.addr, caught.value.target) == (0x400000 + PAGE, LONG)
    assert len(memory.iommu.iotlb._map.leases) == 0
    assert memory.read_some(0x400000, bytearray(2 * PAGE)) == PAGE


def test_without_a_bitmap_of_its_own_a_memory_marks_in_the_regions():
    """A migration by guest physical address would lose pages silently."""
    region = MmapRegion.anonymous(0, 16 * PAGE, bitmap=AtomicBitmap(16 * PAGE))
    backend = GuestRegionCollection.from_regions([region])
    tables, marked = Tables(), AtomicBitmap(16 * PAGE)
    tables.iotlb.set_mapping(2 * PAGE, 4 * PAGE, PAGE, RW)
    IommuMemory(backend, tables).write(2 * PAGE, b"x")
    assert region.bitmap.dirty_pages(clear=True).tolist() == [4]
    IommuMemory(backend, tables, bitmap=marked).write(2 * PAGE, b"x")
    assert (marked.dirty_pages().tolist(), region.bitmap.count()) == ([2], 0)
    assert IommuMemory(backend, tables).dirty is DirtyMode.PHYSICAL
    assert IommuMemory(backend, tables, bitmap=marked).dirty is DirtyMode.IOVA
    with pytest.raises(TypeError, match="dirty"):
        IommuMemory(backend, tables, dirty="iova")


def test_an_endpoint_marks_in_the_regions():
    from guestio.virtio.iommu import VirtioIommu

    region = MmapRegion.anonymous(0, 16 * PAGE, bitmap=AtomicBitmap(16 * PAGE))
    backend = GuestRegionCollection.from_regions([region])
    endpoint = VirtioIommu(endpoints=[8], bypass=True).endpoint(8)
    endpoint.memory(backend).write(3 * PAGE, b"x")
    assert region.bitmap.dirty_pages().tolist() == [3]


def request_of(memory):
    """A ring with one request: 16 bytes to read, then two pages to write."""
    for i, (at, size, flags) in enumerate(((0x4000, 16, 1), (0x8000, PAGE, 3), (0xA000, PAGE, 2))):
        link = flags.to_bytes(2, "little") + (i + 1).to_bytes(2, "little")
        memory.write(16 * i, at.to_bytes(8, "little") + size.to_bytes(4, "little") + link)
    memory.store(PAGE + 2, 1, 2)
    ring = SplitRing(memory._space, 8, 0, PAGE, 2 * PAGE)
    (chain,), _ = ring.pop()
    return ring, chain


def test_a_buffer_that_is_kept_is_marked_before_its_request_is_shown():
    region = MmapRegion.anonymous(0, 16 * PAGE, bitmap=AtomicBitmap(16 * PAGE))
    memory = GuestRegionCollection.from_regions([region])
    ring, chain = request_of(memory)
    region.bitmap.reset()
    first, second = chain.writable.slices()
    kept = memoryview(second.subslice(8, 8))
    kept[:] = b"12345678"
    with memoryview(chain.readable.slices()[0]) as view:
        assert view.readonly
    assert region.bitmap.count() == 0
    chain.finish(PAGE)
    assert region.bitmap.dirty_pages(clear=True).tolist() == [10]
    ring.complete(chain)
    ring.publish()
    region.bitmap.reset()
    # It can be written still, so it is marked once more.
    kept.release()
    assert region.bitmap.dirty_pages(clear=True).tolist() == [10]
    del first, second
    assert region.bitmap.count() == 0


def test_slices_of_a_vector_over_slices_are_marked_when_it_is_closed():
    from guestio._core.memory.vector import IoVector

    region = MmapRegion.anonymous(0, 16 * PAGE, bitmap=AtomicBitmap(16 * PAGE))
    memory = GuestRegionCollection.from_regions([region])
    parts = [memory.whole_slice(at * PAGE, PAGE, RW) for at in (2, 5, 7)]
    vector = IoVector.of_slices(parts, W)
    kept = memoryview(vector.slices()[1])
    vector.close()
    assert region.bitmap.dirty_pages(clear=True).tolist() == [5]
    assert vector.slices() == []
    kept.release()
    assert region.bitmap.dirty_pages(clear=True).tolist() == [5]


def test_a_request_of_many_descriptors_gives_back_each_lease(memory):
    """Its leases are more than a request has room for at first, and than twice as many."""
    physical, iotlb = memory.backend, memory.iommu.iotlb
    iotlb.set_mapping(0, 0, 3 * PAGE, RW)
    ring = SplitRing(AddressSpace(physical._space.regions, iotlb._map), 64, 0, PAGE, 2 * PAGE)
    parts = [0x100000 + 0x2000 * i for i in range(37)]
    for i, at in enumerate(parts):
        flags = 1 if i + 1 < len(parts) else 0
        link = flags.to_bytes(2, "little") + (i + 1).to_bytes(2, "little")
        physical.write(16 * i, at.to_bytes(8, "little") + (16).to_bytes(4, "little") + link)
    physical.store(PAGE + 2, 1, 2)
    (chain,), _ = ring.pop()
    chain.hand_over()
    assert len(iotlb._map.leases) == len(parts)
    assert not any(iotlb.drain(at, 16, 0.0) for at in parts)
    ring.complete(chain, 0)
    # With another one held, the table is looked at.
    with iotlb.guard(0, 1, R):
        assert len(iotlb._map.leases) == 1
        assert all(iotlb.drain(at, 16, 0.0) for at in parts)
