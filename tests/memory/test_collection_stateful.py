"""Collections and dirty bitmaps against models that know every byte and every page."""

import io

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from guestio import (
    AtomicBitmap,
    Backing,
    GuestRegionCollection,
    InvalidAddressError,
    MemoryRegionOverlapError,
    MisalignedError,
    MmapRegion,
    NoMemoryRegionError,
    PartialAccessError,
    PermissionDeniedError,
    Permissions,
)

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
SPAN = 80
BASES = (0, 0x7FFF_FFFF_FFFF_FF00, 2**64 - SPAN)


class CollectionMachine(RuleBasedStateMachine):
    """Small regions at an edge of the space; each byte of the model knows its value and rights."""

    def __init__(self):
        super().__init__()
        self.cells = {}
        self.regions = {}
        self.dirty = {}

    @initialize(base=st.sampled_from(BASES))
    def start(self, base):
        self.base = base
        self.memory = GuestRegionCollection()

    offsets = st.integers(0, SPAN - 1)
    lengths = st.integers(0, 40)

    def there(self, at, length, access):
        """How many bytes from ``at`` on are there and allow the access."""
        for i in range(length):
            cell = self.cells.get(at + i)
            if cell is None or (access & W and not cell[1]):
                return i
        return length

    @rule(at=offsets, size=st.integers(1, 24), writable=st.booleans(), memfd=st.booleans())
    def insert(self, at, size, writable, memfd):
        size = min(size, SPAN - at)
        backing = Backing.memfd(size) if memfd else Backing.anonymous(size)
        region = MmapRegion(
            self.base + at, backing, bitmap=AtomicBitmap(size, 1), writable=writable
        )
        before = self.memory
        if any(a in self.cells for a in range(at, at + size)):
            with pytest.raises(MemoryRegionOverlapError):
                before.insert_region(region)
            return
        self.memory = before.insert_region(region)
        assert len(before) == len(self.regions)
        self.regions[at] = region
        self.dirty[at] = set()
        for i in range(size):
            self.cells[at + i] = [0, writable]

    @rule(at=offsets, size=st.integers(1, 24))
    def remove(self, at, size):
        region = self.regions.get(at)
        if region is None or region.size != size:
            with pytest.raises(NoMemoryRegionError):
                self.memory.remove_region(self.base + at, size)
            return
        self.forget(at)

    @precondition(lambda self: self.regions)
    @rule(data=st.data())
    def remove_one(self, data):
        self.forget(data.draw(st.sampled_from(sorted(self.regions))))

    def forget(self, at):
        region = self.regions.pop(at)
        self.memory, removed = self.memory.remove_region(self.base + at, region.size)
        assert removed is region
        for i in range(region.size):
            del self.cells[at + i]
        del self.dirty[at]

    def owner(self, at):
        return max((start for start in self.regions if start <= at), default=None)

    def write_model(self, at, data):
        for i, byte in enumerate(data):
            self.cells[at + i][0] = byte
            start = self.owner(at + i)
            self.dirty[start].add(at + i - start)

    def check_failure(self, error, at, length, done, access):
        """An access of which only ``done`` bytes are there failed as it should."""
        cause = error.__cause__ if isinstance(error, PartialAccessError) else error
        if done:
            assert isinstance(error, PartialAccessError)
            assert error.completed == done
        hole = self.cells.get(at + done) is None
        assert isinstance(cause, InvalidAddressError if hole else PermissionDeniedError)
        assert cause.addr == self.base + at + done
        assert (cause.region is None) == hole

    @rule(at=offsets, data=st.binary(max_size=40), how=st.sampled_from(["exact", "some", "stream"]))
    def write(self, at, data, how):
        data = data[: SPAN - at]
        done = self.there(at, len(data), W)
        addr = self.base + at
        try:
            if how == "exact":
                self.memory.write(addr, data)
            elif how == "some":
                assert self.memory.write_some(addr, data) == done
            else:
                self.memory.read_exact_from(addr, io.BytesIO(data), len(data))
        except (InvalidAddressError, PermissionDeniedError, PartialAccessError) as error:
            assert done < len(data)
            self.check_failure(error, at, len(data), done, W)
        else:
            assert done == len(data) or (how == "some" and done)
        self.write_model(at, data[:done])

    @rule(at=offsets, length=lengths, value=st.integers(0, 255))
    def fill(self, at, length, value):
        length = min(length, SPAN - at)
        done = self.there(at, length, W)
        try:
            self.memory.fill(self.base + at, length, value)
        except (InvalidAddressError, PermissionDeniedError, PartialAccessError) as error:
            self.check_failure(error, at, length, done, W)
        else:
            assert done == length
        self.write_model(at, bytes([value]) * done)

    @rule(at=offsets, length=lengths, how=st.sampled_from(["exact", "some", "stream", "slices"]))
    def read(self, at, length, how):
        length = min(length, SPAN - at)
        done = self.there(at, length, R)
        expected = bytes(self.cells[at + i][0] for i in range(done))
        addr = self.base + at
        sink = io.BytesIO()
        try:
            if how == "exact":
                assert self.memory.read(addr, length) == expected
            elif how == "some":
                buffer = bytearray(length)
                assert self.memory.read_some(addr, buffer) == done
                assert buffer == expected.ljust(length, b"\0")
            elif how == "stream":
                self.memory.write_all_to(addr, sink, length)
            else:
                for piece in self.memory.slices(addr, length):
                    sink.write(piece.read())
        except (InvalidAddressError, PermissionDeniedError, PartialAccessError) as error:
            assert done < length
            if how != "slices":
                self.check_failure(error, at, length, done, R)
        else:
            assert done == length or (how == "some" and done)
        if how in ("stream", "slices"):
            assert sink.getvalue() == expected

    @rule(at=offsets, width=st.sampled_from([1, 2, 4, 8]), value=st.integers(0, 2**64 - 1))
    def atomics(self, at, width, value):
        at = min(at, SPAN - width)
        value %= 1 << (8 * width)
        whole = self.there(at, width, RW) == width
        start = self.owner(at)
        inside = whole and at + width <= start + self.regions[start].size
        addr = self.base + at
        aligned = inside and self.regions[start].host_address(at - start) % width == 0
        if not aligned:
            with pytest.raises((InvalidAddressError, PermissionDeniedError, MisalignedError)):
                self.memory.store(addr, value, width)
            with pytest.raises((InvalidAddressError, PermissionDeniedError, MisalignedError)):
                self.memory.compare_exchange(addr, value, 0, width)
            return
        before = int.from_bytes(bytes(self.cells[at + i][0] for i in range(width)), "little")
        assert self.memory.load(addr, width) == before
        assert self.memory.compare_exchange(addr, before, value, width) == (True, before)
        assert self.memory.compare_exchange(addr, value ^ 1, 0, width) == (False, value)
        self.memory.store(addr, value, width)
        self.write_model(at, value.to_bytes(width, "little"))

    @rule(at=offsets, length=lengths, access=st.sampled_from(list(map(Permissions, range(4)))))
    def check_range(self, at, length, access):
        length = min(length, SPAN - at)
        whole = self.there(at, length, access) == length
        assert self.memory.check_range(self.base + at, length, access) == whole

    @rule(at=offsets)
    def find(self, at):
        addr = self.base + at
        found = self.memory.to_region_addr(addr)
        if at in self.cells:
            start = self.owner(at)
            assert found == (self.regions[start], at - start)
            assert self.memory.find_region(addr) is self.regions[start]
        else:
            assert found is None
        assert self.memory.address_in_range(addr) == (at in self.cells)
        assert self.memory.check_address(addr) == (addr if at in self.cells else None)

    @invariant()
    def marked(self):
        if not hasattr(self, "memory"):
            return
        assert [r.start - self.base for r in self.memory] == sorted(self.regions)
        for start, region in self.regions.items():
            assert set(region.bitmap.dirty_pages().tolist()) == self.dirty[start]
        last = max(self.cells, default=None)
        assert self.memory.last_addr == (0 if last is None else self.base + last)


@pytest.mark.slow
def test_collections_agree_with_the_byte_model():
    run_state_machine_as_test(
        CollectionMachine,
        settings=settings(max_examples=100, stateful_step_count=40, deadline=None),
    )


class BitmapMachine(RuleBasedStateMachine):
    """Sets of page numbers are the model."""

    def __init__(self):
        super().__init__()
        self.dirty = set()

    @initialize(size=st.integers(0, 3000), page=st.sampled_from([1, 3, 8, 64]))
    def start(self, size, page):
        self.size, self.page = size, page
        self.bitmap = AtomicBitmap(size, page)

    starts = st.integers(0, 4000) | st.integers(2**64 - 50, 2**64 - 1)
    lengths = st.integers(0, 700)

    @property
    def pages(self):
        return -(-self.size // self.page)

    def touched(self, start, length):
        if not length:
            return set()
        return set(
            range(start // self.page, min((start + length - 1) // self.page + 1, self.pages))
        )

    def clip(self, start, length):
        return min(length, 2**64 - start)

    @rule(start=starts, length=lengths, offset=st.integers(0, 500))
    def set_range(self, start, length, offset):
        length = self.clip(start, length)
        if offset <= start:
            self.bitmap.slice_at(offset).set_range(start - offset, length)
        else:
            self.bitmap.set_range(start, length)
        self.dirty |= self.touched(start, length)

    @rule(start=starts, length=lengths)
    def reset_range(self, start, length):
        length = self.clip(start, length)
        self.bitmap.reset_range(start, length)
        self.dirty -= self.touched(start, length)

    @rule(page=st.integers(0, 400), to=st.booleans())
    def one_bit(self, page, to):
        (self.bitmap.set_bit if to else self.bitmap.reset_bit)(page)
        if page < self.pages:
            (self.dirty.add if to else self.dirty.discard)(page)
        assert self.bitmap.is_bit_set(page) == (to and page < self.pages)

    @rule(start=starts, length=st.none() | lengths, clear=st.booleans())
    def harvest(self, start, length, clear):
        if length is not None:
            length = self.clip(start, length)
        touched = self.touched(start, 2**64 - start if length is None else length)
        found = self.bitmap.dirty_pages(start, length, clear=clear)
        assert found.tolist() == sorted(self.dirty & touched)
        if clear:
            self.dirty -= touched

    @rule(start=st.integers(0, 4000), length=lengths, factor=st.sampled_from([2, 4, 10]))
    def other_page_sizes(self, start, length, factor):
        touched = self.dirty & self.touched(start, length)
        coarse = self.bitmap.dirty_pages(start, length, page_size=self.page * factor)
        assert coarse.tolist() == sorted({page // factor for page in touched})
        fine = self.bitmap.dirty_pages(start, length, page_size=1)
        asked = range(start, min(start + length, self.size))
        expected = [byte for byte in asked if byte // self.page in touched]
        assert fine.tolist() == expected

    @rule()
    def take_words(self):
        words = self.bitmap.peek()
        assert np.array_equal(self.bitmap.get_and_reset(), words)
        pages = [
            64 * i + b for i, word in enumerate(words.tolist()) for b in range(64) if word >> b & 1
        ]
        assert pages == sorted(self.dirty)
        self.dirty.clear()

    @rule()
    def reset(self):
        self.bitmap.reset()
        self.dirty.clear()

    @rule(extra=st.integers(0, 600))
    def enlarge(self, extra):
        self.bitmap.enlarge(extra)
        self.size += extra

    @rule()
    def copy(self):
        twin = self.bitmap.copy()
        assert twin.dirty_pages().tolist() == sorted(self.dirty)
        twin.set_range(0, self.size)
        assert self.bitmap.count() == len(self.dirty)

    @invariant()
    def agrees(self):
        if not hasattr(self, "bitmap"):
            return
        assert (len(self.bitmap), self.bitmap.byte_size) == (self.pages, self.size)
        assert self.bitmap.count() == len(self.dirty)
        for page in list(self.dirty)[:3]:
            assert self.bitmap.is_set(page * self.page)


@pytest.mark.slow
def test_bitmaps_agree_with_sets():
    run_state_machine_as_test(
        BitmapMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )


def test_a_byte_behind_the_end_in_the_last_page():
    bitmap = AtomicBitmap(4, 3)
    bitmap.set_range(6, 1)
    assert bitmap.count() == 0
    bitmap.set_range(5, 1)
    assert bitmap.dirty_pages().tolist() == [1]
    bitmap.reset_range(5, 1)
    bitmap.set_range(0, 2**64)
    assert bitmap.count() == 2


def test_page_sizes_that_do_not_fit():
    bitmap = AtomicBitmap(1000, 8)
    bitmap.set_range(0, 1)
    for size in (3, 12, 0):
        with pytest.raises(ValueError, match="divide"):
            bitmap.dirty_pages(page_size=size, clear=True)
    assert bitmap.count() == 1
