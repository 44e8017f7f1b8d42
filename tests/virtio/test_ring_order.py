"""The order in which requests are taken and shown: in turn, as they are done, or over each other.

Where requests in flight are noted, a device that is gone is followed by one that goes on; the tests
let that happen between any two steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

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

from guestio._core.access import AddressSpace
from guestio._core.chain import Chain
from guestio._core.inflight import InflightQueue
from guestio._core.ring import SplitRing
from guestio.addr import Permissions
from guestio.errors import QueueError
from guestio.iommu import Iotlb
from guestio.memory import GuestRegionCollection, MmapRegion
from guestio.vhost_user.inflight import InflightRegion
from tests.virtio.rings import PAGE, WRITE, Desc, HandRing

RW = Permissions.READ_WRITE
DESC, AVAIL, USED = 0x10000, 0x20000, 0x30000
AREAS = 0x40000
BUFFERS = 0x100000
ROOM = 32
"""Bytes that each request has for an answer."""
MAX_HELD = 64
"""Requests that may be overtaken at a time."""


class Bench(HandRing):
    """A ring by hand, one descriptor for each request, each with a page of its own.

    Args:
        size: Entries.
        base: Index of the first entry.
        order: ``"ordered"``, ``"done"`` or ``"noted"``.
    """

    def __init__(self, size: int = 8, *, base: int = 0, order: str = "ordered") -> None:
        self.memory = GuestRegionCollection.from_regions(
            [MmapRegion.memfd(0, BUFFERS + size * PAGE)]
        )
        super().__init__(self.memory, size=size, desc=DESC, avail=AVAIL, used=USED, base=base)
        self.iotlb = Iotlb()
        self.iotlb.set_mapping(0, 0, AREAS, RW)
        self.space = AddressSpace(self.memory._space.regions, self.iotlb)
        self.order = order
        self.region = InflightRegion.create(1, size) if order == "noted" else None
        self.memory.write(USED + 2, base.to_bytes(2, "little"))
        self.memory.write(AVAIL + 2, base.to_bytes(2, "little"))
        for head in range(size):
            self.put(head, Desc(self.page(head), ROOM, WRITE))
        self.ring = self.device(base)

    def close(self) -> None:
        """Let go of the region."""
        if self.region is not None:
            self.region.close()

    def noted(self) -> InflightQueue | None:
        """The region's part."""
        return None if self.region is None else self.region.queue(0)

    def device(self, base: int) -> SplitRing:
        """Another device's side of the same ring."""
        return SplitRing(
            self.space,
            self.size,
            *(DESC, AVAIL, USED),
            base=base,
            ordered=self.order == "ordered",
            inflight=self.noted(),
        )

    def page(self, head: int) -> int:
        """The memory of a request."""
        return BUFFERS + head * PAGE

    def tell(self, *heads: int) -> None:
        """Let the device know where requests are."""
        for head in heads:
            self.iotlb.set_mapping(self.page(head), self.page(head), PAGE, RW)

    def forget(self, *heads: int) -> None:
        """Take that back."""
        for head in heads:
            self.iotlb.invalidate_mapping(self.page(head), PAGE)

    def shown(self, first: int) -> list[tuple[int, int]]:
        """The used entries from an index on."""
        count = (self.used_idx - first) & 0xFFFF
        return [self.used_entry((first + i) & 0xFFFF) for i in range(count)]

    def take(self) -> list[Chain]:
        """Take what is there; nothing is missing."""
        chains, misses = self.ring.pop()
        assert misses == []
        return chains


@pytest.fixture
def ordered() -> Bench:
    made = Bench()
    made.tell(*range(8))
    return made


@pytest.fixture
def noted() -> Iterator[Bench]:
    made = Bench(order="noted")
    yield made
    made.close()


class TestInTurn:
    @pytest.mark.parametrize("done", list(itertools.permutations(range(4))))
    def test_any_order_of_completion(self, ordered: Bench, done: tuple[int, ...]) -> None:
        ordered.offer(3, 1, 0, 2)
        chains = ordered.take()
        complete: set[int] = set()
        for i in done:
            ordered.ring.complete(chains[i], 10 + i)
            complete.add(i)
            ready = next(n for n in range(5) if n not in complete)
            before = ordered.used_idx
            assert ordered.ring.publish() is (ready > before)
            assert ordered.shown(0) == [((3, 1, 0, 2)[n], 10 + n) for n in range(ready)]
            assert ordered.ring.resume_at == ready
            assert ordered.ring.unpublished == len(complete) - ready
        assert ordered.ring.outstanding == 0

    def test_what_is_not_shown_does_not_wake_the_driver(self, ordered: Bench) -> None:
        ordered.offer(0, 1)
        first, second = ordered.take()
        ordered.ring.complete(second, 0)
        assert ordered.ring.publish() is False
        assert ordered.used_idx == 0
        assert ordered.used_entry(0) == (0, 0)
        assert ordered.used_entry(1) == (0, 0)
        ordered.ring.complete(first, 0)
        assert ordered.ring.publish() is True

    def test_requests_that_come_meanwhile_wait_as_well(self, ordered: Bench) -> None:
        ordered.offer(0)
        (slow,) = ordered.take()
        for head in range(1, 8):
            ordered.offer(head)
            (chain,) = ordered.take()
            ordered.ring.complete(chain, head)
            ordered.ring.publish()
            assert ordered.used_idx == 0
        assert ordered.ring.resume_at == 0
        ordered.ring.complete(slow, 0)
        ordered.ring.publish()
        assert ordered.shown(0) == [(head, head) for head in range(8)]

    def test_the_driver_may_not_offer_more_than_was_shown_to_it(self, ordered: Bench) -> None:
        ordered.offer(*range(8))
        chains = ordered.take()
        for chain in chains[1:]:
            ordered.ring.complete(chain, 0)
        ordered.ring.publish()
        ordered.offer(1)
        with pytest.raises(QueueError, match="8 requests not given back"):
            ordered.ring.pop()

    def test_over_the_end_of_the_index(self) -> None:
        bench = Bench(base=0xFFFD)
        bench.tell(*range(8))
        bench.offer(*range(6))
        chains = bench.take()
        for i in (5, 4, 1, 0, 3):
            bench.ring.complete(chains[i], i)
            bench.ring.publish()
        assert (bench.used_idx, bench.ring.resume_at) == (0xFFFF, 0xFFFF)
        bench.ring.complete(chains[2], 2)
        bench.ring.publish()
        assert (bench.used_idx, bench.ring.resume_at) == (3, 3)
        assert bench.shown(0xFFFD) == [(i, i) for i in range(6)]

    def test_as_they_are_done_without_order(self) -> None:
        bench = Bench(order="done")
        bench.tell(*range(8))
        bench.offer(*range(4))
        chains = bench.take()
        for i in (2, 0, 3, 1):
            bench.ring.complete(chains[i], i)
            bench.ring.publish()
        assert bench.shown(0) == [(2, 2), (0, 0), (3, 3), (1, 1)]

    def test_whoever_goes_on_does_again_what_was_not_shown(self, ordered: Bench) -> None:
        ordered.offer(*range(5))
        chains = ordered.take()
        for i in (0, 2, 4):
            ordered.ring.complete(chains[i], i)
        ordered.ring.publish()
        del chains
        again = ordered.device(ordered.ring.resume_at)
        ordered.ring = again
        assert [chain.head for chain in ordered.take()] == [1, 2, 3, 4]

    def test_notes_and_order_exclude_each_other(self, noted: Bench) -> None:
        with pytest.raises(ValueError, match="not shown in order"):
            SplitRing(noted.space, 8, DESC, AVAIL, USED, ordered=True, inflight=noted.noted())
        with pytest.raises(ValueError, match="8 requests in flight can be noted of a ring of 16"):
            SplitRing(noted.space, 16, DESC, AVAIL, USED, inflight=noted.noted())


class TestSettling:
    def test_twice(self, ordered: Bench) -> None:
        ordered.offer(0, 1)
        first, second = ordered.take()
        first.settle(3)
        with pytest.raises(ValueError, match="completed before"):
            first.settle(3)
        with pytest.raises(ValueError, match="completed before"):
            ordered.ring.complete(first, 3)
        ordered.ring.complete(first)
        with pytest.raises(ValueError, match="completed before"):
            ordered.ring.complete(first)
        ordered.ring.complete(second, 4)
        with pytest.raises(ValueError, match="completed before"):
            ordered.ring.complete(second)
        assert (ordered.ring.outstanding, ordered.ring.unpublished) == (0, 2)
        ordered.ring.publish()
        assert ordered.shown(0) == [(0, 3), (1, 4)]

    def test_not_at_all(self, ordered: Bench) -> None:
        ordered.offer(0)
        (chain,) = ordered.take()
        with pytest.raises(ValueError, match="not settled"):
            ordered.ring.complete(chain)
        assert ordered.ring.outstanding == 1

    @pytest.mark.parametrize("written", [ROOM + 1, 1 << 32, 1 << 63, 2**64 - 1])
    def test_more_than_there_is_room_for(self, ordered: Bench, written: int) -> None:
        ordered.offer(0)
        (chain,) = ordered.take()
        for attempt in (chain.settle, lambda n: ordered.ring.complete(chain, n)):
            with pytest.raises(ValueError, match=f"{written} bytes written to a request with room"):
                attempt(written)
        chain.writable.write(b"still there")
        ordered.ring.complete(chain, ROOM)

    @pytest.mark.parametrize("written", [-1, 2**64, 1.0, "1", True])
    def test_no_number_of_bytes(self, ordered: Bench, written: object) -> None:
        ordered.offer(0)
        (chain,) = ordered.take()
        with pytest.raises((ValueError, TypeError, OverflowError)):
            chain.settle(written)  # type: ignore[arg-type]
        chain.settle(1)

    def test_of_another_ring(self, ordered: Bench) -> None:
        other = Bench()
        other.tell(0)
        ordered.offer(0)
        other.offer(0)
        (ours,), (theirs,) = ordered.take(), other.take()
        theirs.settle(0)
        with pytest.raises(ValueError, match="another ring"):
            ordered.ring.complete(theirs)
        with pytest.raises(ValueError, match="another ring"):
            other.ring.complete(ours, 0)
        assert (ordered.ring.outstanding, other.ring.outstanding) == (1, 1)
        other.ring.complete(theirs)

    def test_memory_is_given_back_before_the_ring_is_told(self, ordered: Bench) -> None:
        ordered.offer(0)
        (chain,) = ordered.take()
        with pytest.raises(RuntimeError, match="would wait for itself"):
            ordered.forget(0)
        ordered.tell(0)
        chain.settle(0)
        ordered.forget(0)
        with pytest.raises(ValueError, match="holds 0x0 bytes"):
            chain.writable.write(b"too late")
        ordered.ring.complete(chain)
        ordered.ring.publish()
        assert ordered.shown(0) == [(0, 0)]


class TestOvertaking:
    def test_those_behind_are_taken_first(self, noted: Bench) -> None:
        noted.tell(1, 3)
        noted.offer(0, 1, 2, 3)
        chains, misses = noted.ring.pop()
        assert [chain.head for chain in chains] == [1, 3]
        assert [base for (base, _), _ in misses] == [noted.page(0), noted.page(2)]
        assert (noted.ring.held_count, noted.ring.outstanding, noted.ring.next_avail) == (2, 4, 4)
        progress = noted.ring.progress
        noted.tell(2)
        (second,), misses = noted.ring.pop()
        assert second.head == 2
        assert len(misses) == 1
        assert noted.ring.progress == progress, "the oldest still waits"
        noted.tell(0)
        (first,) = noted.take()
        assert noted.ring.progress != progress
        for chain in (second, *chains, first):
            noted.ring.complete(chain, chain.head)
        noted.ring.publish()
        assert noted.shown(0) == [(2, 2), (1, 1), (3, 3), (0, 0)]

    def test_a_request_is_failed_wherever_it_is(self, noted: Bench) -> None:
        noted.offer(0, 1, 2)
        noted.ring.pop()
        assert [noted.ring.lacking(i) is None for i in range(4)] == [False] * 3 + [True]
        assert noted.ring.pop_faulty(3) is None
        progress = noted.ring.progress
        middle = noted.ring.pop_faulty(1)
        assert middle is not None
        assert (middle.head, noted.ring.held_count) == (1, 2)
        assert middle.fault is not None
        assert noted.ring.progress == progress
        oldest = noted.ring.pop_faulty()
        assert oldest is not None
        assert (oldest.head, noted.ring.progress) == (0, progress + 1)
        noted.ring.complete(middle, 0)
        noted.ring.complete(oldest, 0)
        noted.tell(2)
        noted.ring.complete(noted.take()[0], 1)
        noted.ring.publish()
        assert noted.shown(0) == [(1, 0), (0, 0), (2, 1)]

    def test_no_more_than_a_few_wait_at_a_time(self) -> None:
        bench = Bench(128, order="noted")
        bench.offer(*range(128))
        bench.tell(*range(MAX_HELD + 1, 128))
        chains = []
        for _ in range(3):
            taken, misses = bench.ring.pop(128)
            chains += taken
            assert len(misses) >= 1
            assert bench.ring.held_count == MAX_HELD
        # The next one finds no place to wait, so it and those behind it stay in the ring.
        assert chains == []
        assert bench.ring.next_avail == MAX_HELD
        bench.tell(17)
        (freed,), _ = bench.ring.pop(1)
        assert freed.head == 17
        chains, _ = bench.ring.pop(128)
        assert [chain.head for chain in chains] == list(range(MAX_HELD + 1, 128))
        assert bench.ring.held_count == MAX_HELD
        bench.tell(*range(MAX_HELD + 1))
        chains += bench.take()
        for chain in [freed, *chains]:
            bench.ring.complete(chain, chain.head % ROOM)
        bench.ring.publish()
        assert sorted(bench.shown(0)) == [(head, head % ROOM) for head in range(128)]
        bench.close()

    def test_a_full_ring_of_requests_that_wait(self, noted: Bench) -> None:
        noted.offer(*range(8))
        assert noted.ring.pop()[0] == []
        assert noted.ring.held_count == 8
        noted.offer(0)
        with pytest.raises(QueueError, match="with 8 requests not given back"):
            noted.ring.pop()
        assert noted.ring.broken is not None

    @pytest.mark.parametrize("ahead", [9, 0x7FFF, 0x8000, 0xFFFF])
    def test_an_available_index_that_cannot_be(self, noted: Bench, ahead: int) -> None:
        noted.offer(0, 1)
        noted.ring.pop()
        noted.set_avail_idx((2 + ahead) & 0xFFFF)
        with pytest.raises(QueueError, match="runs ahead of a ring of 8"):
            noted.ring.pop()

    @pytest.mark.parametrize(
        "descriptor",
        [Desc(BUFFERS, 0, WRITE), Desc(2**64 - 8, 16, WRITE), Desc(0, 16, 4), Desc(0, 16, 1, 99)],
    )
    def test_a_descriptor_that_changes_while_its_request_waits(
        self, noted: Bench, descriptor: Desc
    ) -> None:
        noted.offer(0, 1)
        noted.ring.pop()
        noted.put(1, descriptor)
        with pytest.raises(QueueError):
            noted.ring.pop()
        with pytest.raises(QueueError):
            noted.ring.lacking(0)

    def test_a_head_that_is_offered_again_while_it_waits(self, noted: Bench) -> None:
        noted.offer(0, 0, 0)
        noted.ring.pop()
        assert noted.ring.held_count == 3
        noted.tell(0)
        chains = noted.take()
        for chain in chains:
            noted.ring.complete(chain, 1)
        noted.ring.publish()
        assert noted.shown(0) == [(0, 1)] * 3
        noted.ring = noted.device(0)
        assert noted.take() == []
        assert noted.ring.next_avail == 3


class TestGoingOn:
    """Another device's side of the ring, with the same region."""

    def hold(self, noted: Bench) -> None:
        noted.tell(1, 3)
        noted.offer(0, 1, 2, 3)
        chains, _ = noted.ring.pop()
        noted.ring.complete(chains[1], 5)
        noted.ring.publish()
        for chain in chains:
            if chain.head == 1:
                chain.settle(0)

    def test_what_was_in_flight_is_taken_first_and_in_order(self, noted: Bench) -> None:
        self.hold(noted)
        noted.offer(4)
        noted.ring = noted.device(77)
        assert noted.ring.resume_at == 77
        noted.tell(*range(8))
        assert [chain.head for chain in noted.take()] == [0, 1, 2, 4]
        assert noted.ring.resume_at == 5

    def test_it_may_still_lack_something(self, noted: Bench) -> None:
        self.hold(noted)
        noted.ring = noted.device(0)
        (chain,), misses = noted.ring.pop()
        assert chain.head == 1
        assert len(misses) == 2
        faulty = noted.ring.pop_faulty(1)
        assert faulty is not None
        assert faulty.head == 2

    def test_more_than_may_be_overtaken(self) -> None:
        bench = Bench(256, order="noted")
        bench.tell(*range(256))
        bench.offer(*range(200))
        assert len(bench.ring.pop(200)[0]) == 200
        bench.forget(*range(100))
        bench.ring = bench.device(0)
        chains, misses = bench.ring.pop()
        assert [chain.head for chain in chains] == list(range(100, 200))
        assert len(misses) == 100
        assert bench.ring.held_count == 100
        bench.offer(200, 201)
        assert [chain.head for chain in bench.ring.pop()[0]] == [200, 201]
        bench.tell(*range(100))
        assert [chain.head for chain in bench.take()] == list(range(100))
        bench.close()

    def test_twice_in_a_row(self, noted: Bench) -> None:
        self.hold(noted)
        for _ in range(3):
            noted.ring = noted.device(0)
            noted.ring.pop()
        noted.tell(*range(8))
        assert sorted(chain.head for chain in noted.ring.pop()[0]) == [0, 2]
        noted.ring = noted.device(0)
        assert [chain.head for chain in noted.take()] == [0, 1, 2]

    def test_heads_that_the_ring_does_not_have(self) -> None:
        bench = Bench(16, order="noted")
        small = Bench(8)
        small.tell(*range(8))
        bench.noted().recover(0)  # type: ignore[union-attr]
        part = bench.noted()
        assert part is not None
        part.recover(0)
        part.take(12)
        ring = SplitRing(small.space, 8, DESC, AVAIL, USED, inflight=bench.noted())
        small.offer(0)
        with pytest.raises(QueueError, match="names descriptor 12 of 8"):
            ring.pop()
        assert ring.broken is not None
        bench.close()

    def test_more_in_flight_than_the_ring_has_entries(self) -> None:
        bench, small = Bench(16, order="noted"), Bench(4)
        part = bench.noted()
        assert part is not None
        part.recover(0)
        for head in (3, 3, 2, 1, 0, 15, 14, 13):
            part.take(head)
        small.tell(*range(4))
        small.set_avail_idx(4)
        ring = SplitRing(small.space, 4, DESC, AVAIL, USED, inflight=bench.noted())
        assert [chain.head for chain in ring.pop()[0]] == [3, 2, 1, 0]
        small.set_avail_idx(5)
        with pytest.raises(QueueError, match="runs ahead"):
            ring.pop()
        bench.close()

    def test_more_in_flight_than_was_ever_offered(self, noted: Bench) -> None:
        part = noted.noted()
        assert part is not None
        part.recover(0)
        for head in range(5):
            part.take(head)
        noted.tell(*range(8))
        noted.offer(0, 1)
        noted.ring = noted.device(0)
        with pytest.raises(QueueError, match="runs ahead"):
            noted.ring.pop()


@dataclass
class Request:
    """What the model knows of a request.

    Attributes:
        head: Its descriptor.
        turn: How many were offered before it.
        chain: What the device was given, if it was taken.
        written: With how much it was completed.
    """

    head: int
    turn: int
    chain: Chain | None = None
    written: int | None = None


class OrderMachine(RuleBasedStateMachine):
    """A driver, a device, an IOMMU, and now and then the end of one of them.

    The model keeps requests in lists: offered, held (overtaken), taken, and completed but not
    shown. What is shown is compared with the used ring after every step.
    """

    SIZE = 8

    @initialize(
        order=st.sampled_from(("ordered", "done", "noted", "noted")),
        base=st.sampled_from((0, 1, 0xFFFA, 0xFFFF)),
    )
    def start(self, order: str, base: int) -> None:
        self.bench = Bench(self.SIZE, base=base, order=order)
        self.offered: list[Request] = []
        self.held: list[Request] = []
        self.taken: list[Request] = []
        self.shown = base
        self.told: set[int] = set()
        self.areas = True
        self.turns = itertools.count()
        self.free = list(range(self.SIZE))

    def teardown(self) -> None:
        self.taken.clear()
        if hasattr(self, "bench"):
            self.bench.close()

    @property
    def noted(self) -> bool:
        return self.bench.order == "noted"

    heads = st.integers(0, SIZE - 1)

    @rule(count=st.integers(1, SIZE))
    def offer(self, count: int) -> None:
        for _ in range(min(count, len(self.free))):
            head = self.free.pop(0)
            self.offered.append(Request(head, next(self.turns)))
            self.bench.offer(head)

    @rule(heads=st.sets(heads))
    def tell(self, heads: set[int]) -> None:
        self.bench.tell(*heads)
        self.told |= heads

    @rule(heads=st.sets(heads))
    def forget(self, heads: set[int]) -> None:
        # A revocation waits for requests that use the memory.
        used = {each.head for each in self.taken if each.written is None}
        self.bench.forget(*heads - used)
        self.told -= heads - used

    @rule()
    def lose_areas(self) -> None:
        self.bench.iotlb.invalidate_mapping(0, AREAS)
        self.areas = False

    @rule()
    def find_areas(self) -> None:
        self.bench.iotlb.set_mapping(0, 0, AREAS, RW)
        self.areas = True

    def expected(self) -> tuple[list[Request], list[Request]]:
        """What is taken next, and what is held then."""
        if not self.noted:
            ready = list(itertools.takewhile(lambda each: each.head in self.told, self.offered))
            return ready, []
        waiting = self.held + self.offered
        ready = [each for each in waiting if each.head in self.told]
        return ready, [each for each in waiting if each.head not in self.told]

    @rule()
    def pop(self) -> None:
        chains, misses = self.bench.ring.pop()
        if not self.areas:
            assert chains == []
            assert misses != []
            return
        ready, held = self.expected()
        assert [chain.head for chain in chains] == [each.head for each in ready]
        lacking = held if self.noted else [e for e in self.offered if e.head not in self.told]
        pages = {base for (base, length), _ in misses for base in range(base, base + length, PAGE)}
        assert pages == {self.bench.page(each.head) for each in lacking}
        for each, chain in zip(ready, chains, strict=True):
            each.chain = chain
            assert chain.fault is None
        self.taken += ready
        self.held = held
        self.offered = [] if self.noted else self.offered[len(ready) :]

    @rule(index=st.integers(0, 3))
    def look(self, index: int) -> None:
        found = self.bench.ring.lacking(index)
        waiting = self.held if self.noted else self.offered[:1]
        if not self.areas or index >= len(waiting):
            assert found is None
        else:
            head = waiting[index].head
            pages = [] if head in self.told else [self.bench.page(head)]
            assert [base for (base, _), _ in found or []] == pages

    @rule(index=st.integers(0, 3))
    def fail(self, index: int) -> None:
        chain = self.bench.ring.pop_faulty(index)
        waiting = self.held if self.noted else self.offered
        if not self.areas or index >= (len(waiting) if self.noted else min(len(waiting), 1)):
            assert chain is None
            return
        assert chain is not None
        each = waiting.pop(index)
        assert chain.head == each.head
        assert (chain.fault is None) == (each.head in self.told)
        each.chain = chain
        self.taken.append(each)

    @precondition(lambda self: any(each.written is None for each in self.taken))
    @rule(data=st.data(), early=st.booleans())
    def complete(self, data: st.DataObject, early: bool) -> None:
        each = data.draw(st.sampled_from([e for e in self.taken if e.written is None]))
        assert each.chain is not None
        each.written = data.draw(st.integers(0, each.chain.writable.total))
        if early:
            each.chain.settle(each.written)
        self.bench.ring.complete(each.chain, None if early else each.written)
        if self.bench.order != "ordered":
            # In the order in which they are done, at the end of those done before.
            self.taken.remove(each)
            done = sum(other.written is not None for other in self.taken)
            self.taken.insert(done, each)

    @rule()
    def publish(self) -> None:
        found = self.bench.ring.publish()
        pending = any(each.written is not None for each in self.taken)
        if pending and not self.areas:
            assert found is None
            return
        ready = list(itertools.takewhile(lambda each: each.written is not None, self.taken))
        assert found is bool(ready)
        assert self.bench.shown(self.shown) == [(each.head, each.written) for each in ready]
        self.shown = (self.shown + len(ready)) & 0xFFFF
        self.free += [each.head for each in ready]
        self.taken = self.taken[len(ready) :]

    @precondition(lambda self: self.bench.order != "done")
    @rule(hint=st.integers(0, 0xFFFF), told=st.booleans())
    def die(self, hint: int, told: bool) -> None:
        """What was not shown is taken again; with notes, nobody has to say where to go on."""
        base = self.bench.ring.resume_at if told or not self.noted else hint
        if not self.noted:
            assert base == self.shown
        again = (
            sorted(self.taken + self.held, key=lambda each: each.turn) if self.noted else self.taken
        )
        again = [Request(each.head, each.turn) for each in again]
        self.taken = []
        self.bench.ring = self.bench.device(base)
        if self.noted:
            self.held = again
        else:
            self.offered = again + self.offered

    @invariant()
    def counts(self) -> None:
        if not hasattr(self, "bench"):
            return
        ring = self.bench.ring
        assert self.bench.used_idx == self.shown
        assert ring.unpublished == sum(each.written is not None for each in self.taken)
        if self.bench.order == "ordered":
            assert ring.resume_at == self.shown, "the used index says where to go on"
        assert ring.broken is None


@pytest.mark.slow
def test_requests_in_any_order_and_devices_that_come_and_go() -> None:
    run_state_machine_as_test(
        OrderMachine,
        settings=settings(
            max_examples=150, stateful_step_count=50, deadline=None, derandomize=True
        ),
    )
