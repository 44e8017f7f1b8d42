"""Requests are taken in the order of the ring, and published in that order or as they are done.

Where requests in flight are noted, a device that is gone is followed by one that goes on; the tests
let that happen between any two steps.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from guestio._core.memory.image import ImageFile
from guestio._core.virtio.block_server import BlockServer
from guestio._core.virtio.chain import Quota
from guestio._core.virtio.split import SplitRing
from guestio.addr import Permissions
from guestio.errors import QueueError
from tests.kit.ring_bench import AREAS, AVAIL, BUFFERS, DESC, ROOM, RW, USED, Bench
from tests.kit.rings import NEXT, PAGE, WRITE, Desc

VERSION_AT = 8
"""Where a queue's part of the region for requests in flight says its version."""


@pytest.fixture(params=["ordered", "both"])
def ordered(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(order=request.param)
    made.tell(*range(8))
    yield made
    made.close()


@pytest.fixture
def noted() -> Iterator[Bench]:
    made = Bench(order="noted")
    yield made
    made.close()


@pytest.mark.capacity(RING_LOOK_WORK=1024)
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
            assert ordered.published(0) == [((3, 1, 0, 2)[n], 10 + n) for n in range(ready)]
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
        assert ordered.published(0) == [(head, head) for head in range(8)]

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
        assert bench.published(0xFFFD) == [(i, i) for i in range(6)]

    def test_as_they_are_done_without_order(self) -> None:
        bench = Bench(order="done")
        bench.tell(*range(8))
        bench.offer(*range(4))
        chains = bench.take()
        for i in (2, 0, 3, 1):
            bench.ring.complete(chains[i], i)
            bench.ring.publish()
        assert bench.published(0) == [(2, 2), (0, 0), (3, 3), (1, 1)]

    def test_the_successor_repeats_what_was_not_published(self, ordered: Bench) -> None:
        ordered.offer(*range(5))
        chains = ordered.take()
        for i in (0, 2, 4):
            ordered.ring.complete(chains[i], i)
        ordered.ring.publish()
        del chains
        again = ordered.device(ordered.ring.resume_at)
        ordered.ring = again
        assert [chain.head for chain in ordered.take()] == [1, 2, 3, 4]

    def test_notes_need_room(self, noted: Bench) -> None:
        with pytest.raises(ValueError, match="8 requests in flight can be noted of a ring of 16"):
            SplitRing(noted.space, 16, DESC, AVAIL, USED, inflight=noted.noted())

    @pytest.mark.parametrize("base", [0, 0xFFFD])
    @pytest.mark.parametrize("done", list(itertools.permutations(range(5))))
    def test_what_was_in_flight_before_is_published_in_order_too(
        self, base: int, done: tuple[int, ...]
    ) -> None:
        """With notes: what the device before had taken, and what is new."""
        bench = Bench(base=base, order="both")
        bench.tell(*range(8))
        bench.offer(4, 2, 0)
        bench.take()
        bench.ring = bench.device(0)
        bench.offer(1, 3)
        chains = bench.take()
        assert [chain.head for chain in chains] == [4, 2, 0, 1, 3]
        complete: set[int] = set()
        for i in done:
            bench.ring.complete(chains[i], i)
            bench.ring.publish()
            complete.add(i)
            ready = next(n for n in range(6) if n not in complete)
            assert bench.published(base) == [((4, 2, 0, 1, 3)[n], n) for n in range(ready)]
            assert bench.ring.resume_at == (base + ready) & 0xFFFF
        bench.ring = bench.device(bench.ring.resume_at)
        assert bench.take() == []
        assert bench.ring.held_count == 0
        bench.close()

    def test_a_successor_with_or_without_the_notes_does_what_was_not_published(self) -> None:
        bench = Bench(order="both")
        bench.tell(*range(8))
        bench.offer(*range(4))
        chains = bench.take()
        for i in (0, 3, 2):
            bench.ring.complete(chains[i], 0)
        bench.ring.publish()
        del chains
        base = bench.ring.resume_at
        assert base == bench.used_idx == 1
        for noted in (bench.noted(), None):
            successor = SplitRing(
                bench.space, 8, DESC, AVAIL, USED, base=base, ordered=True, inflight=noted
            )
            again, _ = successor.pop()
            assert [chain.head for chain in again] == [1, 2, 3]
            successor.put_back(again)
        bench.close()


class TestSettling:
    def test_twice(self, ordered: Bench) -> None:
        ordered.offer(0, 1)
        first, second = ordered.take()
        first.finish(3)
        with pytest.raises(ValueError, match="completed before"):
            first.finish(3)
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
        assert ordered.published(0) == [(0, 3), (1, 4)]

    def test_not_at_all(self, ordered: Bench) -> None:
        ordered.offer(0)
        (chain,) = ordered.take()
        with pytest.raises(ValueError, match="not finished"):
            ordered.ring.complete(chain)
        assert ordered.ring.outstanding == 1

    @pytest.mark.parametrize("written", [ROOM + 1, 1 << 32, 1 << 63, 2**64 - 1])
    def test_more_than_there_is_room_for(self, ordered: Bench, written: int) -> None:
        ordered.offer(0)
        (chain,) = ordered.take()
        for attempt in (chain.finish, lambda n: ordered.ring.complete(chain, n)):
            with pytest.raises(ValueError, match=f"{written} bytes written to a request with room"):
                attempt(written)
        chain.writable.write(b"still there")
        ordered.ring.complete(chain, ROOM)

    @pytest.mark.parametrize("written", [-1, 2**64, 1.0, "1", True])
    def test_no_number_of_bytes(self, ordered: Bench, written: object) -> None:
        ordered.offer(0)
        (chain,) = ordered.take()
        with pytest.raises((ValueError, TypeError, OverflowError)):
            chain.finish(written)  # type: ignore[arg-type]
        chain.finish(1)

    def test_of_another_ring(self, ordered: Bench) -> None:
        other = Bench()
        other.tell(0)
        ordered.offer(0)
        other.offer(0)
        (ours,), (theirs,) = ordered.take(), other.take()
        theirs.finish(0)
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
        chain.finish(0)
        ordered.forget(0)
        with pytest.raises(ValueError, match="holds 0x0 bytes"):
            chain.writable.write(b"too late")
        ordered.ring.complete(chain)
        ordered.ring.publish()
        assert ordered.published(0) == [(0, 0)]


class TestWaiting:
    """A request that lacks a translation, and those behind it."""

    @pytest.mark.parametrize("order", ["ordered", "done", "noted", "both"])
    def test_nothing_overtakes_it(self, order: str) -> None:
        bench = Bench(order=order)
        bench.tell(1, 3)
        bench.offer(0, 1, 2, 3)
        chains, misses = bench.ring.pop()
        assert chains == []
        assert [base for (base, _), _ in misses] == [bench.page(0), bench.page(2)]
        assert (bench.ring.next_avail, bench.ring.outstanding) == (0, 0)
        progress = bench.ring.progress
        bench.tell(0)
        first, misses = bench.ring.pop()
        assert [chain.head for chain in first] == [0, 1]
        assert [base for (base, _), _ in misses] == [bench.page(2)]
        assert bench.ring.progress != progress
        bench.tell(2)
        for chain in first + bench.take():
            bench.ring.complete(chain, chain.head)
        bench.ring.publish()
        assert bench.published(0) == [(head, head) for head in range(4)]
        bench.close()

    def test_what_was_taken_before_it_is_shown_as_it_is_done(self, noted: Bench) -> None:
        noted.tell(0, 1)
        noted.offer(0, 1, 2)
        (slow, fast), _ = noted.ring.pop()
        noted.ring.complete(fast, 5)
        noted.ring.publish()
        assert noted.published(0) == [(1, 5)]
        noted.ring.complete(slow, 6)
        noted.ring.publish()
        assert noted.published(0) == [(1, 5), (0, 6)]
        assert noted.ring.resume_at == 2

    def test_the_oldest_fails(self, noted: Bench) -> None:
        noted.offer(0, 1)
        noted.ring.pop()
        assert [base for (base, _), _ in noted.ring.lacking()] == [noted.page(0)]
        oldest = noted.ring.pop_faulty()
        assert oldest is not None
        assert oldest.head == 0
        assert oldest.fault is not None
        assert [base for (base, _), _ in noted.ring.lacking()] == [noted.page(1)]
        noted.ring.complete(oldest, 0)
        noted.tell(1)
        noted.ring.complete(noted.take()[0], 1)
        noted.ring.publish()
        assert noted.published(0) == [(0, 0), (1, 1)]
        assert noted.ring.lacking() is None
        assert noted.ring.pop_faulty() is None

    def test_one_that_comes_meanwhile_does_not_keep_the_ring_busy(self, noted: Bench) -> None:
        for count in range(1, 4):
            noted.offer(count)
            chains, misses, served, idle = noted.ring.run_once(None, 128, -1, True)
            assert (chains, served, len(list(misses))) == ([], 0, count)
            assert idle, "it is looked at again and again"

    def test_more_than_the_ring_has_entries(self, noted: Bench) -> None:
        noted.tell(*range(8))
        noted.offer(*range(8))
        noted.take()
        noted.offer(0)
        with pytest.raises(QueueError, match="with 8 requests not given back"):
            noted.ring.pop()
        assert noted.ring.broken is not None

    @pytest.mark.parametrize("ahead", [9, 0x7FFF, 0x8000, 0xFFFF])
    def test_an_available_index_that_cannot_be(self, noted: Bench, ahead: int) -> None:
        noted.tell(0, 1)
        noted.offer(0, 1)
        noted.take()
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
            noted.ring.lacking()

    def test_a_head_that_is_offered_again_while_it_waits(self, noted: Bench) -> None:
        noted.offer(0, 0, 0)
        noted.ring.pop()
        noted.tell(0)
        chains = noted.take()
        for chain in chains:
            noted.ring.complete(chain, 1)
        noted.ring.publish()
        assert noted.published(0) == [(0, 1)] * 3
        noted.ring = noted.device(0)
        assert noted.take() == []
        assert noted.ring.next_avail == 3


@pytest.mark.capacity(RING_LOOK_WORK=1024)
class TestGoingOn:
    """Another device's side of the ring, with the same region."""

    def leave(self, noted: Bench) -> None:
        """Leave 0, 2 and 3 in flight; 1, which was taken after 0, is published."""
        noted.tell(*range(4))
        noted.offer(0, 1, 2, 3)
        chains = noted.take()
        noted.ring.complete(chains[1], 5)
        noted.ring.publish()
        for chain in chains:
            if chain.head != 1:
                chain.finish(0)
        noted.forget(*range(4))

    def test_what_was_in_flight_is_taken_first_and_in_order(self, noted: Bench) -> None:
        self.leave(noted)
        noted.offer(4)
        noted.ring = noted.device(77)
        assert noted.ring.resume_at == 77
        noted.tell(*range(8))
        assert [chain.head for chain in noted.take()] == [0, 2, 3, 4]
        assert noted.ring.resume_at == 5

    def test_it_may_still_lack_something(self, noted: Bench) -> None:
        self.leave(noted)
        noted.offer(4)
        noted.ring = noted.device(0)
        noted.tell(2, 4)
        chains, misses = noted.ring.pop()
        assert chains == []
        assert [base for (base, _), _ in misses] == [noted.page(0), noted.page(3)]
        assert [base for (base, _), _ in noted.ring.lacking()] == [noted.page(0)]
        progress = noted.ring.progress
        faulty = noted.ring.pop_faulty()
        assert faulty is not None
        assert (faulty.head, faulty.fault is None) == (0, False)
        assert noted.ring.progress != progress
        chains, misses = noted.ring.pop()
        assert [chain.head for chain in chains] == [2]
        assert noted.ring.held_count == 1
        noted.tell(3)
        assert [chain.head for chain in noted.take()] == [3, 4]

    def test_what_it_lacks_keeps_what_comes_new_in_the_ring(self, noted: Bench) -> None:
        self.leave(noted)
        noted.ring = noted.device(0)
        noted.tell(0, 2, 4)
        noted.offer(4)
        chains, _, served, idle = noted.ring.run_once(None, 64, -1, True)
        assert [chain.head for chain in chains] == [0, 2]
        for chain in chains:
            noted.ring.complete(chain, 0)
        for _ in range(2):
            chains, misses, served, idle = noted.ring.run_once(None, 64, -1, True)
            assert (chains, served, idle) == ([], 0, True)
            assert [base for (base, _), _ in misses] == [noted.page(3)]

    @pytest.mark.parametrize("work", [1, 2])
    def test_what_does_not_fit_a_turn_is_taken_in_the_next(self, work: int) -> None:
        bench = Bench(8, order="noted")
        bench.tell(*range(8))
        bench.offer(0, 1, 2)
        bench.take()
        bench.ring = SplitRing(
            bench.space, 8, DESC, AVAIL, USED, inflight=bench.noted(), batch_bytes=work * ROOM
        )
        server = BlockServer(ImageFile(-1, 512))
        taken = 0
        for _ in range(5):
            chains, _, served, idle = bench.ring.run_once(server, 64, -1, True)
            taken += len(chains) + served
            if idle:
                break
        assert taken == 3
        bench.close()

    def test_after_a_turn_that_a_revocation_cut_short(self, noted: Bench) -> None:
        """What is left of them is taken in the next, although no kick announces it."""
        for head in range(3):
            noted.put(head, Desc(noted.page(head), 16, NEXT, head + 4))
            noted.put(head + 4, Desc(noted.page(head + 4), 513, WRITE))
        noted.tell(*range(8))
        noted.offer(0, 1, 2)
        noted.take()
        noted.ring = noted.device(0)

        def revoke(*_: object) -> None:
            noted.forget(7)
            noted.tell(7)

        server = BlockServer(ImageFile(-1, 512), report=revoke)
        done, batches = 0, 0
        idle = False
        while not idle:
            chains, _, served, idle = noted.ring.run_once(server, 64, -1, True)
            assert chains == []
            done, batches = done + served, batches + 1
        assert done == 3
        assert batches > 1
        assert sorted(noted.published(0)) == [(0, 0), (1, 0), (2, 0)]

    def test_while_the_device_holds_as_much_as_it_may(self, noted: Bench) -> None:
        noted.tell(*range(8))
        noted.offer(0, 1)
        noted.take()
        noted.offer(2)
        noted.ring = SplitRing(
            noted.space, 8, DESC, AVAIL, USED, inflight=noted.noted(), quota=Quota(1)
        )
        for head in range(3):
            (chain,), _, _, idle = noted.ring.run_once(None, 64, -1, True)
            assert (chain.head, idle) == (head, False)
            assert noted.ring.run_once(None, 64, -1, True)[0] == []
            assert noted.ring.run_once(None, 64, -1, True)[3], "it is looked at again and again"
            noted.ring.complete(chain, 0)

    def test_many_of_them(self) -> None:
        bench = Bench(256, order="noted")
        bench.tell(*range(256))
        bench.offer(*range(200))
        assert len(bench.ring.pop(200)[0]) == 200
        bench.forget(*range(100))
        bench.ring = bench.device(0)
        chains, misses = bench.ring.pop()
        assert chains == []
        assert len(misses) == 100
        bench.offer(200, 201)
        bench.tell(*range(99))
        assert [chain.head for chain in bench.ring.pop(100)[0]] == list(range(99))
        assert bench.ring.held_count == 101
        bench.tell(99)
        assert [chain.head for chain in bench.take()] == list(range(99, 163))
        assert [chain.head for chain in bench.take()] == list(range(163, 202))
        bench.close()

    def test_twice_in_a_row(self, noted: Bench) -> None:
        self.leave(noted)
        for _ in range(3):
            noted.ring = noted.device(0)
            noted.ring.pop()
        noted.tell(0, 2)
        assert [chain.head for chain in noted.ring.pop()[0]] == [0, 2]
        noted.ring = noted.device(0)
        noted.tell(*range(8))
        assert [chain.head for chain in noted.take()] == [0, 2, 3]

    @pytest.mark.parametrize("base", [0, 0xFFFD])
    def test_at_a_stop_an_index_is_enough(self, base: int) -> None:
        """The next back-end is told where, and is not given the notes."""
        bench = Bench(base=base, order="noted")
        bench.tell(0, 1, 3)
        bench.offer(0, 1, 2, 3)
        first, second = bench.ring.pop()[0]
        bench.ring.complete(second, 1)
        bench.ring.publish()
        bench.ring.complete(first, 0)
        bench.ring.publish()
        assert bench.ring.give_back() == 0
        assert bench.ring.resume_at == bench.used_idx == (base + 2) & 0xFFFF
        bench.tell(2)
        without = SplitRing(
            bench.space, 8, DESC, AVAIL, USED, base=bench.ring.resume_at, ordered=True
        )
        assert [chain.head for chain in without.pop()[0]] == [2, 3]
        bench.close()

    def test_what_was_in_flight_before_is_given_back_at_a_stop(self, noted: Bench) -> None:
        noted.tell(0, 1, 2)
        noted.offer(0, 1, 2)
        noted.ring.complete(noted.take()[0], 0)
        noted.ring.publish()
        noted.forget(0)
        noted.ring = noted.device(0)
        noted.iotlb.invalidate_mapping(0, AREAS)
        assert noted.ring.give_back() == 0, "the ring cannot be reached"
        noted.iotlb.set_mapping(0, 0, AREAS, RW)
        noted.iotlb.set_mapping(noted.page(1), noted.page(1), PAGE, Permissions.READ)
        assert noted.ring.pop()[0] == []
        noted.iotlb.invalidate_mapping(0, AREAS)
        assert noted.ring.give_back() == 0, "the ring cannot be reached any more"
        noted.iotlb.set_mapping(0, 0, AREAS, RW)
        assert noted.ring.give_back() == 2
        assert (noted.ring.held_count, noted.ring.outstanding, noted.ring.resume_at) == (0, 0, 1)
        without = SplitRing(noted.space, 8, DESC, AVAIL, USED, base=1, ordered=True)
        noted.tell(1, 2)
        chains, _ = without.pop()
        assert [chain.head for chain in chains] == [1, 2]
        for chain in chains:
            without.complete(chain, 0)
        without.publish()
        # Nor is it done once more by one with the notes.
        noted.offer(3)
        noted.tell(3)
        noted.ring = noted.device(3)
        assert [chain.head for chain in noted.take()] == [3]

    @pytest.mark.capacity(RING_LOOK_WORK=1024)
    @pytest.mark.parametrize("order", ["noted", "both"])
    def test_what_is_put_back_is_taken_again(self, order: str) -> None:
        """Both what was in flight before and what is new."""
        noted = Bench(order=order)
        noted.tell(0, 1, 2, 3)
        noted.offer(0, 1)
        noted.take()
        noted.ring = noted.device(0)
        noted.offer(2, 3)
        for kept in (3, 2, 1, 0):
            chains = noted.ring.pop()[0]
            assert [chain.head for chain in chains] == [0, 1, 2, 3]
            rest = chains[kept:]
            noted.ring.put_back(rest)
            assert rest == []
            held = max(2 - kept, 0)
            assert (noted.ring.held_count, noted.ring.outstanding) == (held, max(kept, 2))
            noted.ring.put_back(chains[:kept])
            assert (noted.ring.held_count, noted.ring.next_avail) == (2, 2)
        assert noted.ring.give_back() == 2
        assert (noted.ring.resume_at, noted.ring.outstanding) == (0, 0)
        noted.ring = noted.device(0)
        assert noted.ring.held_count == 0
        assert [chain.head for chain in noted.take()] == [0, 1, 2, 3]
        noted.close()

    def test_what_was_overtaken_before_stays_in_the_notes(self, noted: Bench) -> None:
        self.leave(noted)
        noted.ring = noted.device(0)
        noted.ring.pop()
        assert noted.ring.give_back() == 2
        assert noted.ring.resume_at == 2
        noted.ring = noted.device(0)
        noted.tell(*range(8))
        assert [chain.head for chain in noted.take()] == [0, 2, 3]

    def test_a_region_that_cannot_be_followed_breaks_the_ring(self, noted: Bench) -> None:
        part = noted.noted()
        assert part is not None
        assert noted.region is not None
        part.recover(0)
        os.pwrite(noted.region.fd, (7).to_bytes(2, "little"), VERSION_AT)
        noted.tell(*range(8))
        noted.offer(0)
        for _ in range(2):
            with pytest.raises(QueueError, match="version"):
                noted.ring.pop()
        assert noted.ring.broken is not None

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
