"""A revocation returns only when the old translation is no longer in use."""

import gc
import re
import threading
import time

import numpy as np
import pytest

from guestio import (
    CannotResolveError,
    GuestMemory,
    GuestRegionCollection,
    Iommu,
    IommuMemory,
    Iotlb,
    IotlbFails,
    MappedRange,
    Permissions,
)

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
SHORT = 0.05
LONG = 20


class Tables(Iommu):
    def __init__(self, capacity=None):
        self._iotlb = Iotlb(capacity)

    @property
    def iotlb(self):
        return self._iotlb


@pytest.fixture
def memory():
    memory = IommuMemory(GuestRegionCollection.from_ranges([(0, 0x10000)]), Tables())
    memory.iommu.iotlb.set_mapping(0x1000, 0x4000, 0x2000, RW)
    return memory


class Background:
    """A call on a thread of its own."""

    def __init__(self, call):
        self.error = None
        self.thread = threading.Thread(target=self.run, args=(call,), daemon=True)
        self.thread.start()

    def run(self, call):
        try:
            call()
        except BaseException as error:
            self.error = error

    def waits(self):
        self.thread.join(SHORT)
        return self.thread.is_alive()

    def returns(self):
        self.thread.join(LONG)
        assert not self.thread.is_alive(), "it still waits"
        if self.error is not None:
            raise self.error
        return True


REVOCATIONS = {
    "invalidate": lambda t: t.invalidate_mapping(0x1000, 0x1000),
    "a part": lambda t: t.invalidate_mapping(0x17FF, 1),
    "everything": lambda t: t.invalidate_all(),
    "moved": lambda t: t.set_mapping(0x1800, 0x9000, 0x1000, RW),
    "restricted": lambda t: t.set_mapping(0x1000, 0x4000, 0x2000, R),
}
HOLDERS = {
    "guard": lambda m: m.iommu.translate(0x1400, 0x800, RW),
    "vector": lambda m: m.gather(0x1400, 0x800, RW),
    "iterator": lambda m: m.slices(0x1400, 0x800, RW),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("how", REVOCATIONS)
def test_a_revocation_waits_for_its_users(memory, how, holder):
    held = HOLDERS[holder](memory)
    revocation = Background(lambda: REVOCATIONS[how](memory.iommu.iotlb))
    assert revocation.waits()
    # It is in effect for every later access.
    try:
        found = memory.iommu.iotlb.lookup(0x17FF, 2, W)
    except IotlbFails:
        pass
    else:
        assert how == "moved"
        assert found == [MappedRange(0x47FF, 1), MappedRange(0x9000, 1)]
    held.close()
    assert revocation.returns()
    assert len(memory.iommu.iotlb._map.leases) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.invalidate_mapping(0x2C00, 0x400),
        lambda t: t.invalidate_mapping(0x8000, 0x1000),
        lambda t: t.set_mapping(0x9000, 0, 0x1000, RW),
        lambda t: t.set_mapping(0x1000, 0x4000, 0x2000, RW),
    ],
    ids=["beside it", "nothing there", "an addition", "the same again"],
)
def test_what_takes_nothing_away_does_not_wait(memory, change):
    with memory.iommu.translate(0x1400, 0x800, RW):
        assert Background(lambda: change(memory.iommu.iotlb)).returns()


def test_an_empty_iotlb_is_one():
    assert Iotlb()
    assert not len(Iotlb())


@pytest.mark.parametrize("limit", [float("nan"), -1, -0.001, float("-inf")])
def test_a_time_limit_is_a_time(memory, limit):
    with memory.iommu.translate(0x1000, 0x10, R), pytest.raises(ValueError, match="timeout"):
        memory.iommu.iotlb.drain(0x1000, 1, limit)
    with pytest.raises(TypeError, match="timeout"):
        memory.iommu.iotlb.drain(0x1000, 1, "1")
    assert memory.iommu.iotlb.drain(0x1000, 1, float("inf"))


def test_more_permissions_do_not_wait():
    """Not even for this thread itself: what it uses stays right."""
    iotlb = Iotlb()
    iotlb.set_mapping(0x1000, 0x4000, 0x1000, R)
    with iotlb.guard(0x1000, 0x10, R) as ranges:
        iotlb.set_mapping(0x1000, 0x4000, 0x1000, RW)
        iotlb.set_mapping(0, 0x3000, 0x4000, RW)
        assert ranges == [MappedRange(0x4000, 0x10)]
    assert iotlb.lookup(0x1000, 0x10, W) == [MappedRange(0x4000, 0x10)]


@pytest.mark.parametrize("changed", range(3))
@pytest.mark.parametrize("restricted", [False, True])
def test_any_of_many_that_a_change_takes_away_is_waited_for(changed, restricted):
    """Three entries are mapped as one; all but one of them lead where they led."""
    iotlb = Iotlb()
    for page in range(3):
        target, perm = 0x40000 + page * 0x1000, R
        if page == changed:
            target, perm = (target, RW) if restricted else (0x90000, R)
        iotlb.set_mapping(0x1000 + page * 0x1000, target, 0x1000, perm)
    before = list(iotlb)
    with iotlb.guard(0x1000 + changed * 0x1000, 8, R):
        with pytest.raises(RuntimeError, match="itself"):
            iotlb.set_mapping(0x1000, 0x40000, 0x3000, R)
        assert list(iotlb) == before
    assert iotlb._map.overwrite(0x1000, 0x3000, 0x40000, R)
    assert not iotlb._map.overwrite(0x1000, 0x3000, 0x40000, R)


@pytest.mark.parametrize("how", REVOCATIONS)
def test_a_thread_does_not_wait_for_itself(memory, how):
    iotlb = memory.iommu.iotlb
    before = list(iotlb), iotlb.stats().invalidations, iotlb._map.generation
    with memory.iommu.translate(0x1400, 0x800, RW), pytest.raises(RuntimeError, match="itself"):
        REVOCATIONS[how](iotlb)
    assert (list(iotlb), iotlb.stats().invalidations, iotlb._map.generation) == before
    REVOCATIONS[how](iotlb)


def test_a_drain_does_not_wait_for_its_own_thread(memory):
    iotlb = memory.iommu.iotlb
    with memory.iommu.translate(0x1400, 0x800, RW):
        for limit in (0.1, None, float("inf")):
            with pytest.raises(RuntimeError, match="itself"):
                iotlb.drain(0x1BFF, 1, limit)
        assert iotlb.drain(0x1C00, 0x400)
    assert iotlb.drain(0x1400, 0x800)


def test_readers_do_not_wait_for_each_other_nor_for_a_revocation(memory):
    first = memory.iommu.translate(0x1000, 0x10, R)
    revocation = Background(lambda: memory.iommu.iotlb.invalidate_mapping(0x1000, 0x1000))
    assert revocation.waits()
    assert Background(lambda: memory.read(0x2000, 0x1000)).returns()
    with memory.iommu.translate(0x2000, 0x10, R):
        assert revocation.waits()
    first.close()
    assert revocation.returns()


def test_users_of_what_is_mapped_afterwards_are_not_waited_for(memory):
    """Else a stream of new users could keep a revocation waiting for ever."""
    iotlb = memory.iommu.iotlb
    first = iotlb.guard(0x1000, 0x10, R)
    iotlb._map.cut(0x1000, 0x1000)
    waiting = Background(lambda: iotlb.drain(0x1000, 0x1000))
    assert waiting.waits()
    iotlb.set_mapping(0x1000, 0x7000, 0x1000, R)
    second = iotlb.guard(0x1000, 0x10, R)
    first.close()
    assert waiting.returns()
    second.close()


def test_waiting_can_be_limited(memory):
    iotlb = memory.iommu.iotlb
    guard = Background(lambda: None)
    assert guard.returns()
    held = []
    assert Background(lambda: held.append(iotlb.guard(0x1000, 1, R))).returns()
    started = time.monotonic()
    assert not iotlb.drain(0x1000, 1, 0.1)
    assert 0.05 < time.monotonic() - started < LONG
    assert iotlb.drain(0x1001, 1, 0)
    held.pop().close()
    assert iotlb.drain(0x1000, 1, 0)


def test_a_dropped_holder_lets_go(memory):
    iotlb = memory.iommu.iotlb
    for holder in HOLDERS.values():
        holder(memory)
    gc.collect()
    assert len(iotlb._map.leases) == 0
    memory.slices(0x1000, 0x1000)
    gc.collect()
    assert len(iotlb._map.leases) == 0
    iotlb.invalidate_all()


def test_failed_accesses_hold_nothing(memory):
    iotlb = memory.iommu.iotlb
    for call in (
        lambda: memory.read(0x2000, 0x2000),
        lambda: memory.load(0x1001, 8),
        lambda: iotlb.guard(0, 0x1000, R),
        lambda: memory.gather(0x5000, 1, R),
        lambda: memory.write(0x1000, None),
        lambda: memory.fill(0x1000, 8, 256),
        lambda: memory.read_from(0x1000, 1 << 20, 8),
    ):
        with pytest.raises(Exception):  # noqa: B017
            call()
        assert len(iotlb._map.leases) == 0


def test_entries_in_use_are_not_evicted():
    iotlb = Iotlb(2)
    iotlb.set_mapping(0x1000, 0x4000, 0x1000, RW)
    with iotlb.guard(0x1000, 1, R):
        for page in range(4, 9):
            iotlb.set_mapping(page << 12, 0, 0x1000, RW)
        assert iotlb.lookup(0x1000, 1, R)
    assert len(iotlb) == 2


class Foreign(Iommu):
    """Translates by its own rules, with guards of its own."""

    def __init__(self, ranges):
        self._iotlb, self.ranges, self.log = Iotlb(), ranges, []

    @property
    def iotlb(self):
        return self._iotlb

    def translate(self, iova, length, access):
        outer = self

        class Guard:
            def __enter__(self):
                outer.log.append("enter")
                return outer.ranges

            def __exit__(self, *exc):
                outer.log.append("exit")

        return Guard()


def test_a_translation_of_another_iommu_is_held_as_long_as_it_is_used():
    iommu = Foreign([MappedRange(0x100, 4), MappedRange(0x200, 4)])
    memory = IommuMemory(GuestRegionCollection.from_ranges([(0, 0x1000)]), iommu)
    memory.write(0x9000, b"12345678")
    assert iommu.log == ["enter", "exit"]
    assert (memory.backend.read(0x100, 4), memory.backend.read(0x200, 4)) == (b"1234", b"5678")
    pieces = memory.slices(0x9000, 8, R)
    next(pieces)
    assert iommu.log[2:] == ["enter"]
    del pieces
    gc.collect()
    assert iommu.log[2:] == ["enter", "exit"]
    memory.slices(0x9000, 8, R)
    gc.collect()
    assert iommu.log[4:] == ["enter", "exit"]


@pytest.mark.parametrize(
    "ranges", [[], [MappedRange(0, 7)], [MappedRange(0, 5), MappedRange(9, 4)]]
)
def test_a_translation_of_another_length_is_refused(ranges):
    iommu = Foreign(ranges)
    memory = IommuMemory(GuestRegionCollection.from_ranges([(0, 0x1000)]), iommu)
    with pytest.raises(RuntimeError, match="another length"):
        memory.write(0x9000, b"12345678")
    assert iommu.log == ["enter", "exit"]
    assert memory.backend.read(0, 0x1000) == bytes(0x1000)


def test_a_translation_that_never_stays_is_given_up():
    class Fickle(Tables):
        def resolve(self, fails, iova, length, access):
            self.iotlb.set_mapping(iova, 0, length, access)
            self.iotlb.invalidate_mapping(iova, length)

    memory = IommuMemory(GuestRegionCollection.from_ranges([(0, 0x1000)]), Fickle())
    with pytest.raises(CannotResolveError, match="does not stay"):
        memory.read(0, 4)


class Fragments(GuestMemory):
    """Foreign memory that provides no more than it must."""

    def __init__(self, backend):
        self.backend, self.open = backend, 0

    def check_range(self, addr, length, access=Permissions.NONE):
        return self.backend.check_range(addr, length, access)

    def slices(self, addr, length, access=R):
        self.open += 1
        try:
            for at in range(addr, addr + length, 3):
                yield self.backend.whole_slice(at, min(3, addr + length - at), access)
        finally:
            self.open -= 1


def test_foreign_memory_has_every_access():
    memory = Fragments(GuestRegionCollection.from_ranges([(0, 0x100)]))
    memory.write(1, b"0123456789")
    assert memory.read(1, 10) == b"0123456789"
    memory.store(3, 7, 1)
    with memory.gather(0, 10, R) as vector:
        assert memory.open == 1
        assert vector.count == 4
    assert memory.open == 0
    assert memory.read_some(0xFA, bytearray(10)) == 6
    assert memory.open == 0
    assert memory.read(0, 0) == b""


def test_batches_and_changes_on_several_threads():
    """A batch sees every mapping whole, as it was before or after each change."""
    iotlb = Iotlb()
    pages = 2000
    for page in range(pages):
        iotlb.set_mapping(page << 12, page << 13, 4096, RW)
    starts = np.arange(pages, dtype=np.uint64) << np.uint64(12)
    stop, seen = threading.Event(), []

    def look():
        while not stop.is_set():
            targets, status = iotlb.lookup_many(starts, 4096, R)
            hit = status == 0
            assert set(np.unique(status).tolist()) <= {0, 1}
            expected = starts << np.uint64(1)
            moved = expected + np.uint64(1 << 40)
            assert ((targets == expected) | (targets == moved))[hit].all()
            seen.append(int(hit.sum()))

    lookers = [Background(look) for _ in range(2)]
    rng = np.random.default_rng(2)
    until, changes = time.monotonic() + 60, 0
    # Also where processors are rare, until changes were seen.
    while changes < 15000 or (len(set(seen)) < 2 and time.monotonic() < until):
        changes += 1
        page = int(rng.integers(0, pages))
        if rng.random() < 0.5:
            iotlb.invalidate_mapping(page << 12, 4096)
        else:
            offset = int(rng.integers(0, 2)) << 40
            iotlb.set_mapping(page << 12, (page << 13) + offset, 4096, RW)
    stop.set()
    for looker in lookers:
        assert looker.returns()
    assert len(set(seen)) > 1
    iotlb._map.check()


def test_who_would_wait_for_itself_is_named():
    iotlb = Iotlb()
    iotlb.set_mapping(0x1000, 0x8000, 0x2000, RW)
    said = (
        f"thread {threading.current_thread().name} would wait for itself: it still uses "
        "0x1800..0x187f (inclusive), which a change of 0x1000..0x2fff takes away"
    )
    with iotlb.guard(0x1800, 0x80, R):
        with pytest.raises(RuntimeError, match=re.escape(said)):
            iotlb.invalidate_mapping(0x1000, 0x2000)
        with pytest.raises(RuntimeError, match=re.escape(said)):
            iotlb.set_mapping(0x1000, 0xA000, 0x2000, RW)
        assert iotlb.lookup(0x1000, 1, R) == [MappedRange(0x8000, 1)]
