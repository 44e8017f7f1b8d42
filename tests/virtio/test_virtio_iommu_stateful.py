"""The virtio-iommu against a model of plain dictionaries.

Requests, clients that hold memory and let go, targets that fail, resets and bypass in any order.
The model carries requests out in the order in which they are sent; the device may answer later,
and must then give the same answers and end in the same state.
"""

import errno
from dataclasses import dataclass, field

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

from guestio import CannotResolveError, GuestRegionCollection, Permissions
from guestio.dma import DmaError
from guestio.iommu import ExportError
from guestio.virtio.iommu import Pending, VirtioIommu
from tests.kit.iommu_driver import (
    DEVERR,
    INVAL,
    NOENT,
    NOMEM,
    OK,
    PAGE,
    RANGE,
    UNSUPP,
    LedgerTarget,
    attach,
    detach,
    map_,
    status,
    unmap,
)

PAGES = 6  # where mappings begin
SEEN = PAGES + 4  # as far as they reach
RESERVED = 4  # this page, for endpoint 10
RAM = (0, 0x40000)
ENDPOINTS = (8, 9, 10)
ANCHOR = 12  # keeps domain 1 alive, and is never moved
UNMAP = 4  # the type of a request
SHARED = {8: (8,), 9: (9, 10), 10: (9, 10), ANCHOR: ()}  # endpoints with the same target
MAX_MAPPINGS = 3


@dataclass
class Domain:
    bypass: bool
    maps: dict = field(default_factory=dict)  # first page: (pages, physical page, flags)
    endpoints: set = field(default_factory=set)

    def touching(self, first, count):
        return [at for at, (n, _, _) in self.maps.items() if at < first + count and first < at + n]


@dataclass
class Model:
    bypass: bool = False
    domains: dict = field(default_factory=dict)
    where: dict = field(default_factory=lambda: dict.fromkeys((*ENDPOINTS, ANCHOR)))

    def attach(self, endpoint, number, flag):
        if endpoint not in self.where:
            return NOENT
        domain = self.domains.get(number)
        if domain is not None:
            if domain.bypass != flag:
                return INVAL
            if self.where[endpoint] == number:
                return OK
            if endpoint == 10 and not flag and domain.touching(RESERVED, 1):
                return UNSUPP
        others = {self.where[e] for e in SHARED[endpoint] if e != endpoint} - {None}
        if others - {number}:
            return UNSUPP
        self.leave(endpoint)
        self.domains.setdefault(number, Domain(flag)).endpoints.add(endpoint)
        self.where[endpoint] = number
        return OK

    def leave(self, endpoint):
        number, self.where[endpoint] = self.where[endpoint], None
        if number is not None:
            self.domains[number].endpoints.discard(endpoint)
            if not self.domains[number].endpoints:
                del self.domains[number]

    def detach(self, endpoint, number):
        if endpoint not in self.where:
            return NOENT
        if self.where[endpoint] != number:
            return INVAL
        self.leave(endpoint)
        return OK

    def map(self, number, first, count, phys, flags):
        domain = self.domains.get(number)
        if domain is None:
            return NOENT
        if domain.bypass:
            return INVAL
        if 10 in domain.endpoints and first <= RESERVED < first + count:
            return INVAL
        if domain.touching(first, count):
            return INVAL
        if len(domain.maps) >= MAX_MAPPINGS:
            return NOMEM
        domain.maps[first] = count, phys, flags
        return OK

    def unmap(self, number, first, count):
        domain = self.domains.get(number)
        if domain is None:
            return NOENT
        if domain.bypass:
            return INVAL
        met = domain.touching(first, count)
        if any(at < first or at + domain.maps[at][0] > first + count for at in met):
            return RANGE
        for at in met:
            del domain.maps[at]
        return OK

    def reset(self):
        for endpoint in self.where:
            self.leave(endpoint)

    def view(self, endpoint):
        """``(bypass, mappings)`` of an endpoint."""
        number = self.where[endpoint]
        if number is None:
            return self.bypass, {}
        return self.domains[number].bypass, self.domains[number].maps

    def permissions(self, endpoint):
        bypass, maps = self.view(endpoint)
        if bypass:
            return [3] * SEEN
        found = [None] * SEEN
        for at, (count, _, flags) in maps.items():
            found[at : at + count] = [flags] * count
        return found

    def target(self, endpoint):
        """What the target of an endpoint must hold."""
        attached = [e for e in SHARED[endpoint] if self.where[e] is not None]
        bypass, maps = self.view((attached or [endpoint])[0])
        if bypass:
            return [RAM]
        return sorted((at * PAGE, n * PAGE) for at, (n, _, flags) in maps.items() if flags)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.iommu = VirtioIommu(
            endpoints=(*ENDPOINTS, ANCHOR),
            reserved={10: [(RESERVED * PAGE, RESERVED * PAGE + PAGE - 1, 0)]},
            max_mappings=MAX_MAPPINGS,
            revoke_after=None,
        )
        self.physical = GuestRegionCollection.from_ranges([RAM])
        self.targets = {8: LedgerTarget(), 9: LedgerTarget()}
        self.targets[10] = self.targets[9]
        for number in ENDPOINTS:
            self.iommu.endpoint(number).add_target(self.targets[number], self.physical)
        self.model = Model()
        self.sessions = {}
        self.held = []
        self.waiting = []

    endpoints = st.sampled_from([*ENDPOINTS, *ENDPOINTS, 11])
    domains = st.sampled_from([1, 1, 1, 2])
    firsts = st.integers(0, PAGES - 1)
    mappings = st.tuples(firsts, st.integers(1, 3), st.integers(0, 40), st.integers(0, 3))
    # The target that fails, and at which call; mostly none.
    failures = st.one_of(
        st.none(), st.none(), st.tuples(st.sampled_from([8, 9]), st.integers(0, 3))
    )

    @initialize(joined=st.booleans(), flags=st.lists(st.integers(1, 3), max_size=2))
    def start(self, joined, flags):
        """Begin with something mapped and seen, or it takes long to get there."""
        self.attach(ANCHOR, 1, 0, None)
        self.attach(8, 1, 0, None)
        self.attach(9, 1 if joined else 2, 0, None)
        for at, flag in enumerate(flags):
            self.map(1, 2 * at, 2, 8 * at, flag, None)

    def holds(self, endpoint, first=0, end=1 << 64):
        """Whether a client of an endpoint holds memory of a range and has not been told yet."""
        return any(
            owner == endpoint and not session.broken and iova < end and first < iova + size
            for session, owner, iova, size in self.held
        )

    def send(self, request, keys, operation, failing=None, held=False):
        """Send a request and carry it out in the model.

        ``keys`` are the domain and endpoint that it names, ``held`` says whether a client holds
        what it would take away.
        """
        target = None
        if failing is not None and not self.waiting:
            target = self.targets[failing[0]]
            target.fail_next(DmaError("map", 0, 0, "told to fail", errno=errno.EIO), failing[1])
        answer = self.iommu.handle_request(request, 4)
        if target is not None:
            failed = not target.failures
            target.failures.clear()
            if failed:
                assert status(answer) in {DEVERR, UNSUPP}
                return
        before = dict(self.model.where)
        expected = operation()
        stayed = request[0] != UNMAP and before == self.model.where
        must_wait = held and expected is OK and not stayed
        must_wait |= any(keys & others for _, _, others in self.waiting)
        if isinstance(answer, Pending):
            assert self.waiting or must_wait
            self.waiting.append((answer, expected, keys))
        else:
            assert not must_wait
            assert status(answer) is expected

    # Few rules, so that most runs use all of them.

    @rule(
        data=st.data(),
        kind=st.sampled_from(
            ["attach", "detach", "map", "map", "map", "unmap", "unmap", "unmap", "change"]
        ),
        domain=domains,
        failing=failures,
    )
    def request(self, data, kind, domain, failing):
        if kind == "attach":
            endpoint = data.draw(self.endpoints, label="endpoint")
            self.attach(endpoint, domain, data.draw(st.integers(0, 4), label="flag"), failing)
        elif kind == "detach":
            self.detach(data.draw(self.endpoints, label="endpoint"), domain, failing)
        elif kind == "map":
            first, count, phys, flags = data.draw(self.mappings, label="mapping")
            self.map(domain, first, count, phys, flags, failing)
        elif kind == "change":
            self.change(data.draw(st.sampled_from(["reset", "on", "off"]), label="what"))
        else:
            known = self.model.domains.get(domain)
            exact = [(at, n) for at, (n, _, _) in known.maps.items()] if known is not None else []
            anywhere = st.tuples(self.firsts, st.integers(1, PAGES))
            likely = st.sampled_from([*exact, *exact, (0, SEEN)])
            self.unmap(domain, *data.draw(anywhere | likely, label="pages"), failing)

    def attach(self, endpoint, domain, flag, failing):
        bypass = flag == 4
        self.send(
            attach(endpoint, domain, int(bypass)),
            {("domain", domain), ("endpoint", endpoint)},
            lambda: self.model.attach(endpoint, domain, bypass),
            failing,
            self.holds(endpoint),
        )

    def detach(self, endpoint, domain, failing):
        self.send(
            detach(endpoint, domain),
            {("domain", domain), ("endpoint", endpoint)},
            lambda: self.model.detach(endpoint, domain),
            failing,
            self.holds(endpoint),
        )

    def map(self, domain, first, count, phys, flags, failing):
        last = (first + count) * PAGE - 1
        self.send(
            map_(domain, first * PAGE, last, phys * PAGE, flags),
            {("domain", domain)},
            lambda: self.model.map(domain, first, count, phys, flags),
            failing,
        )

    def unmap(self, domain, first, count, failing):
        start, end = first * PAGE, (first + count) * PAGE
        self.send(
            unmap(domain, start, end - 1),
            {("domain", domain)},
            lambda: self.model.unmap(domain, first, count),
            failing,
            any(
                self.holds(endpoint, start, end)
                for endpoint, where in self.model.where.items()
                if where == domain
            ),
        )

    def change(self, what):
        if what == "reset":
            self.reset()
        elif not self.waiting:
            self.iommu.bypass = self.model.bypass = what == "on"
            self.forget_revoked()

    def forget_revoked(self):
        """A client that was revoked holds nothing any more."""
        self.held = [(session, *rest) for session, *rest in self.held if session.exports]

    def reset(self):
        done = self.iommu.reset()
        self.model.reset()
        assert done is None or self.held or self.waiting
        assert all(p.result(0) == b"" for p, _, _ in self.waiting if p.cancelled)
        self.waiting = [waiting for waiting in self.waiting if not waiting[0].cancelled]
        if done is not None:
            # Everything waits behind a reset.
            keys = {("domain", n) for n in (1, 2)} | {("endpoint", n) for n in (*ENDPOINTS, 11)}
            self.waiting.append((done, None, keys))

    @precondition(lambda self: not self.waiting)
    @rule(data=st.data(), endpoint=st.sampled_from(ENDPOINTS), times=st.integers(1, 3))
    def export(self, data, endpoint, times):
        for _ in range(times):
            self.export_once(data, endpoint)

    def export_once(self, data, endpoint):
        perms = self.model.permissions(endpoint)
        pages = [page for page, granted in enumerate(perms) if granted is not None]
        first = data.draw(st.sampled_from([*pages, 0]), label="page")
        offset = data.draw(st.integers(0, 2), label="half pages")
        n = data.draw(st.integers(1, 3), label="half pages")
        session = self.sessions.get(endpoint)
        if session is None or session.broken:
            session = self.sessions[endpoint] = self.iommu.endpoint(endpoint).open_session()
        iova, size = first * PAGE + offset * PAGE // 2, n * PAGE // 2
        pages = range(iova // PAGE, (iova + size - 1) // PAGE + 1)
        bypass = self.model.view(endpoint)[0]
        mapped = bypass or all(p < SEEN and perms[p] is not None for p in pages)
        try:
            regions = session.export(iova, size)
        except CannotResolveError:
            assert not mapped
        else:
            assert mapped
            assert sum(length for _, length, _ in regions) == size
            self.held.append((session, endpoint, iova, size))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["release"] * 4 + ["close", "revoke"]))
    def let_go(self, data, how):
        which = data.draw(st.integers(0, len(self.held) - 1), label="which")
        session, _, iova, size = self.held[which]
        if how == "release":
            del self.held[which]
            session.release(iova, size)
        else:
            getattr(session, how)()
            self.held = [held for held in self.held if held[0] is not session]
            self.sessions = {e: s for e, s in self.sessions.items() if s is not session}
        if session.broken:
            with pytest.raises(ExportError):
                session.export(0, 1)
        self.settle()

    def settle(self):
        """Look at the answers that have come."""
        for pending, expected, _ in self.waiting:
            if pending.done and expected is not None:
                assert status(pending.result(0)) is expected
        self.waiting = [waiting for waiting in self.waiting if not waiting[0].done]

    @invariant()
    def nothing_waits_without_a_holder(self):
        assert self.held or not self.waiting

    @invariant()
    def equals_the_model(self):
        if self.waiting:
            return
        state = self.iommu.snapshot()
        assert {e["id"]: e["domain"] for e in state["endpoints"]} == self.model.where
        assert {d["id"]: (d["bypass"], d["mappings"]) for d in state["domains"]} == {
            number: (
                domain.bypass,
                [
                    [at * PAGE, (at + n) * PAGE - 1, phys * PAGE, flags]
                    for at, (n, phys, flags) in sorted(domain.maps.items())
                ],
            )
            for number, domain in self.model.domains.items()
        }
        for number in ENDPOINTS:
            self.check_endpoint(number)

    def check_endpoint(self, number):
        endpoint = self.iommu.endpoint(number)
        endpoint.iotlb._map.check()
        granted = self.model.permissions(number)
        for access in (Permissions.READ, Permissions.WRITE):
            _, found = endpoint.iotlb.lookup_many(np.arange(SEEN) * PAGE, PAGE, access)
            assert [state == 0 for state in found] == [
                perm is not None and bool(perm & access) for perm in granted
            ]
        assert self.targets[number].ranges() == self.model.target(number)


def test_machine():
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=120, stateful_step_count=50, deadline=None)
    )
