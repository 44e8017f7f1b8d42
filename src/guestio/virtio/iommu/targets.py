"""What a DMA target is to hold of a domain's mappings, and how it follows guest memory.

A target (a VFIO container, say) belongs to one endpoint or to several that the host cannot tell
apart. It is programmed with what the endpoints that are attached see, or with what unattached
endpoints see if none is. What it really holds is in its :class:`~guestio.dma.ledger.Ledger`, and
every change goes through a :class:`~guestio.dma.Journal`, so that a target that refuses leaves no
trace at the others.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.dma import DmaMapRequest, DmaTarget, Journal, MappingType, RegionManager
from guestio.dma.changes import Entry, Step
from guestio.dma.ledger import Ledger
from guestio.dma.physical import PhysicalMap
from guestio.errors import GuestioError
from guestio.memory import GuestMemoryAtomic, GuestRegionCollection
from guestio.ratelog import LOG
from guestio.virtio.iommu.requests import target_key
from guestio.virtio.iommu.wire import Status

if TYPE_CHECKING:
    from guestio.iommu.mapper import MapEntry
    from guestio.memory.followed import Followed, Follower
    from guestio.virtio.iommu.space import Endpoint, Space

_log = logging.getLogger(__name__)

LOGGED: Final = 8
"""Failures that are logged one by one, where a guest may cause any number of them."""

Physical = GuestRegionCollection | GuestMemoryAtomic[GuestRegionCollection] | RegionManager
"""Guest physical memory: fixed, or something whose changes are followed."""


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


class MemorySource:
    """Where the memory behind mappings is, as the caller gave it.

    Attributes:
        given: What the caller gave.
        followed: What tells of its changes; None if it is fixed.

    Raises:
        TypeError: It is none of the kinds of :data:`Physical`.
    """

    def __init__(self, given: Physical) -> None:
        self.given = given
        self.followed: Followed[Any] | None = None
        if isinstance(given, RegionManager):
            self.followed = given.followed()
        elif isinstance(given, GuestMemoryAtomic):
            self.followed = given.followed
            self.map_of(given.memory())
        elif not isinstance(given, GuestRegionCollection):
            raise TypeError(
                "physical must be a GuestRegionCollection, a GuestMemoryAtomic of one or a "
                f"RegionManager, not {type(given).__name__}"
            )

    def follow(self, follower: Follower[Any]) -> PhysicalMap:
        """What is where now, and have a follower told of changes."""
        if self.followed is None:
            return self.map_of(self.given)
        return self.map_of(self.followed.follow(follower))

    def unfollow(self, follower: Follower[Any]) -> None:
        """Undo :meth:`follow`."""
        if self.followed is not None:
            self.followed.unfollow(follower)

    def map_of(self, memory: object) -> PhysicalMap:
        """What is where in a state of the memory.

        Raises:
            TypeError: It is no physical memory.
        """
        if isinstance(memory, PhysicalMap):
            return memory
        if isinstance(memory, GuestRegionCollection):
            return PhysicalMap.of_memory(memory)
        raise TypeError(
            "physical memory that DMA targets follow must be a GuestRegionCollection, not "
            f"{type(memory).__name__}"
        )


class DomainTarget:
    """One target, the endpoints that it belongs to, and whose mappings it is to hold.

    Requests that touch it are never concurrent.

    Attributes:
        source: The memory behind the mappings, as given.
        physical: What is where in it.
        ledger: What the target holds.
        endpoints: The endpoints that it belongs to, by id.
        attached: How many of them are attached to a domain.
        current: Whose mappings it holds.
        follower: What is told of changes of the memory; None before the start and after the end.
    """

    def __init__(
        self,
        target: DmaTarget,
        source: MemorySource,
        count: Callable[[int], None],
    ) -> None:
        self.target = target
        self.source = source
        self.physical = PhysicalMap()
        self.ledger = Ledger(target, self_mending=True)
        self.endpoints: dict[int, Endpoint] = {}
        self.attached = 0
        self.current: Space | None = None
        self.follower: Follower[Any] | None = None
        # Told how many mappings more or fewer it has.
        self._count = count

    @property
    def key(self) -> Hashable:
        """What a request names that touches it."""
        return target_key(self.target)

    def stats(self) -> TargetStats:
        """What it holds and what it should."""
        stats = self.ledger.stats()
        stuck = self.ledger.stuck()
        return TargetStats(
            stats.mappings - len(stats.quarantined),
            stats.mapped_bytes - sum(request.size for request in stats.quarantined),
            self.ledger.missing(),
            stuck,
        )

    def start(self, follower: Follower[Any]) -> None:
        """Learn what is where in memory, and be told of changes from now on."""
        self.physical = self.source.follow(follower)
        self.follower = follower

    def stop(self) -> None:
        """Undo :meth:`start`, for good. Nothing of the memory is kept in use any more."""
        if self.follower is not None:
            self.source.unfollow(self.follower)
            self.follower = None
        self.source, self.physical = MemorySource(GuestRegionCollection()), PhysicalMap()

    def entries(self, mapping: MapEntry, registers: bool, *, partly: bool = False) -> list[Entry]:
        """A mapping as requests to the target, one for each region of memory behind it.

        Args:
            mapping: The mapping.
            registers: Whether it has VIRTIO_IOMMU_MAP_F_MMIO; then a hole does not matter.
            partly: Whether a hole does not matter anyway. Nor does it if the memory is followed:
                what is plugged there later becomes reachable then.

        Raises:
            Refused: FAULT: there is not memory behind all of it.
        """
        found = _behind(self.physical, mapping, registers)
        _, size, gpa, prot = mapping
        if registers or partly or self.source.followed is not None or prot is Permissions.NONE:
            return found
        covered = sum(entry.request.size for entry in found)
        if covered < size:
            raise Refused(
                Status.FAULT,
                f"{size - covered:#x} bytes of {gpa:#x}+{size:#x} are not guest memory, so a "
                "device cannot reach them",
            )
        return found

    def add(self, entries: Iterable[Entry], journal: Journal) -> None:
        """Map requests.

        Raises:
            DmaError: The target refused.
        """
        for entry in entries:
            self.ledger.map(entry, journal)

    def take(self, mappings: Iterable[MapEntry], mmio: Container[int], journal: Journal) -> None:
        """Take mappings away that were added.

        Raises:
            DmaError: The target refused.
        """
        for mapping in mappings:
            for entry in _behind(self.physical, mapping, mapping[0] in mmio):
                self.ledger.unmap(entry, journal)

    def follow(self, endpoint: Endpoint, space: Space, idle: Space, journal: Journal) -> None:
        """Have it hold what its endpoints see once ``endpoint`` sees ``space``.

        Raises:
            Refused: UNSUPP: another endpoint of the target is in another domain.
            DmaError: The target refused.
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
            del self.current.targets[self.key]
            self._count(-self.current.counted)
        self.current = space
        if space is not None:
            space.targets[self.key] = self
            self._count(space.counted)

    def move(self, space: Space, journal: Journal) -> None:
        """Have it hold the mappings of another space. What both lead to alike is not touched.

        Raises:
            Refused: FAULT: the space maps what is not memory, and the memory is fixed.
            DmaError: The target refused.
        """
        wanted = self._entries_of(space)
        before = self.current
        self.place(space)
        journal.did(partial(self.place, before))
        self._carry_out(self.ledger.steps_to(wanted), journal)

    def restart(self, space: Space) -> None:
        """As :meth:`move`, but what the target refuses is only noted: for a reset."""
        if self.current is not space:
            self.place(space)
            _log_failures(self._get_on(self.ledger.steps_to(self._entries_of(space, partly=True))))

    def change_memory(
        self, physical: PhysicalMap, journal: Journal, failures: list[Any] | None = None
    ) -> None:
        """Exchange what it holds for what the same mappings lead to in other memory.

        What leads to the same place in both is not touched.

        Args:
            physical: What is where from now on.
            journal: Notes how to undo it.
            failures: Where unmappings go that failed, instead of being raised.

        Raises:
            DmaError: The target refused.
        """
        steps = self._steps_between(self.physical, physical)
        journal.did(partial(setattr, self, "physical", self.physical))
        self.physical = physical
        self._carry_out(steps, journal, failures)

    def return_to_memory(self, physical: PhysicalMap) -> list[Exception]:
        """As :meth:`change_memory`, to undo one: gets as far as possible; what failed."""
        steps = self._steps_between(self.physical, physical)
        self.physical = physical
        return self._get_on(steps)

    def _steps_between(self, old: PhysicalMap, new: PhysicalMap) -> list[Step]:
        """What a change of the memory behind its mappings is to the target."""
        places = old.differences(new)
        if self.current is None or not places:
            return []
        before: list[Entry] = []
        after: list[Entry] = []
        for mapping in self.current.mappings():
            if places.meet(mapping[2], min(mapping[1], ADDRESS_SPACE - mapping[2])):
                registers = mapping[0] in self.current.mmio
                before += _behind(old, mapping, registers)
                after += _behind(new, mapping, registers)
        return self.ledger.steps_between(before, after)

    def _carry_out(
        self, steps: Sequence[Step], journal: Journal, failures: list[Any] | None = None
    ) -> None:
        for step in steps:
            self.ledger.carry_out(step, journal, failures)

    def _get_on(self, steps: Sequence[Step]) -> list[Exception]:
        """Take steps whatever fails; what failed."""
        failures: list[Any] = []
        for step in steps:
            try:
                self.ledger.carry_out(step, Journal(), failures)
            except Exception as error:
                if step.new is not None:
                    self.ledger.note_missing(step.new, error)
                failures.append(error)
        return failures

    def _entries_of(self, space: Space, *, partly: bool = False) -> list[Entry]:
        return [
            entry
            for mapping in space.mappings()
            for entry in self.entries(
                mapping, mapping[0] in space.mmio, partly=partly or space.bypass
            )
        ]


def _behind(physical: PhysicalMap, mapping: MapEntry, registers: bool) -> list[Entry]:
    """What a mapping leads to, as requests to a target: one for each region of memory."""
    iova, size, gpa, prot = mapping
    if prot is Permissions.NONE:
        return []
    # What would lie behind the last physical address is nowhere.
    size = min(size, ADDRESS_SPACE - gpa)
    found = []
    for memory, backing in physical.meeting(gpa, size):
        first, end = max(gpa, memory.start), min(gpa + size, memory.end)
        inside = first - memory.start
        request = DmaMapRequest(
            start=iova + first - gpa,
            size=end - first,
            host_address=None if memory.host_address is None else memory.host_address + inside,
            fd=memory.fd,
            file_offset=0 if memory.fd is None else memory.file_offset + inside,
            # Reading cannot be withheld from hardware, writing can.
            writable=bool(prot & Permissions.WRITE) and memory.writable,
            kind=MappingType.DEVICE if registers else memory.kind,
        )
        found.append(Entry(request, backing))
    return found


def undo(journal: Journal) -> None:
    """Undo what a refused request did at the targets; what cannot be undone is in their stats."""
    _log_failures(journal.undo())


def _log_failures(failures: Sequence[Exception]) -> None:
    for failure in failures[:LOGGED]:
        LOG.report(
            _log,
            logging.ERROR,
            "a DMA target does not hold what it should: %s; stats() of its handle says what is "
            "missing or stuck",
            failure,
        )
    if len(failures) > LOGGED:
        LOG.report(
            _log,
            logging.ERROR,
            "the same %d times more; stats() of the handles say what",
            len(failures) - LOGGED,
        )
