"""Endpoints and what they see: the mappings of a domain, everything, or nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, Protocol, cast

from guestio._core.iommu.intervals import IntervalMap, follow, users_of
from guestio.addr import ADDRESS_SPACE, IovaRange, Permissions, check_access, check_range
from guestio.budgets import IOMMU_RECORDS_PER_ACCESS
from guestio.errors import CannotResolveError, InvalidAddressError, IotlbFails
from guestio.iommu import DirtyMode, Iommu, IommuMemory, Iotlb
from guestio.iommu.mapper import (
    AddMapResult,
    BasicMemoryMapper,
    ExportError,
    ExportSession,
    MemRegion,
)
from guestio.memory import AtomicBitmap, GuestRegionCollection
from guestio.virtio.iommu.faults import FaultStats
from guestio.virtio.iommu.wire import (
    FAULT_F_ADDRESS,
    FAULT_F_READ,
    FAULT_F_WRITE,
    FaultReason,
    FaultRecord,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from guestio.dma import DmaTarget
    from guestio.iommu.events import Event
    from guestio.iommu.mapper import MapEntry
    from guestio.virtio.iommu.targets import DomainTarget, Physical, TargetStats

ReservedRegion = tuple[int, int, int]
"""``(first, last, subtype)`` of a reserved region, inclusive."""


LISTED: Final = 4096
"""Mappings listed at a time: a list of all of a domain's would take more memory than they do."""

_EMPTY: Final = IntervalMap()
"""What an endpoint sees on its way from one space to the next."""


class ReservedUnion:
    """What is reserved for any of a domain's endpoints.

    Endpoints of one machine mostly have the same regions, so equal ones are kept once. The union
    of all is made on the first use after a change.
    """

    def __init__(self) -> None:
        self._counts: Counter[ReservedRegion] = Counter()
        self._union: IntervalMap | None = None

    def add(self, regions: Iterable[ReservedRegion]) -> None:
        """Reserve the regions of an endpoint."""
        for region in regions:
            if not self._counts[region]:
                self._union = None
            self._counts[region] += 1

    def remove(self, regions: Iterable[ReservedRegion]) -> None:
        """Undo one :meth:`add`."""
        for region in regions:
            self._counts[region] -= 1
            if not self._counts[region]:
                del self._counts[region]
                self._union = None

    def meets(self, first: int, last: int) -> bool:
        """Whether anything in an inclusive range is reserved. O(log n) unless something changed."""
        if not self._counts:
            return False
        union = self._union
        if union is None:
            union = IntervalMap()
            for low, high, _ in self._counts:
                union.overwrite(low, high - low + 1, low, Permissions.NONE)
            self._union = union
        after = union.neighbours(first)[1]
        return bool(union.overlapping(first, 1)) or (after is not None and after[0] <= last)


class Space:
    """Mappings and the endpoints that see them.

    The mappings are kept here once, however many endpoints see them.

    Attributes:
        id: The guest's number of the domain; None for what unattached endpoints see.
        bypass: Whether every address is mapped to itself.
        mapper: The mappings, each as the driver made it, and the sessions that export them.
        mmio: First addresses of the mappings that have VIRTIO_IOMMU_MAP_F_MMIO.
        endpoints: The endpoints that see them, by id.
        reserved: What the driver cannot map because of them.
        targets: The DMA targets that hold them, by key.
    """

    def __init__(self, number: int | None, bypass: bool, mapper: BasicMemoryMapper) -> None:
        self.id = number
        self.bypass = bypass
        self.mapper = mapper
        # The mappings for lookups: neighbors are joined, and what passes 2**64 is cut off. The maps
        # of the endpoints' IOTLBs follow it; they are kept here by id of the endpoint.
        self._map = IntervalMap()
        self._followers: dict[int, IntervalMap] = {}
        self.mmio: set[int] = set()
        self.endpoints: dict[int, Endpoint] = {}
        self.reserved = ReservedUnion()
        self.targets: dict[Hashable, DomainTarget] = {}
        if bypass:
            self.add(0, ADDRESS_SPACE, 0, Permissions.READ_WRITE, registers=False)

    def add(self, iova: int, size: int, gpa: int, prot: Permissions, *, registers: bool) -> bool:
        """Add a mapping; False, and nothing changed, if something is mapped there."""
        if self.mapper.add_range(iova, size, gpa, prot) is AddMapResult.OVERLAP:
            return False
        if registers:
            self.mmio.add(iova)
        # What would lie behind the last physical address is nowhere.
        self._map.overwrite(iova, min(size, ADDRESS_SPACE - gpa), gpa, prot)
        return True

    # Private, as the wait for users is the caller's: it does not do that under its lock.
    def _remove(self, iova: int, size: int) -> list[IntervalMap]:
        """Remove the mappings of a range, none of which reaches out of it.

        Returns:
            The maps of the endpoints of which a translation in the range is still in use: wait for
            it.
        """
        if self.mmio:
            self.mmio.difference_update(entry[0] for entry in self.mapper.mappings(iova, size))
        self.mapper.remove_map(iova, size)
        self._map.cut(iova, size)
        return users_of(self._followers, iova, size)

    def mappings(self) -> Iterator[MapEntry]:
        """All mappings, ascending; nothing may be added or removed meanwhile."""
        at = 0
        while at < ADDRESS_SPACE:
            entries = self.mapper.mappings(at, ADDRESS_SPACE - at, limit=LISTED)
            yield from entries
            at = entries[-1][0] + entries[-1][1] if entries else ADDRESS_SPACE

    def enter(self, endpoint: Endpoint) -> None:
        """Note that an endpoint sees these mappings, or will. O(1)."""
        self.endpoints[endpoint.id] = endpoint
        self._followers[endpoint.id] = endpoint.iotlb._map
        self.reserved.add(endpoint.reserved)
        endpoint.space = self

    def leave(self, endpoint: Endpoint) -> None:
        """Undo :meth:`enter`. O(1)."""
        del self.endpoints[endpoint.id], self._followers[endpoint.id]
        self.reserved.remove(endpoint.reserved)

    @property
    def counted(self) -> int:
        """Mappings that the driver made here, which are limited."""
        return 0 if self.id is None or self.bypass else len(self.mapper)

    @property
    def weight(self) -> int:
        """How often each mapping is kept: here, and for each DMA target."""
        return 1 + len(self.targets)


class EndpointMemory(IommuMemory):
    """Guest memory as one endpoint sees it; made by :meth:`Endpoint.memory`."""

    @property
    def endpoint(self) -> Endpoint:
        """Whose memory it is."""
        return cast("Endpoint", self.iommu)

    def check_range(self, addr: int, length: int, access: Permissions = Permissions.NONE) -> bool:
        """As :meth:`IommuMemory.check_range`. A question is no access, so no fault is reported."""
        if not self.enabled:
            return self.backend.check_range(addr, length, access)
        try:
            with self._space.gather(addr, length, access) as vector:
                return not vector.stop
        except (IotlbFails, InvalidAddressError):
            return False


class Owner(Protocol):
    """What an endpoint asks of its device.

    Attributes:
        origin: The number of the server in records of tracepoints; 0 without one.
    """

    origin: int

    def report(self, record: FaultRecord) -> None:
        """Have a fault reported."""
        ...

    def fault_stats(self, endpoint: int) -> FaultStats:
        """What became of an endpoint's faults."""
        ...

    def add_target(self, endpoint: int, target: DmaTarget, physical: Physical) -> TargetHandle:
        """Have a target follow an endpoint."""
        ...

    def remove_target(self, endpoint: int, target: DmaTarget) -> None:
        """Let a target go."""
        ...

    def change_memory(self, follower: DomainTarget, physical: GuestRegionCollection) -> None:
        """Have a target follow a change of guest memory."""
        ...

    def explain(self, endpoint: int, iova: int, length: int, access: Permissions) -> str:
        """Say what an access would meet."""
        ...


class Endpoint(Iommu):
    """A device behind the virtio-iommu: the IOMMU as that device sees it.

    Its IOTLB always shows every mapping that it may use, so a miss is a fault: it is reported to
    the guest and raises. The mappings are those of its domain, which all endpoints there share.
    Everything may be called from any thread.

    Attributes:
        id: The guest's number of it.
        reserved: Its reserved regions, ``(first, last, subtype)`` with inclusive ends.
    """

    def __init__(
        self, owner: Owner, number: int, reserved: Iterable[ReservedRegion], space: Space
    ) -> None:
        self.id = number
        self.reserved = tuple(reserved)
        self.space = space
        self.targets: list[DomainTarget] = []
        self._owner = owner
        self._iotlb = Iotlb()
        follow(self._iotlb._map, _EMPTY)
        self._sessions: list[ExportSession] = []
        self._single: ExportSession | None = None

    @property
    def iotlb(self) -> Iotlb:
        """What it may access now; always the same object, with the endpoint's own counters.

        Only requests to the virtio-iommu change it: what would change it here raises RuntimeError.
        """
        return self._iotlb

    @property
    def domain(self) -> int | None:
        """The domain it is attached to, or None."""
        return self.space.id

    @property
    def fault_stats(self) -> FaultStats:
        """What became of its faults."""
        return self._owner.fault_stats(self.id)

    def memory(
        self,
        physical: GuestRegionCollection,
        *,
        bitmap: AtomicBitmap | None = None,
        dirty: DirtyMode | None = None,
    ) -> EndpointMemory:
        """Guest memory as this endpoint sees it, for any device of ours.

        Args:
            physical: Guest physical memory.
            bitmap: Where writes are marked by I/O virtual address.
            dirty: Which bitmaps writes are marked in, as in :class:`~guestio.IommuMemory`: by
                default in ``bitmap``, or without one in those of ``physical``, as a migration by
                guest physical address needs.
        """
        if not isinstance(physical, GuestRegionCollection):
            raise TypeError(
                f"physical must be a GuestRegionCollection, not {type(physical).__name__}"
            )
        return EndpointMemory(physical, self, True, bitmap, dirty=dirty)

    def resolve(
        self,
        fails: IotlbFails,
        iova: int,
        length: int,
        access: Permissions,
    ) -> None:
        """Report an access that failed; see :meth:`Iommu.resolve`."""
        pieces = [p for where in fails.access_fails for p in self._mapped_pieces(where)]
        for piece in sorted(fails.misses + pieces)[:IOMMU_RECORDS_PER_ACCESS]:
            self._report(piece, access)
        first = min(fails.misses + fails.access_fails)
        if self.space.id is None:
            reason = f"endpoint {self.id} is not attached to a domain"
        elif first in fails.misses:
            reason = f"it is not mapped in domain {self.space.id} of endpoint {self.id}"
        else:
            reason = f"its mapping in domain {self.space.id} does not allow the access"
        raise CannotResolveError(first, access, reason)

    def report_unreachable(self, where: IovaRange, access: Permissions) -> None:
        """Tell the guest of a range that an access could not reach.

        Accesses through :meth:`memory` report that themselves; this is for those who look up in the
        IOTLB, as a ring does. The range is unmapped throughout or forbidden throughout.
        """
        where = IovaRange(*check_range(*where, name="where"))
        access = check_access(access)
        for piece in (self._mapped_pieces(where) or [where])[:IOMMU_RECORDS_PER_ACCESS]:
            self._report(piece, access)

    def _mapped_pieces(self, where: IovaRange) -> list[IovaRange]:
        """The first parts of a range that are mappings; the IOTLB may have joined them."""
        base, end = where.base, where.base + where.length
        return [
            IovaRange(max(start, base), min(start + size, end) - max(start, base))
            for start, size, _, _ in self.space.mapper.mappings(
                *where, limit=IOMMU_RECORDS_PER_ACCESS
            )
        ]

    def _report(self, piece: IovaRange, access: Permissions) -> None:
        reason = FaultReason.DOMAIN if self.space.id is None else FaultReason.MAPPING
        flags = FAULT_F_ADDRESS
        if access & Permissions.READ:
            flags |= FAULT_F_READ
        if access & Permissions.WRITE:
            flags |= FAULT_F_WRITE
        self._owner.report(FaultRecord.make(reason, flags, self.id, piece.base))

    def open_session(self, *, time_limit: float | None = None) -> ExportSession:
        """Begin to export memory to a client, beside those that there are.

        The session follows the endpoint from domain to domain. What it holds faults when the
        mapping goes or the endpoint leaves the domain; an export of what is not mapped is reported
        to the guest like an access.

        Args:
            time_limit: As in :meth:`BasicMemoryMapper.open_session`.
        """
        session = self.space.mapper.open_session(time_limit=time_limit)
        session.on_unmapped = self._report_unmapped
        self.adopt(session)
        return session

    def adopt(self, session: ExportSession) -> None:
        """Have a session follow the endpoint. For devices."""
        self._sessions = [s for s in self._sessions if not s.closed] + [session]
        # The endpoint may have gone to another domain since the session was opened.
        session.move(self.space.mapper)

    def _report_unmapped(self, where: IovaRange) -> None:
        self._report(where, Permissions.NONE)

    @property
    def sessions(self) -> list[ExportSession]:
        """The open sessions, oldest first."""
        return [session for session in self._sessions if not session.closed]

    def start_export_session(self) -> Event:
        """As :meth:`BasicMemoryMapper.start_export_session`: for an endpoint with one client."""
        previous = self._single
        if previous is not None:
            if previous.exports:
                raise ExportError("the previous export session is still active: it holds memory")
            previous.close()
        self._single = self.open_session()
        return self._single.fault

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """As :meth:`ExportSession.export`, for the endpoint's one client."""
        return self._one().export(iova, size)

    def release(self, iova: int, size: int) -> None:
        """As :meth:`ExportSession.release`, for the endpoint's one client."""
        self._one().release(iova, size)

    def _one(self) -> ExportSession:
        if self._single is None:
            raise ExportError("no export session; call start_export_session() first")
        return self._single

    def add_target(self, target: DmaTarget, physical: Physical) -> TargetHandle:
        """Have a DMA target hold what this endpoint may access, from now on.

        Endpoints that share a target can only be attached to the same domain.

        Args:
            target: What is told of the mappings, such as a VFIO container.
            physical: Guest physical memory. A :class:`~guestio.GuestMemoryAtomic` or a
                :class:`~guestio.dma.RegionManager` is followed: RAM that is plugged is mapped
                before the change of memory returns, RAM that is unplugged is unmapped first, and
                what stays is not touched. A mapping that leads to no memory reaches what is
                plugged there later. A :class:`~guestio.GuestRegionCollection` is fixed: a mapping
                of anything else is refused, and :meth:`TargetHandle.change_memory` tells of
                changes.

        Returns:
            What to close when the target is to forget the endpoint. Memory that is followed keeps
            the target, the endpoint and its device alive until then.

        Raises:
            DmaError: The target refused; what it raised is the cause. It holds nothing then.
            DeviceError: The target belongs to an endpoint in another domain; the domain maps what
                is not in ``physical``, which is fixed; or there is no room for its mappings.
            TypeError: ``physical`` is none of these.
            ValueError: The target belongs to this endpoint already, or to other memory.
            ReentrantCallError: A DMA target called this from inside a call.

        Cost: O(n) calls of the target for n mappings.
        """
        return self._owner.add_target(self.id, target, physical)

    # Private, as the wait for users is the caller's.
    def _show(self, space: Space | None) -> None:
        """Have its IOTLB show the mappings of a space, or nothing. O(1)."""
        follow(self._iotlb._map, _EMPTY if space is None else space._map)

    def explain(self, iova: int, length: int = 1, access: Permissions = Permissions.READ) -> str:
        """Say in a few lines what an access would meet, and why."""
        return self._owner.explain(self.id, iova, length, access)

    def __repr__(self) -> str:
        where = "unattached" if self.domain is None else f"in domain {self.domain}"
        return f"<Endpoint {self.id} {where}>"


class TargetHandle:
    """A target that follows an endpoint."""

    def __init__(self, owner: Owner, endpoint: int, follower: DomainTarget) -> None:
        self._owner = owner
        self._endpoint = endpoint
        self._follower = follower
        self._open = True

    @property
    def target(self) -> DmaTarget:
        """The target."""
        return self._follower.target

    def stats(self) -> TargetStats:
        """What the target holds and what it should."""
        return self._follower.stats()

    def change_memory(self, physical: GuestRegionCollection) -> None:
        """Have the target follow a change of guest memory: RAM was plugged or unplugged.

        Only for a target that was added with a :class:`~guestio.GuestRegionCollection`. Whatever
        leads to the same memory as before is not touched, so accesses to it go on. If several
        endpoints share the target, this is done for all of them.

        Args:
            physical: Guest physical memory from now on. The old memory may be closed afterwards,
                unless something is ``stuck`` at the target.

        Raises:
            DmaError: The target refused; it holds what it held before.
            ValueError: The target is closed, or follows its memory by itself.
        """
        self._owner.change_memory(self._follower, physical)

    def close(self) -> None:
        """Take the endpoint from the target, and everything if it was the last.

        Calling it again does nothing.

        Raises:
            DmaError: The target refused; nothing changed then.
        """
        if self._open:
            self._owner.remove_target(self._endpoint, self._follower.target)
            self._open = False
