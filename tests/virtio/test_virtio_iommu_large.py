"""A virtio-iommu with very many mappings: structures that tests at toy size never reach."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from guestio import Permissions
from guestio.iommu import AddMapResult, BasicMemoryMapper, MappingInfo
from guestio.virtio.iommu import VirtioIommu
from tests.kit.big_domain import BigDomain
from tests.kit.iommu_driver import (
    INVAL,
    NOENT,
    OK,
    PAGE,
    RANGE,
    attach,
    detach,
    map_,
    send,
    send_all,
    unmap,
)

MAX = 2**64 - 1

ORDERS = {
    "up": lambda n: list(range(n)),
    "down": lambda n: list(reversed(range(n))),
    "random": lambda n: random.Random(n).sample(range(n), n),
    "strides": lambda n: [page for first in range(7) for page in range(first, n, 7)],
    "inwards": lambda n: [page // 2 if page % 2 else n - 1 - page // 2 for page in range(n)],
}


def halves(big):
    """The upper half at once, then half of what is left, and so on."""
    n = big.pages
    while n > 1:
        big.unmap(n // 2, n - n // 2)
        n //= 2
    big.unmap(0)


def churn(big):
    rng = random.Random(1)
    for _ in range(big.pages):
        page = rng.randrange(big.pages)
        if rng.random() < 0.5:
            big.map(page)
        else:
            big.unmap(page, min(rng.randrange(1, 4), big.pages - page))
    big.unmap(0, big.pages)


EMPTYING = {
    "at once": lambda big: big.unmap(0, big.pages),
    "from below": lambda big: [big.unmap(page) for page in range(big.pages)],
    "from above": lambda big: [big.unmap(page) for page in reversed(range(big.pages))],
    "from the middle": lambda big: [
        big.unmap(page) for page in reversed(ORDERS["inwards"](big.pages))
    ],
    "by halves": halves,
    "by churn": churn,
}


@pytest.mark.parametrize(
    ("order", "emptying"),
    [
        ("up", "at once"),
        ("up", "from below"),
        ("down", "from above"),
        ("random", "from below"),
        ("random", "by halves"),
        ("strides", "by churn"),
        ("inwards", "from the middle"),
        ("down", "from the middle"),
    ],
)
def test_filled_and_emptied(order, emptying):
    big = BigDomain(6_000)
    big.fill(ORDERS[order](big.pages))
    big.check()
    assert big.count == big.pages
    EMPTYING[emptying](big)
    big.check()
    assert big.count == 0
    big.map(5)
    big.check()


@pytest.mark.slow
def test_a_hundred_thousand_mappings_at_the_end_of_the_space():
    big = BigDomain(100_000, base=2**64 - 100_000 * PAGE)
    big.fill(range(big.pages))
    big.check()
    big.unmap(50_000, 1000)
    big.unmap(0, 500)
    big.unmap(99_000, 1000)
    big.check()
    big.map(50_000)
    big.unmap(0, big.pages)
    big.check()
    assert big.count == 0


def test_targets_and_endpoints_that_come_late():
    """What an endpoint and its target hold does not depend on when they came."""
    big = BigDomain(6_000)
    big.fill(ORDERS["random"](big.pages))
    big.add_target()
    send_all(big.iommu, attach(9, 1))
    for endpoint in (8, 9):
        big.check(endpoint)
    for page in range(0, big.pages, 3):
        big.unmap(page)
    send_all(big.iommu, detach(9, 1), attach(9, 1))
    for endpoint in (8, 9):
        big.check(endpoint)
    restored = VirtioIommu.restore(big.iommu.snapshot())
    assert restored.snapshot() == big.iommu.snapshot()
    assert restored._state.total_mappings == big.count
    send_all(big.iommu, detach(8, 1), detach(9, 1))
    assert big.target.held == {}
    assert big.iommu._state.total_mappings == 0


@pytest.mark.parametrize("order", ["up", "random"])
def test_the_mapper_alone(order):
    mapper, n = BasicMemoryMapper(), 5000
    model = {}
    for page in ORDERS[order](n):
        info = MappingInfo(page << 13, page << 12, PAGE, Permissions.READ_WRITE)
        assert mapper.add_map(info) is AddMapResult.OK
        model[page << 13] = page << 12
    assert [(iova, gpa) for iova, _, gpa, _ in mapper.mappings()] == sorted(model.items())
    assert mapper.mappings(limit=3) == mapper.mappings()[:3]
    assert mapper.mappings(100 << 13, 3 << 13, limit=9) == mapper.mappings(100 << 13, 3 << 13)
    assert mapper.remove_map(1000 << 13, 1000 << 13) == mapper.remove_map(0, 1 << 13)
    del model[0]
    for page in range(1000, 2000):
        del model[page << 13]
    assert [(iova, gpa) for iova, _, gpa, _ in mapper.mappings()] == sorted(model.items())
    assert mapper.remove_map(0, n << 13).fault is None
    assert mapper.mappings() == []


@pytest.mark.parametrize("gap", [0, 1, PAGE])
def test_the_first_mappings_of_a_range(gap):
    """As many as asked for, also where one begins at once after the other."""
    mapper = BasicMemoryMapper()
    stride = PAGE + gap
    for number in range(40):
        mapper.add_range(number * stride, PAGE, 0, Permissions.READ)
    for first, size in ((0, 2**64), (stride, 5 * stride), (3 * stride + 7, 9 * stride), (PAGE, 1)):
        everything = mapper.mappings(first, size)
        for limit in (0, 1, 2, 7, 39, 40, 99):
            assert mapper.mappings(first, size, limit=limit) == everything[:limit]
    mapper.add_range(2**64 - PAGE, PAGE, 0, Permissions.READ)
    assert mapper.mappings(limit=99) == mapper.mappings()
    assert mapper.mappings(0, 0, limit=9) == []


class Machine(RuleBasedStateMachine):
    """Whole ranges are filled and emptied, so that maps of hundreds of entries come and go."""

    PAGES = 700

    firsts = st.integers(0, PAGES - 1)
    strides = st.sampled_from([1, 1, 2, 3, 5])
    failures = st.one_of(st.none(), st.none(), st.integers(0, 40))

    @initialize(top=st.booleans(), with_target=st.booleans())
    def start(self, top, with_target):
        self.big = BigDomain(self.PAGES, base=2**64 - self.PAGES * PAGE if top else 0)
        if with_target:
            self.big.add_target()
        self.joined = False

    @rule(first=firsts, count=st.integers(1, PAGES), stride=strides, down=st.booleans())
    def fill(self, first, count, stride, down):
        pages = range(first, min(first + count, self.PAGES), stride)
        for page in reversed(pages) if down else pages:
            self.big.map(page)

    @rule(first=firsts, count=st.integers(1, PAGES), failing=failures)
    def empty(self, first, count, failing):
        if failing is not None and self.big.target is not None:
            self.big.fail_next(failing)
        self.big.unmap(first, min(count, self.PAGES - first))

    @rule(first=firsts, count=st.integers(1, PAGES), stride=strides, down=st.booleans())
    def nibble(self, first, count, stride, down):
        pages = range(first, min(first + count, self.PAGES), stride)
        for page in reversed(pages) if down else pages:
            self.big.unmap(page)

    @rule(first=firsts, count=st.integers(1, 9), failing=failures)
    def map_several(self, first, count, failing):
        if failing is not None and self.big.target is not None:
            self.big.fail_next(failing % 2)
        self.big.map(first, min(count, self.PAGES - first))
        self.big.failed()

    @rule(first=firsts, count=st.integers(1, PAGES), data=st.data())
    def nonsense(self, first, count, data):
        """Requests that make no sense change nothing, however much is mapped."""
        start, end = self.big.at(first), self.big.at(min(first + count, self.PAGES)) - 1
        request, expected = data.draw(
            st.sampled_from(
                [
                    (map_(1, MAX, start, 0), {INVAL}),
                    (map_(1, start + 1, end, 0), {RANGE}),
                    (map_(1, start, end - 1, 0), {RANGE}),
                    (map_(1, start, end, 1), {RANGE}),
                    (map_(1, start, end, 0, 8), {INVAL}),
                    (map_(1, start, end, 0, 1 << 31), {INVAL}),
                    (map_(3, start, end, 0), {NOENT}),
                    (unmap(1, MAX, start), {INVAL}),
                    (unmap(1, start, end, reserved=b"\0\0\0\1"), {INVAL}),
                    (unmap(3, 0, MAX), {NOENT}),
                    (attach(8, 1, reserved=b"\1\0\0\0"), {INVAL}),
                    (attach(8, 1, flags=1), {INVAL}),
                    (attach(8, 1, flags=2), {INVAL}),
                    (attach(7, 1), {NOENT}),
                    (detach(8, 3), {INVAL}),
                    (detach(7, 1), {NOENT}),
                    (map_(1, start, end, 0)[:-1], {None}),
                    (unmap(1, 0, MAX)[:-1], {None}),
                    (b"\7" + bytes(80), {None}),
                ]
            ),
            label="request",
        )
        assert send(self.big.iommu, request) in expected

    @rule()
    def another_endpoint(self):
        request = detach(9, 1) if self.joined else attach(9, 1)
        assert send(self.big.iommu, request) is OK
        self.joined = not self.joined

    @rule(failing=st.integers(0, 800))
    def leave_and_return(self, failing):
        """The endpoint goes elsewhere and comes back; the target may refuse to follow."""
        send_all(self.big.iommu, *([] if self.joined else [attach(9, 1)]))
        self.joined = True
        if self.big.target is not None:
            self.big.fail_next(failing)
        first = send(self.big.iommu, attach(8, 2))
        if self.big.failed():
            assert first is not OK
            return
        if self.big.target is not None:
            self.big.fail_next(failing)
        if send(self.big.iommu, attach(8, 1)) is not OK:
            assert self.big.failed()
            send_all(self.big.iommu, attach(8, 1))
        self.big.failed()

    @rule()
    def restore(self):
        state = self.big.iommu.snapshot()
        self.big.iommu = VirtioIommu.restore(state)
        assert self.big.iommu.snapshot() == state
        if self.big.target is not None:
            self.big.target.held.clear()
            self.big.target._starts.clear()
            self.big.iommu.endpoint(8).add_target(self.big.target, self.big.physical)

    @invariant()
    def equals_the_model(self):
        if hasattr(self, "big"):
            for endpoint in (8, 9) if self.joined else (8,):
                self.big.check(endpoint)


@pytest.mark.slow
def test_machine():
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
