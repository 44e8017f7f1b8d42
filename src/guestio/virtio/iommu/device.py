"""The virtio-iommu (virtio 1.3, section 5.13): a device like any other.

Bytes of a request go in, bytes of its answer come out, with queues or without. What the driver may
do wrong ends in a status or a zero-length answer and changes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, Self, SupportsIndex, TypeVar, overload

from guestio._core.virtio.chain import Chain
from guestio.addr import Permissions, check_flag, check_int, check_range, check_seconds
from guestio.budgets import (
    DEVICE_STATE,
    IOMMU_BYPASS_WAIT,
    IOMMU_DOMAIN_MAPPINGS,
    IOMMU_FAULT_BURST,
    IOMMU_FAULT_RATE,
    IOMMU_FAULT_RECORDS,
    IOMMU_REVOKE_AFTER,
    IOMMU_REVOKE_AT_STOP,
    IOMMU_TOTAL_MAPPINGS,
    IOMMU_WAITING_REQUESTS,
    STOP_TIMEOUT,
)
from guestio.dma import DmaTarget
from guestio.dma.physical import PhysicalMap
from guestio.errors import DeviceError
from guestio.iommu.events import Event
from guestio.memory import GuestRegionCollection
from guestio.memory.followed import Follower
from guestio.ratelog import LOG
from guestio.trace import What, event
from guestio.virtio import saved
from guestio.virtio.device import Device, DeviceId
from guestio.virtio.iommu import snapshot, wire
from guestio.virtio.iommu.faults import FaultLog, FaultStats
from guestio.virtio.iommu.requests import Keys, Pending, RequestQueue, Steps, target_key
from guestio.virtio.iommu.serving import (
    EVENT_QUEUE,
    REQUEST_QUEUE,
    FaultReporter,
    RequestServer,
    write_failure,
)
from guestio.virtio.iommu.space import Endpoint, ReservedRegion, TargetHandle
from guestio.virtio.iommu.state import Limits, State
from guestio.virtio.iommu.targets import DomainTarget, MemorySource, Physical
from guestio.virtio.iommu.wire import FaultRecord

if TYPE_CHECKING:
    from guestio.virtio.host import DeviceHost

U32: Final = (1 << 32) - 1
U64: Final = (1 << 64) - 1

DEVICE_BITS: Final = (1 << 24) - 1
"""Feature bits whose meaning depends on the device type (virtio 1.4, section 2.2)."""

FEATURES: Final = (
    wire.F_INPUT_RANGE
    | wire.F_DOMAIN_RANGE
    | wire.F_MAP_UNMAP
    | wire.F_PROBE
    | wire.F_MMIO
    | wire.F_BYPASS_CONFIG
)
"""What the device offers. PROBE is left out if ``probe_size`` is 0."""

_log = logging.getLogger(__name__)

_I = TypeVar("_I", bound="VirtioIommu")

Reserved = Sequence[ReservedRegion]


class _Restore:
    """Of the class, `VirtioIommu._make_restored`; of a device, what `Device.restore` is."""

    @overload
    def __get__(self, device: None, kind: type[_I]) -> Callable[..., _I]: ...

    @overload
    def __get__(self, device: VirtioIommu, kind: type[_I]) -> Callable[[bytes], None]: ...

    def __get__(self, device: VirtioIommu | None, kind: type[_I]) -> Callable[..., Any]:
        return kind._make_restored if device is None else device._take_over


class VirtioIommu(Device):
    """Lets a guest decide which of its memory each endpoint reaches.

    A :class:`~guestio.virtio.Device`: a back-end serves its two queues, or `IommuQueues` in this
    process; or :meth:`handle_request` and :meth:`event_records` are called without any queue. The
    first arguments are named after the configuration space, and inclusive as it is.

    Args:
        endpoints: Ids of the endpoints that there are.
        page_size_mask: Page sizes; the lowest bit is the granularity of mappings.
        input_range: First and last I/O virtual address that can be mapped.
        domain_range: First and last domain number.
        probe_size: Bytes of properties in the answer to a PROBE; 0 to offer no PROBE.
        bypass: Whether unattached endpoints reach all of memory.
        features: Feature bits that the driver accepted, as a number or as bit numbers; all that
            are offered by default. Set anew after each negotiation.
        reserved: Regions that cannot be mapped, ``(first, last, subtype)`` with inclusive ends:
            for all endpoints, or a mapping from endpoint ids to such lists.
        max_domains: Domains at a time; None for as many as endpoints.
        max_mappings: Mappings in each domain.
        max_total_mappings: Mappings in all domains, where those of a domain count once more for
            every DMA target that holds them. Endpoints cost nothing: they share their domain's.
        revoke_after: Seconds that clients of export sessions have to release memory that the guest
            unmapped; then it is taken from them. None to wait for ever.
        stop_timeout: Seconds that they have when the device is reset.
        fault_rate: Fault records a second that an endpoint may cause in the long run.
        fault_burst: Fault records that it may cause at once.
        fault_capacity: Fault records that wait for the guest at most.
        clock: Tells the time in seconds, for the fault rate.

    Raises:
        TypeError, ValueError: An argument is none of that, or the reserved regions of an endpoint
            do not fit in ``probe_size`` bytes.

    Everything may be called from any thread.
    """

    device_id = DeviceId.IOMMU
    num_queues = 2
    device_queues = (EVENT_QUEUE,)
    origin = 0
    """The number of its server in records of tracepoints; 0 while it has none."""

    def __init__(
        self,
        endpoints: Iterable[int] = (),
        page_size_mask: int = U64 & ~0xFFF,
        input_range: tuple[int, int] = (0, U64),
        domain_range: tuple[int, int] = (0, U32),
        probe_size: int = 512,
        bypass: bool | int = False,
        features: int | Iterable[int] | None = None,
        reserved: Reserved | Mapping[int, Reserved] = (),
        *,
        max_domains: int | None = None,
        max_mappings: int = IOMMU_DOMAIN_MAPPINGS,
        max_total_mappings: int = IOMMU_TOTAL_MAPPINGS,
        revoke_after: float | None = IOMMU_REVOKE_AFTER,
        stop_timeout: float = STOP_TIMEOUT,
        fault_rate: float = IOMMU_FAULT_RATE,
        fault_burst: int = IOMMU_FAULT_BURST,
        fault_capacity: int = IOMMU_FAULT_RECORDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = Limits(
            page_size_mask=_checked(page_size_mask, "page_size_mask", 1, U64),
            input_range=_inclusive(input_range, "input_range", U64),
            domain_range=_inclusive(domain_range, "domain_range", U32),
            probe_size=_checked(probe_size, "probe_size", 0, U32),
            max_domains=None if max_domains is None else _count(max_domains, "max_domains"),
            max_mappings=_count(max_mappings, "max_mappings"),
            max_total_mappings=_count(max_total_mappings, "max_total_mappings"),
            revoke_after=None
            if revoke_after is None
            else check_seconds(revoke_after, "revoke_after"),
            stop_timeout=check_seconds(stop_timeout, "stop_timeout"),
        )
        if not callable(clock):
            raise TypeError(f"clock must be callable, not {type(clock).__name__}")
        self._faults = FaultLog(
            check_seconds(fault_rate, "fault_rate"),
            _checked(fault_burst, "fault_burst", 1, U32),
            _checked(fault_capacity, "fault_capacity", 1, U32),
            clock,
        )
        mappings = min(self._limits.max_total_mappings, 1 << 32)
        self.max_state = DEVICE_STATE + mappings * wire.MAP_BYTES
        self._requests = RequestQueue()
        self._server = RequestServer(self)
        self._state = State(self, self._limits)
        accepted = self.offered_features if features is None else _bits(features)
        if isinstance(endpoints, str | bytes) or not isinstance(endpoints, Iterable):
            raise TypeError(f"endpoints must be numbers, not {type(endpoints).__name__}")
        self._set_idle(check_flag(bypass, "bypass"), accepted)
        for number in endpoints:
            regions = reserved.get(number, ()) if isinstance(reserved, Mapping) else reserved
            self.add_endpoint(number, regions)

    @property
    def offered_features(self) -> int:
        """Feature bits that the device offers a driver."""
        return FEATURES if self._limits.probe_size else FEATURES & ~wire.F_PROBE

    @property
    def features(self) -> int:
        """Feature bits that the driver accepted; bit numbers may be assigned too."""
        return self._state.features

    @features.setter
    def features(self, bits: int | Iterable[int]) -> None:
        self._set_idle(self._state.bypass, _bits(bits))

    def config(self) -> bytes:
        """The configuration space."""
        limits = self._limits
        return wire.pack_config(
            limits.page_size_mask,
            limits.input_range,
            limits.domain_range,
            limits.probe_size,
            self.bypass,
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """Take what the driver wrote to the configuration space: only ``bypass`` may be written.

        Raises:
            DeviceError: Anything else was written; nothing changed.
        """
        allowed = self.features & wire.F_BYPASS_CONFIG and offset == wire.BYPASS_OFFSET
        if not allowed or data not in {b"\0", b"\1"}:
            raise DeviceError(
                f"the driver wrote {data[:16].hex()} at {offset:#x} of the configuration space; "
                "only 0 or 1 at the offset of bypass is allowed, once that is negotiated"
            )
        self.bypass = data == b"\1"

    @property
    def bypass(self) -> bool:
        """Whether unattached endpoints reach all of memory, untranslated. A reset keeps it.

        Setting it waits for requests that are being answered, and when it is turned off for
        accesses that have begun, but no longer than `IOMMU_BYPASS_WAIT` seconds; it takes effect
        later then. Memory that clients hold of unattached endpoints is revoked at once, since
        there is no answer that could be delayed.

        Setting raises what a DMA target raised; nothing changed then.
        """
        return self._state.bypass

    @bypass.setter
    def bypass(self, value: bool | int) -> None:
        self._set_idle(check_flag(value, "bypass"), self._state.features)

    def negotiated(self, features: int) -> None:
        """See :class:`Device`. The bits of the device type become :attr:`features`.

        Raises:
            Exception: As setting :attr:`bypass`; nothing changed then.
        """
        accepted = features & DEVICE_BITS
        if accepted != self.features:
            self.features = accepted

    def _set_idle(self, bypass: bool, features: int) -> None:
        work = self._state.switch_idle(bypass, features)
        pending = self._requests.submit(lambda: None, work, raises=True)
        if pending.wait(IOMMU_BYPASS_WAIT):
            pending.result()

    def attached(self, host: DeviceHost) -> None:
        """See :class:`Device`. Fault records go to the driver of the last host from now on."""
        self.origin = host.origin
        self._server.use(host.call_soon_threadsafe)
        FaultReporter(self._faults, host.queue(EVENT_QUEUE))

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        """Serve a request; see :class:`Device` and :meth:`handle_request`.

        With `IOMMU_WAITING_REQUESTS` that wait, the next ones are begun when one is answered.
        """
        return self._server.serve(chain)

    def fail(self, queue: int, chain: Chain) -> int:
        """Answer a request with DEVERR where a byte of that can be written; see :class:`Device`."""
        if queue == EVENT_QUEUE:
            self._faults.short_buffers += 1
            return 0
        return write_failure(chain, self._limits.probe_size)

    def stopping(self, queue: int) -> None:
        """See :class:`Device`.

        Requests that have not begun fail. If others wait for clients to release memory, those have
        `IOMMU_REVOKE_AT_STOP` seconds, or ``stop_timeout`` if that is less; then they are revoked.
        """
        if queue != REQUEST_QUEUE:
            return
        self._server.drop_backlog()
        if self._server.busy:
            limit = min(IOMMU_REVOKE_AT_STOP, self._limits.stop_timeout)
            for number in self.endpoint_ids:
                for session in self.endpoint(number).sessions:
                    session.hurry(limit)

    @property
    def short_buffers(self) -> int:
        """Event buffers that were too small for a record, or out of reach; they went back empty."""
        return self._faults.short_buffers

    def handle_request(self, request: bytes, writable: int) -> bytes | Pending:
        """Serve one request of the request queue.

        Args:
            request: All the device-readable bytes.
            writable: How many device-writable bytes there are.

        Returns:
            What is to be written from the start of the device-writable part, ``b""`` for a
            zero-length answer; or :class:`Pending` if that must wait: for memory that is still in
            use or exported, or for an earlier request that waits and concerns the same domain,
            endpoint or target. With `IOMMU_WAITING_REQUESTS` that wait, the answer is NOMEM.
        """
        room = check_int(writable, "writable")
        parsed = wire.parse(bytes(memoryview(request)[: wire.LONGEST_REQUEST]))
        if parsed is None or room < wire.TAIL_BYTES:
            return b""
        try:
            if isinstance(parsed, wire.Probe):
                return self._state.probe(parsed, room)
            if self._requests.waiting >= IOMMU_WAITING_REQUESTS:
                return wire.tail(wire.Status.NOMEM)
            pending = self._requests.submit(*self._state.plan(parsed))
            return pending.result() if pending.done else pending
        except Exception:
            LOG.report(
                _log,
                logging.ERROR,
                "a virtio-iommu request failed; the guest is told of a device error",
                trace=True,
            )
            return wire.failure(parsed, room, self._limits.probe_size)

    def event_records(self, limit: int | None = None) -> list[FaultRecord]:
        """Take the fault records that wait for the event queue, oldest first, at most ``limit``."""
        return self._faults.take(None if limit is None else _count(limit, "limit"))

    @property
    def event_arrival(self) -> Event:
        """Happens when there is a fault record to take; a new one each time there was none."""
        return self._faults.arrival

    def reset(self) -> Pending | None:
        """Forget domains and attachments, as a device reset does; ``bypass`` and features stay.

        Requests that have not begun are cancelled, fault records that wait are dropped. Clients
        have ``stop_timeout`` seconds to release their memory, then they are revoked.

        Returns:
            None, or what to wait for before the driver is told that the reset is done: memory is
            still exported, or in use by an access that has begun.
        """
        self._server.drop_backlog()
        self._requests.cancel()
        self._faults.clear()
        self._state.hurry()
        pending = self._requests.submit(lambda: None, self._state.reset())
        return None if pending.done else pending

    @property
    def endpoint_ids(self) -> list[int]:
        """Ids of the endpoints, ascending."""
        return sorted(self._state.endpoints)

    def endpoint(self, number: int) -> Endpoint:
        """An endpoint by its id.

        Raises:
            ValueError: There is none.
        """
        found = self._state.endpoints.get(check_int(number, "endpoint"))
        if found is None:
            raise ValueError(f"endpoint {number} does not exist")
        return found

    def add_endpoint(self, number: int, reserved: Reserved = ()) -> Endpoint:
        """Add an endpoint, unattached.

        Raises:
            ValueError: It exists, or the reserved regions are wrong.
        """
        number = _checked(number, "endpoint", 0, U32)
        regions = _regions(reserved)
        room = self._limits.probe_size
        if room and len(regions) * wire.RESV_MEM_BYTES > room:
            raise ValueError(f"{len(regions)} reserved regions do not fit in {room} bytes")
        self._run(lambda: {("endpoint", number)}, self._state.add_endpoint(number, regions))
        return self._state.endpoints[number]

    def remove_endpoint(self, number: int) -> Pending | None:
        """Remove an endpoint; its domain stays for the others, its sessions are closed.

        Returns:
            None, or what to wait for before the device behind it is gone: its memory is still in
            use or exported.

        Raises:
            ValueError: There is none, or a DMA target belongs to it; close that first.
        """
        number = self.endpoint(number).id
        state = self._state
        pending = self._requests.submit(
            lambda: state.endpoint_keys(number), state.remove_endpoint(number), raises=True
        )
        if not pending.done:
            return pending
        pending.result()
        return None

    def add_target(self, endpoint: int, target: DmaTarget, physical: Physical) -> TargetHandle:
        """Have a DMA target hold what an endpoint may access; see :meth:`Endpoint.add_target`."""
        endpoint = self.endpoint(endpoint).id
        if isinstance(target, type) or not isinstance(target, DmaTarget):
            raise TypeError(f"target must have map_dma and unmap_dma, not be {target!r}")
        source = MemorySource(physical)
        state = self._state
        self._run(
            lambda: {target_key(target), *state.endpoint_keys(endpoint)},
            state.add_target(endpoint, target, source, self._follower_of),
        )
        return TargetHandle(self, endpoint, state.targets[id(target)])

    def _follower_of(self, target: DomainTarget) -> Follower[Any]:
        """What is told of the memory that a target's mappings lead to."""
        state = self._state

        def keys() -> set[Hashable]:
            return {target.key}

        def follow(memory: object, failures: list[Any] | None) -> Callable[[], None]:
            physical = target.source.map_of(memory)
            before: list[PhysicalMap] = []
            self._run(keys, state.follow_memory(target, physical, failures, before), first=True)

            def take_back() -> None:
                for old in before:
                    self._run(keys, state.return_to_memory(target, old), first=True)

            return take_back

        return follow

    def change_memory(self, target: DomainTarget, physical: GuestRegionCollection) -> None:
        """Have a target follow guest memory; see :meth:`TargetHandle.change_memory`."""
        if not isinstance(physical, GuestRegionCollection):
            raise TypeError(
                f"physical must be a GuestRegionCollection, not {type(physical).__name__}"
            )
        work = self._state.change_memory(target, MemorySource(physical))
        self._run(lambda: {target.key}, work, first=True)

    def remove_target(self, endpoint: int, target: DmaTarget) -> None:
        """Take an endpoint from a DMA target; see :meth:`TargetHandle.close`."""
        endpoint = self.endpoint(endpoint).id
        state = self._state
        self._run(lambda: state.endpoint_keys(endpoint), state.remove_target(endpoint, target))

    def _run(self, keys: Keys, work: Steps, *, first: bool = False) -> None:
        self._requests.run(keys, work, first=first)

    def report(self, record: FaultRecord) -> None:
        """Have a fault reported to the guest. It is not if the endpoint is gone."""
        if not isinstance(record, FaultRecord):
            raise TypeError(f"record must be a FaultRecord, not {type(record).__name__}")
        if record.endpoint in self._state.endpoints:
            self._faults.add(record)
            event(
                What.FAULT,
                origin=self.origin,
                address=record.address,
                length=1,
                detail=int(record.reason),
                access=record.flags & (wire.FAULT_F_READ | wire.FAULT_F_WRITE),
                result=record.endpoint,
            )

    def fault_stats(self, endpoint: int) -> FaultStats:
        """What became of an endpoint's faults."""
        return self._faults.stats(check_int(endpoint, "endpoint"))

    def explain(
        self, endpoint: int, iova: int, length: int = 1, access: Permissions = Permissions.READ
    ) -> str:
        """Say in a few lines what an access by an endpoint would meet, and why.

        Meant for people; the wording may change. It is no access and causes no fault.
        """
        found = self.endpoint(endpoint)
        first, size = check_range(iova, length, name="iova")
        end = first + size
        space = found.space
        if space.id is None:
            what = f"is not attached and {'in' if space.bypass else 'not in'} bypass mode"
        else:
            kind = "bypass domain" if space.bypass else "domain"
            others = ", ".join(str(e.id) for e in space.endpoints.values() if e is not found)
            what = f"is attached to {kind} {space.id}" + (f" with {others}" if others else "")
        lines = [f"endpoint {endpoint} {what}", found.iotlb.explain(first, size, access)]
        lines += [
            f"  reserved: {low:#x}..{high:#x}, subtype {subtype}"
            for low, high, subtype in found.reserved
            if low < end and first <= high
        ]
        lines += [
            f"  held by {'a broken' if session.broken else 'a'} session: {base:#x}+{length:#x}"
            for session in found.sessions
            for base, length in session.exports
            if base < end and first < base + length
        ]
        return "\n".join(lines)

    def snapshot(self) -> dict[str, Any]:
        """The complete state as plain data: numbers, strings, lists and dictionaries.

        Domains and their mappings, endpoints and where they are attached, export sessions and what
        they hold, fault records that wait, and the settings. DMA targets are not among it; add
        them again after :meth:`restore`, which replays to them.

        Raises:
            DeviceError: Requests wait for memory to be released; wait for their answers first.
        """
        return self._requests.alone(lambda: snapshot.take(self._state, self._faults))

    def save(self) -> bytes:
        """Where endpoints are attached, what domains map, and fault records that wait.

        What the driver did, in short, as another device with the same endpoints can go on with; see
        :class:`Device`. Export sessions and DMA targets are the owner's, and so are the settings.

        Raises:
            DeviceError: Requests wait for memory to be released.
        """

        def take() -> bytes:
            head = saved.pack(
                bypass=self.bypass,
                features=self.features,
                records=[saved.text(record) for record in self._faults.waiting()],
            )
            return b"".join(
                [len(head).to_bytes(4, "little"), head, *snapshot.requests(self._state)]
            )

        return self._requests.alone(take)

    def _take_over(self, state: bytes) -> None:
        """Do what the driver of another device did; see :meth:`save`.

        DMA targets get the mappings. The device is reset before.

        Raises:
            DeviceError: Not all of it is possible here: the endpoints or the limits are others,
                say. The device is reset then.
        """
        size = int.from_bytes(state[:4], "little")
        fields = saved.Fields(state[4 : 4 + size])
        bypass = fields.take("bypass", saved.flag)
        features = fields.take("features", lambda value: saved.number(value, DEVICE_BITS))
        records = fields.take("records", _records_of)
        self._finish(self.reset())
        try:
            self._set_idle(bypass, features)
            for request in wire.split(state[4 + size :]):
                self._replay(request)
        except ValueError as error:
            self._finish(self.reset())
            raise DeviceError(f"the state of a virtio-iommu cannot be read: {error}") from None
        except BaseException:
            self._finish(self.reset())
            raise
        for record in records:
            self.report(record)

    def _replay(self, request: bytes) -> None:
        """Do a request of a saved state."""
        parsed = wire.parse(request)
        if not isinstance(parsed, wire.Attach | wire.Map):
            raise DeviceError(f"{type(parsed).__name__} is no part of a state")
        answer = self._finish(self._requests.submit(*self._state.plan(parsed)))
        if answer[0] != wire.Status.OK:
            raise DeviceError(
                f"{parsed} of the state is not possible here: {wire.Status(answer[0]).name}"
            )

    def _finish(self, pending: Pending | None) -> bytes:
        """The answer, which nothing in a device that does not run should keep from coming."""
        if pending is None:
            return b""
        try:
            return pending.result(self._limits.stop_timeout)
        except TimeoutError as error:
            raise DeviceError(f"the state cannot be taken over: {error}") from None

    @classmethod
    def _make_restored(cls, data: Mapping[str, Any], **options: Any) -> Self:
        """A device in the state that a :meth:`snapshot` was taken in.

        Args:
            data: The snapshot.
            options: Arguments of the constructor. Those for faults and the clock are not in a
                snapshot; others replace what the snapshot says.

        Raises:
            ValueError: The data is no snapshot, or contradicts itself.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"data must be a snapshot, not {type(data).__name__}")
        try:
            settings = snapshot.settings(data)
            # By itself first, so that a bad option is told from a bad snapshot.
            device = cls(**settings)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the snapshot is incomplete: {error!r}") from error
        if options:
            device = cls(**{**settings, **options})
        try:
            for number, reserved in snapshot.endpoints(data):
                device.add_endpoint(number, reserved)
            snapshot.fill(device._state, device._faults, data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the snapshot is incomplete: {error!r}") from error
        return device

    # What the class has by this name makes a device, what a device has is `Device.restore`.
    restore = _Restore()  # type: ignore[assignment]  # mypy expects a method


def _records_of(value: object) -> list[FaultRecord]:
    """The fault records of a saved state."""
    if not isinstance(value, list) or len(value) > IOMMU_FAULT_RECORDS:
        raise ValueError("not a list of fault records")
    records = [FaultRecord(saved.data(each, FaultRecord.SIZE)) for each in value]
    if any(len(record) != FaultRecord.SIZE for record in records):
        raise ValueError("a fault record of another size")
    return records


def _checked(value: int, name: str, first: int, last: int) -> int:
    number = check_int(value, name)
    if not first <= number <= last:
        raise ValueError(f"{name} {number:#x} is not in {first:#x}..{last:#x}")
    return number


def _count(value: int, name: str) -> int:
    return _checked(value, name, 0, U64)


def _inclusive(pair: Sequence[int], name: str, limit: int) -> tuple[int, int]:
    try:
        low, high = pair
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a pair of first and last, not {pair!r}") from None
    first = _checked(low, name, 0, limit)
    return first, _checked(high, name, first, limit)


def _bits(features: int | Iterable[int]) -> int:
    if isinstance(features, SupportsIndex):
        return _checked(features, "features", 0, U64)
    if isinstance(features, str | bytes) or not isinstance(features, Iterable):
        raise TypeError(f"features must be a number or bit numbers, not {type(features).__name__}")
    bits = 0
    for bit in features:
        bits |= 1 << _checked(bit, "features: bit", 0, 63)
    return bits


def _regions(reserved: Reserved) -> list[ReservedRegion]:
    """Reserved regions, checked and ascending."""
    found: list[ReservedRegion] = []
    try:
        triples = sorted((first, last, subtype) for first, last, subtype in reserved)
    except (TypeError, ValueError):
        raise TypeError(
            f"reserved must be (first, last, subtype) triples, not {reserved!r}"
        ) from None
    for low, high, kind in triples:
        first, last = _inclusive((low, high), "reserved region", U64)
        subtype = _checked(kind, "reserved subtype", 0, 255)
        if found and found[-1][1] >= first:
            raise ValueError(f"reserved regions overlap at {first:#x}")
        found.append((first, last, subtype))
    if sum(subtype == wire.RESV_MEM_MSI for _, _, subtype in found) > 1:
        raise ValueError("an endpoint has one MSI region at most")
    return found
