"""Slices of memory: pieces, bytes, objects and streams.

An object or a partial transfer on a slice goes through :class:`~guestio.SliceMemory`, which has
the whole access interface.
"""

import contextlib
import ctypes
import io
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from guestio import (
    GuestRegionCollection,
    InvalidAddressError,
    MisalignedError,
    MmapRegion,
    PartialAccessError,
    SliceMemory,
    VolatileSlice,
)
from guestio.addr import checked_add

MAX = 2**64 - 1


def slice_of(content: bytes | int) -> VolatileSlice:
    return VolatileSlice.over(bytearray(content))


def memory_of(content: bytes | int) -> SliceMemory:
    return SliceMemory(slice_of(content))


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint32))


class Wide(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * 32),)


def test_partial_writes_to_a_container():
    memory = memory_of(5)
    memory.write(0, bytes([1, 2, 3, 4, 5]))
    assert memory.write_some(0, b"\x06\x07\x08") == 3
    assert memory.write_some(3, b"\x09\x0a\x0b") == 2
    assert memory.read(0, 5) == bytes([6, 7, 8, 9, 10])
    with pytest.raises(InvalidAddressError) as caught:
        memory.write_some(5, b"\x01")
    assert caught.value.addr == 5
    assert memory.write_some(5, b"") == 0


def test_objects_need_exactly_their_bytes():
    whole = memory_of(bytes(range(8)))
    assert whole.read_obj(0, "<u8") == 0x0706050403020100
    with pytest.raises(PartialAccessError):
        whole.read_obj(1, "<u8")
    # Plain transfers need no alignment, unlike a cast in place.
    assert whole.read_obj(1, "<u4") == 0x04030201


def test_a_structure_from_bytes():
    got = memory_of(bytes([0, 0, 0, 0, 1, 1, 1, 1])).read_obj(0, Pair)
    assert (got.a, got.b) == (0, 0x01010101)


def test_a_structure_from_a_short_stream():
    memory = memory_of(8)
    with pytest.raises(PartialAccessError) as caught:
        memory.read_exact_from(0, io.BytesIO(b"1234567"), 8)
    assert caught.value.completed == 7
    assert isinstance(caught.value.__cause__, EOFError)


def test_a_structure_to_a_short_sink():
    with pytest.raises(PartialAccessError) as caught:
        memory_of(8).write_all_to(0, Sink(7), 8)
    assert caught.value.completed == 7


def test_a_zeroed_structure():
    memory = memory_of(b"\xff" * 8)
    memory.write_obj(0, Pair())
    assert memory.read(0, 8) == bytes(8)


def test_an_object_at_the_end():
    memory = memory_of(10)
    memory.write_obj(0, ctypes.c_uint64(MAX))
    assert memory.read_obj(0, ctypes.c_uint64).value == MAX
    with pytest.raises(InvalidAddressError):
        memory.write_obj(10, ctypes.c_uint64(1))


def test_atomic_access_to_a_slice():
    memory = SliceMemory(VolatileSlice.over(np.zeros(8, np.uint8)))
    assert memory.load(0, 4) == 0
    memory.store(0, 100, 4)
    assert memory.load(0, 4) == 100
    for call in (lambda: memory.load(20, 4), lambda: memory.store(20, 1, 4)):
        with pytest.raises(InvalidAddressError):
            call()


def test_offsets_are_checked():
    assert checked_add(100, 8) == 108
    assert checked_add(MAX, 6) is None


def test_where_a_piece_may_end():
    whole = slice_of(5)
    for length in range(4):
        for base in range(6 - length):
            assert len(whole.subslice(base, length)) == length
    for base, length in ((5, 1), (6, 0)):
        with pytest.raises(InvalidAddressError):
            whole.subslice(base, length)
    assert len(slice_of(3).subslice(3, 0)) == 0


def test_an_atomic_that_leaves_the_slice():
    whole = VolatileSlice.over(np.zeros(1, np.uint64))
    assert whole.load(0, 8) == 0
    with pytest.raises(InvalidAddressError):
        whole.load(1, 8)


SUBSLICES = [
    (0, 0, 0),
    (99, 0, 0),
    (99, 1, 1),
    (100, 0, 0),
    (0, 101, None),
    (99, 2, None),
    (100, 1, None),
    (101, 0, None),
    (101, 1, None),
    (MAX, 2, None),
    (2, MAX, None),
    (50, 50, 50),
    (55, 50, None),
    (MAX, 1, None),
]


@pytest.mark.parametrize(("start", "length", "expected"), SUBSLICES)
def test_subslices_of_100_bytes(start, length, expected):
    whole = slice_of(100)
    if expected is None:
        with pytest.raises(InvalidAddressError):
            whole.subslice(start, length)
    else:
        assert len(whole.subslice(start, length)) == expected


def test_tails_and_pieces():
    whole = slice_of(100)
    whole.write(10, b"\x01" * 80)
    assert whole.subslice(10, 80).read() == b"\x01" * 80
    with pytest.raises(InvalidAddressError):
        whole.offset(101)
    tail = whole.offset(10)
    assert len(tail) == 90
    assert tail.read() == b"\x01" * 80 + bytes(10)


def test_references_stay_inside():
    assert slice_of(100).read(99, 1) == b"\0"
    with pytest.raises(InvalidAddressError):
        slice_of(1).subslice(MAX, 1)
    with pytest.raises(InvalidAddressError):
        slice_of(1).load(MAX, 1)
    with pytest.raises(InvalidAddressError):
        slice_of(100).subslice(99, 2)
    with pytest.raises(InvalidAddressError):
        slice_of(3).subslice(0, 4)
    with pytest.raises(ValueError, match="passes"):
        slice_of(100).subslice(4, 4 * MAX)


def test_partial_and_exact():
    five = slice_of(5)
    assert five.write_some(0, bytes([1, 2, 3, 4, 5, 6])) == 5
    for access in (lambda: five.write_some(5, b"123"), lambda: five.read_some(5, bytearray(3))):
        with pytest.raises(InvalidAddressError) as caught:
            access()
        assert caught.value.addr == 5
    assert five.write_some(100, b"") == 0
    assert five.read_some(4, bytearray()) == 0
    assert slice_of(0).write_some(1, b"") == 0
    assert slice_of(0).read_some(1, bytearray()) == 0
    objects = SliceMemory(five)
    for access in (
        lambda: objects.write_obj(4, np.uint16(1)),
        lambda: objects.read_obj(4, np.uint16),
    ):
        with pytest.raises(PartialAccessError) as partial:
            access()
        assert (partial.value.length, partial.value.completed) == (2, 1)
    for access in (
        lambda: objects.write_obj(MAX, np.uint8(1)),
        lambda: objects.read_obj(MAX, np.uint8),
    ):
        with pytest.raises(InvalidAddressError) as caught:
            access()
        assert caught.value.addr == MAX
    with pytest.raises(ValueError, match="passes"):
        objects.read_obj(MAX, np.uint16)
    objects.write_obj(2, np.uint16(55))
    assert objects.read_obj(2, np.uint16) == 55
    kibibyte = slice_of(1024)
    assert kibibyte.write_some(1020, b"12345") == 4
    assert kibibyte.read_some(1010, bytearray(16)) == 14


def test_an_exact_slice_access_moves_what_fits():
    five = slice_of(bytes([1, 2, 3, 4, 5]))
    with pytest.raises(PartialAccessError) as caught:
        five.write(4, b"\x08\x09")
    assert caught.value.completed == 1
    assert five.read() == bytes([1, 2, 3, 4, 8])
    with pytest.raises(PartialAccessError):
        five.fill(3, 3, 0)
    assert five.read() == bytes([1, 2, 3, 0, 0])
    with pytest.raises(PartialAccessError):
        five.readinto(4, bytearray(2))
    with pytest.raises(PartialAccessError):
        five.read(4, 2)


def test_an_unaligned_reference():
    seven = slice_of(bytes.fromhex("0102AAAAAAAA04"))
    assert int.from_bytes(seven.read(2, 4), "little") == 0xAAAAAAAA
    seven.write(2, (0x55555555).to_bytes(4, "little"))
    assert seven.read().hex() == "01025555555504"
    unaligned = VolatileSlice.over(np.zeros(16, np.uint8)[1:])
    with pytest.raises(MisalignedError):
        unaligned.load(0, 4)


def test_a_stream_shorter_than_the_object():
    memory = memory_of(32)
    assert memory.read_from(0, io.BytesIO(b"\x07" * 20), 32) == 20
    assert bytes(memory.read_obj(0, Wide).bytes) == b"\x07" * 20 + bytes(12)


def test_whole_elements():
    five = slice_of(bytes([2, 4, 6, 8, 10]))
    four, six = bytearray(4), bytearray(6)
    assert (five.copy_to(four), five.copy_to(six)) == (4, 5)
    assert (list(four), list(six)) == ([2, 4, 6, 8], [2, 4, 6, 8, 10, 0])
    nine = slice_of(np.array([1, 2, 3, 4, 5], "<u2").tobytes()[:9])
    small, large = np.zeros(4, "<u2"), np.zeros(6, "<u2")
    assert (nine.copy_to(small), nine.copy_to(large)) == (4, 4)
    assert small.tolist() == [1, 2, 3, 4]
    assert large.tolist() == [1, 2, 3, 4, 0, 0]
    for size in (8, 9):
        target = slice_of(size)
        assert target.copy_from(np.array([2, 4, 6, 8, 10], "<u2")) == 4
        assert np.frombuffer(target.read(0, 8), "<u2").tolist() == [2, 4, 6, 8]
        assert target.read()[8:] == bytes(size - 8)


def test_between_slices():
    source, target = slice_of(bytes([2, 4, 6, 8, 10])), slice_of(4)
    assert source.copy_to(target) == 4
    assert target.read() == bytes([2, 4, 6, 8])
    whole = slice_of(bytes(range(32)))
    whole.subslice(0, 24).copy_to(whole.offset(8))
    assert whole.read() == bytes([*range(8), *range(24)])


def test_arrays_in_place():
    five = slice_of(bytes([0, 0, 2, 3, 10]))
    array = np.frombuffer(five, np.uint8, count=4, offset=1)
    assert array[1:4].tolist() == [2, 3, 10]
    array[1:4] = [2, 4, 6]
    assert five.read(2, 3) == bytes([2, 4, 6])


@pytest.mark.parametrize(
    ("middle", "sizes"),
    [(8, (8, 24)), (0, (0, 32)), (31, (31, 1)), (32, (32, 0)), (33, None)],
)
def test_splits(middle, sizes):
    whole = slice_of(32)
    if sizes is None:
        with pytest.raises(InvalidAddressError):
            whole.split_at(middle)
    else:
        head, tail = whole.split_at(middle)
        assert (len(head), len(tail)) == sizes


FLIP = """
import sys
from guestio import GuestRegionCollection, MmapRegion
fds, addr, width, skip = sys.argv[1].split(","), *map(int, sys.argv[2:])
memory = GuestRegionCollection.from_regions(
    MmapRegion.from_fd(0x1000 * i, int(fd), 0x1000) for i, fd in enumerate(fds)
)
sources = []
for byte in (b"\\x00", b"\\xff"):
    sources.append(memoryview(bytearray(byte * (width + skip)))[skip:])
print("ready", flush=True)
while True:
    for source in sources:
        memory.write(addr, source)
"""


@contextlib.contextmanager
def flipping(regions, addr, width, skip):
    """Another process writes all zeroes and all ones in turn; the interpreter lock would hide it.

    ``skip`` is the alignment of the writer's own buffer.
    """
    fds = [region.backing.fd for region in regions]
    arguments = [",".join(map(str, fds)), str(addr), str(width), str(skip)]
    with subprocess.Popen(
        [sys.executable, "-c", FLIP, *arguments],
        pass_fds=fds,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield GuestRegionCollection.from_regions(regions)
        finally:
            process.kill()


def all_seen(read):
    """What is read again and again, until another process has changed it at least once."""
    seen = set()
    until = time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < until:
        for _ in range(100_000):
            seen.add(read())
    return seen


@pytest.mark.parametrize("width", [2, 4, 8])
def test_aligned_values_are_never_torn(width):
    """Whatever the alignment of the private side, of writer and reader."""
    target = memoryview(bytearray(width + 1))[1:]

    def read():
        memory.readinto(0x100, target)
        return bytes(target)

    with flipping([MmapRegion.memfd(0, 0x1000)], 0x100, width, 1) as memory:
        assert all_seen(read) == {b"\x00" * width, b"\xff" * width}


def test_an_object_across_two_regions():
    """The value at the end of one region is whole although the object goes on in the next."""
    regions = [MmapRegion.memfd(0, 0x1000), MmapRegion.memfd(0x1000, 0x1000)]
    with flipping(regions, 0x1000 - 2, 10, 0) as memory:
        seen = all_seen(lambda: memory.read(0x1000 - 2, 10)[:2])
    assert seen == {b"\x00\x00", b"\xff\xff"}


class Sink(io.RawIOBase):
    """A stream with room for so many bytes."""

    def __init__(self, room):
        self.room, self.content = room, b""

    def writable(self):
        return True

    def write(self, data):
        taken = bytes(data)[: self.room - len(self.content)]
        self.content += taken
        return len(taken)


def pipe_with(content: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    return reading


@pytest.fixture(params=["file-like", "descriptor"])
def source(request):
    """Makes a source of the given bytes."""
    opened = []

    def make(content):
        if request.param == "file-like":
            return io.BytesIO(content)
        opened.append(pipe_with(content))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


@pytest.mark.parametrize(
    ("content", "moved", "after"),
    [
        ([1, 2], 2, [1, 2, 0, 0, 0]),
        ([1, 2, 3, 4], 4, [1, 2, 3, 4, 0]),
        ([5, 6, 7, 8, 9], 4, [5, 6, 7, 8, 0]),
    ],
)
def test_reading_into_the_first_four_bytes(source, content, moved, after):
    memory = memory_of(5)
    assert memory.read_from(0, source(bytes(content)), 4) == moved
    assert list(memory.read(0, 5)) == after


def test_an_exact_read_of_too_little(source):
    memory = memory_of(5)
    with pytest.raises(PartialAccessError) as caught:
        memory.read_exact_from(0, source(b"\x01\x02"), 4)
    assert caught.value.completed == 2
    assert list(memory.read(0, 5)) == [1, 2, 0, 0, 0]


@pytest.mark.parametrize(
    ("content", "moved"), [([1, 2], 2), ([1, 2, 3, 4], 4), ([5, 6, 7, 8, 9], 4)]
)
def test_writing_to_a_sink(content, moved):
    sink = Sink(4)
    memory = memory_of(bytes(content))
    count = len(content)
    if count <= 4:
        assert memory.write_to(0, sink, count) == moved
    else:
        with pytest.raises(PartialAccessError) as caught:
            memory.write_all_to(0, sink, count)
        assert caught.value.completed == 4
    assert list(sink.content) == content[:4]


def test_a_file_gets_exactly_the_bytes(tmp_path):
    path = tmp_path / "sink"
    with path.open("wb", buffering=0) as sink:
        memory_of(bytes([5, 6, 7, 8, 9])).write_all_to(0, sink, 5)
    assert path.read_bytes() == bytes([5, 6, 7, 8, 9])


def test_a_source_with_a_position():
    memory, cursor = memory_of(4), io.BytesIO(bytes([1, 2, 3, 4, 5, 6, 7]))
    assert memory.read_from(0, cursor, 4) == 4
    assert list(memory.read(0, 4)) == [1, 2, 3, 4]
    assert memory.read_from(0, cursor, 4) == 3
    assert list(memory.read(0, 4)) == [5, 6, 7, 4]
    cursor.seek(0)
    memory.read_exact_from(0, cursor, 4)
    assert list(memory.read(0, 4)) == [1, 2, 3, 4]
    with pytest.raises(PartialAccessError) as caught:
        memory.read_exact_from(0, cursor, 4)
    assert caught.value.completed == 3


def test_a_sink_with_room_for_seven():
    sink, memory = Sink(7), memory_of(bytes([1, 2, 3, 4]))
    assert memory.write_to(0, sink, 4) == 4
    with pytest.raises(PartialAccessError) as caught:
        memory.write_to(0, sink, 4)
    assert caught.value.completed == 3
    assert list(sink.content) == [1, 2, 3, 4, 1, 2, 3]


def test_a_sink_that_grows():
    sink = io.BytesIO()
    assert memory_of(bytes([1, 2, 3, 4])).write_to(0, sink, 4) == 4
    assert sink.getvalue() == bytes([1, 2, 3, 4])
