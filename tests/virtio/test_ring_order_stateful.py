"""Requests in any order, and devices that come and go, against a model of lists."""

from __future__ import annotations

import itertools
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

from guestio._core.virtio.chain import Chain
from tests.kit.ring_bench import AREAS, RW, Bench
from tests.kit.rings import PAGE


@dataclass
class Request:
    """What the model knows of a request.

    Attributes:
        head: Its descriptor.
        number: How many were offered before it.
        chain: What the device was given, if it was taken.
        written: With how much it was completed.
    """

    head: int
    number: int
    chain: Chain | None = None
    written: int | None = None


class OrderMachine(RuleBasedStateMachine):
    """A driver, a device, an IOMMU, and now and then the end of one of them.

    The model keeps requests in lists: offered, held (in flight when a device died), taken, and
    completed but not published. What is published is compared with the used ring after every step.
    """

    SIZE = 8

    @initialize(
        order=st.sampled_from(("ordered", "done", "noted", "noted", "both")),
        base=st.sampled_from((0, 1, 0xFFFA, 0xFFFF)),
    )
    def start(self, order: str, base: int) -> None:
        self.bench = Bench(self.SIZE, base=base, order=order)
        self.offered: list[Request] = []
        self.held: list[Request] = []
        self.taken: list[Request] = []
        self.published = base
        self.taken_count = 0
        self.told: set[int] = set()
        self.areas = True
        self.numbers = itertools.count()
        self.free = list(range(self.SIZE))

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.close()

    @property
    def noted(self) -> bool:
        return self.bench.order in ("noted", "both")

    heads = st.integers(0, SIZE - 1)

    @rule(count=st.integers(1, SIZE))
    def offer(self, count: int) -> None:
        for _ in range(min(count, len(self.free))):
            head = self.free.pop(0)
            self.offered.append(Request(head, next(self.numbers)))
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

    def ready(self, waiting: list[Request]) -> list[Request]:
        return list(itertools.takewhile(lambda each: each.head in self.told, waiting))

    @rule()
    def pop(self) -> None:
        chains, misses = self.bench.ring.pop()
        if not self.areas:
            assert chains == []
            assert misses != []
            return
        again = self.ready(self.held)
        self.held = self.held[len(again) :]
        fresh = [] if self.held else self.ready(self.offered)
        self.offered = self.offered[len(fresh) :]
        self.taken_count += len(fresh)
        assert [chain.head for chain in chains] == [each.head for each in again + fresh]
        pages = {base for (base, length), _ in misses for base in range(base, base + length, PAGE)}
        lacking = [each for each in self.held or self.offered if each.head not in self.told]
        assert pages == {self.bench.page(each.head) for each in lacking}
        for each, chain in zip(again + fresh, chains, strict=True):
            each.chain = chain
            assert chain.fault is None
        self.taken += again + fresh

    @rule()
    def look(self) -> None:
        found = self.bench.ring.lacking()
        waiting = self.held or self.offered
        if not self.areas or not waiting:
            assert found is None
        else:
            head = waiting[0].head
            pages = [] if head in self.told else [self.bench.page(head)]
            assert [base for (base, _), _ in found or []] == pages

    @rule()
    def fail(self) -> None:
        chain = self.bench.ring.pop_faulty()
        waiting = self.held or self.offered
        if not self.areas or not waiting:
            assert chain is None
            return
        self.taken_count += not self.held
        each = waiting.pop(0)
        assert chain is not None
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
            each.chain.finish(each.written)
        self.bench.ring.complete(each.chain, None if early else each.written)
        if self.bench.order not in ("ordered", "both"):
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
        assert self.bench.published(self.published) == [(each.head, each.written) for each in ready]
        self.published = (self.published + len(ready)) & 0xFFFF
        self.free += [each.head for each in ready]
        self.taken = self.taken[len(ready) :]

    @precondition(lambda self: self.bench.order != "done")
    @rule(hint=st.integers(0, 0xFFFF), told=st.booleans())
    def die(self, hint: int, told: bool) -> None:
        """What was not published is taken again; with notes, no index is needed to resume."""
        base = self.bench.ring.resume_at if told or not self.noted else hint
        if not self.noted:
            assert base == self.published
        again = self.taken
        if self.noted:
            again = sorted(self.taken + self.held, key=lambda each: each.number)
        for each in self.taken:
            each.chain = None
        again = [Request(each.head, each.number) for each in again]
        self.taken = []
        self.bench.ring = self.bench.device(base)
        if self.noted:
            self.held = again
        else:
            self.offered = again + self.offered

    @precondition(lambda self: self.bench.order != "done")
    @rule(notes=st.booleans())
    def stop(self, notes: bool) -> None:
        """All that was taken is finished, and an index says where the rest begins.

        Only what a device that died had let others overtake needs the notes again.
        """
        self.find_areas()
        for each in self.taken:
            if each.written is None:
                assert each.chain is not None
                each.written = 0
                self.bench.ring.complete(each.chain, 0)
        self.bench.ring.publish()
        published = self.bench.published(self.published)
        assert sorted(published) == sorted((each.head, each.written) for each in self.taken)
        self.published = self.bench.used_idx
        self.free += [each.head for each in self.taken]
        self.taken = []
        given = 0
        while self.held and self.held[-1].number == self.taken_count - 1:
            each = self.held.pop()
            self.offered.insert(0, each)
            self.taken_count -= 1
            given += 1
        assert self.bench.ring.give_back() == given
        base = self.bench.ring.resume_at
        if not self.held:
            assert base == self.published
            if self.noted and not notes:
                self.bench.close()
                self.bench.region, self.bench.order = None, "ordered"
        self.bench.ring = self.bench.device(base)

    @invariant()
    def counts(self) -> None:
        if not hasattr(self, "bench"):
            return
        ring = self.bench.ring
        assert self.bench.used_idx == self.published
        assert ring.unpublished == sum(each.written is not None for each in self.taken)
        if self.bench.order == "ordered":
            assert ring.resume_at == self.published, "the used index says where to go on"
        assert ring.broken is None


@pytest.mark.slow
@pytest.mark.capacity(RING_LOOK_WORK=1024)
def test_requests_in_any_order_and_devices_that_come_and_go() -> None:
    run_state_machine_as_test(
        OrderMachine,
        settings=settings(
            max_examples=100, stateful_step_count=40, deadline=None, derandomize=True
        ),
    )
