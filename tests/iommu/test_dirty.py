"""Where writes through an IOMMU are marked, and how marks are harvested."""

import ctypes
import itertools
import os
import threading
import tracemalloc

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    DirtyMode,
    GuestRegionCollection,
    Iommu,
    IommuMemory,
    Iotlb,
    MmapRegion,
    Permissions,
)

RW, W = Permissions.READ_WRITE, Permissions.WRITE
PAGE = 4096


class Tables(Iommu):
    def __init__(self):
        self._iotlb = Iotlb()

    @property
    def iotlb(self):
        return self._iotlb


def build(mode, bitmap=True):
    """Pages 4 and 8 of physical memory at I/O pages 2 and 3."""
    region = MmapRegion.anonymous(0, 16 * PAGE, bitmap=AtomicBitmap(16 * PAGE))
    iommu = Tables()
    iommu.iotlb.set_mapping(2 * PAGE, 4 * PAGE, PAGE, RW)
    iommu.iotlb.set_mapping(3 * PAGE, 8 * PAGE, PAGE, RW)
    marked = AtomicBitmap(16 * PAGE) if bitmap else None
    memory = IommuMemory(
        GuestRegionCollection.from_regions([region]), iommu, bitmap=marked, dirty=mode
    )
    return memory, marked, region.bitmap


WAYS = {
    "write": lambda m, fd: m.write(3 * PAGE - 4, bytes(8)),
    "write_some": lambda m, fd: m.write_some(3 * PAGE - 4, bytes(8)),
    "fill": lambda m, fd: m.fill(3 * PAGE - 4, 8, 1),
    "object": lambda m, fd: m.write_obj(3 * PAGE - 4, ctypes.c_uint64(5)),
    "stores": lambda m, fd: (m.store(3 * PAGE - 8, 1, 8), m.store(3 * PAGE, 1, 8)),
    "exchange": lambda m, fd: (
        m.compare_exchange(3 * PAGE - 8, 0, 1, 8),
        m.compare_exchange(3 * PAGE, 0, 1, 4),
    ),
    "stream": lambda m, fd: m.read_exact_from(3 * PAGE - 4, fd, 8),
    "slices": lambda m, fd: [s.fill(0, len(s), 1) for s in m.slices(3 * PAGE - 4, 8, RW)],
    "slice stores": lambda m, fd: [s.store(0, 1, 4) for s in m.slices(3 * PAGE - 4, 8, RW)],
    "large": lambda m, fd: m.write(2 * PAGE, bytes(2 * PAGE)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("mode", "io_pages", "pages"),
    [
        (DirtyMode.IOVA, [2, 3], []),
        (DirtyMode.PHYSICAL, [], [4, 8]),
        (DirtyMode.BOTH, [2, 3], [4, 8]),
    ],
)
def test_every_way_to_write_marks_where_the_mode_says(mode, io_pages, pages, way):
    memory, marked, physical = build(mode)
    with open("/dev/zero", "rb", buffering=0) as zero:  # noqa: PTH123
        WAYS[way](memory, zero.fileno())
    assert marked.dirty_pages().tolist() == io_pages
    assert physical.dirty_pages().tolist() == pages


@pytest.mark.parametrize("mode", list(DirtyMode))
def test_disabled_it_is_the_regions(mode):
    memory, marked, physical = build(mode)
    memory.enabled = False
    memory.write(2 * PAGE, b"x")
    assert (marked.count(), physical.dirty_pages().tolist()) == (0, [2])


def test_no_bitmap_of_its_own():
    memory, _, physical = build(DirtyMode.BOTH, bitmap=False)
    memory.write(2 * PAGE, b"x")
    assert physical.dirty_pages().tolist() == [4]


def test_a_failed_read_of_a_file_marks_all_it_may_have_written(tmp_path):
    memory, marked, physical = build(DirtyMode.BOTH)
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with memory.gather(2 * PAGE, 2 * PAGE, W) as vector, pytest.raises(IsADirectoryError):
            vector.from_file(fd, 0)
    finally:
        os.close(fd)
    assert marked.dirty_pages().tolist() == [2, 3]
    assert physical.dirty_pages().tolist() == [4, 8]


def test_a_replaced_backend_keeps_mode_and_bitmap():
    memory, marked, _ = build(DirtyMode.BOTH)
    fresh = MmapRegion.anonymous(0, 16 * PAGE, bitmap=AtomicBitmap(16 * PAGE))
    other = memory.with_replaced_backend(GuestRegionCollection.from_regions([fresh]))
    assert (other.dirty, other.bitmap) == (DirtyMode.BOTH, marked)
    other.write(2 * PAGE, b"x")
    assert (marked.dirty_pages().tolist(), fresh.bitmap.dirty_pages().tolist()) == ([2], [4])


def test_migration_ends_with_equal_memory():
    """Copying what is dirty until nothing is, while a writer goes on, loses nothing."""
    memory, _, physical = build(DirtyMode.PHYSICAL)
    for page in range(16):
        memory.iommu.iotlb.set_mapping((32 + page) * PAGE, page * PAGE, PAGE, RW)
    source = memory.backend
    copy = bytearray(16 * PAGE)
    physical.set_range(0, 16 * PAGE)
    stop = threading.Event()

    def write():
        rng = np.random.default_rng(3)
        while not stop.is_set():
            at = int(rng.integers(0, 16 * PAGE - 20000))
            memory.write(32 * PAGE + at, rng.bytes(int(rng.choice([1, 8, 300, 20000]))))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            for page in physical.dirty_pages(clear=True).tolist():
                source.readinto(page * PAGE, memoryview(copy)[page * PAGE : (page + 1) * PAGE])
    finally:
        stop.set()
        writer.join()
    for page in physical.dirty_pages(clear=True).tolist():
        source.readinto(page * PAGE, memoryview(copy)[page * PAGE : (page + 1) * PAGE])
    assert bytes(copy) == source.read(0, 16 * PAGE)


def test_a_tebibyte_is_harvested_at_memory_speed():
    """Nothing but 32 MiB of bits is proportional to the guest."""
    bitmap = AtomicBitmap(1 << 40)
    rng = np.random.default_rng(1)
    chosen = np.unique(rng.integers(0, 1 << 28, 20000))
    for page in chosen.tolist():
        bitmap.set_bit(page)
    assert np.array_equal(bitmap.dirty_pages(), chosen.astype(np.uint64))
    assert np.array_equal(bitmap.dirty_pages(clear=True), chosen.astype(np.uint64))
    assert bitmap.count() == 0
    words = bitmap.get_and_reset()
    assert words.nbytes == 32 << 20
    assert not words.any()


def test_a_tebibyte_is_harvested_in_parts_and_pages_of_any_size():
    """Each byte range gives and takes what is its own, in whatever pages it is counted."""
    guest, huge = 1 << 40, 2 << 20
    bitmap = AtomicBitmap(guest)
    rng = np.random.default_rng(2)
    chosen = np.unique(rng.integers(0, guest // PAGE, 5000)).astype(np.uint64)
    for page in chosen.tolist():
        bitmap.set_range(page * PAGE + 17, 1)
    as_huge = np.unique(chosen // np.uint64(huge // PAGE))
    assert np.array_equal(bitmap.dirty_pages(page_size=huge), as_huge)
    assert bitmap.dirty_pages(page_size=1 << 39).tolist() == [0, 1]
    found = []
    cuts = [0, 1, PAGE, 12345 * PAGE + 1, 1 << 33, (1 << 39) + 5, guest - PAGE - 1, guest]
    for start, end in itertools.pairwise(cuts):
        expected = chosen[(chosen >= start // PAGE) & (chosen <= (end - 1) // PAGE)]
        assert set(bitmap.dirty_pages(start, end - start).tolist()) <= set(expected.tolist())
        found.append(bitmap.dirty_pages(start, end - start, clear=True))
        assert bitmap.dirty_pages(start, end - start).size == 0
    assert np.array_equal(np.concatenate(found), chosen)
    assert bitmap.count() == 0


def test_a_sparse_harvest_allocates_for_what_is_dirty_only():
    bitmap = AtomicBitmap(1 << 40)
    for page in range(0, 1 << 28, 1 << 20):
        bitmap.set_bit(page)
    bitmap.dirty_pages(0, 1)
    tracemalloc.start()
    try:
        found = bitmap.dirty_pages(clear=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.tolist() == list(range(0, 1 << 28, 1 << 20))
    assert peak < 1 << 16
