"""What a domain's mappings are to a DMA target: which requests it gets, and what it really holds.

A target (a VFIO container, say) belongs to one endpoint or to several that the host cannot tell
apart. It is programmed with what the endpoints that are attached see, or with what unattached
endpoints see if none is. Every change goes through a :class:`~guestio.dma.Journal`, so that a
target that refuses leaves no trace at the others.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.dma import DmaMapRequest, DmaTarget, Journal, MappingType
from guestio.errors import GuestioError
from guestio.ratelog import LOG
from guestio.virtio.iommu.wire import Status

if TYPE_CHECKING:
    from guestio.iommu.mapper import MapEntry
    from guestio.memory import GuestRegionCollection
    from guestio.virtio.iommu.space import Endpoint, Space

_log = logging.getLogger(__name__)

LOGGED: Final = 8
"""Failures that are logged one by one, where a guest may cause any number of them."""


class Refused(GuestioError):  # noqa: N818 - not an error of ours but an answer
    """A request cannot be carried out; its status says why."""

    def __init__(self, status: Status, text: str) -> None:
        self.status = status
        self.text = text
        super().__init__(f"{status.name}: {text}")


def status_of(error: Exception) -> Status:
    """What the guest is told of a failure."""
    if isinstance(error, Refused):
        return error.status
    if getattr(error, "errno", None) in {errno.ENOMEM, errno.ENOSPC}:
        return Status.NOMEM
    return Status.DEVERR


@dataclass(frozen=True, slots=True)
class TargetStats:
    """What a target holds and what it should.

    Attributes:
        held: Requests that are mapped.
        held_bytes: Their bytes.
        missing: Requests that should be mapped and are not, by their first address, and why.
        stuck: Requests that should be gone and could not be taken away, and why. Their memory is
            kept.
    """

    held: int
    held_bytes: int
    missing: dict[int, str] = field(default_factory=dict)
    stuck: dict[int, str] = field(default_factory=dict)


class Program:
    """One target and the ledger of what it holds. Its endpoints' requests are never concurrent."""

    def __init__(
        self,
        target: DmaTarget,
        physical: GuestRegionCollection,
        count: Callable[[int], None],
    ) -> None:
        self.target = target
        self.physical = physical
        self.endpoints: dict[int, Endpoint] = {}
        # How many of them are attached to a domain.
        self.attached = 0
        self.current: Space | None = None
        # Told how many mappings more or fewer it has.
        self._count = count
        self._held: dict[int, DmaMapRequest] = {}
        self._missing: dict[int, tuple[DmaMapRequest, str]] = {}
        # With the memory, which must stay as long as the target may reach it.
        self._stuck: dict[int, tuple[DmaMapRequest, str, GuestRegionCollection]] = {}

    @property
    def key(self) -> Hashable:
        """What a request names that touches it."""
        return target_key(self.target)

    def stats(self) -> TargetStats:
        """What it holds and what it should."""
        return TargetStats(
            len(self._held),
            sum(request.size for request in list(self._held.values())),
            {start: why for start, (_, why) in self._missing.items()},
            {start: why for start, (_, why, _) in self._stuck.items()},
        )

    def requests(
        self, entry: MapEntry, registers: bool, *, partly: bool = False
    ) -> list[DmaMapRequest]:
        """A mapping as requests to the target, one for each region of memory behind it.

        Args:
            entry: The mapping.
            registers: Whether it has VIRTIO_IOMMU_MAP_F_MMIO; then a hole does not matter.
            partly: Whether a hole does not matter anyway.

        Raises:
            Refused: FAULT: there is not memory behind all of it.
        """
        iova, size, gpa, prot = entry
        if prot is Permissions.NONE:
            return []
        found = list(self._split(iova, min(size, ADDRESS_SPACE - gpa), gpa, prot, registers))
        covered = sum(request.size for request in found)
        if covered < size and not registers and not partly:
            raise Refused(
                Status.FAULT,
                f"{size - covered:#x} bytes of {gpa:#x}+{size:#x} are not guest memory, so a "
                "device cannot reach them",
            )
        return found

    def _split(
        self, iova: int, size: int, gpa: int, prot: Permissions, registers: bool
    ) -> Iterator[DmaMapRequest]:
        for region in self.physical.regions_in(gpa, size):
            first, end = max(gpa, region.start), min(gpa + size, region.start + region.size)
            inside = first - region.start
            file = region.file_offset
            yield DmaMapRequest(
                start=iova + first - gpa,
                size=end - first,
                host_address=region.host_address(inside),
                fd=file.fd if file is not None else None,
                file_offset=file.start + inside if file is not None else 0,
                # Reading cannot be withheld from hardware, writing can.
                writable=bool(prot & Permissions.WRITE) and region.writable,
                kind=MappingType.DEVICE if registers else MappingType.RAM,
            )

    def add(self, requests: Iterable[DmaMapRequest], journal: Journal) -> None:
        """Map requests; what the target raises comes through."""
        for request in requests:
            self._map(request)
            journal.did(partial(self._undo_map, request))

    def take(self, entries: Iterable[MapEntry], mmio: Container[int], journal: Journal) -> None:
        """Take mappings away that were added; what the target raises comes through."""
        for entry in entries:
            self._take(self.requests(entry, entry[0] in mmio, partly=True), journal)

    def _take(self, requests: Iterable[DmaMapRequest], journal: Journal) -> None:
        for request in requests:
            if request.start in self._held or request.start in self._missing:
                self._unmap(request)
                journal.did(partial(self._undo_unmap, request))

    def follow(self, endpoint: Endpoint, space: Space, idle: Space, journal: Journal) -> None:
        """Have it hold what its endpoints see once ``endpoint`` sees ``space``.

        Raises:
            Refused: UNSUPP: another endpoint of the target is in another domain.
        """
        others = self.attached - (endpoint.id in self.endpoints and endpoint.space.id is not None)
        here = self.current if others else None
        if here is not None and space.id is not None and space is not here:
            raise Refused(
                Status.UNSUPP,
                f"{endpoint} shares a DMA target with an endpoint in domain {here.id}",
            )
        wanted = space if space.id is not None else here or idle
        if self.current is not wanted:
            self.move(wanted, journal)

    def join(self, endpoint: Endpoint) -> None:
        """Count an endpoint among those that have it, once it follows that."""
        self.endpoints[endpoint.id] = endpoint
        self.attached += endpoint.space.id is not None

    def part(self, endpoint: Endpoint) -> None:
        """Undo :meth:`join`."""
        del self.endpoints[endpoint.id]
        self.attached -= endpoint.space.id is not None

    def place(self, space: Space | None) -> None:
        """Note whose mappings it holds, or is to hold next."""
        if self.current is not None:
            del self.current.programs[self.key]
            self._count(-self.current.counted)
        self.current = space
        if space is not None:
            space.programs[self.key] = self
            self._count(space.counted)

    def move(self, space: Space, journal: Journal) -> None:
        """RequestChannel all that it holds for the mappings of a space."""
        wanted = self._requests_of(space)
        before = self.current
        self.place(space)
        journal.did(partial(self.place, before))
        self._take(self._all(), journal)
        self.add(wanted, journal)

    def change_memory(self, physical: GuestRegionCollection, journal: Journal) -> None:
        """RequestChannel what it holds for what the same mappings lead to in other memory.

        What leads to the same place in both is not touched.
        """
        if self.current is None:
            self.physical = physical
            return
        before, self.physical = self.physical, physical
        journal.did(partial(setattr, self, "physical", before))
        wanted = {r.start: r for r in self._requests_of(self.current, partly=True)}
        present = {request.start: request for request in self._all()}
        self._take([r for r in present.values() if wanted.get(r.start) != r], journal)
        self.add([r for r in wanted.values() if present.get(r.start) != r], journal)

    def unstick(self, start: int = 0, end: int = ADDRESS_SPACE) -> None:
        """Take away what could not be taken away before; what the target raises comes through."""
        for request, _, _ in list(self._stuck.values()):
            if request.start < end and start < request.end:
                self.target.unmap_dma(request.start, request.size)
                del self._stuck[request.start]

    def restart(self, space: Space) -> None:
        """As :meth:`move`, but what the target refuses is only noted: for a reset."""
        if self.current is space:
            return
        self.place(space)
        for request in self._all():
            try:
                self._unmap(request)
            except Exception as error:
                self._stick(request, error)
        for request in self._requests_of(space):
            try:
                self._map(request)
            except Exception as error:
                self._missing[request.start] = request, str(error)

    def _requests_of(self, space: Space, *, partly: bool = False) -> list[DmaMapRequest]:
        return [
            request
            for entry in space.mapper.mappings()
            for request in self.requests(
                entry, entry[0] in space.mmio, partly=partly or space.bypass
            )
        ]

    def _all(self) -> list[DmaMapRequest]:
        """What it holds or should, ascending."""
        found = [*self._held.values(), *(request for request, _ in self._missing.values())]
        return sorted(found, key=lambda request: request.start)

    def _map(self, request: DmaMapRequest) -> None:
        self.unstick(request.start, request.end)
        try:
            self.target.map_dma(request)
        except (OSError, GuestioError) as error:
            # Anything else is a bug of the target.
            if request.kind is not MappingType.DEVICE:
                raise
            self._missing[request.start] = request, str(error)
        else:
            self._held[request.start] = request

    def _unmap(self, request: DmaMapRequest) -> None:
        if request.start in self._held:
            self.target.unmap_dma(request.start, request.size)
            del self._held[request.start]
        else:
            self._missing.pop(request.start, None)

    def _undo_map(self, request: DmaMapRequest) -> None:
        try:
            self._unmap(request)
        except Exception as error:
            self._stick(request, error)
            raise

    def _undo_unmap(self, request: DmaMapRequest) -> None:
        try:
            self._map(request)
        except Exception as error:
            self._missing[request.start] = request, str(error)
            raise

    def _stick(self, request: DmaMapRequest, error: Exception) -> None:
        del self._held[request.start]
        self._stuck[request.start] = request, str(error), self.physical
        if len(self._stuck) <= LOGGED:
            LOG.report(
                _log,
                logging.ERROR,
                "%s did not give up %#x+%#x: %s; stats() of its handle lists what is stuck",
                type(self.target).__name__,
                request.start,
                request.size,
                error,
            )


def target_key(target: DmaTarget) -> Hashable:
    """What a request names that touches a target."""
    return ("target", id(target))


def undo(journal: Journal) -> None:
    """Undo what a refused request did at the targets; what cannot be undone is in their stats."""
    failures = journal.undo()
    for failure in failures[:LOGGED]:
        LOG.report(
            _log,
            logging.ERROR,
            "a DMA target could not be brought back to its state before: %s",
            failure,
        )
    if len(failures) > LOGGED:
        LOG.report(
            _log,
            logging.ERROR,
            "the same %d times more; stats() of the handles say what",
            len(failures) - LOGGED,
        )
