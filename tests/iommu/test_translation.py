"""Translation by an IOMMU's tables: what is asked for, explained, counted, and shared by views."""

import io

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
    MmapRegion,
    PartialAccessError,
    Permissions,
)

NONE, R, W, RW = map(Permissions, range(4))
MAX = 2**64 - 1


class PageTables(Iommu):
    """An IOMMU with tables of its own, from which the IOTLB is filled page by page."""

    def __init__(self, pages):
        self.pages, self.questions, self._iotlb = pages, [], Iotlb()

    @property
    def iotlb(self):
        return self._iotlb

    def resolve(self, fails, iova, length, access):
        self.questions.append((fails.misses, fails.access_fails))
        for base, size in (*fails.misses, *fails.access_fails):
            for page in range(base >> 12, (base + size - 1 >> 12) + 1):
                target, perm = self.pages.get(page, (0, None))
                if perm is None or not perm.allows(access):
                    raise CannotResolveError(IovaRange(page << 12, 4096), access, "no such page")
                self._iotlb.set_mapping(page << 12, target, 4096, perm)


@pytest.fixture
def memory():
    regions = [MmapRegion.anonymous(0, 0x10000, bitmap=AtomicBitmap(0x10000))]
    tables = PageTables({0x10: (0x3000, RW), 0x11: (0x1000, RW), 0x12: (0x7000, RW), 0x13: (0, R)})
    backend = GuestRegionCollection.from_regions(regions)
    return IommuMemory(backend, tables, bitmap=AtomicBitmap(0x20000))


def test_everything_that_is_missing_is_asked_for_at_once(memory):
    iotlb = memory.iommu.iotlb
    iotlb.set_mapping(0x11000, 0x1000, 0x1000, R)
    memory.write(0x10800, b"x" * 0x2000)
    assert memory.iommu.questions == [
        ([(0x10800, 0x800), (0x12000, 0x800)], [(0x11000, 0x1000)]),
    ]
    memory.write(0x10000, b"x" * 0x3000)
    assert len(memory.iommu.questions) == 1
    assert memory.backend.read(0x3800, 0x800) == b"x" * 0x800


def test_a_tightened_translation_is_asked_for_again(memory):
    """Taking away is pushed; allowing more is found out at the next access."""
    memory.write(0x10000, b"1234")
    memory.iommu.pages[0x10] = (0x4000, R)
    memory.iommu.iotlb.invalidate_mapping(0x10000, 0x1000)
    with pytest.raises(CannotResolveError) as caught:
        memory.write(0x10000, b"5678")
    assert caught.value.reason == "no such page"
    assert memory.read(0x10000, 4) == bytes(4)
    memory.iommu.pages[0x10] = (0x4000, RW)
    memory.write(0x10000, b"5678")
    assert memory.backend.read(0x4000, 4) == b"5678"
    assert memory.backend.read(0x3000, 4) == b"1234"


def test_a_failed_translation_moves_nothing_whatever_the_access(memory):
    """Pages 0x13 (read-only) and 0x14 (missing) follow three good ones."""
    before = memory.backend.read(0, 0x10000)
    for access in (
        lambda: memory.write(0x12000, b"x" * 0x2000),
        lambda: memory.write_some(0x12000, b"x" * 0x2000),
        lambda: memory.read_from(0x12000, io.BytesIO(b"x" * 0x2000), 0x2000),
        lambda: memory.fill(0x12FFF, 2, 1),
        lambda: next(memory.slices(0x12000, 0x2000, W)),
        lambda: memory.read(0x12000, 0x3000),
    ):
        with pytest.raises(CannotResolveError):
            access()
    assert memory.backend.read(0, 0x10000) == before
    assert memory.bitmap.count() == 0
    assert memory.check_range(0x12000, 0x2000, R)
    assert not memory.check_range(0x12000, 0x2000, W)
    assert not memory.check_range(0x12000, 0x3000, NONE)


def test_two_views_of_one_iommu(memory):
    """What a copy of the original's is: another view that shares all but the switch."""
    other = IommuMemory(memory.backend, memory.iommu, memory.enabled, memory.bitmap)
    other.write(0x11000, b"other")
    assert memory.read(0x11000, 5) == b"other"
    assert memory.bitmap.dirty_pages().tolist() == [0x11]
    other.enabled = False
    assert (memory.enabled, memory.physical_memory) == (True, None)
    assert other.physical_memory is memory.backend
    assert other.read(0x1000, 5) == b"other"
    other.write(0x1000, b"plain")
    assert memory.read(0x11000, 5) == b"plain"
    [region] = memory.backend
    assert region.bitmap.dirty_pages().tolist() == [1]


def test_a_target_that_wraps_around():
    """Either side of the end of physical memory can be used, but no access goes across it."""
    iommu = PageTables({})
    iommu.iotlb.set_mapping(0x1000, MAX - 0xF, 0x20, RW)
    backend = GuestRegionCollection.from_regions(
        [MmapRegion.anonymous(0, 0x1000), MmapRegion.anonymous(MAX - 0xFFF, 0x1000)]
    )
    memory = IommuMemory(backend, iommu)
    assert iommu.iotlb.lookup(0x1008, 0x10, R) == [MappedRange(MAX - 7, 0x10)]
    assert iommu.iotlb.lookup(0x1010, 4, R) == [MappedRange(0, 4)]
    memory.write(0x1008, b"01234567")
    memory.write(0x1010, b"89abcdef")
    assert (backend.read(MAX - 7, 8), backend.read(0, 8)) == (b"01234567", b"89abcdef")
    with pytest.raises(PartialAccessError) as caught:
        memory.write(0x1008, b"x" * 16)
    assert (caught.value.completed, caught.value.__cause__.target) == (8, 0)
    assert backend.read(0, 8) == b"89abcdef"
    assert not memory.check_range(0x1008, 16, R)


def test_the_end_of_the_translated_space():
    iommu = PageTables({})
    iommu.iotlb.set_mapping(MAX - 0xFFF, 0, 0x1000, RW)
    memory = IommuMemory(GuestRegionCollection.from_ranges([(0, 0x1000)]), iommu)
    memory.write(MAX - 3, b"last")
    assert memory.backend.read(0xFFC, 4) == b"last"
    assert memory.check_range(MAX, 1, W)
    assert not memory.check_range(MAX, 2, W)
    with pytest.raises(InvalidAddressError):
        memory.write(MAX - 3, b"fifth")


def test_mappings_in_order():
    iotlb = Iotlb()
    for iova, to, perm in ((0x3000, 0x8000, R), (0x1000, 0x9000, W), (0x2000, 0xA000, W)):
        iotlb.set_mapping(iova, to, 0x1000, perm)
    iotlb.invalidate_mapping(0x3800, 0x100)
    assert list(iotlb) == [
        ((0x1000, 0x2000), (0x9000, 0x2000), W),
        ((0x3000, 0x800), (0x8000, 0x800), R),
        ((0x3900, 0x700), (0x8900, 0x700), R),
    ]
    assert len(iotlb) == 3
    iotlb.invalidate_all()
    assert (len(iotlb), list(iotlb)) == (0, [])


def test_an_explanation_names_what_is_wrong_and_what_is_near():
    iotlb = Iotlb()
    iotlb.set_mapping(0x1000, 0x8000, 0x1000, R)
    iotlb.set_mapping(0x3000, 0xA000, 0x1000, RW)
    iotlb.set_mapping(0x9000, 0xC000, 0x1000, W)
    before = iotlb.stats()
    lines = iotlb.explain(0x1800, 0x3000, W).splitlines()
    assert "0x1800+0x3000 for WRITE fails: 2 ranges not mapped, 1 refused" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "0x1800+0x800 -> 0x8800 READ: WRITE is refused",
        "0x2000+0x1000 is not mapped",
        "0x3000+0x1000 -> 0xa000 READ_WRITE: ok",
        "0x4000+0x800 is not mapped",
        "before: nothing is mapped",
        "after: 0x9000+0x1000 -> 0xc000 WRITE",
    ]
    assert "succeeds" in iotlb.explain(0x3000, 0x1000, RW)
    assert "0 bytes" in iotlb.explain(0x1800, 0, W)
    nothing = Iotlb().explain(MAX, 1, R)
    assert nothing.count("nothing is mapped") == 2
    assert iotlb.stats() == before


def test_an_explanation_of_many_pieces_shows_some_and_counts_all():
    iotlb = Iotlb()
    for page in range(200):
        iotlb.set_mapping(page << 13, page << 13, 0x1000, R)
    lines = iotlb.explain(0, 200 << 13, R).splitlines()
    assert "fails: 200 ranges not mapped, 0 refused" in lines[0]
    assert lines[-3].strip() == "and 336 more pieces"
    assert len(lines) == 1 + 64 + 1 + 2


def test_counters_and_capacity():
    iotlb = Iotlb(capacity=2)
    iotlb.set_mapping(0, 0x8000, 0x1000, RW)
    iotlb.pin(0, 1)
    for page in (2, 4, 6):
        iotlb.set_mapping(page << 12, 0x8000, 0x1000, R)
    assert [entry[0].base for entry in iotlb] == [0, 0x6000]
    iotlb.lookup(0, 0x1000, RW)
    iotlb.lookup_many([0, 0x6000, 0x2000, 0x6000], 4, W)
    iotlb.invalidate_mapping(0x6000, 0x1000)
    stats = iotlb.stats()
    assert stats._asdict() == {
        "entries": 1,
        "capacity": 2,
        "hits": 2,
        "misses": 1,
        "access_fails": 2,
        "evictions": 2,
        "invalidations": 1,
    }
