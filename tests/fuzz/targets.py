"""Fuzz targets: bytes in, a sequence of calls out, checked against what must always hold.

Each is a plain function of ``bytes``, so that any fuzzer can drive it; the tests beside it do so
with Hypothesis.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import numpy as np

from guestio import (
    AtomicBitmap,
    GuestRegionCollection,
    InvalidAddressError,
    IotlbFails,
    MisalignedError,
    MmapRegion,
    PartialAccessError,
    Permissions,
    VolatileSlice,
)
from guestio._core.iommu.intervals import IntervalMap

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
SPACE = 1 << 64
# Numbers near which arithmetic goes wrong, if it does.
EDGES = (
    0,
    1,
    15,
    16,
    17,
    4095,
    4096,
    4097,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    SPACE - 4096,
    SPACE - 1,
)


def words(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Operations: a code and two numbers, small, near an edge, or any."""
    for code, kind, a, b in struct.iter_unpack("<BBQQ", data[: len(data) // 18 * 18]):
        first = a % 96 if kind & 1 else (EDGES[a % len(EDGES)] + (a >> 32) % 5) % SPACE
        second = b % 96 if kind & 2 else (EDGES[b % len(EDGES)] + (b >> 32) % 5) % SPACE
        yield code, a if kind & 4 else first, b if kind & 8 else second


def fuzz_intervals(data: bytes) -> None:
    """Any calls on an interval map: it stays sound, and its ways to answer agree."""
    if not data:
        return
    bounded = bool(data[0] & 2)
    tree = IntervalMap(merge=bool(data[0] & 1), capacity=5 if bounded else None)
    for code, start, length in words(data[1:]):
        perm = Permissions(code >> 6)
        try:
            match code % 8:
                case 0 | 1:
                    tree.overwrite(start, length, length ^ start, perm)
                    if not bounded:
                        assert tree.lookup(start, 1, perm)[0].base == length ^ start
                case 2:
                    tree.cut(start, length)
                    assert not tree.overlapping(start, length)
                case 3:
                    free = not tree.overlapping(start, length)
                    assert tree.add(start, length, start, perm) == free
                case 4:
                    inside = tree.overlapping(start, length)
                    taken = tree.take(start, length)
                    assert taken in (None, inside)
                    assert tree.overlapping(start, length) == ([] if taken is not None else inside)
                case 5:
                    tree.pin(start, length)
                case 6:
                    with tree.guard(start, length, perm) as ranges:
                        assert sum(r.length for r in ranges) == length
                case _:
                    tree.neighbours(start)
            compare_answers(tree, start, length, perm)
        except (ValueError, IotlbFails):
            pass
        tree.check()
        assert len(tree.leases) == 0


def compare_answers(tree: IntervalMap, start: int, length: int, access: Permissions) -> None:
    """The single lookup, the batch and the listing of mappings say the same."""
    targets, status = tree.lookup_many([start], [length], access)
    try:
        ranges = tree.lookup(start, length, access)
    except IotlbFails as error:
        fails = error
    else:
        assert sum(r.length for r in ranges) == length
        covered = tree.overlapping(start, length)
        assert len(covered) == len(ranges)
        assert all(perm.allows(access) for *_, perm in covered)
        if len(ranges) == 1:
            assert (status[0], targets[0]) == (0, ranges[0].base)
        return
    assert status[0] == (1 if fails.misses else 2)
    parts = sorted([*fails.misses, *fails.access_fails])
    assert all(part.length > 0 for part in parts)
    assert parts[0].base >= start
    assert parts[-1].base + parts[-1].length <= start + length


def fuzz_slices(data: bytes) -> None:
    """Any calls on a slice: nothing outside it changes, its bitmap knows what was written."""
    size = 256
    bitmap = AtomicBitmap(3 * size, 1)
    memory = GuestRegionCollection.from_regions([MmapRegion.anonymous(0, 3 * size, bitmap=bitmap)])
    memory.fill(0, 3 * size, 0xAA)
    bitmap.reset()
    model = bytearray(b"\xaa" * size)
    written: set[int] = set()
    whole = memory.whole_slice(size, size, RW)
    for code, offset, length in words(data):
        with contextlib.suppress(ValueError, PartialAccessError, MisalignedError):
            apply(whole, model, written, code, offset, length)
        assert whole.read() == bytes(model)
    assert memory.read(0, size) == memory.read(2 * size, size) == b"\xaa" * size
    assert set(bitmap.dirty_pages().tolist()) == {size + at for at in written}


def apply(
    whole: VolatileSlice, model: bytearray, written: set[int], code: int, offset: int, length: int
) -> None:
    """One call on the slice, and what it means for the model."""
    size, value = len(model), code >> 3
    room = max(size - offset, 0)
    moved = min(length, room)
    content = bytes([value]) * min(length, 1000)
    width = (1, 2, 4, 8)[length % 4]

    def note(at: int, data: bytes) -> None:
        model[at : at + len(data)] = data
        written.update(range(at, at + len(data)))

    match code % 8:
        case 0 | 1:
            note(offset, content[:room])
            (whole.write if code % 8 else whole.write_some)(offset, content)
        case 2:
            if length < 1 << 63 and offset + length <= SPACE:
                note(offset, bytes([value]) * moved)
            whole.fill(offset, length, value)
        case 3:
            assert whole.read(offset, length) == bytes(model[offset : offset + moved])
        case 4:
            try:
                part = whole.subslice(offset, length)
            except InvalidAddressError:
                assert offset + length > size
            else:
                assert part.read() == bytes(model[offset : offset + length])
                head, tail = part.split_at(length // 2)
                assert head.read() + tail.read() == part.read()
        case 5:
            whole.store(offset, value, width)
            note(offset, value.to_bytes(width, "little"))
        case 6:
            seen = whole.load(offset, width)
            assert seen == int.from_bytes(model[offset : offset + width], "little")
            assert whole.compare_exchange(offset, seen, value, width) == (True, seen)
            note(offset, value.to_bytes(width, "little"))
        case _:
            count = whole.offset(offset).copy_from(np.full(length % 64, value, "<u2"))
            note(offset, np.full(count, value, "<u2").tobytes())
