"""Objects in memory: ctypes and numpy types, byte order, objects in place, atomic integers."""

import ctypes

import numpy as np
import pytest

from guestio import (
    AtomicBitmap,
    GuestRegionCollection,
    MisalignedError,
    MmapRegion,
    Permissions,
    VolatileSlice,
)

W = Permissions.WRITE
MAX = 2**64 - 1


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint32))


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
    """Also arrays of more than 32 elements, where vm-memory stops."""
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
    bitmap = AtomicBitmap(0x1000, 1)
    region = MmapRegion.anonymous(0, 0x1000, bitmap=bitmap)
    memory = GuestRegionCollection.from_regions([region])
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


def test_elements_outside_an_array_are_refused():
    """vm-memory panics."""
    array = np.frombuffer(VolatileSlice.over(bytearray(8)), "<u2")
    with pytest.raises(IndexError):
        array[4]
    with pytest.raises(IndexError):
        array[4] = 1


@pytest.mark.parametrize("width", [2, 4, 8])
def test_byte_order(width):
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


def test_structures_of_either_order():
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
def test_atomic_integers(width):
    memory = GuestRegionCollection.from_ranges([(0, 64)])
    assert memory.load(8, width) == 0
    memory.store(8, 100, width)
    assert memory.load(8, width) == 100
    top = (1 << 8 * width) - 1
    assert memory.compare_exchange(8, 100, top, width) == (True, 100)
    assert memory.compare_exchange(8, 100, 1, width) == (False, top)
    assert memory.load(8, width) == top
    assert memory.read(8 + width, 8) == bytes(8)
