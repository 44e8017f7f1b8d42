"""Endpoints of a domain share its mappings, and nothing else: accesses, waits, costs."""

import contextlib
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from guestio import CannotResolveError, GuestRegionCollection, IovaRange, Permissions
from guestio.virtio.iommu import Pending, VirtioIommu
from tests.kit.big_domain import BigDomain
from tests.kit.iommu_driver import (
    INVAL,
    OK,
    PAGE,
    RW,
    UNSUPP,
    LedgerTarget,
    R,
    attach,
    detach,
    map_,
    pend,
    send,
    send_all,
    status,
    unmap,
)

WAIT = 20
TOP = 2**64


def page(number, domain=1, flags=RW, phys=None):
    start = number * PAGE
    return map_(domain, start, start + PAGE - 1, start if phys is None else phys * PAGE, flags)


def unpage(number, domain=1, count=1):
    return unmap(domain, number * PAGE, (number + count) * PAGE - 1)


@pytest.fixture
def physical():
    return GuestRegionCollection.from_ranges([(0, 0x40000)])


class TestWhoIsWaitedFor:
    """An access is ended where it is taken away, and only there."""

    @pytest.fixture
    def iommu(self):
        iommu = VirtioIommu(endpoints=[8, 9, 10])
        send_all(iommu, *(attach(number, 1) for number in (8, 9, 10)))
        send_all(iommu, page(1), page(2), page(3))
        return iommu

    def test_an_unmap_waits_for_every_endpoint(self, iommu):
        with contextlib.ExitStack() as last:
            for number in (8, 9, 10):
                guard = iommu.endpoint(number).translate(PAGE, 8, Permissions.READ)
                last.enter_context(guard)
            with iommu.endpoint(9).translate(3 * PAGE, 8, Permissions.READ):
                pending = pend(iommu, unpage(1))
                # No access gets through any more, at none of them.
                for number in (8, 9, 10):
                    with pytest.raises(CannotResolveError):
                        iommu.endpoint(number).translate(PAGE, 1, Permissions.READ)
                last.pop_all().close()
                # What 9 does elsewhere does not matter.
                assert status(pending.result(WAIT)) is OK

    @pytest.mark.parametrize("busy", [8, 9, 10])
    def test_one_user_is_enough(self, iommu, busy):
        with iommu.endpoint(busy).translate(PAGE, 8, Permissions.READ):
            pending = pend(iommu, unpage(1))
        assert status(pending.result(WAIT)) is OK

    @pytest.mark.parametrize("leaving", [detach(8, 1), attach(8, 2)], ids=["detach", "attach"])
    def test_a_detach_waits_for_its_endpoint_only(self, iommu, leaving):
        others = [iommu.endpoint(number).translate(PAGE, 8, Permissions.READ) for number in (9, 10)]
        with others[0], others[1]:
            mine = iommu.endpoint(8).translate(2 * PAGE, 8, Permissions.READ)
            with mine:
                pending = pend(iommu, leaving)
                with pytest.raises(CannotResolveError):
                    iommu.endpoint(8).translate(PAGE, 1, Permissions.READ)
            assert status(pending.result(WAIT)) is OK
            for number in (9, 10):
                with iommu.endpoint(number).translate(2 * PAGE, 1, Permissions.READ):
                    pass
        # And with users of others only it does not wait at all.
        with iommu.endpoint(9).translate(PAGE, 8, Permissions.READ):
            send_all(iommu, detach(10, 1))
            assert iommu.remove_endpoint(10) is None

    def test_an_access_of_before_is_not_one_of_the_new_domain(self, iommu):
        """The translation in use is that of the old domain, so the new one's UNMAP goes on."""
        iommu.add_endpoint(11)
        send_all(iommu, attach(11, 2), page(1, domain=2))
        with iommu.endpoint(8).translate(PAGE, 8, Permissions.READ):
            pending = pend(iommu, detach(8, 1))
            send_all(iommu, unpage(1, domain=2))
        assert status(pending.result(WAIT)) is OK

    def test_a_ring_or_device_keeps_its_iotlb(self, iommu):
        """Wherever an endpoint goes, what devices were given of it stays the same object."""
        endpoint = iommu.endpoint(8)
        iotlb, physical = endpoint.iotlb, GuestRegionCollection.from_ranges([(0, 0x10000)])
        memory = endpoint.memory(physical)
        physical.write(5 * PAGE, b"five")
        for request, there in (
            (detach(8, 1), False),
            (attach(8, 1), True),
            (attach(8, 2), False),
            (page(1, domain=2, phys=5), True),
        ):
            send_all(iommu, request)
            assert memory.check_range(PAGE, 1) is there
        assert memory.read(PAGE, 4) == b"five"
        assert endpoint.iotlb is iotlb

    def test_only_the_device_changes_what_an_endpoint_sees(self, iommu):
        iotlb = iommu.endpoint(8).iotlb
        for change in (
            lambda: iotlb.set_mapping(0, 0, PAGE, Permissions.READ_WRITE),
            lambda: iotlb.invalidate_mapping(PAGE, PAGE),
            iotlb.invalidate_all,
        ):
            with pytest.raises(RuntimeError, match="another"):
                change()
        for number in (8, 9):
            assert (
                iommu.endpoint(number)
                .memory(GuestRegionCollection.from_ranges([(0, 0x10000)]))
                .check_range(PAGE, 3 * PAGE, Permissions.WRITE)
            )


class TestReserved:
    """A domain maps nothing that is reserved for any of its endpoints."""

    def test_it_follows_the_endpoints(self):
        regions = {8: [(0x1000, 0x1FFF, 0)], 9: [(0x1000, 0x2FFF, 0)], 10: [(0x1000, 0x1FFF, 0)]}
        iommu = VirtioIommu(endpoints=[7, 8, 9, 10], reserved=regions)
        send_all(iommu, *(attach(number, 1) for number in (7, 8, 9, 10)))
        assert [send(iommu, page(n)) for n in (1, 2, 3)] == [INVAL, INVAL, OK]
        assert send(iommu, map_(1, 0, TOP - 1, 0)) is INVAL
        assert send(iommu, map_(1, 0, 2 * PAGE - 1, 0)) is INVAL
        send_all(iommu, detach(9, 1), page(2), unpage(2), detach(8, 1))
        assert send(iommu, page(1)) is INVAL
        send_all(iommu, detach(10, 1), page(1))
        assert send(iommu, attach(10, 1)) is UNSUPP
        send_all(iommu, attach(7, 1), unpage(1), attach(10, 1))
        assert send(iommu, page(1)) is INVAL
        send_all(iommu, page(0), page(2))

    def test_to_the_end_of_the_space(self):
        iommu = VirtioIommu(endpoints=[8], reserved=[(TOP - PAGE, TOP - 1, 0)])
        send_all(iommu, attach(8, 1))
        assert send(iommu, map_(1, TOP - 2 * PAGE, TOP - 1, 0)) is INVAL
        send_all(iommu, map_(1, TOP - 2 * PAGE, TOP - PAGE - 1, 0))


def calls_of(work):
    """Calls of Python and C functions that something makes: what it costs, whatever the load."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


class TestGrowth:
    def domain(self, endpoints, mappings, with_targets=False):
        reserved = [(0x100000000, 0x1000FFFFF, 1)]
        iommu = VirtioIommu(endpoints=range(endpoints + 1), reserved=reserved)
        physical = GuestRegionCollection.from_ranges([(0, 0x100000)])
        if with_targets:
            iommu.endpoint(0).add_target(LedgerTarget(), physical)
        send_all(iommu, *(attach(number, 1) for number in range(endpoints)))
        send_all(iommu, *(page(2 * n, phys=n % 16) for n in range(mappings)))
        send_all(iommu, page(1), unpage(1))
        return iommu

    @pytest.mark.parametrize("with_targets", [False, True])
    def test_requests_do_not_grow_with_endpoints(self, with_targets):
        def cost(endpoints):
            iommu = self.domain(endpoints, 5, with_targets)
            return [
                calls_of(lambda request=request: send_all(iommu, request))
                for request in (page(1), unpage(1), unpage(0, count=10))
            ]

        assert cost(200) == cost(1)

    def test_attachments_do_not_grow_with_mappings_or_endpoints(self):
        def cost(endpoints, mappings):
            iommu = self.domain(endpoints, mappings)
            return [
                calls_of(lambda request=request: send_all(iommu, request))
                for request in (attach(endpoints, 1), detach(endpoints, 1))
            ]

        assert cost(1, 2000) == cost(200, 5) == cost(1, 5)

    def test_restoring_does_not_grow_with_what_endpoints_see(self):
        def cost(endpoints, mappings):
            state = self.domain(endpoints, mappings).snapshot()
            return calls_of(lambda: VirtioIommu.restore(state))

        one_more = cost(11, 2) - cost(10, 2)
        # Not equal to the call: what was of use before is freed at times.
        assert cost(11, 2000) - cost(10, 2000) < one_more + 500

    @pytest.mark.slow
    def test_a_hundred_thousand_mappings_and_a_hundred_endpoints(self):
        big = BigDomain(100_000)
        big.fill(range(big.pages))
        for number in range(100, 200):
            big.iommu.add_endpoint(number)
        send_all(big.iommu, attach(100, 1), detach(100, 1))
        before = resident()
        send_all(big.iommu, *(attach(number, 1) for number in range(100, 200)))
        assert resident() - before < 4 << 20  # a copy for each took 480 MiB
        for number in (8, 100, 199):
            big.check(number)
        big.unmap(50_000, 1000)
        send_all(big.iommu, *(detach(number, 1) for number in range(100, 199)))
        big.unmap(0, 50_000)
        big.map(0)
        for number in (8, 199):
            big.check(number)
        assert len(big.iommu.endpoint(100).iotlb) == 0


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_accesses_of_many_threads_while_pages_and_endpoints_come_and_go():
    """Invariant L1 with a shared map: after an answer no endpoint reaches what was taken away."""
    iommu = VirtioIommu(endpoints=[8, 9, 10])
    send_all(iommu, *(attach(number, 1) for number in (8, 9, 10)))
    physical = GuestRegionCollection.from_ranges([(0, 0x10000)])
    stop, wrote, wrong = threading.Event(), dict.fromkeys((8, 9), 0), []

    def write(number):
        memory = iommu.endpoint(number).memory(physical)
        while not stop.is_set():
            with contextlib.suppress(CannotResolveError):
                memory.write(0x100, b"\xff" * 64)
                wrote[number] += 1

    def finish(request):
        answer = iommu.handle_request(request, 4)
        assert status(answer.result(WAIT) if isinstance(answer, Pending) else answer) is OK

    threads = [threading.Thread(target=write, args=(number,)) for number in (8, 9)]
    for thread in threads:
        thread.start()
    try:
        rounds = 0
        while rounds < 60 or (not all(wrote.values()) and rounds < 100_000):
            finish(map_(1, 0, PAGE - 1, 0x4000))
            stop.wait(0.0005)
            if rounds % 2:
                finish(unmap(1, 0, PAGE - 1))
                finish(detach(9, 1)) if rounds % 4 == 1 else finish(attach(9, 1))
            else:
                for number in (8, 9):
                    if iommu.endpoint(number).domain is not None:
                        finish(detach(number, 1))
            physical.fill(0x4100, 64, 0)
            for _ in range(20):
                wrong.append(physical.read(0x4100, 64) != bytes(64))
            if not rounds % 2:
                finish(unmap(1, 0, PAGE - 1))
                finish(attach(8, 1))
                if rounds % 4 == 0:
                    finish(attach(9, 1))
            rounds += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not any(wrong)
    assert all(wrote.values())


PAGES = 4
ENDPOINTS = (8, 9, 10)


class Machine(RuleBasedStateMachine):
    """Attachments, mappings and accesses in progress, against a model of pages."""

    def __init__(self):
        super().__init__()
        self.iommu = VirtioIommu(endpoints=ENDPOINTS, max_mappings=3)
        self.maps = {}  # domain: {page: (physical page, flags)}
        self.where = dict.fromkeys(ENDPOINTS)
        self.accesses = []  # (endpoint, first page, pages, guard)

    endpoints = st.sampled_from(ENDPOINTS)
    domains = st.sampled_from([1, 1, 2])
    ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(
        lambda r: (r[0], min(r[1], PAGES - r[0]))
    )

    def seen(self, endpoint):
        return self.maps.get(self.where[endpoint], {})

    def send(self, request, expected, in_its_way=()):
        """Send a request; it waits for just the accesses that are in its way."""
        answer = self.iommu.handle_request(request, 4)
        if not in_its_way:
            assert not isinstance(answer, Pending)
            assert status(answer) is expected
            return
        assert expected is OK
        assert isinstance(answer, Pending)
        for access in in_its_way:
            assert not answer.done
            self.accesses.remove(access)
            access[3].__exit__(None, None, None)
        assert status(answer.result(WAIT)) is OK

    def accesses_of(self, endpoint):
        return [access for access in self.accesses if access[0] == endpoint]

    def leave(self, endpoint):
        number, self.where[endpoint] = self.where[endpoint], None
        if number is not None and number not in self.where.values():
            del self.maps[number]

    @rule(endpoint=endpoints, domain=domains)
    def attach(self, endpoint, domain):
        stays = self.where[endpoint] == domain
        mine = [] if stays else self.accesses_of(endpoint)
        self.send(attach(endpoint, domain), OK, mine)
        if not stays:
            self.leave(endpoint)
            self.where[endpoint] = domain
            self.maps.setdefault(domain, {})

    @rule(endpoint=endpoints)
    def detach(self, endpoint):
        number = self.where[endpoint]
        if number is None:
            self.send(detach(endpoint, 1), INVAL)
            return
        self.send(detach(endpoint, number), OK, self.accesses_of(endpoint))
        self.leave(endpoint)

    @precondition(lambda self: self.maps)
    @rule(
        data=st.data(),
        at=st.integers(0, PAGES - 1),
        phys=st.integers(0, 9),
        flags=st.just(RW) | st.just(R),
    )
    def map(self, data, at, phys, flags):
        number = data.draw(st.sampled_from(sorted(self.maps)), label="domain")
        pages = self.maps[number]
        if at in pages:
            self.send(page(at, number, flags, phys), INVAL)
        elif len(pages) < 3:
            self.send(page(at, number, flags, phys), OK)
            pages[at] = phys, flags

    @precondition(lambda self: self.maps)
    @rule(data=st.data(), where=ranges)
    def unmap(self, data, where):
        number = data.draw(st.sampled_from(sorted(self.maps)), label="domain")
        first, count = where
        in_its_way = [
            access
            for access in self.accesses
            if self.where[access[0]] == number
            and access[1] < first + count
            and first < access[1] + access[2]
        ]
        self.send(unpage(first, number, count), OK, in_its_way)
        for at in range(first, first + count):
            self.maps[number].pop(at, None)

    @rule(endpoint=endpoints, where=ranges)
    def access(self, endpoint, where):
        first, count = where
        there = self.seen(endpoint)
        if all(at in there for at in range(first, first + count)):
            guard = self.iommu.endpoint(endpoint).translate(
                first * PAGE, count * PAGE, Permissions.READ
            )
            guard.__enter__()
            self.accesses.append((endpoint, first, count, guard))
        else:
            with pytest.raises(CannotResolveError):
                self.iommu.endpoint(endpoint).translate(
                    first * PAGE, count * PAGE, Permissions.READ
                )

    @precondition(lambda self: self.accesses)
    @rule(data=st.data())
    def end_access(self, data):
        which = data.draw(st.integers(0, len(self.accesses) - 1), label="which")
        self.accesses.pop(which)[3].__exit__(None, None, None)

    @rule()
    def reset(self):
        attached = [e for e in ENDPOINTS if self.where[e] is not None]
        in_its_way = [access for access in self.accesses if access[0] in attached]
        done = self.iommu.reset()
        assert (done is None) == (not in_its_way)
        for access in in_its_way:
            assert not done.done
            self.accesses.remove(access)
            access[3].__exit__(None, None, None)
        assert done is None or done.wait(WAIT)
        for endpoint in attached:
            self.leave(endpoint)

    @precondition(lambda self: not self.accesses)
    @rule()
    def restore(self):
        state = self.iommu.snapshot()
        self.iommu = VirtioIommu.restore(state)
        assert self.iommu.snapshot() == state

    @invariant()
    def each_endpoint_sees_its_domain(self):
        starts = np.arange(PAGES) * PAGE
        for number in ENDPOINTS:
            endpoint = self.iommu.endpoint(number)
            endpoint.iotlb._map.check()
            there = self.seen(number)
            for access in (Permissions.READ, Permissions.WRITE):
                found, states = endpoint.iotlb.lookup_many(starts, PAGE, access)
                assert {at: int(found[at]) // PAGE for at in range(PAGES) if states[at] == 0} == {
                    at: phys for at, (phys, flags) in there.items() if flags & access
                }
            held = sorted(IovaRange(a[1] * PAGE, a[2] * PAGE) for a in self.accesses_of(number))
            assert len(endpoint.iotlb._map.leases) == len(held)
        assert self.iommu._state.total_mappings == sum(map(len, self.maps.values()))

    def teardown(self):
        for access in self.accesses:
            access[3].__exit__(None, None, None)


def test_machine():
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


class TestTwoEndpoints:
    """A second endpoint sees the domain's mappings, and the first keeps them."""

    def test_both_see_what_was_and_what_comes(self, physical):
        iommu = VirtioIommu(endpoints=[8, 9])
        targets = {n: LedgerTarget() for n in (8, 9)}
        memory = {n: iommu.endpoint(n).memory(physical) for n in (8, 9)}
        for number, target in targets.items():
            iommu.endpoint(number).add_target(target, physical)
        send_all(iommu, attach(8, 1), map_(1, 0, PAGE - 1, PAGE), attach(9, 1))
        send_all(iommu, map_(1, PAGE, 2 * PAGE - 1, 0))
        for number in (8, 9):
            assert memory[number].check_range(0, 2 * PAGE, Permissions.READ_WRITE)
            assert targets[number].ranges() == [(0, PAGE), (PAGE, PAGE)]
        send_all(iommu, unmap(1, 0, PAGE - 1))
        for number in (8, 9):
            assert not memory[number].check_range(0, 1)
            assert targets[number].ranges() == [(PAGE, PAGE)]

    def test_removing_a_device_leaves_the_domain(self, physical):
        iommu = VirtioIommu(endpoints=[8, 9])
        send_all(iommu, attach(8, 1), attach(9, 1), map_(1, 0, PAGE - 1, 0))
        iommu.remove_endpoint(8)
        assert iommu.endpoint(9).memory(physical).check_range(0, PAGE)
        assert send(iommu, map_(1, 0, PAGE - 1, 0)) is INVAL
