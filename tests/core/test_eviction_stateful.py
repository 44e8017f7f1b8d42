"""A bounded interval map: who is evicted, who is not, and what is counted."""

import contextlib

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

from guestio import Iotlb, IotlbFails, Permissions
from guestio._core.base.variant import CAPACITIES

R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE
SLOTS = 64
SLOT = 0x10
EXACT = CAPACITIES["EVICTION_KEPT"] >= SLOTS <= CAPACITIES["EVICTION_STALE"]
"""Whether a change looks at as many entries as there are."""


class EvictionMachine(RuleBasedStateMachine):
    """Entries that never touch, so that each is one slot; the model keeps when each was used."""

    def __init__(self):
        super().__init__()
        self.used = {}
        self.latest = {}  # where it differs: what is kept may have counted as used until then
        self.perms = {}
        self.pinned_ranges = []
        self.pins = []
        self.guards = []
        self.clock = 0
        self.counts = dict.fromkeys(("hits", "misses", "access_fails", "evictions"), 0)
        self.invalidations = 0

    @initialize(capacity=st.one_of(st.integers(1, 6), st.integers(1, SLOTS)))
    def start(self, capacity):
        self.capacity = capacity
        self.iotlb = Iotlb(capacity)

    slots = st.integers(0, SLOTS - 1)

    def now(self):
        self.clock += 1
        return self.clock

    def kept(self, slot):
        """Whether the slot may not be evicted."""
        return (
            slot in self.pins
            or any(first <= slot < end for first, end in self.pinned_ranges)
            or any(held == slot for held, _ in self.guards)
        )

    def evicted(self):
        """Take from the model what a change evicted, after a look that it was right to."""
        present = {source.base // SLOT for source, _, _ in self.iotlb}
        gone = set(self.used) - present
        assert present <= set(self.used)
        evictable = {slot for slot in self.used if not self.kept(slot)}
        assert gone <= evictable
        wanted = min(max(len(self.used) - self.capacity, 0), len(evictable))
        assert len(gone) == wanted or (
            not EXACT and len(gone) < wanted and evictable < set(self.used)
        )
        left = evictable - gone
        if EXACT and gone and left:
            newest = max(self.used[slot] for slot in gone)
            assert newest <= min(max(self.used[slot], self.latest.get(slot, 0)) for slot in left)
        if len(self.used) > self.capacity:
            moment = self.now()
            self.latest.update((slot, moment) for slot in self.used if self.kept(slot))
        for slot in gone:
            del self.used[slot], self.perms[slot]
        self.counts["evictions"] += len(gone)

    @rule(slot=slots, perm=st.sampled_from([R, W, RW]))
    def map(self, slot, perm):
        held = any(at == slot for at, _ in self.guards)
        if held and slot in self.perms and not perm.allows(self.perms[slot]):
            with pytest.raises(RuntimeError, match="wait for itself"):
                self.iotlb.set_mapping(slot * SLOT, slot << 20, SLOT // 2, perm)
            return
        self.iotlb.set_mapping(slot * SLOT, slot << 20, SLOT // 2, perm)
        self.used[slot], self.perms[slot] = self.now(), perm
        self.evicted()

    ranges = st.tuples(st.integers(0, SLOTS - 1), st.integers(0, SLOTS), st.integers(1, 3))

    @rule(chosen=ranges, perm=st.sampled_from([R, RW]), down=st.booleans())
    def fill(self, chosen, perm, down):
        for slot in list(range(*chosen))[:: -1 if down else 1]:
            self.map(slot, perm)

    @rule(chosen=ranges, down=st.booleans())
    def empty(self, chosen, down):
        for slot in list(range(*chosen))[:: -1 if down else 1]:
            self.invalidate(slot)

    @rule(
        ends=st.tuples(st.integers(0, SLOTS - 1), st.integers(1, SLOTS)).filter(
            lambda e: e[0] < e[1]
        )
    )
    def pin_range(self, ends):
        self.iotlb.pin(ends[0] * SLOT, (ends[1] - ends[0]) * SLOT)
        self.pinned_ranges.append(ends)

    @precondition(lambda self: self.pinned_ranges)
    @rule(data=st.data())
    def unpin_range(self, data):
        ends = data.draw(st.sampled_from(self.pinned_ranges))
        self.iotlb.unpin(ends[0] * SLOT, (ends[1] - ends[0]) * SLOT)
        self.pinned_ranges.remove(ends)

    @rule(slot=slots)
    def invalidate(self, slot):
        if any(at == slot for at, _ in self.guards):
            with pytest.raises(RuntimeError, match="wait for itself"):
                self.iotlb.invalidate_mapping(slot * SLOT, SLOT)
            return
        self.iotlb.invalidate_mapping(slot * SLOT, SLOT)
        self.invalidations += 1
        self.used.pop(slot, None)
        self.perms.pop(slot, None)
        self.evicted()

    def expected(self, slot, access):
        if slot not in self.used:
            return "misses"
        self.used[slot] = self.now()
        return "hits" if self.perms[slot].allows(access) else "access_fails"

    @rule(slot=slots, access=st.sampled_from([R, W]))
    def look_up(self, slot, access):
        outcome = self.expected(slot, access)
        if outcome == "hits":
            assert self.iotlb.lookup(slot * SLOT + 1, 2, access) == [((slot << 20) + 1, 2)]
        else:
            with pytest.raises(IotlbFails) as caught:
                self.iotlb.lookup(slot * SLOT + 1, 2, access)
            assert len(getattr(caught.value, outcome)) == 1
        self.counts[outcome] += 1

    @rule(chosen=st.lists(slots, max_size=20), access=st.sampled_from([R, W]))
    def look_up_many(self, chosen, access):
        _, status = self.iotlb.lookup_many([slot * SLOT for slot in chosen], 4, access)
        moment = self.now()
        for slot, outcome in zip(chosen, status.tolist(), strict=True):
            name = self.expected(slot, access)
            assert name == ("hits", "misses", "access_fails")[outcome]
            self.counts[name] += 1
        for slot in set(chosen) & set(self.used):
            self.used[slot] = moment

    @rule(slot=slots)
    def pin(self, slot):
        self.iotlb.pin(slot * SLOT + 3, 1)
        self.pins.append(slot)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        slot = data.draw(st.sampled_from(self.pins))
        self.iotlb.unpin(slot * SLOT + 3, 1)
        self.pins.remove(slot)

    @precondition(lambda self: any(perm.allows(R) for perm in self.perms.values()))
    @rule(data=st.data())
    def hold(self, data):
        slot = data.draw(st.sampled_from([s for s, p in self.perms.items() if p.allows(R)]))
        self.guards.append((slot, self.iotlb.guard(slot * SLOT, 4, R)))
        self.expected(slot, R)
        self.counts["hits"] += 1

    @precondition(lambda self: self.guards)
    @rule(data=st.data())
    def let_go(self, data):
        chosen = data.draw(st.integers(0, len(self.guards) - 1))
        self.guards.pop(chosen)[1].close()

    @invariant()
    def counted(self):
        if not hasattr(self, "iotlb"):
            return
        stats = self.iotlb.stats()
        assert stats.entries == len(self.iotlb) == len(self.used)
        assert stats.capacity == self.capacity
        for name, count in self.counts.items():
            assert getattr(stats, name) == count, name
        assert stats.invalidations == self.invalidations
        assert len(self.iotlb._map.leases) == len(self.guards)
        self.iotlb._map.check()

    def teardown(self):
        for _, guard in self.guards:
            guard.close()


@pytest.mark.slow
def test_least_recently_used_goes_first():
    run_state_machine_as_test(
        EvictionMachine, settings=settings(max_examples=120, stateful_step_count=50, deadline=None)
    )


def test_a_cache_that_is_used_more_than_it_is_filled():
    """Uses are noted without moving anything; the queue is put in order when it matters."""
    iotlb = Iotlb(100)
    rng = np.random.default_rng(5)
    for page in range(100):
        iotlb.set_mapping(page << 12, 0, 4096, RW)
    hot = np.arange(min(50, CAPACITIES["EVICTION_STALE"] // 2), dtype=np.uint64) << np.uint64(12)
    for round_ in range(200):
        iotlb.lookup_many(rng.permutation(hot), 1, R)
        iotlb.set_mapping((1000 + round_) << 12, 0, 4096, RW)
    assert len(iotlb) == 100
    assert not iotlb.lookup_many(hot, 1, R)[1].any()
    assert iotlb.stats().evictions == 200
    iotlb._map.check()


def test_parts_of_a_split_entry_are_evicted_on_their_own():
    iotlb = Iotlb(3)
    iotlb.set_mapping(0, 0x10000, 0x3000, RW)
    iotlb.invalidate_mapping(0x1000, 0x1000)
    iotlb.set_mapping(0x8000, 0, 0x1000, RW)
    iotlb.lookup(0, 1, R)
    iotlb.set_mapping(0xA000, 0, 0x1000, RW)
    assert [source.base for source, _, _ in iotlb] == [0, 0x8000, 0xA000]


def test_everything_pinned_exceeds_the_capacity_until_it_may_go():
    iotlb = Iotlb(2)
    iotlb.pin(0, 0x10000)
    for page in range(6):
        iotlb.set_mapping(page << 12, page << 20, 4096, RW)
    assert len(iotlb) == 6
    iotlb.unpin(0, 0x10000)
    iotlb.set_mapping(0x20000, 0, 4096, RW)
    assert len(iotlb) == 2
    assert iotlb.stats().evictions == 5


@pytest.mark.parametrize(
    "refused",
    [
        lambda t: t.set_mapping(0, 1 << 40, 4096, RW),
        lambda t: t._map.take(16, 4096),
        lambda t: t._map.add(16, 4096, 0, RW),
        lambda t: t.invalidate_mapping(0, 4096),
        lambda t: t.set_mapping(0, 0, 0, RW),
    ],
    ids=["move", "take", "add", "cut", "empty"],
)
def test_a_call_that_is_refused_evicts_nothing(refused):
    """Also where there are more entries than there should be, as all were pinned."""
    iotlb = Iotlb(2)
    iotlb.pin(0, 0x10000)
    for page in range(6):
        iotlb.set_mapping(page << 12, page << 20, 4096, RW)
    iotlb.unpin(0, 0x10000)
    before = list(iotlb), iotlb.stats(), iotlb._map.generation
    with iotlb.guard(0, 1, R):
        with contextlib.suppress(RuntimeError, ValueError):
            assert not refused(iotlb)
        assert (list(iotlb), iotlb.stats()._replace(hits=0), iotlb._map.generation) == before
    iotlb.set_mapping(0x20000, 0, 4096, RW)
    assert len(iotlb) == 2


def test_an_insertion_looks_at_few_entries_that_are_in_use():
    """With all of a large map in use, insertions go on, and what is let go of is found later."""
    iotlb = Iotlb(20_000)
    for page in range(20_000):
        iotlb.set_mapping(page << 12, (page * 3) << 12, 4096, RW)
    with iotlb.guard(0, 20_000 << 12, R):
        for page in range(3000):
            iotlb.set_mapping((1 << 40) + (page << 13), 0, 4096, RW)
        assert len(iotlb) >= 20_000
        starts = np.arange(20_000, dtype=np.uint64) << np.uint64(12)
        assert not iotlb.lookup_many(starts, 1, R)[1].any()
    for page in range(3000, 6000):
        iotlb.set_mapping((1 << 40) + (page << 13), 0, 4096, RW)
    assert len(iotlb) == 20_000
    iotlb._map.check()


def test_pins_that_overlap_nest_and_repeat():
    rng = np.random.default_rng(2)
    iotlb, pins = Iotlb(1), []
    for _ in range(400):
        if pins and rng.random() < 0.45:
            first, count = pins.pop(int(rng.integers(len(pins))))
            iotlb.unpin(first << 12, count << 12)
        else:
            pins.append((int(rng.integers(40)), int(rng.integers(1, 12))))
            iotlb.pin(pins[-1][0] << 12, pins[-1][1] << 12)
        iotlb._map.check()
        page = int(rng.integers(52))
        iotlb.set_mapping(page << 12, 0, 4096, RW)
        for _ in range(60):  # a change looks at a limited number of entries
            iotlb.set_mapping(1 << 40, 0, 4096, RW)
            iotlb.set_mapping(1 << 41, 0, 4096, RW)
        kept = any(first <= page < first + count for first, count in pins)
        assert (iotlb.lookup_many([page << 12], 1, R)[1][0] == 0) == kept
    for first, count in pins:
        iotlb.unpin(first << 12, count << 12)
    with pytest.raises(ValueError, match="not pinned"):
        iotlb.unpin(0, 1 << 12)
    with pytest.raises(ValueError, match="not pinned"):
        iotlb.unpin(pins[0][0] << 12, 100 << 12)
