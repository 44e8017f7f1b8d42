"""Regions, collections of them, and access across regions."""

import ctypes
import io
import os
import threading

import pytest

from guestio import (
    AccessError,
    AtomicBitmap,
    Backing,
    BackingError,
    GuestMemory,
    GuestMemoryAtomic,
    GuestRegionCollection,
    InvalidAddressError,
    MemoryRegionOverlapError,
    MisalignedError,
    MmapRegion,
    NoMemoryRegionError,
    PartialAccessError,
    Permissions,
    SliceMemory,
    UnsortedMemoryRegionsError,
    VolatileSlice,
)

MAX = 2**64 - 1
R, W = Permissions.READ, Permissions.WRITE


@pytest.fixture(params=["anonymous", "memfd", "file"])
def memory_at(request, tmp_path):
    """Makes collections; all three kinds must agree."""

    def region(start, size):
        if request.param == "anonymous":
            return MmapRegion.anonymous(start, size)
        if request.param == "memfd":
            return MmapRegion.memfd(start, size)
        path = tmp_path / f"{start:x}"
        path.write_bytes(bytes(size))
        return MmapRegion(start, Backing.from_file(path))

    return lambda *ranges: GuestRegionCollection.from_regions(region(*r) for r in ranges)


@pytest.mark.parametrize(
    ("ranges", "error"),
    [
        ([], NoMemoryRegionError),
        ([(0, 100), (99, 100)], MemoryRegionOverlapError),
        ([(100, 100), (0, 100)], UnsortedMemoryRegionsError),
        ([(0, 0x1000), (0, 0x1000)], MemoryRegionOverlapError),
    ],
)
def test_refused_collections(ranges, error):
    with pytest.raises(error):
        GuestRegionCollection.from_ranges(ranges)
    with pytest.raises(error):
        GuestRegionCollection.from_regions(MmapRegion.anonymous(*r) for r in ranges)


def test_neighbors_and_the_empty_one():
    assert GuestRegionCollection.from_ranges([(0, 100), (100, 100)]).last_addr == 199
    assert len(GuestRegionCollection()) == 0


def test_insert_and_remove():
    first = GuestRegionCollection.from_ranges([(0, 0x1000), (0x100000, 0x1000)])
    grown = first
    for start in (0x8000, 0x4000, 0xC000):
        grown = grown.insert_region(MmapRegion.anonymous(start, 0x1000))
    assert [r.start for r in grown] == [0, 0x4000, 0x8000, 0xC000, 0x100000]
    assert len(first) == 2
    with pytest.raises(MemoryRegionOverlapError):
        grown.insert_region(MmapRegion.anonymous(0xC000, 0x1000))
    for start in (0, 0x4000):
        with pytest.raises(NoMemoryRegionError):
            grown.remove_region(start, 128)
    left, removed = first.remove_region(0x100000, 0x1000)
    assert [r.start for r in left] == [0]
    assert (removed.start, len(first)) == (0x100000, 2)


def test_remove_the_only_region():
    empty, _ = GuestRegionCollection.from_ranges([(0, 0x1000)]).remove_region(0, 0x1000)
    assert len(empty) == 0
    assert empty.last_addr == 0
    assert empty.check_range(5, 0)
    assert not empty.check_range(0, 1)


@pytest.mark.parametrize(
    ("addr", "there"), [(0x200, True), (0x600, False), (0xA00, True), (0xC00, False)]
)
def test_addresses_in_range(addr, there):
    memory = GuestRegionCollection.from_ranges([(0, 0x400), (0x800, 0x400)])
    assert memory.address_in_range(addr) == there
    assert memory.check_address(addr) == (addr if there else None)


@pytest.mark.parametrize(
    ("base", "offset", "expected"),
    [
        (0, 0x200, 0x200),
        (0, 0xA00, 0xA00),
        (0x800, 0x7FF, 0xFFF),
        (0x800, 0xC00, None),
        (0, MAX, None),
        (0, 0x400, None),
        (0, 0x3FF, 0x3FF),
    ],
)
def test_offsets(base, offset, expected):
    memory = GuestRegionCollection.from_ranges([(0, 0x400), (0x800, 0x400), (0xC00, 0x400)])
    assert memory.checked_offset(base, offset) == expected


def test_where_an_address_is(memory_at):
    memory = memory_at((0, 0x400), (0x800, 0x400))
    second = list(memory)[1]
    assert memory.to_region_addr(0x600) is None
    assert memory.to_region_addr(0x800) == (second, 0)
    assert memory.to_region_addr(0xA00) == (second, 0x200)
    with pytest.raises(InvalidAddressError) as caught:
        memory.host_address(0x600)
    assert caught.value.addr == 0x600
    assert memory.host_address(0xA00) == memory.host_address(0x800) + 0x200
    assert second.to_offset(0xA00) == 0x200
    assert second.to_offset(0x600) is None
    ctypes.memset(memory.host_address(0xA00), 7, 1)
    assert memory.read(0xA00, 1) == b"\x07"


@pytest.mark.parametrize(
    ("addr", "length", "whole"),
    [
        (0, 0, True),
        (0, 0x200, True),
        (0, 0x400, True),
        (0, 0xA00, False),
        (0x800, 0x7FF, True),
        (0x800, 0x800, True),
        (0x800, 0x801, False),
        (0x800, 0xC00, False),
        (0, MAX, False),
        (0, 2**64, False),
        (MAX, 2, False),
    ],
)
def test_check_range(memory_at, addr, length, whole):
    memory = memory_at((0, 0x400), (0x800, 0x400), (0xC00, 0x400))
    assert memory.check_range(addr, length) == whole


def test_objects_across_regions(memory_at):
    memory = memory_at((0, 0x1000), (0x1000, 0x1000))
    with pytest.raises(InvalidAddressError) as caught:
        memory.write_obj(0x2001, ctypes.c_uint64(1))
    assert caught.value.addr == 0x2001
    with pytest.raises(PartialAccessError) as partial:
        memory.write_obj(0x1FFC, ctypes.c_uint64(1))
    assert (partial.value.length, partial.value.completed) == (8, 4)
    for addr, value in ((0x500, 0xAA55AA55AA55AA55), (0x1020, 0x55AA55AA55AA55AA)):
        memory.write_obj(addr, ctypes.c_uint64(value))
        assert memory.read_obj(addr, ctypes.c_uint64).value == value


def test_partial_transfers(memory_at):
    memory, buffer = memory_at((0x1000, 0x400)), bytearray(5)
    assert memory.write_some(0x1000, b"12345") == 5
    assert (memory.read_some(0x1000, buffer), buffer) == (5, b"12345")
    assert memory.write_some(0x13FF, b"67890") == 1
    buffer = bytearray(5)
    assert (memory.read_some(0x13FF, buffer), buffer) == (1, b"6\0\0\0\0")


def test_across_regions(memory_at):
    memory = memory_at((0, 0x1000), (0x1000, 0x1000))
    assert memory.write_some(0xFFC, b"12345") == 5
    assert memory.read(0xFFC, 5) == b"12345"


def test_streams_within_a_region(memory_at):
    memory, sink = memory_at((0, 0x1000), (0x1000, 0x1000)), io.BytesIO()
    memory.write_obj(0x1010, ctypes.c_uint32(0xFFFFFFFF))
    with open("/dev/zero", "rb", buffering=0) as zero:  # noqa: PTH123
        memory.read_exact_from(0x1010, zero, 4)
    assert memory.read_obj(0x1010, ctypes.c_uint32).value == 0
    memory.write_all_to(0x1010, sink, 4)
    assert sink.getvalue() == bytes(4)


@pytest.mark.parametrize(
    ("ranges", "addr", "length", "expected"),
    [
        (1, 0x100, 0x200, 0x200),
        (1, 0x200, 0, 0),
        (1, 0x300, 0x200, InvalidAddressError),
        (2, 0x100, 0x200, 0x200),
        (2, 0x800, 0x400, 0x400),
        (2, 0x900, 0, 0),
        (2, 0, 0x500, InvalidAddressError),
        (2, 0x600, 0x100, InvalidAddressError),
        (2, 0xC00, 0x100, InvalidAddressError),
        (3, 0x3F0, 0x20, InvalidAddressError),
    ],
)
def test_a_range_as_one_slice(memory_at, ranges, addr, length, expected):
    memory = memory_at(*[(0, 0x400), (0x800, 0x400), (0xC00, 0x400)][:ranges])
    if expected is InvalidAddressError:
        with pytest.raises(InvalidAddressError):
            memory.whole_slice(addr, length, R)
    else:
        assert len(memory.whole_slice(addr, length, R)) == expected


def pieces(memory, addr, length):
    """The lengths of a range's slices, and the address of the error that ended them."""
    found = []
    slices = memory.slices(addr, length, R)
    try:
        found.extend(len(piece) for piece in slices)
    except InvalidAddressError as error:
        assert next(slices, None) is None
        return found, error.addr
    return found, None


@pytest.mark.parametrize(
    ("addr", "length", "expected"),
    [
        (0x100, 0x200, ([0x200], None)),
        (0x800, 0x400, ([0x400], None)),
        (0x900, 0, ([], None)),
        (0, 0x500, ([0x400], 0x400)),
        (0x600, 0x100, ([], 0x600)),
        (0x1000, 0x100, ([], 0x1000)),
        (0xA00, 0x400, ([0x200, 0x200], None)),
    ],
)
def test_slices(memory_at, addr, length, expected):
    memory = memory_at((0, 0x400), (0x800, 0x400), (0xC00, 0x400))
    assert pieces(memory, addr, length) == expected


def test_a_stream_across_regions():
    memory = GuestRegionCollection.from_ranges([(0, 64), (0x40, 64)])
    assert memory.read_from(0x30, io.BytesIO(b"\x05" * 0x80), 0x20) == 0x20
    assert memory.read(0x30, 0x20) == b"\x05" * 0x20


def test_zero_lengths(memory_at):
    """Everything of no length succeeds, also where nothing is."""
    memory = memory_at((0, 0x400))
    for addr in (0, 0x400, 0x1000, MAX):
        assert memory.read(addr, 0) == b""
        memory.write(addr, b"")
        memory.readinto(addr, bytearray())
        memory.fill(addr, 0, 1)
        assert memory.read_some(addr, bytearray()) == memory.write_some(addr, b"") == 0
        assert memory.read_from(addr, io.BytesIO(b"x"), 0) == 0
        assert memory.write_to(addr, io.BytesIO(), 0) == 0
        memory.read_exact_from(addr, io.BytesIO(), 0)
        memory.write_all_to(addr, io.BytesIO(), 0)
        assert list(memory.slices(addr, 0)) == []
        assert memory.check_range(addr, 0, W)
        assert len(memory.whole_slice(addr, 0, W)) == 0


def test_the_same_memory_at_another_address(memory_at):
    memory = memory_at((0x1000, 0x1000))
    memory.write(0x1234, b"here")
    without, region = memory.remove_region(0x1000, 0x1000)
    moved = without.insert_region(MmapRegion(0x2000, region.backing))
    assert not moved.address_in_range(0x1234)
    assert moved.read(0x2234, 4) == b"here"


def test_refused_mappings():
    with pytest.raises(ValueError, match="size"):
        Backing.anonymous(0)
    with pytest.raises(ValueError, match="greater than 0"):
        MmapRegion.anonymous(0, 0)
    with Backing.memfd(0x3000) as backing:
        # Unlike upstream an offset need not be a multiple of the page size.
        with Backing.from_fd(backing.fd, 0x1000, 4095) as odd:
            assert (odd.file_offset, odd.size) == (4095, 0x1000)
        with pytest.raises(ValueError, match="offset"):
            Backing.from_fd(backing.fd, 0x1000, MAX)
        with pytest.raises(BackingError, match="do not fit"):
            Backing.from_fd(backing.fd, 0x1000, 0x2001)
    with pytest.raises(ValueError, match="size"):
        Backing.from_buffer(b"")
    memory = bytearray(16)
    adopted = Backing.from_buffer(memory)
    assert adopted.writable
    adopted.close()
    memory.append(0)
    assert not Backing.from_buffer(bytes(4)).writable


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ((0, 4096), (4096, 4096), False),
        ((0, 5000), (4096, 4096), True),
        ((0, 5000), (0, 1000), True),
    ],
)
def test_regions_that_share_bytes_of_a_file(tmp_path, one, two, expected):
    path = tmp_path / "file"
    path.write_bytes(bytes(0x4000))
    first, second = (Backing.from_file(path, size, offset) for offset, size in (one, two))
    assert MmapRegion(0, first).fds_overlap(MmapRegion(0x10000, second)) == expected
    assert second.overlaps(first) == expected
    other = Backing.memfd(0x4000)
    assert not first.overlaps(other)
    assert not first.overlaps(Backing.anonymous(0x4000))
    # A duplicated descriptor is the same file; upstream takes it for another.
    same = Backing.from_fd(os.dup(other.fd), 0x1000)
    assert same.overlaps(other)


@pytest.fixture
def three():
    return GuestRegionCollection.from_ranges([(0, 0x1000), (0x1000, 0x1000), (0x4000, 0x1000)])


def test_partial_results(three):
    assert three.write_some(0x9999999, b"") == 0
    assert three.read_some(0x1FF8, bytearray(16)) == 8
    with pytest.raises(PartialAccessError) as partial:
        three.write(0x1FF8, bytes(16))
    assert (partial.value.length, partial.value.completed) == (16, 8)
    assert isinstance(partial.value.__cause__, InvalidAddressError)
    assert partial.value.__cause__.addr == 0x2000
    with pytest.raises(InvalidAddressError) as caught:
        three.read(0x2000, 1)
    assert caught.value.addr == 0x2000


@pytest.mark.parametrize(
    ("addr", "width", "error"),
    [
        (2, 4, MisalignedError),
        (0xFFE, 4, MisalignedError),
        (0x1FFC, 8, InvalidAddressError),
        (0x2000, 4, InvalidAddressError),
    ],
)
def test_atomics_that_cannot_be(three, addr, width, error):
    with pytest.raises(error):
        three.load(addr, width)
    before = three.read(0xFF0, 0x1010)
    with pytest.raises(error):
        three.store(addr, 1, width)
    with pytest.raises(error):
        three.compare_exchange(addr, 0, 1, width)
    assert three.read(0xFF0, 0x1010) == before


def test_ends_of_regions(three):
    assert three.check_range(0x9999999, 0)
    assert three.last_addr == 0x4FFF
    assert GuestRegionCollection().last_addr == 0


def test_regions_at_the_end_of_the_space():
    """Upstream cannot have the last byte."""
    with pytest.raises(ValueError, match="passes"):
        MmapRegion.anonymous(MAX - 0xFFF, 0x2000)
    below = MmapRegion.anonymous(MAX - 0x1FFF, 0x1000)
    assert below.last_addr == MAX - 0x1000
    memory = GuestRegionCollection.from_regions([below, MmapRegion.anonymous(MAX - 0xFFF, 0x1000)])
    assert memory.last_addr == MAX
    memory.write(MAX, b"\x2a")
    assert memory.read(MAX, 1) == b"\x2a"
    memory.fill(MAX - 0x1FFF, 0x2000, 3)
    assert memory.read(MAX - 0x1000, 0x1001) == b"\x03" * 0x1001
    assert memory.check_range(MAX - 0x1FFF, 0x2000, W)
    assert not memory.check_range(MAX, 2)


def test_streams_across_three_regions(three):
    class Eight(io.RawIOBase):
        left = 8

        def write(self, data):
            taken = min(len(data), self.left)
            self.left -= taken
            return taken

    with pytest.raises(PartialAccessError) as caught:
        three.write_to(0x10, Eight(), 16)
    assert caught.value.completed == 8
    assert three.read_from(0x10, io.BytesIO(bytes(8)), 16) == 8
    with pytest.raises(PartialAccessError) as caught:
        three.read_exact_from(0x10, io.BytesIO(bytes(8)), 16)
    assert (caught.value.length, caught.value.completed) == (16, 8)
    assert three.read_from(0xFF8, io.BytesIO(bytes(20)), 32) == 20


def test_snapshots():
    memory = GuestRegionCollection.from_ranges([(0, 0x400), (0x1000, 0x400)])
    holder = GuestMemoryAtomic(memory)
    for snapshot in (holder.memory(), GuestMemoryAtomic(holder.memory()).memory()):
        assert len(snapshot) == 2
        assert snapshot.address_in_range(0x1000)
        assert not snapshot.address_in_range(0x10000)
    kept = holder.memory()
    del holder, memory
    assert len(kept) == 2


def test_replacing_a_map():
    holder = GuestMemoryAtomic(GuestRegionCollection.from_ranges([(0, 0x1000), (0x100000, 0x1000)]))
    old = holder.memory()
    with holder.lock() as update:
        new = update.memory
        for start in (0x8000, 0x4000, 0xC000):
            new = new.insert_region(MmapRegion.anonymous(start, 0x1000))
        with pytest.raises(MemoryRegionOverlapError):
            new.insert_region(MmapRegion.anonymous(0x8000, 0x1000))
        assert len(holder.memory()) == 2
        update.replace(new)
    assert (len(old), len(holder.memory())) == (2, 5)
    with pytest.raises(RuntimeError, match="lock"):
        update.replace(old)
    with holder.lock():
        pass
    assert len(holder.memory()) == 5
    with pytest.raises(AccessError), holder.lock():
        holder.memory().read(0x2000, 1)
    with holder.lock() as update:
        update.replace(old)
    assert holder.memory() is old


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


def test_every_holder_of_a_map_sees_every_swap():
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


def test_the_end_point_says_nothing_of_what_lies_between():
    memory = GuestRegionCollection.from_ranges([(0, 0x1000), (0x4000, 0x1000)])
    assert memory.checked_offset(0, 0x4800) == 0x4800
    assert not memory.check_range(0, 0x4800)
    assert memory.check_range(0x4000, 0x800)
