"""Dirty bitmaps, and which accesses mark them."""

import ctypes
import io
import os

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    Backing,
    GuestRegionCollection,
    InvalidAddressError,
    MmapRegion,
    Permissions,
    VolatileSlice,
)
from guestio.memory import DirtyLog

MAX = 2**64 - 1
R, W = Permissions.READ, Permissions.WRITE


def marks(bitmap, *addresses):
    return [bitmap.is_set(addr) for addr in addresses]


def tracked(size=0x10000, page_size=0x1000):
    """A region at 0, the memory made of it, and its bitmap."""
    bitmap = AtomicBitmap(size, page_size)
    region = MmapRegion.anonymous(0, size, bitmap=bitmap)
    return GuestRegionCollection.from_regions([region]), bitmap


def tracked_by_byte(*ranges):
    """Memory that marks every byte that is written, and its regions' bitmaps."""
    regions = [
        MmapRegion.anonymous(start, size, bitmap=AtomicBitmap(size, 1)) for start, size in ranges
    ]
    return GuestRegionCollection.from_regions(regions), [region.bitmap for region in regions]


@pytest.mark.parametrize(
    ("size", "page", "pages"),
    [(1025, 128, 9), (1024, 128, 8), (0, 128, 0), (4097, 4096, 2), (MAX, 1 << 50, 1 << 14)],
)
def test_sizes(size, page, pages):
    bitmap = AtomicBitmap(size, page)
    assert (len(bitmap), bitmap.pages, bitmap.byte_size) == (pages, pages, size)
    assert bitmap.page_size == page


class TestMerging:
    """Another bitmap's bits, such as a kernel's, with pages of its own size."""

    @pytest.mark.parametrize("unit", [1, 3, 4096, 5000, 8192, 1 << 20])
    @pytest.mark.parametrize("page", [1, 7, 4096, 1 << 16])
    @pytest.mark.parametrize("start", [0, 1, 4096, 12345])
    def test_every_size_and_place(self, unit, page, start):
        random = np.random.default_rng(start + unit + page)
        for share in (0.02, 0.5, 0.97, 1.0):
            flags = random.random(200) < share
            words = np.zeros(4, np.uint64)
            words.view(np.uint8)[:25] = np.packbits(flags, bitorder="little")
            size = start + 150 * unit + 11  # not all of it fits
            bitmap, model = AtomicBitmap(size, page), AtomicBitmap(size, page)
            assert bitmap.merge(start, words, unit) == np.count_nonzero(flags)
            for number in np.flatnonzero(flags).tolist():
                model.set_range(start + number * unit, unit)
            assert np.array_equal(bitmap.peek(), model.peek())

    def test_what_is_set_stays_and_goes_into_the_log(self):
        log = DirtyLog()
        with Backing.memfd(4096) as space:
            log.use(space._mapping, 0, 64)
            log.enabled = True
            bitmap = AtomicBitmap(1 << 20, log=log, log_start=1 << 16)
            bitmap.set_bit(1)
            log.take()
            words = np.array([1 << 63, 0b101], np.uint64)
            assert bitmap.merge(0, words) == 3
            assert list(bitmap.dirty_pages()) == [1, 63, 64, 66]
            assert list(log.take()) == [16 + 63, 16 + 64, 16 + 66]
            log.clear()

    def test_the_end_of_the_address_space(self):
        everything = np.full(2, MAX, np.uint64)
        bitmap = AtomicBitmap(MAX, 1 << 57)
        assert bitmap.merge(MAX - 4095, everything, 4096) == 128
        assert list(bitmap.dirty_pages()) == [127]
        bitmap.reset()
        bitmap.merge(0, everything, 1 << 57)
        assert bitmap.count() == 128
        bitmap.reset()
        bitmap.merge(MAX, everything, MAX)
        assert list(bitmap.dirty_pages()) == [127]

    def test_misuse(self):
        bitmap = AtomicBitmap(4096)
        for words in (None, bytes(8), np.zeros(1, np.int64), np.zeros((1, 1), np.uint64)):
            with pytest.raises((TypeError, ValueError, BufferError)):
                bitmap.merge(0, words)
        with pytest.raises(ValueError, match="page_size"):
            bitmap.merge(0, np.ones(1, np.uint64), 0)
        with pytest.raises(ValueError):
            bitmap.merge(-1, np.ones(1, np.uint64))
        assert bitmap.merge(0, np.zeros(0, np.uint64)) == 0
        assert not bitmap.count()


def test_set_copy_reset_harvest():
    bitmap = AtomicBitmap(1024, 128)
    bitmap.set_range(128, 129)
    expected = [False, True, True, False]
    assert marks(bitmap, 0, 128, 256, 384) == expected
    twin = bitmap.copy()
    assert marks(twin, 0, 128, 256, 384) == expected
    bitmap.reset()
    assert not any(marks(bitmap, 0, 128, 256, 384))
    assert marks(twin, 0, 128, 256, 384) == expected
    bitmap.set_range(128, 129)
    assert bitmap.peek().tolist() == [0b110]
    assert bitmap.get_and_reset().tolist() == [0b110]
    assert not any(marks(bitmap, 0, 128, 256, 384))
    assert bitmap.get_and_reset().tolist() == [0]


def test_reset_of_a_range():
    bitmap = AtomicBitmap(1024, 128)
    bitmap.set_range(128, 129)
    bitmap.reset_range(128, 129)
    assert bitmap.count() == 0


def test_marks_beyond_the_end_are_ignored():
    bitmap = AtomicBitmap(1024, 1)
    bitmap.set_range(768, 512)
    assert marks(bitmap, 767, 768, 1023, 1024, 1152) == [False, True, True, False, False]
    assert bitmap.count() == 256
    bitmap.set_bit(1024)
    bitmap.reset_bit(5000)
    assert not bitmap.is_bit_set(1024)


def test_enlarged_bitmaps_keep_their_marks():
    bitmap = AtomicBitmap(8192, 128)
    bitmap.set_range(128, 129)
    bitmap.enlarge(8192)
    assert (len(bitmap), bitmap.byte_size) == (128, 16384)
    assert not any(bitmap.is_bit_set(page) for page in range(65, 128))
    assert marks(bitmap, 128, 256) == [True, True]
    bitmap.set_bit(55)
    for page in range(65, 128):
        bitmap.set_bit(page)
    assert bitmap.is_bit_set(55)
    assert bitmap.dirty_pages().tolist() == [1, 2, 55, *range(65, 128)]
    bitmap.reset_range(0, 16384)
    assert bitmap.count() == 0


def test_a_slice_of_a_bitmap():
    bitmap = AtomicBitmap(0x800, 1)
    part = bitmap.slice_at(0x400)
    bitmap.set_range(0x400, 0x100)
    assert all(marks(part, 0, 0xFF))
    assert not part.is_set(0x100)
    part.slice_at(0x100).set_range(0, 1)
    assert bitmap.is_set(0x500)
    part.reset_range(0, 0x100)
    assert bitmap.dirty_pages().tolist() == [0x500]


WRITERS = {
    "write_some": lambda memory, addr: memory.write_some(addr, bytes(1024)),
    "write": lambda memory, addr: memory.write(addr, bytes(1024)),
    "write_obj": lambda memory, addr: memory.write_obj(addr, ctypes.c_uint64(1)),
    "store": lambda memory, addr: memory.store(addr, 1, 8),
    "fill": lambda memory, addr: memory.fill(addr, 5),
    "exchange": lambda memory, addr: memory.compare_exchange(addr, 0, 1, 8),
}


@pytest.mark.parametrize("how", WRITERS)
def test_every_write_marks_its_page(how):
    memory, bitmap = tracked()
    for addr in range(0x1000, 0x5000, 0x1000):
        assert not any(marks(bitmap, addr, addr + 0xFFF))
        WRITERS[how](memory, addr)
        assert marks(bitmap, addr, addr + 0xFFF, addr + 0x1000) == [True, True, False]


def test_what_reads_or_fails_marks_nothing():
    memory, bitmap = tracked()
    memory.read(0, 0x10000)
    memory.load(0, 8)
    assert memory.compare_exchange(0, 1, 2, 8) == (False, 0)
    list(memory.slices(0, 0x10000, W))
    with pytest.raises(InvalidAddressError):
        memory.write(0x10000, b"x")
    assert bitmap.count() == 0


def test_slices_know_where_they_are():
    memory, bitmap = tracked()
    whole = memory.whole_slice(0, 0x10000, W)
    whole.write(0x1000, bytes(8))
    assert all(marks(bitmap, 0x1000, 0x1FFF))
    bitmap.reset()
    head, tail = whole.split_at(0x1000)
    tail.write(0, b"x")
    assert marks(bitmap, 0, 0xFFF, 0x1000) == [False, False, True]
    assert head.bitmap is tail.bitmap is bitmap
    for part in (whole.subslice(0x1000, 8), whole.offset(0x1000)):
        bitmap.reset()
        part.store(0, 1, 8)
        assert bitmap.dirty_pages().tolist() == [1]


def test_copies_mark_their_destination():
    source, target = tracked(), tracked()
    source[0].whole_slice(0, 0x10000, W).copy_to(target[0].whole_slice(0, 0x10000, W))
    assert target[1].count() == 16
    assert source[1].count() == 0


@pytest.mark.parametrize("elements", [np.ones(0x1000, np.uint8), np.ones(1024, np.uint32)])
def test_copies_from_buffers(elements):
    memory, bitmap = tracked()
    memory.whole_slice(0, 0x10000, W).copy_from(elements)
    assert bitmap.dirty_pages().tolist() == [0]


def test_stores_mark_their_page():
    memory, bitmap = tracked(0x10000, 8)
    whole = memory.whole_slice(0, 0x10000, W)
    whole.store(0, 1, 8)
    whole.store(0x1000 * 8, 1, 8)
    assert bitmap.dirty_pages().tolist() == [0, 0x1000]


def test_a_slice_taken_before():
    memory, bitmap = tracked(0x10000, 8)
    before = memory.whole_slice(0x800, 0x1000, W)
    memory.write_obj(0x1000, ctypes.c_uint64(1))
    assert before.bitmap is bitmap
    assert marks(bitmap, 0xFFF, 0x1000, 0x1007, 0x1008) == [False, True, True, False]


@pytest.mark.parametrize(("start", "length", "words"), [(4095, 2, [3]), (MAX, 1, [0]), (0, 0, [0])])
def test_edges_of_a_mark(start, length, words):
    bitmap = AtomicBitmap(3 * 4096)
    bitmap.set_range(start, length)
    assert bitmap.peek().tolist() == words


def test_a_mark_past_the_space_is_refused():
    bitmap = AtomicBitmap(3 * 4096)
    with pytest.raises(InvalidAddressError):
        bitmap.set_range(MAX, MAX)
    assert bitmap.count() == 0


def test_a_slice_does_not_wrap():
    """vm-memory marks page 0 here."""
    bitmap = AtomicBitmap(3 * 4096)
    part = bitmap.slice_at(4096)
    for refused in (
        lambda: part.set_range(MAX - 4095, 1),
        lambda: part.reset_range(MAX - 4095, 1),
        lambda: part.is_set(MAX - 4095),
        lambda: part.slice_at(MAX),
        lambda: part.set_range(MAX - 8191, 8192),
    ):
        with pytest.raises(InvalidAddressError):
            refused()
    assert bitmap.count() == 0
    part.set_range(MAX - 4096, 1)
    assert bitmap.count() == 0


def test_writes_through_a_buffer_are_marked_when_it_is_released():
    """Writes through a host address are not: that is the caller's part."""
    memory, (bitmap,) = tracked_by_byte((0x4000, 0x1000))
    part = memory.whole_slice(0x4100, 16, W)
    with memoryview(part) as view:
        view[0] = 1
        assert bitmap.count() == 0
    assert bitmap.dirty_pages(clear=True).tolist() == list(range(0x100, 0x110))
    np.frombuffer(part.subslice(8, 8), np.uint64)[0] = 2
    assert bitmap.dirty_pages(clear=True).tolist() == list(range(0x108, 0x110))
    # What can only read marks nothing.
    assert bytes(memory.whole_slice(0x4100, 16, R))[:1] == b"\x01"
    assert part.read(0, 1) == b"\x01"
    memory.write(0x4800, part.subslice(0, 1))
    assert bitmap.dirty_pages(clear=True).tolist() == [0x800]
    ctypes.memset(part.host_address, 3, 1)
    assert memory.read(0x4100, 1) == b"\x03"
    assert bitmap.count() == 0
    part.bitmap.set_range(0x100, 16)
    assert bitmap.dirty_pages().tolist() == list(range(0x100, 0x110))


def test_a_slice_with_another_bitmap():
    memory, (bitmap,) = tracked_by_byte((0, 0x1000))
    other = AtomicBitmap(0x10000, 1)
    part = memory.whole_slice(0x10, 16, W).with_bitmap(other, 0x8000)
    part.write(4, b"four")
    part.subslice(8, 4).write(0, b"more")
    assert memory.read(0x14, 8) == b"fourmore"
    assert other.dirty_pages().tolist() == list(range(0x8004, 0x800C))
    assert bitmap.count() == 0
    part.with_bitmap(None).write(0, b"none")
    assert (other.count(), bitmap.count()) == (8, 0)


@pytest.mark.parametrize("kind", ["descriptor", "file-like"])
def test_a_stream_marks_what_it_gave(kind):
    memory, (low, high) = tracked_by_byte((0, 0x100), (0x100, 0x100))
    reading, writing = os.pipe()
    try:
        os.write(writing, b"12345")
        source = reading if kind == "descriptor" else io.BytesIO(b"12345")
        assert memory.read_from(0xFE, source, 16) == 5
    finally:
        os.close(reading)
        os.close(writing)
    assert low.dirty_pages().tolist() == [0xFE, 0xFF]
    assert high.dirty_pages().tolist() == [0, 1, 2]


def test_what_a_failed_descriptor_may_have_written_is_marked(tmp_path):
    memory, (low, high) = tracked_by_byte((0, 0x100), (0x100, 0x100))
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            memory.read_from(0xF0, directory, 0x20)
    finally:
        os.close(directory)
    assert low.dirty_pages().tolist() == list(range(0xF0, 0x100))
    assert high.dirty_pages().tolist() == list(range(0x10))


def test_no_bitmap_marks_nothing():
    region = MmapRegion.anonymous(0, 0x1000)
    memory = GuestRegionCollection.from_regions([region])
    memory.write(0, b"x")
    assert region.bitmap is None
    assert memory.whole_slice(0, 1, W).bitmap is None


def test_a_bitmap_may_be_marked_and_reset_in_a_range_of_no_length():
    bitmap = AtomicBitmap(0x4000)
    assert bitmap.page_size == 4096
    bitmap.set_range(0, 0x4000)
    bitmap.reset_range(0x1000, 0)
    bitmap.reset_range(0x1FFF, 2)
    assert bitmap.dirty_pages().tolist() == [0, 3]
    bitmap.set_range(0x1000, 0)
    assert bitmap.dirty_pages().tolist() == [0, 3]


def test_no_mark_wraps_to_an_unrelated_page():
    """vm-memory adds the offset of a slice modulo 2**64 and marks page 0 here."""
    top, bitmap = 2**64, AtomicBitmap(0x3000)
    part = bitmap.slice_at(0x1000)
    for refused in (
        lambda: part.set_range(top - 0x1000, 1),
        lambda: part.is_set(top - 0x1000),
        lambda: part.slice_at(top - 0x800).set_range(0, 1),
        lambda: VolatileSlice.over(bytearray(0x2000)).with_bitmap(bitmap, top - 0x1000),
    ):
        with pytest.raises(InvalidAddressError):
            refused()
    assert bitmap.count() == 0
