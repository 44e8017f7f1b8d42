"""What vm-memory can do and no other test pins; see docs/coming-from-vm-memory.md."""

import ctypes
import io
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    Backing,
    GuestMemory,
    GuestMemoryAtomic,
    GuestRegionCollection,
    InvalidAddressError,
    MisalignedError,
    MmapRegion,
    PartialAccessError,
    Permissions,
    SliceMemory,
    VolatileSlice,
)

R, W = Permissions.READ, Permissions.WRITE
MAX = 2**64 - 1


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint32))


def tracked(*ranges, page_size=1):
    """Memory that marks every byte that is written, and its regions' bitmaps."""
    regions = [
        MmapRegion.anonymous(start, size, bitmap=AtomicBitmap(size, page_size))
        for start, size in ranges
    ]
    return GuestRegionCollection.from_regions(regions), [region.bitmap for region in regions]


OBJECTS = [
    *(kind(5) for kind in (ctypes.c_int8, ctypes.c_uint8, ctypes.c_int16, ctypes.c_uint16)),
    *(kind(-5) for kind in (ctypes.c_int32, ctypes.c_int64)),
    *(kind(5) for kind in (ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_ssize_t)),
    *((ctypes.c_uint16 * count)(*range(count)) for count in (0, 1, 32, 33)),
    (ctypes.c_uint64 * 2)(MAX, 1),
    *(np.dtype(code).type(7) for code in ("i1", "u2", "i4", "u8", "f4", "f8")),
]


@pytest.mark.parametrize("value", OBJECTS, ids=lambda value: type(value).__name__)
def test_every_plain_type_is_an_object(value):
    """Also arrays of more than 32 elements, which the original stops at."""
    memory = GuestRegionCollection.from_ranges([(0, 0x1000), (0x1000, 0x1000)])
    content = memoryview(value).tobytes()
    memory.write_obj(0x1000 - 3, value)
    assert memory.read(0x1000 - 3, len(content)) == content
    assert memoryview(memory.read_obj(0x1000 - 3, type(value))).tobytes() == content


class Anything:
    pass


class Chain(ctypes.Structure):
    _fields_ = (("next", ctypes.POINTER(Pair)),)


@pytest.mark.parametrize(
    "kind", [ctypes.c_void_p, ctypes.POINTER(Pair), Chain, Chain * 2, np.dtype("O"), Anything, None]
)
def test_types_without_a_layout_are_refused(kind):
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    with pytest.raises(TypeError):
        memory.read_obj(0, kind)


def test_objects_in_place():
    """A structure or an array over a slice: changes go both ways, at the slice's own alignment."""
    memory, (bitmap,) = tracked((0, 0x1000))
    part = memory.whole_slice(0x100, 16, W)
    pair = Pair.from_buffer(part)
    pair.b = 9
    assert memory.read(0x104, 4) == b"\x09\0\0\0"
    memory.store(0x100, 7, 4)
    assert pair.a == 7
    with pytest.raises(ValueError, match="small"):
        Pair.from_buffer(part, 9)
    with pytest.raises(ValueError, match="multiple"):
        np.frombuffer(part.subslice(0, 15), "<u4")
    assert not np.frombuffer(part, "<u4", count=1, offset=1).flags.aligned
    with pytest.raises(MisalignedError):
        part.load(1, 4)
    # What was written through a buffer is known when that is released: it may be all of the slice.
    assert bitmap.dirty_pages().tolist() == list(range(0x100, 0x110))


def test_bytes_of_an_object_as_a_slice():
    """What is written to the slice is in the object, and the other way round."""
    pair = Pair(1, 2)
    view = VolatileSlice.over(pair)
    view.store(4, 77, 4)
    assert pair.b == 77
    pair.a = 5
    assert view.load(0, 4) == 5
    assert view.bitmap is None


def test_writes_through_a_buffer_are_marked_when_it_is_released():
    """Writes through an address are not; whoever does that marks by himself."""
    memory, (bitmap,) = tracked((0x4000, 0x1000))
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
    memory, (bitmap,) = tracked((0, 0x1000))
    other = AtomicBitmap(0x10000, 1)
    part = memory.whole_slice(0x10, 16, W).with_bitmap(other, 0x8000)
    part.write(4, b"four")
    part.subslice(8, 4).write(0, b"more")
    assert memory.read(0x14, 8) == b"fourmore"
    assert other.dirty_pages().tolist() == list(range(0x8004, 0x800C))
    assert bitmap.count() == 0
    part.with_bitmap(None).write(0, b"none")
    assert (other.count(), bitmap.count()) == (8, 0)


def test_elements_outside_an_array_are_refused():
    """The original ends the process."""
    array = np.frombuffer(VolatileSlice.over(bytearray(8)), "<u2")
    with pytest.raises(IndexError):
        array[4]
    with pytest.raises(IndexError):
        array[4] = 1


@pytest.mark.parametrize("kind", ["descriptor", "file-like"])
def test_a_stream_marks_what_it_gave(kind):
    memory, (low, high) = tracked((0, 0x100), (0x100, 0x100))
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
    memory, (low, high) = tracked((0, 0x100), (0x100, 0x100))
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            memory.read_from(0xF0, directory, 0x20)
    finally:
        os.close(directory)
    assert low.dirty_pages().tolist() == list(range(0xF0, 0x100))
    assert high.dirty_pages().tolist() == list(range(0x10))


@pytest.mark.parametrize("way", ["read", "write"])
def test_interrupted_system_calls_are_repeated(way):
    """Signals whose handlers return do not end a transfer; one whose handler raises does."""
    memory = GuestRegionCollection.from_ranges([(0, 1 << 20)])
    memory.fill(0, 1 << 20, 5)
    ours, theirs = socket.socketpair()
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)

    def serve():
        time.sleep(0.2)
        if way == "read":
            theirs.sendall(b"late")
        else:
            left = 1 << 20
            while left:
                left -= len(theirs.recv(left))

    peer = threading.Thread(target=serve)
    try:
        with ours, theirs:
            peer.start()
            if way == "read":
                assert memory.read_from(0, ours, 100) == 4
                assert memory.read(0, 5) == b"late\x05"
            else:
                memory.write_all_to(0, ours, 1 << 20)
            peer.join()
            assert len(seen) > 2

            def give_up(*_):
                raise KeyboardInterrupt

            signal.signal(signal.SIGALRM, give_up)
            with pytest.raises(KeyboardInterrupt):
                memory.read_from(0, ours, 4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_exact_read_from_a_byte_source_moves_what_there_is():
    """The original checks the length of such a source first, and moves nothing."""
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    source = io.BytesIO(b"123")
    with pytest.raises(PartialAccessError) as caught:
        memory.read_exact_from(0, source, 4)
    assert (caught.value.completed, memory.read(0, 4)) == (3, b"123\0")
    assert source.tell() == 3


def test_a_range_that_passes_the_address_space_is_refused_before_anything_moves():
    memory = GuestRegionCollection.from_regions([MmapRegion.anonymous(MAX - 0xFFF, 0x1000)])
    for refused in (
        lambda: memory.slices(MAX, 2),
        lambda: memory.write(MAX, b"ab"),
        lambda: memory.write_some(MAX, b"ab"),
        lambda: memory.read_from(MAX, io.BytesIO(b"ab"), 2),
    ):
        with pytest.raises(InvalidAddressError):
            refused()
    assert memory.read(MAX, 1) == b"\0"
    assert [len(piece) for piece in memory.slices(MAX, 1)] == [1]


def test_regions_are_found_and_counted():
    memory = GuestRegionCollection.from_ranges([(0x1000, 0x1000), (0x2000, 0x10), (0x9000, 1)])
    assert len(memory) == 3
    regions = list(memory)
    for region in regions:
        assert memory.find_region(region.start) is region
        assert memory.find_region(region.last_addr) is region
    for addr in (0, 0xFFF, 0x2010, 0x8FFF, 0x9001, MAX):
        assert memory.find_region(addr) is None
    assert [(region.size, region.last_addr) for region in regions] == [
        (0x1000, 0x1FFF),
        (0x10, 0x200F),
        (1, 0x9000),
    ]


def test_collections_share_their_regions():
    first = GuestRegionCollection.from_ranges([(0, 0x1000)])
    [region] = first
    second = first.insert_region(MmapRegion.anonymous(0x1000, 0x1000))
    third = GuestRegionCollection.from_regions([region])
    assert next(iter(second)) is next(iter(third)) is region
    third.write(5, b"shared")
    assert first.read(5, 6) == second.read(5, 6) == b"shared"


def test_a_region_alone_can_be_accessed():
    """By offset, as the original's regions can."""
    region = MmapRegion.anonymous(0x5000, 0x1000, bitmap=AtomicBitmap(0x1000, 1))
    inside = SliceMemory(region.slice())
    inside.write_obj(0xFF8, ctypes.c_uint64(3))
    assert GuestRegionCollection.from_regions([region]).load(0x5FF8, 8) == 3
    assert region.bitmap.dirty_pages().tolist() == list(range(0xFF8, 0x1000))
    assert inside.write_some(0xFFF, b"ab") == 1
    with pytest.raises(InvalidAddressError):
        inside.read(0x1000, 1)
    with pytest.raises(InvalidAddressError):
        region.slice(0xFFF, 2)


def test_private_memory_is_not_shared_and_files_are(tmp_path):
    """Without a file private and zeroed; with one, what is written is in the file."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(0x2000))
    shared = MmapRegion(0x1000, Backing.from_file(path))
    memory = GuestRegionCollection.from_regions([MmapRegion.anonymous(0, 0x1000), shared])
    assert memory.read(0, 0x1000) == bytes(0x1000)
    memory.write(0xFFC, b"12345678")
    assert path.read_bytes()[:4] == b"5678"
    modes = []
    for region in memory:
        at = region.host_address()
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if first <= at < last:
                modes.append(line.split()[1])
    assert modes == ["rw-p", "rw-s"]


def test_adopted_memory_stays_the_owners():
    """Any address can be adopted by way of ctypes, aligned or not; closing does not unmap it."""
    owner = np.zeros(0x2001, np.uint8)
    at = owner.ctypes.data + 1
    backing = Backing.from_buffer((ctypes.c_uint8 * 0x1000).from_address(at))
    assert (backing.host_address, backing.fd, backing.file_offset) == (at, None, None)
    memory = GuestRegionCollection.from_regions([MmapRegion(0, backing)])
    memory.write(0, b"adopted")
    assert owner[1:8].tobytes() == b"adopted"
    del memory
    backing.close()
    owner[1] = 1


def test_memory_of_ordinary_pages_says_so():
    assert not MmapRegion.anonymous(0, 0x1000).is_hugetlbfs
    assert not MmapRegion.memfd(0, 0x1000).is_hugetlbfs


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


def test_whoever_shares_a_map_sees_every_swap():
    """Readers do not wait for a writer; writers take turns; old snapshots stay whole."""
    holder = GuestMemoryAtomic(GuestRegionCollection.from_ranges([(0, 0x1000)]))
    seen, second_done = [], threading.Event()
    old = holder.memory()

    def second():
        with holder.lock() as update:
            seen.append(len(update.memory))
            update.replace(update.memory.insert_region(MmapRegion.anonymous(0x2000, 0x1000)))
        second_done.set()

    with holder.lock() as update:
        writer = threading.Thread(target=second)
        writer.start()
        assert not second_done.wait(0.05)
        reader = threading.Thread(target=lambda: seen.append(holder.memory().read(0, 1)))
        reader.start()
        reader.join(10)
        assert seen == [b"\0"]
        update.replace(update.memory.insert_region(MmapRegion.anonymous(0x1000, 0x1000)))
    assert second_done.wait(10)
    writer.join()
    assert seen == [b"\0", 2]
    assert (len(old), len(holder.memory())) == (1, 3)
    old.write(0, b"x")
    assert holder.memory().read(0, 1) == b"x"


def test_any_kind_of_memory_serves():
    """One that is neither regions nor translated: everything follows from two methods."""

    class Doubled(GuestMemory):
        """The same 16 bytes again and again, piece by piece."""

        def __init__(self):
            self.part = VolatileSlice.over(bytearray(16))

        def check_range(self, addr, length, access=Permissions.NONE):
            return addr + length <= 2**64

        def slices(self, addr, length, access=R):
            end = addr + length
            while addr < end:
                count = min(16 - addr % 16, end - addr)
                yield self.part.subslice(addr % 16, count)
                addr += count

    memory: GuestMemory = Doubled()
    memory.write(0x8, b"0123456789abcdef")
    assert memory.read(0x1000, 16) == b"89abcdef01234567"
    memory.store(0x20, 7, 4)
    assert memory.load(0x1000, 4) == 7
    sink = io.BytesIO()
    memory.write_all_to(0x4, sink, 20)
    assert len(sink.getvalue()) == 20
    assert memory.physical_memory is None
    assert GuestRegionCollection().physical_memory is not None
