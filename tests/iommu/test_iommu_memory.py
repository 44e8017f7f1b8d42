"""Memory behind an IOMMU: what is mapped, what is resolved on demand, what a write marks."""

import copy

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    CannotResolveError,
    GuestRegionCollection,
    InvalidAddressError,
    Iommu,
    IommuMemory,
    Iotlb,
    IovaRange,
    MappedRange,
    MisalignedError,
    MmapRegion,
    PartialAccessError,
    Permissions,
)

NONE, R, W, RW = map(Permissions, range(4))


class OneShotIommu(Iommu):
    """Resolves the last failure of a lookup to an armed target, once, and records it."""

    def __init__(self):
        self._iotlb = Iotlb()
        self.armed = 0
        self.recorded = None

    @property
    def iotlb(self):
        return self._iotlb

    def resolve(self, fails, iova, length, access):
        last = fails.misses[-1] if fails.misses else fails.access_fails[-1]
        self.recorded = (last.base, last.length, bool(fails.misses))
        if len(fails.misses) + len(fails.access_fails) > 1:
            raise CannotResolveError(IovaRange(iova, length), access, "more than one failure")
        if not self.armed:
            raise CannotResolveError(last, access, "nothing is armed")
        target, self.armed = self.armed, 0
        self._iotlb.set_mapping(last.base, target, last.length, access)


def physical(*ranges, first=0):
    """Regions whose bytes count up through all of them."""
    memory = GuestRegionCollection.from_ranges(ranges)
    for start, size in ranges:
        memory.write(start, (np.arange(size) + first).astype(np.uint8))
        first += size
    return memory


def counted(length, first=0):
    return (np.arange(length) + first).astype(np.uint8).tobytes()


@pytest.fixture
def iommu():
    return OneShotIommu()


@pytest.fixture
def memory(iommu):
    return IommuMemory(physical((0x4000, 128), (0x8000, 128)), iommu)


def unresolved(access):
    with pytest.raises(CannotResolveError) as caught:
        access()
    return tuple(caught.value.iova_range)


def test_access_to_what_is_mapped(memory, iommu):
    iommu.iotlb.set_mapping(0x2A000, 0x4000, 128, R)
    iommu.iotlb.set_mapping(0x2A080, 0x8000, 128, R)
    assert [memory.check_range(0x2A000, 256, p) for p in (NONE, R, W, RW)] == [
        True,
        True,
        False,
        False,
    ]
    assert not memory.check_range(0x29FFF, 1)
    assert not memory.check_range(0x2A100, 1)
    assert memory.read(0x2A000, 256) == counted(256)
    assert unresolved(lambda: memory.read(0x29FFF, 1)) == (0x29FFF, 1)
    assert unresolved(lambda: memory.read(0x2A100, 1)) == (0x2A100, 1)
    assert unresolved(lambda: memory.read(0x2A000, 257)) == (0x2A100, 1)


def test_access_to_what_is_not_mapped(memory):
    for perm in (NONE, R, W, RW):
        assert not memory.check_range(0x2A000, 256, perm)
    for iova, length in ((0x2A000, 256), (0x29FFF, 1), (0x2A100, 1), (0x2A000, 257)):
        assert unresolved(lambda at=iova, n=length: memory.read(at, n)) == (iova, length)


def test_misses_are_resolved_during_an_access(memory, iommu):
    iommu.armed = 0x4000
    assert memory.read(0x2A000, 128) == counted(128)
    assert iommu.recorded == (0x2A000, 128, True)
    iommu.armed = 0x8000
    assert memory.read(0x2A000, 256) == counted(256)
    assert iommu.recorded == (0x2A080, 128, True)
    iommu.iotlb.set_mapping(0x2A000, 0x4000, 128, W)
    iommu.armed = 0x4000
    assert memory.read(0x2A000, 128) == counted(128)
    assert iommu.recorded == (0x2A000, 128, False)


def test_views_with_another_backend(iommu):
    a = IommuMemory(physical((0x4000, 128)), iommu)
    clone = copy.copy(a)
    iommu.iotlb.set_mapping(0x2A000, 0x4000, 128, R)
    b = IommuMemory(physical((0x4000, 128), (0x8000, 128), first=42), OneShotIommu())
    assert a.read(0x2A000, 128) == counted(128)
    assert unresolved(lambda: a.read(0x2A000, 256)) == (0x2A080, 128)
    assert b.physical_memory is None
    b.enabled = False
    assert b.physical_memory is b.backend
    a2 = a.with_replaced_backend(b.backend)
    iommu.armed = 0x8000
    assert a2.read(0x2A000, 256) == counted(256, 42)
    assert iommu.recorded == (0x2A080, 128, True)
    for view in (a, clone):
        assert view.read(0x2A000, 128) == counted(128)
    assert a.iommu is a2.iommu is clone.iommu
    assert clone.iommu.iotlb.lookup(0x2A000, 256, R) == [
        MappedRange(0x4000, 128),
        MappedRange(0x8000, 128),
    ]
    a2.enabled = clone.enabled = False
    assert a.enabled
    assert clone.read(0x4000, 128) == counted(128)


def test_slices_mark_io_pages(iommu):
    region = MmapRegion.anonymous(0x4000, 0x2000, bitmap=AtomicBitmap(0x2000))
    marked = AtomicBitmap(0x2C000)
    memory = IommuMemory(GuestRegionCollection.from_regions([region]), iommu, bitmap=marked)
    iommu.iotlb.set_mapping(0x2A000, 0x4000, 0x2000, RW)
    memory.read(0x2A000, 0x2000)
    pieces = memory.slices(0x2A000, 0x2000, RW)
    first = next(pieces)
    assert (marked.count(), region.bitmap.count()) == (0, 0)
    first.store(0, 1, 4)
    assert marked.dirty_pages().tolist() == [0x2A]
    marked.reset()
    first.store(4096, 1, 4)
    assert marked.dirty_pages().tolist() == [0x2B]
    assert region.bitmap.count() == 0


@pytest.fixture
def wide():
    """Five mappings: two writable, one read-only, one without memory, one with memory in part."""
    regions = [
        MmapRegion.anonymous(0x4000, 0x2000, bitmap=AtomicBitmap(0x2000)),
        MmapRegion.anonymous(0x8000, 0x1000, bitmap=AtomicBitmap(0x1000)),
    ]
    iommu = OneShotIommu()
    for iova, length, target, perm in (
        (0x10000, 0x1000, 0x4000, RW),
        (0x11000, 0x1000, 0x8000, RW),
        (0x12000, 0x1000, 0x5000, R),
        (0x13000, 0x1000, 0xF000, RW),
        (0x14000, 0x4000, 0x5000, RW),
    ):
        iommu.iotlb.set_mapping(iova, target, length, perm)
    backend = GuestRegionCollection.from_regions(regions)
    return IommuMemory(backend, iommu, bitmap=AtomicBitmap(0x40000))


def dirty(memory):
    """Dirty I/O pages, and how many pages of the regions."""
    return memory.bitmap.dirty_pages().tolist(), [r.bitmap.count() for r in memory.backend]


def test_writes_are_marked_by_iova(wide):
    wide.write(0x10FF8, bytes(range(16)))
    assert dirty(wide) == ([0x10, 0x11], [0, 0])
    assert wide.read(0x10FF8, 16) == bytes(range(16))


def test_refused_writes_move_nothing(wide):
    assert unresolved(lambda: wide.write(0x12000, b"four")) == (0x12000, 4)
    before = wide.backend.read(0x4000, 0x2000), wide.backend.read(0x8000, 0x1000)
    assert unresolved(lambda: wide.write(0x11FF8, b"\xff" * 16)) == (0x12000, 8)
    assert (wide.backend.read(0x4000, 0x2000), wide.backend.read(0x8000, 0x1000)) == before
    assert dirty(wide) == ([], [0, 0])


def test_a_target_without_memory(wide):
    with pytest.raises(InvalidAddressError) as caught:
        wide.read(0x13000, 4)
    assert (caught.value.addr, caught.value.target) == (0x13000, 0xF000)
    assert not wide.check_range(0x13000, 4, R)


def test_a_target_with_memory_for_a_part(wide):
    assert wide.read_some(0x14000, bytearray(0x2000)) == 0x1000
    with pytest.raises(PartialAccessError) as caught:
        wide.write(0x14000, bytes(0x2000))
    error = caught.value
    assert (error.length, error.completed) == (0x2000, 0x1000)
    assert (error.__cause__.addr, error.__cause__.target) == (0x15000, 0x6000)


def test_empty_writes(wide):
    """vm-memory fails the second."""
    assert wide.write_some(0x99999, b"") == 0
    assert wide.write_some(0x12800, b"") == 0


def test_an_object_over_two_translations(wide):
    with pytest.raises(MisalignedError):
        wide.load(0x10FFC, 8)
    wide.write_obj(0x10FFC, np.uint64(0x0123456789ABCDEF))
    assert wide.read_obj(0x10FFC, np.uint64) == 0x0123456789ABCDEF


def test_slices_end_at_page_boundaries_of_the_iommu(wide):
    assert [len(piece) for piece in wide.slices(0x10000, 0x3000, R)] == [0x1000] * 3


def test_a_disabled_iommu_passes_addresses_through(wide):
    wide.enabled = False
    wide.write(0x5000, b"four")
    assert dirty(wide) == ([], [1, 0])
    assert wide.check_range(0x5000, 4, W)
    assert not wide.check_range(0x10000, 4)
