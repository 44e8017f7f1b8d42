"""Dirty bitmaps and what marks them: vectors 5; byte order and atomic integers: vectors 6."""

import ctypes

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    GuestRegionCollection,
    InvalidAddressError,
    MmapRegion,
    Permissions,
)

MAX = 2**64 - 1
W = Permissions.WRITE


def marks(bitmap, *addresses):
    return [bitmap.is_set(addr) for addr in addresses]


def tracked(size=0x10000, page_size=0x1000):
    """A region at 0, the memory made of it, and its bitmap."""
    bitmap = AtomicBitmap(size, page_size)
    region = MmapRegion.anonymous(0, size, bitmap=bitmap)
    return GuestRegionCollection.from_regions([region]), bitmap


@pytest.mark.parametrize(
    ("size", "page", "pages"),
    [(1025, 128, 9), (1024, 128, 8), (0, 128, 0), (4097, 4096, 2), (MAX, 1 << 50, 1 << 14)],
    ids=lambda v: f"5-1 {v}",
)
def test_sizes(size, page, pages):
    bitmap = AtomicBitmap(size, page)
    assert (len(bitmap), bitmap.pages, bitmap.byte_size) == (pages, pages, size)
    assert bitmap.page_size == page


def test_5_2_set_copy_reset_harvest():
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


def test_5_3_reset_of_a_range():
    bitmap = AtomicBitmap(1024, 128)
    bitmap.set_range(128, 129)
    bitmap.reset_range(128, 129)
    assert bitmap.count() == 0


def test_5_4_beyond_the_end():
    bitmap = AtomicBitmap(1024, 1)
    bitmap.set_range(768, 512)
    assert marks(bitmap, 767, 768, 1023, 1024, 1152) == [False, True, True, False, False]
    assert bitmap.count() == 256
    bitmap.set_bit(1024)
    bitmap.reset_bit(5000)
    assert not bitmap.is_bit_set(1024)


def test_5_5_enlarge():
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


def test_5_6_a_slice_of_a_bitmap():
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
def test_5_7_every_write_marks_its_page(how):
    memory, bitmap = tracked()
    for addr in range(0x1000, 0x5000, 0x1000):
        assert not any(marks(bitmap, addr, addr + 0xFFF))
        WRITERS[how](memory, addr)
        assert marks(bitmap, addr, addr + 0xFFF, addr + 0x1000) == [True, True, False]


def test_5_7_what_reads_or_fails_marks_nothing():
    memory, bitmap = tracked()
    memory.read(0, 0x10000)
    memory.load(0, 8)
    assert memory.compare_exchange(0, 1, 2, 8) == (False, 0)
    list(memory.slices(0, 0x10000, W))
    with pytest.raises(InvalidAddressError):
        memory.write(0x10000, b"x")
    assert bitmap.count() == 0


def test_5_8_slices_know_where_they_are():
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


def test_5_9_copies_mark_their_destination():
    source, target = tracked(), tracked()
    source[0].whole_slice(0, 0x10000, W).copy_to(target[0].whole_slice(0, 0x10000, W))
    assert target[1].count() == 16
    assert source[1].count() == 0


@pytest.mark.parametrize("elements", [np.ones(0x1000, np.uint8), np.ones(1024, np.uint32)])
def test_5_10_copies_from_buffers(elements):
    memory, bitmap = tracked()
    memory.whole_slice(0, 0x10000, W).copy_from(elements)
    assert bitmap.dirty_pages().tolist() == [0]


def test_5_11_single_values():
    memory, bitmap = tracked(0x10000, 8)
    whole = memory.whole_slice(0, 0x10000, W)
    whole.store(0, 1, 8)
    whole.store(0x1000 * 8, 1, 8)
    assert bitmap.dirty_pages().tolist() == [0, 0x1000]


def test_5_12_a_slice_taken_before():
    memory, bitmap = tracked(0x10000, 8)
    before = memory.whole_slice(0x800, 0x1000, W)
    memory.write_obj(0x1000, ctypes.c_uint64(1))
    assert before.bitmap is bitmap
    assert marks(bitmap, 0xFFF, 0x1000, 0x1007, 0x1008) == [False, True, True, False]


@pytest.mark.parametrize(
    ("start", "length", "words"), [(4095, 2, [3]), (MAX, 1, [0]), (0, 0, [0])], ids=lambda v: "5-14"
)
def test_edges_of_a_mark(start, length, words):
    bitmap = AtomicBitmap(3 * 4096)
    bitmap.set_range(start, length)
    assert bitmap.peek().tolist() == words


def test_5_14_a_mark_past_the_space_is_refused():
    bitmap = AtomicBitmap(3 * 4096)
    with pytest.raises(InvalidAddressError):
        bitmap.set_range(MAX, MAX)
    assert bitmap.count() == 0


def test_5_15_a_slice_does_not_wrap():
    """A19: upstream marks page 0 here."""
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


@pytest.mark.parametrize("width", [2, 4, 8])
def test_6_1_byte_order(width):
    value = 0x0123456789ABCDEF & ((1 << 8 * width) - 1)
    memory = GuestRegionCollection.from_ranges([(0, 64)])
    scalars = {2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
    little, big = scalars[width].__ctype_le__, scalars[width].__ctype_be__
    for at, order, kinds in (
        (0, "little", (little, np.dtype(f"<u{width}"))),
        (32, "big", (big, np.dtype(f">u{width}"))),
    ):
        memory.write_obj(at, kinds[0](value))
        assert memory.read(at, width) == value.to_bytes(width, order)
        assert memory.read_obj(at, kinds[0]).value == value
        assert memory.read_obj(at, kinds[1]) == value
        scalar = np.array([value], kinds[1])
        memory.write(at + 8, scalar)
        assert memory.read(at + 8, width) == value.to_bytes(width, order)
        memory.write_obj(at + 16, np.void(scalar.tobytes()))
        assert memory.read(at + 16, width) == value.to_bytes(width, order)


def test_6_1_structures_of_either_order():
    class Big(ctypes.BigEndianStructure):
        _fields_ = (("a", ctypes.c_uint16), ("b", ctypes.c_uint32))

    memory = GuestRegionCollection.from_ranges([(0, 64)])
    memory.write_obj(0, Big(0x0102, 0x03040506))
    assert memory.read(0, 8).hex() == "0102000003040506"
    got = memory.read_obj(0, Big)
    assert (got.a, got.b) == (0x0102, 0x03040506)
    record = np.dtype([("a", ">u2"), ("pad", "V2"), ("b", ">u4")])
    assert memory.read_obj(0, record)["b"] == 0x03040506


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_6_2_atomic_integers(width):
    memory = GuestRegionCollection.from_ranges([(0, 64)])
    assert memory.load(8, width) == 0
    memory.store(8, 100, width)
    assert memory.load(8, width) == 100
    top = (1 << 8 * width) - 1
    assert memory.compare_exchange(8, 100, top, width) == (True, 100)
    assert memory.compare_exchange(8, 100, 1, width) == (False, top)
    assert memory.load(8, width) == top
    assert memory.read(8 + width, 8) == bytes(8)
