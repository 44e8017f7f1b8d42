"""Memory behind an IOMMU against a model of every byte: all fragmentations, rights and bitmaps."""

import io

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from guestio import (
    AccessError,
    AtomicBitmap,
    CannotResolveError,
    DirtyMode,
    GuestRegionCollection,
    InvalidAddressError,
    Iommu,
    IommuMemory,
    Iotlb,
    MisalignedError,
    MmapRegion,
    PartialAccessError,
    PermissionDeniedError,
    Permissions,
)

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
IOVAS = 96
TOP = 2**64 - IOVAS
# Regions with a hole in between, and a part that may not be written.
REGIONS = ((0x1000, 40, True), (0x1028, 24, True), (0x1060, 32, False), (0x1090, 20, True))
TARGETS = range(0x0FF8, 0x10B0)


class LazyIommu(Iommu):
    """Keeps full tables; its IOTLB is small and filled on demand, whole failures at a time."""

    def __init__(self, capacity):
        self.tables = Iotlb()
        self._iotlb = Iotlb(capacity)
        self.lazy = capacity is not None

    @property
    def iotlb(self):
        return self._iotlb

    def resolve(self, fails, iova, length, access):
        found = 0
        for failed in (*fails.misses, *fails.access_fails):
            for start, size, target, perm in self.tables._map.overlapping(*failed):
                if perm.allows(access):
                    self._iotlb.set_mapping(start, target, size, perm)
                    found += 1
        if not found:
            super().resolve(fails, iova, length, access)


class IommuMemoryMachine(RuleBasedStateMachine):
    """I/O addresses here are offsets from a base, at the bottom or the very top of the space."""

    def __init__(self):
        super().__init__()
        self.table = {}
        self.bytes = {}
        self.writable = {}
        self.io_dirty = set()
        self.region_dirty = set()

    @initialize(
        base=st.sampled_from((0, TOP)),
        mode=st.sampled_from(list(DirtyMode)),
        capacity=st.sampled_from((None, 40)),
    )
    def start(self, base, mode, capacity):
        self.base, self.mode = base, mode
        regions = [
            MmapRegion.anonymous(start, size, bitmap=AtomicBitmap(size, 1))
            for start, size, _ in REGIONS
        ]
        regions = [
            region
            if writable
            else MmapRegion(start, region.backing, bitmap=region.bitmap, writable=False)
            for region, (start, _, writable) in zip(regions, REGIONS, strict=True)
        ]
        for start, size, writable in REGIONS:
            for at in range(start, start + size):
                self.bytes[at] = 0
                self.writable[at] = writable
        self.iommu = LazyIommu(capacity)
        # A bitmap cannot cover the top of the space in bytes; there the model expects no marks.
        self.marked = AtomicBitmap(IOVAS, 1)
        self.memory = IommuMemory(
            GuestRegionCollection.from_regions(regions), self.iommu, bitmap=self.marked, dirty=mode
        )

    iovas = st.integers(0, IOVAS - 1)
    lengths = st.integers(0, 48)

    @rule(
        at=iovas,
        length=st.integers(1, 40),
        to=st.sampled_from(TARGETS),
        perm=st.sampled_from((R, W, RW, RW, RW, Permissions.NONE)),
    )
    def map_range(self, at, length, to, perm):
        length = min(length, IOVAS - at)
        self.iommu.iotlb.invalidate_mapping(self.base + at, length)
        self.iommu.tables.set_mapping(self.base + at, to, length, perm)
        if not self.iommu.lazy:
            self.iommu.iotlb.set_mapping(self.base + at, to, length, perm)
        for i in range(length):
            self.table[at + i] = (to + i, perm)

    @rule(at=iovas, length=st.integers(1, 20))
    def unmap(self, at, length):
        length = min(length, IOVAS - at)
        self.iommu.tables.invalidate_mapping(self.base + at, length)
        self.iommu.iotlb.invalidate_mapping(self.base + at, length)
        for i in range(length):
            self.table.pop(at + i, None)

    @rule(enabled=st.booleans())
    def switch(self, enabled):
        self.memory.enabled = enabled

    def outcome(self, at, length, access):
        """``(resolves, done, targets)`` of an access through the IOMMU."""
        cells = [self.table.get(at + i) for i in range(length)]
        if any(cell is None or not cell[1].allows(access) for cell in cells):
            return False, 0, []
        targets = [cell[0] for cell in cells]
        done = 0
        for target in targets:
            if target not in self.bytes or (access & W and not self.writable[target]):
                break
            done += 1
        return True, done, targets

    def check_failure(self, error, at, resolves, done, targets):
        if not resolves:
            assert isinstance(error, CannotResolveError)
            cell = self.table.get(error.iova_range.base - self.base)
            assert cell is None or not cell[1].allows(error.access)
            return
        cause = error.__cause__ if isinstance(error, PartialAccessError) else error
        if done:
            assert error.completed == done
        assert isinstance(cause, InvalidAddressError | PermissionDeniedError)
        assert cause.addr == self.base + at + done
        assert (cause.target or cause.addr) == targets[done]

    def write_model(self, at, targets, data):
        for i, (target, byte) in enumerate(zip(targets, data, strict=False)):
            self.bytes[target] = byte
            if self.mode is not DirtyMode.PHYSICAL and self.base == 0:
                self.io_dirty.add(at + i)
            if self.mode is not DirtyMode.IOVA:
                self.region_dirty.add(target)

    @rule(at=iovas, data=st.binary(max_size=48), how=st.sampled_from(("exact", "some", "stream")))
    def write(self, at, data, how):
        if not self.memory.enabled:
            return
        data = data[: IOVAS - at]
        resolves, done, targets = self.outcome(at, len(data), W)
        addr = self.base + at
        try:
            if how == "exact":
                self.memory.write(addr, data)
            elif how == "some":
                assert self.memory.write_some(addr, data) == done
            else:
                self.memory.read_exact_from(addr, io.BytesIO(data), len(data))
        except AccessError as error:
            assert done < len(data)
            self.check_failure(error, at, resolves, done, targets)
        else:
            assert done == len(data) or (how == "some" and done)
        self.write_model(at, targets[:done], data)

    @rule(at=iovas, length=lengths, value=st.integers(0, 255))
    def fill(self, at, length, value):
        if not self.memory.enabled:
            return
        length = min(length, IOVAS - at)
        resolves, done, targets = self.outcome(at, length, W)
        try:
            self.memory.fill(self.base + at, length, value)
        except AccessError as error:
            self.check_failure(error, at, resolves, done, targets)
        else:
            assert done == length
        self.write_model(at, targets[:done], [value] * done)

    @rule(at=iovas, length=lengths, how=st.sampled_from(("exact", "some", "slices", "stream")))
    def read(self, at, length, how):
        if not self.memory.enabled:
            return
        length = min(length, IOVAS - at)
        resolves, done, targets = self.outcome(at, length, R)
        expected = bytes(self.bytes[target] for target in targets[:done])
        addr, sink = self.base + at, io.BytesIO()
        try:
            if how == "exact":
                assert self.memory.read(addr, length) == expected
            elif how == "some":
                buffer = bytearray(length)
                assert self.memory.read_some(addr, buffer) == done
                assert buffer == expected.ljust(length, b"\0")
            elif how == "slices":
                for piece in self.memory.slices(addr, length, R):
                    sink.write(piece.read())
            else:
                self.memory.write_all_to(addr, sink, length)
        except AccessError as error:
            assert done < length
            if how != "slices":
                self.check_failure(error, at, resolves, done, targets)
        else:
            assert done == length or (how == "some" and done)
        if how in ("slices", "stream"):
            assert sink.getvalue() == expected

    @rule(at=iovas, width=st.sampled_from((1, 2, 4, 8)), value=st.integers(0, 2**64 - 1))
    def atomics(self, at, width, value):
        if not self.memory.enabled:
            return
        at, value = min(at, IOVAS - width), value % (1 << 8 * width)
        resolves, done, targets = self.outcome(at, width, RW)
        addr = self.base + at
        try:
            done_now, seen = self.memory.compare_exchange(addr, value, value, width)
        except MisalignedError:
            # Not contiguous, or not aligned in this process: both only if it is all there.
            assert done == width
            return
        except AccessError as error:
            assert done < width
            if done == 0:
                self.check_failure(error, at, resolves, done, targets)
            return
        assert targets == list(range(targets[0], targets[0] + width))
        held = int.from_bytes(bytes(self.bytes[t] for t in targets), "little")
        assert (done_now, seen) == (held == value, held)
        assert self.memory.load(addr, width) == held
        self.memory.store(addr, value, width)
        self.write_model(at, targets, value.to_bytes(width, "little"))

    @rule(at=iovas, length=lengths, access=st.sampled_from(list(map(Permissions, range(4)))))
    def check_range(self, at, length, access):
        if not self.memory.enabled:
            return
        length = min(length, IOVAS - at)
        resolves, done, _ = self.outcome(at, length, access)
        whole = resolves and done == length
        assert self.memory.check_range(self.base + at, length, access) == whole

    @rule(to=st.sampled_from(TARGETS), data=st.binary(min_size=1, max_size=8))
    def write_physically(self, to, data):
        """While disabled the same object writes physical memory, marked in the regions only."""
        if self.memory.enabled:
            return
        done = 0
        while done < len(data) and self.writable.get(to + done):
            done += 1
        if done:
            assert self.memory.write_some(to, data) == done
        else:
            with pytest.raises(AccessError) as caught:
                self.memory.write_some(to, data)
            assert caught.value.target is None
        for i in range(done):
            self.bytes[to + i] = data[i]
            self.region_dirty.add(to + i)

    @invariant()
    def marks_agree(self):
        if not hasattr(self, "memory"):
            return
        assert set(self.marked.dirty_pages().tolist()) == self.io_dirty
        marked = {
            region.start + page
            for region in self.memory.backend
            for page in region.bitmap.dirty_pages().tolist()
        }
        assert marked == self.region_dirty
        assert len(self.iommu.iotlb._map.leases) == 0
        assert (self.memory.physical_memory is None) == self.memory.enabled


@pytest.mark.slow
def test_memory_behind_an_iommu_agrees_with_the_byte_model():
    run_state_machine_as_test(
        IommuMemoryMachine,
        settings=settings(max_examples=250, stateful_step_count=50, deadline=None),
    )
