"""The state of a virtio-iommu, and what requests do to it.

Truth is kept once per domain, in a :class:`~guestio.virtio.iommu.space.Space`. Three kinds of user
follow it: the IOTLB of every endpoint of the domain, which shows the domain's mappings without a
copy, the DMA targets behind those endpoints, and the export sessions of their clients. A mapping
is added at the targets first, which may refuse, and becomes visible to the others when they all
hold it. It is removed at the targets first too; then it goes from the domain, and the guest is told
when the last access that had begun is over and the last client has released it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from guestio._core.iommu.intervals import IntervalMap
from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.budgets import STOP_TIMEOUT
from guestio.dma import DmaTarget, Journal
from guestio.dma.physical import PhysicalMap
from guestio.errors import DeviceError
from guestio.iommu.events import Event
from guestio.iommu.mapper import BasicMemoryMapper
from guestio.memory.followed import Follower
from guestio.ratelog import LOG
from guestio.trace import What, event
from guestio.virtio.iommu import wire
from guestio.virtio.iommu.requests import Keys, Steps
from guestio.virtio.iommu.space import Endpoint, Owner, ReservedRegion, Space
from guestio.virtio.iommu.targets import DomainTarget, MemorySource, Refused, status_of, undo
from guestio.virtio.iommu.wire import Status

_log = logging.getLogger(__name__)

Waits = Generator[list[Event], None, None]
"""Work that may have to wait and may be refused."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What does not change during a device's life; see :class:`VirtioIommu`."""

    page_size_mask: int
    input_range: tuple[int, int]
    domain_range: tuple[int, int]
    probe_size: int
    max_domains: int | None
    max_mappings: int
    max_total_mappings: int
    revoke_after: float | None
    stop_timeout: float

    @property
    def granule(self) -> int:
        """Granularity of mappings, in bytes."""
        return self.page_size_mask & -self.page_size_mask


class State:
    """Domains, endpoints and DMA targets.

    The methods that are generators are requests for a
    :class:`~guestio.virtio.iommu.requests.RequestQueue`: each runs alone on whatever its keys name.

    Attributes:
        idle: What unattached endpoints see.
        bypass: Whether unattached endpoints reach all of memory.
        features: Feature bits that the driver accepted.
        total_mappings: Mappings of all domains, and of each again for every DMA target that holds
            them, because each target's ledger lists them.
    """

    def __init__(self, owner: Owner, limits: Limits) -> None:
        self.limits = limits
        self.total_mappings = 0
        self.domains: dict[int, Space] = {}
        self.endpoints: dict[int, Endpoint] = {}
        self.targets: dict[int, DomainTarget] = {}
        self._owner = owner
        self._lock = threading.Lock()
        mapper = BasicMemoryMapper(limits.page_size_mask, time_limit=limits.revoke_after)
        self._nowhere = Space(None, False, mapper)
        self._identity = Space(None, True, self.new_mapper())
        self.bypass, self.features, self.idle = False, 0, self._nowhere

    def new_mapper(self) -> BasicMemoryMapper:
        """A mapper for a domain."""
        return BasicMemoryMapper(
            self.limits.page_size_mask,
            time_limit=self.limits.revoke_after,
            sibling=self._nowhere.mapper,
        )

    def plan(
        self, request: wire.Attach | wire.Detach | wire.Map | wire.Unmap
    ) -> tuple[Keys, Steps]:
        """What a request touches, and what it does."""
        if isinstance(request, wire.Map):
            return lambda: self._domain_keys(request.domain), _answer(self._map(request))
        if isinstance(request, wire.Unmap):
            return lambda: self._domain_keys(request.domain), _answer(self._unmap(request))
        work = self._attach(request) if isinstance(request, wire.Attach) else self._detach(request)
        return (
            lambda: {("domain", request.domain), *self.endpoint_keys(request.endpoint)},
            _answer(work),
        )

    def _domain_keys(self, number: int) -> set[Hashable]:
        space = self.domains.get(number)
        return {("domain", number), *(space.targets if space is not None else ())}

    def endpoint_keys(self, number: int) -> set[Hashable]:
        """What a request touches that moves an endpoint."""
        keys: set[Hashable] = {("endpoint", number)}
        endpoint = self.endpoints.get(number)
        if endpoint is not None:
            keys.add(("domain", endpoint.space.id))
            keys.update(target.key for target in endpoint.targets)
        keys.discard(("domain", None))
        return keys

    def probe(self, request: wire.Probe, writable: int) -> bytes:
        """Answer a PROBE, which touches nothing."""
        if not self.limits.probe_size:
            return b""
        room = writable - wire.TAIL_BYTES
        if room < self.limits.probe_size:
            return bytes(room) + wire.tail(Status.INVAL)
        endpoint = self.endpoints.get(request.endpoint)
        if endpoint is None:
            return bytes(self.limits.probe_size) + wire.tail(Status.NOENT)
        properties = wire.pack_reserved(endpoint.reserved)
        return properties.ljust(self.limits.probe_size, b"\0") + wire.tail(Status.OK)

    def _attach(self, request: wire.Attach) -> Waits:
        known = wire.ATTACH_F_BYPASS if self.features & wire.F_BYPASS_CONFIG else 0
        if any(request.reserved) or request.flags & ~known:
            raise Refused(Status.INVAL, "reserved bits are set")
        endpoint = self.endpoints.get(request.endpoint)
        if endpoint is None:
            raise Refused(Status.NOENT, f"endpoint {request.endpoint} does not exist")
        if not self.limits.domain_range[0] <= request.domain <= self.limits.domain_range[1]:
            raise Refused(Status.RANGE, f"domain {request.domain} is out of range")
        bypass = bool(request.flags & wire.ATTACH_F_BYPASS)
        space = self.domains.get(request.domain)
        if space is None:
            space = Space(request.domain, bypass, self.new_mapper())
        elif space.bypass is not bypass:
            raise Refused(Status.INVAL, "the domain exists and its bypass flag differs")
        elif endpoint.space is space:
            return
        elif not bypass and any(
            not space.mapper.is_free(first, last - first + 1)
            for first, last, _ in endpoint.reserved
        ):
            raise Refused(Status.UNSUPP, "the domain maps what is reserved for the endpoint")
        if not bypass and len(space.mapper):
            more = sum(target.current is not space for target in endpoint.targets)
            self._check_total(len(space.mapper) * more)
        self._register(endpoint, space)
        try:
            yield from self._move(endpoint, space)
        except Refused as refused:
            # "If it cannot do so, the device MUST reject the request" with this status.
            raise Refused(Status.UNSUPP, refused.text) from refused
        finally:
            self._drop_empty(space)

    def _detach(self, request: wire.Detach) -> Waits:
        endpoint = self.endpoints.get(request.endpoint)
        if endpoint is None:
            raise Refused(Status.NOENT, f"endpoint {request.endpoint} does not exist")
        if endpoint.space.id != request.domain:
            raise Refused(Status.INVAL, f"{endpoint} is not attached to domain {request.domain}")
        yield from self._move(endpoint, self.idle)

    def _map(self, request: wire.Map) -> Waits:
        start, end, phys = request.virt_start, request.virt_end, request.phys_start
        known = wire.MAP_F_READ | wire.MAP_F_WRITE
        known |= wire.MAP_F_MMIO if self.features & wire.F_MMIO else 0
        if request.flags & ~known:
            raise Refused(Status.INVAL, f"flags {request.flags:#x} are unknown")
        if end < start:
            raise Refused(Status.INVAL, f"the range {start:#x}..{end:#x} is inverted")
        space = self._domain(request.domain)
        size = end - start + 1
        if (start | phys | size) & (self.limits.granule - 1):
            raise Refused(Status.RANGE, "an address is not aligned")
        if start < self.limits.input_range[0] or end > self.limits.input_range[1]:
            raise Refused(Status.RANGE, "the range is outside of the input range")
        if space.reserved.meets(start, end):
            raise Refused(Status.INVAL, "the range is reserved")
        if not space.mapper.is_free(start, size):
            raise Refused(Status.INVAL, "something is mapped there")
        if len(space.mapper) >= self.limits.max_mappings:
            raise Refused(Status.NOMEM, f"the domain has {self.limits.max_mappings} mappings")
        self._check_total(space.weight)
        prot = Permissions(request.flags & (wire.MAP_F_READ | wire.MAP_F_WRITE))
        registers = bool(request.flags & wire.MAP_F_MMIO)
        with _all_or_nothing() as journal:
            for target in space.targets.values():
                target.add(target.entries((start, size, phys, prot), registers), journal)
        space.add(start, size, phys, prot, registers=registers)
        self.count(space.weight)
        event(
            What.DOMAIN_MAP,
            origin=self._owner.origin,
            address=start,
            length=min(size, ADDRESS_SPACE - 1),
            detail=phys,
            access=int(prot),
            result=request.domain,
        )
        yield from ()

    def _unmap(self, request: wire.Unmap) -> Waits:
        start, end = request.virt_start, request.virt_end
        space = self._domain(request.domain)
        if any(request.reserved):
            raise Refused(Status.INVAL, "reserved bits are set")
        if end < start:
            raise Refused(Status.INVAL, f"the range {start:#x}..{end:#x} is inverted")
        size = end - start + 1
        edges = space.mapper.mappings(start, 1) + space.mapper.mappings(end, 1)
        if any(at < start or at + length - 1 > end for at, length, _, _ in edges):
            raise Refused(Status.RANGE, "a mapping would be split")
        # The list may be as long as the quota, so it is only made where it is needed.
        entries = space.mapper.mappings(start, size) if space.targets else []
        with _all_or_nothing() as journal:
            for target in space.targets.values():
                target.take(entries, space.mmio, journal)
        before = len(space.mapper)
        users = space._remove(start, size)
        self.count((len(space.mapper) - before) * space.weight)
        event(
            What.DOMAIN_UNMAP,
            origin=self._owner.origin,
            address=start,
            length=min(size, ADDRESS_SPACE - 1),
            detail=before - len(space.mapper),
            result=request.domain,
        )
        waits = space.mapper.pending_faults()
        for seen in users:
            waits += _draining(seen, start, size)
        yield waits

    def _check_total(self, more: int) -> None:
        """Refuse what would have the domains and DMA targets hold too many mappings."""
        if self.total_mappings + more > self.limits.max_total_mappings:
            raise Refused(
                Status.NOMEM,
                f"domains and DMA targets hold {self.limits.max_total_mappings} mappings together",
            )

    def count(self, mappings: int) -> None:
        """Note that domains and DMA targets hold so many mappings more."""
        with self._lock:
            self.total_mappings += mappings

    def _domain(self, number: int) -> Space:
        space = self.domains.get(number)
        if space is None:
            raise Refused(Status.NOENT, f"domain {number} does not exist")
        if space.bypass:
            raise Refused(Status.INVAL, f"domain {number} is a bypass domain")
        return space

    def _register(self, endpoint: Endpoint, space: Space) -> None:
        """Make the domain exist, if there is room for it."""
        with self._lock:
            if space.id is None or space.id in self.domains:
                return
            leaves = endpoint.space.id is not None and len(endpoint.space.endpoints) == 1
            if (
                self.limits.max_domains is not None
                and len(self.domains) - leaves >= self.limits.max_domains
            ):
                raise Refused(Status.NOMEM, f"there are {self.limits.max_domains} domains")
            self.domains[space.id] = space

    def _drop_empty(self, space: Space) -> None:
        """A domain without endpoints ceases to exist."""
        with self._lock:
            if space.id is None or space.endpoints:
                return
            if self.domains.pop(space.id, None) is not None:
                self.total_mappings -= space.counted * space.weight

    def _move(self, endpoint: Endpoint, space: Space) -> Waits:
        """Have an endpoint see something else."""
        with _all_or_nothing() as journal:
            for target in endpoint.targets:
                target.follow(endpoint, space, self.idle, journal)
        yield self._leave(endpoint, space)
        endpoint._show(space)

    def _leave(self, endpoint: Endpoint, space: Space) -> list[Event]:
        """Take away what an endpoint sees; what is to wait for before it may see anything else."""
        old = endpoint.space
        with self._lock:
            old.leave(endpoint)
            space.enter(endpoint)
            for target in endpoint.targets:
                target.attached += (space.id is not None) - (old.id is not None)
        event(
            What.ATTACHED,
            origin=self._owner.origin,
            detail=endpoint.id,
            result=-1 if space.id is None else space.id,
        )
        self._drop_empty(old)
        moved = [session.move(space.mapper) for session in endpoint.sessions]
        waits = [event for event in moved if event is not None]
        endpoint._show(None)
        return waits + _draining(endpoint.iotlb._map, 0, ADDRESS_SPACE)

    def place(self, endpoint: Endpoint, space: Space) -> None:
        """Attach an endpoint that is not in use yet, as when a snapshot is restored."""
        self._leave(endpoint, space)
        endpoint._show(space)

    def reset(self) -> Steps:
        """Detach every endpoint."""
        attached = [e for e in self.endpoints.values() if e.space.id is not None]
        for target in self.targets.values():
            target.restart(self.idle)
        waits = [event for endpoint in attached for event in self._leave(endpoint, self.idle)]
        self.hurry()
        yield waits
        for endpoint in attached:
            endpoint._show(self.idle)
        return b""

    def hurry(self) -> None:
        """Give clients that must release memory no longer than a reset may take."""
        for endpoint in list(self.endpoints.values()):
            for session in endpoint.sessions:
                session.hurry(self.limits.stop_timeout)

    def switch_idle(self, bypass: bool, features: int) -> Steps:
        """Change what unattached endpoints see, as ``bypass`` and an old feature bit say."""
        legacy = features & wire.F_BYPASS and not features & wire.F_BYPASS_CONFIG
        new, old = self._identity if bypass or legacy else self._nowhere, self.idle
        if new is not old:
            with _all_or_nothing(raises=True) as journal:
                for target in self.targets.values():
                    if target.current is old:
                        target.move(new, journal)
        self.bypass, self.features, self.idle = bypass, features, new
        if new is not old:
            endpoints = list(old.endpoints.values())
            for session in [s for e in endpoints for s in e.sessions if s.exports]:
                session.revoke()
            yield [event for endpoint in endpoints for event in self._leave(endpoint, new)]
            for endpoint in endpoints:
                endpoint._show(new)
        return b""

    def add_endpoint(self, number: int, regions: list[ReservedRegion]) -> Steps:
        """Add an endpoint, unattached."""
        if number in self.endpoints:
            raise ValueError(f"endpoint {number} exists")
        endpoint = Endpoint(self._owner, number, regions, self.idle)
        endpoint._show(self.idle)
        with self._lock:
            self.idle.enter(endpoint)
            self.endpoints[number] = endpoint
        yield from ()
        return b""

    def remove_endpoint(self, number: int) -> Steps:
        """Remove an endpoint from its domain and the device."""
        endpoint = self.endpoints[number]
        if endpoint.targets:
            raise ValueError(f"endpoint {number} has a DMA target; close its handle first")
        del self.endpoints[number]
        yield self._leave(endpoint, self._nowhere)
        with self._lock:
            self._nowhere.leave(endpoint)
        for session in endpoint.sessions:
            session.close()
        return b""

    def add_target(
        self,
        number: int,
        target: DmaTarget,
        source: MemorySource,
        follower: Callable[[DomainTarget], Follower[Any]],
    ) -> Steps:
        """Have a target hold what an endpoint sees."""
        endpoint = self.endpoints[number]
        known = self.targets.get(id(target))
        if known is not None and known.source.given is not source.given:
            raise ValueError("the target was added before with other physical memory")
        if known is not None and number in known.endpoints:
            raise ValueError(f"the target belongs to endpoint {number} already")
        ours = known or DomainTarget(target, source, self.count)
        if known is None:
            ours.start(follower(ours))
        try:
            with _all_or_nothing(raises=True) as journal:
                if endpoint.space.id is not None and ours.current is not endpoint.space:
                    self._check_total(endpoint.space.counted)
                ours.follow(endpoint, endpoint.space, self.idle, journal)
        except BaseException:
            if known is None:
                ours.stop()
            raise
        ours.join(endpoint)
        endpoint.targets.append(ours)
        self.targets[id(target)] = ours
        yield from ()
        return b""

    def change_memory(self, target: DomainTarget, source: MemorySource) -> Steps:
        """Have a target whose memory is fixed follow a change of it."""
        if target.follower is None:
            raise ValueError("the target is closed; it follows no memory")
        if target.source.followed is not None:
            raise ValueError(
                f"the target follows {type(target.source.given).__name__} by itself; change that"
            )
        with _all_or_nothing(raises=True) as journal:
            target.change_memory(source.map_of(source.given), journal)
        target.source = source
        yield from ()
        return b""

    def follow_memory(
        self,
        target: DomainTarget,
        physical: PhysicalMap,
        failures: list[Any] | None,
        before: list[PhysicalMap],
    ) -> Steps:
        """Have a target follow memory that is about to change; ``before`` gets what it had."""
        if target.follower is not None:
            old = target.physical
            with _all_or_nothing(raises=True) as journal:
                target.change_memory(physical, journal, failures)
            before.append(old)
        yield from ()
        return b""

    def return_to_memory(self, target: DomainTarget, physical: PhysicalMap) -> Steps:
        """Undo :meth:`follow_memory`."""
        if target.follower is not None:
            failures = target.return_to_memory(physical)
            if failures:
                raise failures[0]
        yield from ()
        return b""

    def remove_target(self, number: int, target: DmaTarget) -> Steps:
        """Take an endpoint from a target."""
        endpoint = self.endpoints[number]
        ours = self.targets.get(id(target))
        if ours is None or number not in ours.endpoints:
            raise ValueError(f"the target does not belong to endpoint {number}")
        with _all_or_nothing(raises=True) as journal:
            if len(ours.endpoints) == 1:
                ours.ledger.unstick()
                ours.move(self._nowhere, journal)
            else:
                ours.follow(endpoint, self.idle, self.idle, journal)
        ours.part(endpoint)
        endpoint.targets.remove(ours)
        if not ours.endpoints:
            ours.place(None)
            ours.stop()
            del self.targets[id(target)]
        yield from ()
        return b""


def _answer(work: Waits) -> Steps:
    try:
        yield from work
    except Refused as refused:
        return wire.tail(refused.status)
    return wire.tail(Status.OK)


@contextmanager
def _all_or_nothing(*, raises: bool = False) -> Iterator[Journal]:
    """What is done at targets inside is undone if something raises.

    A request of the driver is refused then; with ``raises``, what a target raised comes through.
    """
    journal = Journal()
    try:
        yield journal
    except Refused as refused:
        undo(journal)
        if raises:
            raise DeviceError(refused.text) from None
        raise
    except BaseException as error:
        undo(journal)
        if raises or not isinstance(error, Exception):
            raise
        raise Refused(status_of(error), str(error)) from error


def _draining(seen: IntervalMap, start: int, length: int) -> list[Event]:
    """What to wait for until a translation that was removed is no longer in use."""
    try:
        if seen.drain(start, length, 0):
            return []
    except RuntimeError:
        pass  # this very thread uses one: it must get on before it can let go
    done = Event()

    def wait() -> None:
        if not seen.drain(start, length, STOP_TIMEOUT):
            LOG.report(
                _log,
                logging.ERROR,
                "an access to %#x+%#x that began before the guest took that away has not ended "
                "for %s s: the guest waits for it",
                start,
                length,
                STOP_TIMEOUT,
            )
            seen.drain(start, length)
        done.set()

    threading.Thread(target=wait, name="guestio-iommu-drain", daemon=True).start()
    return [done]
