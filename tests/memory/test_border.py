"""Numbers are checked where they come in: nothing wraps, nothing is guessed, nothing changes."""

import io

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    Backing,
    GuestMemoryAtomic,
    GuestRegionCollection,
    MmapRegion,
    NoMemoryRegionError,
    Ordering,
    Permissions,
    SliceMemory,
    VolatileSlice,
)

R, W = Permissions.READ, Permissions.WRITE
NO_INT = [True, False, 1.0, 0.0, "1", b"1", None, 1j, [1], np.float64(1), np.True_]
NO_U64 = [-1, -(2**63), 2**64, 2**64 + 1, 2**100]
BAD = [*NO_INT, *NO_U64]


def memory_calls(memory):
    """Every number that an access takes, one at a time."""
    buffer = bytearray(4)
    return {
        "check_range addr": lambda n: memory.check_range(n, 1, R),
        "check_range length": lambda n: memory.check_range(0, n, R),
        "check_range access": lambda n: memory.check_range(0, 1, n),
        "slices addr": lambda n: list(memory.slices(n, 1, R)),
        "slices length": lambda n: list(memory.slices(0, n, R)),
        "slices access": lambda n: list(memory.slices(0, 1, n)),
        "gather addr": lambda n: memory.gather(n, 1, R),
        "read addr": lambda n: memory.read(n, 1),
        "read length": lambda n: memory.read(0, n),
        "readinto addr": lambda n: memory.readinto(n, buffer),
        "read_some addr": lambda n: memory.read_some(n, buffer),
        "write addr": lambda n: memory.write(n, b"data"),
        "write_some addr": lambda n: memory.write_some(n, b"data"),
        "fill addr": lambda n: memory.fill(n, 1, 1),
        "fill length": lambda n: memory.fill(0, n, 1),
        "fill value": lambda n: memory.fill(0, 4, n),
        "read_obj addr": lambda n: memory.read_obj(n, "u1"),
        "write_obj addr": lambda n: memory.write_obj(n, np.uint8(1)),
        "load addr": lambda n: memory.load(n, 4),
        "load width": lambda n: memory.load(0, n),
        "load ordering": lambda n: memory.load(0, 4, n),
        "store addr": lambda n: memory.store(n, 1, 4),
        "store value": lambda n: memory.store(0, n, 4),
        "store width": lambda n: memory.store(0, 1, n),
        "store ordering": lambda n: memory.store(0, 1, 4, n),
        "exchange addr": lambda n: memory.compare_exchange(n, 0, 1, 4),
        "exchange expected": lambda n: memory.compare_exchange(0, n, 1, 4),
        "exchange new": lambda n: memory.compare_exchange(0, 0, n, 4),
        "exchange width": lambda n: memory.compare_exchange(0, 0, 1, n),
        "read_from addr": lambda n: memory.read_from(n, io.BytesIO(b"data"), 4),
        "read_from count": lambda n: memory.read_from(0, io.BytesIO(b"data"), n),
        "read_exact_from count": lambda n: memory.read_exact_from(0, io.BytesIO(b"data"), n),
        "write_to addr": lambda n: memory.write_to(n, io.BytesIO(), 4),
        "write_to count": lambda n: memory.write_to(0, io.BytesIO(), n),
        "write_all_to count": lambda n: memory.write_all_to(0, io.BytesIO(), n),
    }


def collection_calls(memory):
    return {
        "find_region": memory.find_region,
        "to_region_addr": memory.to_region_addr,
        "address_in_range": memory.address_in_range,
        "check_address": memory.check_address,
        "checked_offset base": lambda n: memory.checked_offset(n, 1),
        "checked_offset offset": lambda n: memory.checked_offset(1, n),
        "host_address": memory.host_address,
        "whole_slice": lambda n: memory.whole_slice(n, 1, R),
        "whole_slice length": lambda n: memory.whole_slice(0, n, R),
        "remove start": lambda n: memory.remove_region(n, 0x1000),
        "remove size": lambda n: memory.remove_region(1, n),
        "from_ranges start": lambda n: GuestRegionCollection.from_ranges([(n, 1)]),
        "from_ranges size": lambda n: GuestRegionCollection.from_ranges([(0, n)]),
        "region host": next(iter(memory)).host_address,
        "region to_offset": next(iter(memory)).to_offset,
        "region slice": lambda n: next(iter(memory)).slice(n, 1),
        "region slice length": lambda n: next(iter(memory)).slice(0, "n" if n is None else n),
    }


def slice_calls(part):
    return {
        "subslice offset": lambda n: part.subslice(n, 1),
        "subslice length": lambda n: part.subslice(0, n),
        "offset": part.offset,
        "split_at": part.split_at,
        "with_bitmap": lambda n: part.with_bitmap(AtomicBitmap(16), n),
        "read offset": lambda n: part.read(n, 1),
        "read length": lambda n: part.read(0, "n" if n is None else n),
        "readinto": lambda n: part.readinto(n, bytearray(1)),
        "read_some": lambda n: part.read_some(n, bytearray(1)),
        "write": lambda n: part.write(n, b"x"),
        "write_some": lambda n: part.write_some(n, b"x"),
        "fill offset": lambda n: part.fill(n, 1, 1),
        "fill length": lambda n: part.fill(0, n, 1),
        "fill value": lambda n: part.fill(0, 4, n),
        "load offset": lambda n: part.load(n, 4),
        "load width": lambda n: part.load(0, n),
        "load ordering": lambda n: part.load(0, 4, n),
        "store offset": lambda n: part.store(n, 1, 4),
        "store value": lambda n: part.store(0, n, 4),
        "store width": lambda n: part.store(0, 1, n),
        "store ordering": lambda n: part.store(0, 1, 4, n),
        "exchange offset": lambda n: part.compare_exchange(n, 0, 1, 4),
        "exchange expected": lambda n: part.compare_exchange(0, n, 1, 4),
        "exchange new": lambda n: part.compare_exchange(0, 0, n, 4),
    }


def vector_calls(vector):
    fd = 1 << 20
    return {
        "read start": vector.read,
        "read count": lambda n: vector.read(0, "n" if n is None else n),
        "readinto": lambda n: vector.readinto(bytearray(1), n),
        "write": lambda n: vector.write(b"x", n),
        "fill value": vector.fill,
        "fill start": lambda n: vector.fill(1, n, 1),
        "fill count": lambda n: vector.fill(1, 0, "n" if n is None else n),
        "load": vector.load,
        "store value": lambda n: vector.store(n, 4),
        "store width": lambda n: vector.store(0, n),
        "from_file fd": vector.from_file,
        "from_file offset": lambda n: vector.from_file(fd, "n" if n is None else n),
        "from_file start": lambda n: vector.from_file(fd, 0, n),
        "to_file count": lambda n: vector.to_file(fd, 0, 0, "n" if n is None else n),
    }


def bitmap_calls(bitmap):
    part = bitmap.slice_at(0)
    return {
        "size": AtomicBitmap,
        "page_size": lambda n: AtomicBitmap(16, n),
        "set_range start": lambda n: bitmap.set_range(n, 1),
        "set_range length": lambda n: bitmap.set_range(1, n),
        "reset_range start": lambda n: bitmap.reset_range(n, 1),
        "reset_range length": lambda n: bitmap.reset_range(1, n),
        "is_set": bitmap.is_set,
        "set_bit": bitmap.set_bit,
        "reset_bit": bitmap.reset_bit,
        "is_bit_set": bitmap.is_bit_set,
        "enlarge": bitmap.enlarge,
        "slice_at": bitmap.slice_at,
        "dirty_pages start": bitmap.dirty_pages,
        "dirty_pages length": lambda n: bitmap.dirty_pages(1, "n" if n is None else n),
        "dirty_pages page_size": lambda n: bitmap.dirty_pages(
            page_size="n" if n is None else n, clear=True
        ),
        "part set_range": lambda n: part.set_range(n, 1),
        "part length": lambda n: part.set_range(1, n),
        "part is_set": part.is_set,
        "part slice_at": part.slice_at,
    }


def backing_calls():
    return {
        "anonymous": Backing.anonymous,
        "memfd": Backing.memfd,
        "memfd hugetlb": lambda n: Backing.memfd(4096, hugetlb="n" if n is None else n),
        "from_fd fd": lambda n: Backing.from_fd(n, 4096),
        "from_fd size": lambda n: Backing.from_fd(1, n),
        "from_fd offset": lambda n: Backing.from_fd(1, 4096, n),
        "region start": lambda n: MmapRegion(n, Backing.anonymous(16)),
        "region anonymous": lambda n: MmapRegion.anonymous(n, 16),
        "region size": lambda n: MmapRegion.anonymous(0, n),
    }


CALLS = {
    "memory": memory_calls,
    "slice memory": memory_calls,
    "collection": collection_calls,
    "slice": slice_calls,
    "vector": vector_calls,
    "bitmap": bitmap_calls,
    "backing": lambda: backing_calls(),
}
NAMES = [
    (kind, name)
    for kind, calls in CALLS.items()
    for name in (
        calls()
        if kind == "backing"
        else calls(
            {
                "memory": lambda: GuestRegionCollection.from_ranges([(0, 16)]),
                "slice memory": lambda: SliceMemory(VolatileSlice.over(bytearray(16))),
                "collection": lambda: GuestRegionCollection.from_ranges([(0, 16)]),
                "slice": lambda: VolatileSlice.over(bytearray(16)),
                "vector": lambda: GuestRegionCollection.from_ranges([(0, 16)]).gather(0, 4, W),
                "bitmap": lambda: AtomicBitmap(16),
            }[kind]()
        )
    )
]
# A question that can be answered, whatever the length: no.
LARGE_IS_FINE = {("memory", "check_range length"), ("slice memory", "check_range length")}


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_bad_numbers_are_refused(kind, name):
    bitmap = AtomicBitmap(0x2000)
    bitmap.set_range(0, 1)
    memory = GuestRegionCollection.from_regions([MmapRegion.anonymous(0, 0x2000, bitmap=bitmap)])
    memory.whole_slice(0, 16, W)
    subject = {
        "memory": memory,
        "slice memory": SliceMemory(memory.whole_slice(0, 0x2000, W)),
        "collection": memory,
        "slice": memory.whole_slice(0, 0x2000, W),
        "vector": memory.gather(0, 0x10, Permissions.READ_WRITE),
        "bitmap": bitmap,
        "backing": None,
    }[kind]
    call = (CALLS[kind]() if kind == "backing" else CALLS[kind](subject))[name]
    for bad in BAD:
        if name == "remove size" and type(bad) is int and bad > 0:
            with pytest.raises(NoMemoryRegionError):
                call(bad)
            continue
        if (kind, name) in LARGE_IS_FINE and type(bad) is int and bad > 0:
            assert call(bad) is False
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            call(bad)
        assert not isinstance(caught.value, OverflowError)
        if any(bad is one for one in NO_INT):
            assert isinstance(caught.value, TypeError), caught.value
    assert memory.read(0, 0x2000) == bytes(0x2000)
    assert bitmap.dirty_pages().tolist() == [0]
    assert (len(bitmap), bitmap.byte_size) == (2, 0x2000)


@pytest.mark.parametrize("number", [np.uint64(8), np.int32(8)])
def test_whatever_is_an_integer_is_one(number):
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    memory.write(number, b"12345678")
    assert memory.read(number, number) == b"12345678"
    assert memory.load(number, 8) == int.from_bytes(b"12345678", "little")
    assert memory.find_region(number) is not None
    assert len(memory.whole_slice(number, number, R).subslice(0, number)) == 8
    bitmap = AtomicBitmap(number, number)
    assert (len(bitmap), bitmap.is_set(number)) == (1, False)


@pytest.mark.parametrize("width", [3, 0, 16, 5])
def test_widths(width):
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    for call in (
        lambda: memory.load(0, width),
        lambda: memory.store(0, 0, width),
        lambda: memory.compare_exchange(0, 0, 0, width),
        lambda: memory.whole_slice(0, 64, W).load(0, width),
    ):
        with pytest.raises(ValueError, match="width"):
            call()


def test_orderings_that_an_access_cannot_have():
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    for ordering in (Ordering.RELEASE, Ordering.ACQ_REL):
        with pytest.raises(ValueError, match=ordering.name):
            memory.load(0, 4, ordering)
    for ordering in (Ordering.ACQUIRE, Ordering.ACQ_REL):
        with pytest.raises(ValueError, match=ordering.name):
            memory.store(0, 1, 4, ordering)
    with pytest.raises(ValueError, match="77"):
        memory.load(0, 4, 77)
    for ordering in (Ordering.RELAXED, Ordering.RELEASE, Ordering.SEQ_CST):
        memory.store(0, ordering, 4, ordering)
        assert memory.load(0, 4, Ordering.ACQUIRE) == ordering


@pytest.mark.parametrize(("width", "value"), [(1, 256), (2, 1 << 16), (4, 1 << 32), (8, 1 << 64)])
def test_values_that_do_not_fit(width, value):
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    with pytest.raises(ValueError, match="fit"):
        memory.store(0, value, width)
    with pytest.raises(ValueError, match="fit"):
        memory.compare_exchange(0, value, 0, width)
    with pytest.raises(ValueError, match="fit"):
        memory.compare_exchange(0, 0, value, width)
    assert memory.read(0, 8) == bytes(8)


def test_buffers_that_are_none():
    memory = GuestRegionCollection.from_ranges([(0, 0x1000)])
    for bad in (1, "text", None, [1, 2]):
        with pytest.raises(TypeError):
            memory.write(0, bad)
        with pytest.raises(TypeError):
            memory.readinto(0, bad)
        with pytest.raises(TypeError):
            VolatileSlice.over(bad)
        with pytest.raises(TypeError):
            Backing.from_buffer(bad)
    with pytest.raises((TypeError, BufferError)):
        memory.readinto(0, b"constant")
    for buffer in (np.zeros((4, 4))[:, 1], memoryview(bytearray(8))[::2]):
        with pytest.raises((TypeError, ValueError, BufferError)):
            memory.write(0, buffer)
    memory.write(0, np.arange(4, dtype="<u4").reshape(2, 2))
    assert memory.read(4, 4) == b"\x01\0\0\0"


def test_parts_that_only_others_make():
    for call in (VolatileSlice, AtomicBitmap(16).slice_at(0).__class__):
        with pytest.raises(TypeError, match="come from"):
            call()
    with pytest.raises(TypeError):
        GuestMemoryAtomic()
