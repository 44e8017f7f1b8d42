"""The mappings of one I/O address space, and clients that hold memory through them.

A :class:`BasicMemoryMapper` is what a domain of a virtio-iommu is made of. A client that uses
memory by I/O virtual address for longer than one access opens an :class:`ExportSession`, exports a
range (which tells where the memory is) and releases it when done. If the guest takes a mapping
away whose memory is exported:

1. the mapping goes, and the session is broken: nothing more can be exported in it;
2. the session's ``fault`` event tells the client, which must release all that it holds;
3. the caller that removed the mapping gets an event of its own and waits for it before it tells
   the guest that the memory is free;
4. with the last release that event happens. A client that does not release in time is *revoked*:
   what it held is taken from it, ``revoked`` happens, and the wait is over.

Rules of the maps are those of virtio 1.3, section 5.13.6.6: what was mapped as one is unmapped as
one. Ranges are half-open and ``2**64`` is a legal end.
"""

from __future__ import annotations

import enum
import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self, SupportsIndex

from guestio._core.iommu.intervals import IntervalMap
from guestio.addr import (
    ADDRESS_SPACE,
    IovaRange,
    Permissions,
    check_address,
    check_flag,
    check_int,
    check_range,
    check_seconds,
)
from guestio.budgets import EXPORT_RANGES
from guestio.errors import CannotResolveError, GuestioError
from guestio.iommu.events import Event, all_of
from guestio.ratelog import LOG

_log = logging.getLogger(__name__)

MapEntry = tuple[int, int, int, Permissions]
"""``(iova, size, gpa, prot)``; ``gpa + size`` may wrap where :meth:`add_range` let it."""


class ExportError(GuestioError):
    """Memory cannot be exported: no session, a broken one, or one that is still in use."""


@dataclass(frozen=True, slots=True)
class MappingInfo:
    """One mapping of I/O virtual addresses to guest physical ones.

    Attributes:
        iova: First I/O virtual address.
        gpa: First guest physical address.
        size: Bytes, greater than 0; ``iova + size`` and ``gpa + size`` are at most ``2**64``.
        prot: What is allowed; exactly that, so write-only is write-only.

    Raises:
        TypeError, ValueError: The numbers do not hold to that.
    """

    iova: int
    gpa: int
    size: int
    prot: Permissions

    def __post_init__(self) -> None:
        iova, size = check_range(self.iova, self.size, name="iova", length_name="size", empty=False)
        gpa, _ = check_range(self.gpa, size, name="gpa", length_name="size")
        # As plain integers: sums of numpy's may wrap.
        for name, value in (("iova", iova), ("size", size), ("gpa", gpa)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "prot", _check_prot(self.prot))


def _check_prot(prot: SupportsIndex) -> Permissions:
    number = check_int(prot, "prot")
    if not 0 <= number <= Permissions.READ_WRITE:
        raise ValueError(f"prot {number} is not a combination of READ and WRITE")
    return Permissions(number)


def _check_limit(time_limit: float | None) -> float | None:
    return None if time_limit is None else check_seconds(time_limit, "time_limit")


class MemRegion(NamedTuple):
    """A contiguous piece of exported guest physical memory.

    Attributes:
        gpa: First guest physical address.
        length: Bytes.
        prot: What is allowed there.
    """

    gpa: int
    length: int
    prot: Permissions


class AddMapResult(enum.Enum):
    """What became of an :meth:`~MemoryMapper.add_map`."""

    OK = "ok"
    OVERLAP = "overlap"
    """Something is mapped there already; nothing changed."""


@dataclass(frozen=True, slots=True)
class RemoveMapResult:
    """What became of a :meth:`~MemoryMapper.remove_map`.

    Attributes:
        overlap: A mapping reaches out of the range; nothing changed.
        fault: None, or the event to wait for before the guest may be told that the memory is free:
            some of it is exported.
    """

    overlap: bool = False
    fault: Event | None = None


class MemoryMapper(ABC):
    """What a virtio-iommu domain needs from the object that keeps its mappings.

    What a kind of mapper cannot do raises :class:`ExportError`, as the defaults here do.
    """

    @abstractmethod
    def add_map(self, info: MappingInfo) -> AddMapResult:
        """Add a mapping, or refuse it if any of its range is mapped."""

    @abstractmethod
    def remove_map(self, iova: int, size: int) -> RemoveMapResult:
        """Remove every mapping in a range, or none if one reaches out of it."""

    @property
    @abstractmethod
    def mask(self) -> int:
        """Page sizes that can be mapped, one bit each, as in the device's config space."""

    @property
    @abstractmethod
    def id(self) -> int:
        """Identifies the mapper among those of its class."""

    @property
    @abstractmethod
    def supports_detach(self) -> bool:
        """Whether endpoints can be detached from it without harm to others."""

    def reset_domain(self) -> Event | None:
        """Remove everything; an event to wait for if memory is exported. This one does nothing."""
        return None

    def start_export_session(self) -> Event:
        """Begin to export to a client; the event is its fault event."""
        raise ExportError(f"{type(self).__name__} does not export memory")

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """Where the memory of a range is; it is the client's until it is released."""
        raise ExportError(f"{type(self).__name__} does not export memory: {iova:#x}+{size:#x}")

    def release(self, iova: int, size: int) -> None:
        """Give back what one :meth:`export` gave."""
        raise ExportError(f"{type(self).__name__} does not export memory: {iova:#x}+{size:#x}")


class ExportSession:
    """What one client holds; made by :meth:`BasicMemoryMapper.open_session`.

    A context manager that closes the session. Everything may be called from any thread.

    Attributes:
        id: A number of its own in this process.
        fault: Happens when exported memory was unmapped; release everything then.
        revoked: Happens when what the session held was taken from it by force. What runs as its
            callback has run before the guest is told that the memory is free, so that is the place
            to cut a client off.
        time_limit: Seconds that the client has to release everything after a fault; None for ever.
        stray_releases: Releases of what was not exported; they change nothing.
        on_unmapped: Called with the first unmapped part of a range that could not be exported.
    """

    _ids = itertools.count(1)

    def __init__(self, mapper: BasicMemoryMapper, time_limit: float | None) -> None:
        self.id = next(self._ids)
        self.fault = Event()
        self.revoked = Event()
        self.time_limit = time_limit
        self.stray_releases = 0
        self.on_unmapped: Callable[[IovaRange], None] | None = None
        self._mapper = mapper
        self._lock: threading.Lock = mapper._lock
        self._exports: dict[tuple[int, int], int] = {}
        self._broken = False
        self._closed = False
        self._resolved: Event | None = None
        self._timer: threading.Timer | None = None
        self._ends = 0.0

    def __repr__(self) -> str:
        state = "closed" if self._closed else "revoked" if self._broken else "open"
        return f"<ExportSession {self.id}: {len(self._exports)} ranges exported, {state}>"

    @property
    def broken(self) -> bool:
        """Whether a fault, a revocation or :meth:`close` has ended it."""
        return self._broken or self._closed

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def exports(self) -> list[IovaRange]:
        """What it holds, each range as often as it was exported."""
        with self._lock:
            held = sorted(self._exports.items())
        return [IovaRange(*key) for key, count in held for _ in range(count)]

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """Learn where the memory of a range is, and hold it.

        Args:
            iova: First I/O virtual address.
            size: Bytes, greater than 0.

        Returns:
            Pieces in ascending order of their I/O virtual address, ``size`` bytes in all.
            Neighbors that are contiguous and have equal permissions are one piece.

        Raises:
            ExportError: The session is broken or holds too many ranges.
            CannotResolveError: Some of the range is not mapped. Nothing is held.
            TypeError, ValueError: Bad numbers.
        """
        try:
            return self._export(iova, size)
        except CannotResolveError as error:
            if self.on_unmapped is not None:
                self.on_unmapped(error.iova_range)
            raise

    def _export(self, iova: int, size: int) -> list[MemRegion]:
        with self._lock:
            if self.broken:
                raise ExportError("broken export session: release everything and start a new one")
            first, length = check_range(iova, size, name="iova", length_name="size", empty=False)
            if len(self._exports) >= EXPORT_RANGES and (first, length) not in self._exports:
                raise ExportError(f"the session holds {EXPORT_RANGES} ranges; release some first")
            regions = self._mapper._resolve(first, length)
            self._exports[first, length] = self._exports.get((first, length), 0) + 1
            return regions

    def release(self, iova: int, size: int) -> None:
        """Give back what one :meth:`export` of exactly this range gave.

        A range that is not held is counted in ``stray_releases`` and changes nothing.

        Raises:
            TypeError, ValueError: Bad numbers; a size of 0 is a range that is not held.
        """
        key = check_range(iova, size, name="iova", length_name="size")
        with self._lock:
            count = self._exports.get(key, 0)
            if count > 1:
                self._exports[key] = count - 1
            elif count:
                del self._exports[key]
            else:
                self.stray_releases += 1
            released = self._take_released()
        if not count and self.stray_releases == 1:
            _log.warning("a client released %#x+%#x, which it did not hold", iova, size)
        _announce_release(released)

    def revoke(self) -> None:
        """Take everything from the client at once and end the session.

        ``fault`` and ``revoked`` happen, then a wait for the release ends.
        """
        with self._lock:
            if self._closed:
                return
            # Until the client is cut off its memory counts as held.
            self._break()
            had = bool(self._exports)
        self.fault.set()
        if had:
            self.revoked.set()
        with self._lock:
            self._exports.clear()
            released = self._take_released()
        _announce_release(released)

    def restore(self, exports: Iterable[tuple[int, int]], broken: bool) -> None:
        """Take over what a session held that there was before, as when a snapshot is restored.

        Args:
            exports: ``(iova, size)`` of everything held, each as often as it was exported.
            broken: Whether it was broken.

        Raises:
            TypeError, ValueError: Bad numbers; nothing changed.
        """
        held = Counter(
            check_range(iova, size, name="iova", length_name="size", empty=False)
            for iova, size in exports
        )
        broken = check_flag(broken, "broken")
        with self._lock:
            self._exports.update(held)
            self._broken = broken
            self._resolved = Event() if broken and held else None
        if broken:
            # The client has its time anew: how much of it had passed is not known here.
            self._announce()

    def close(self) -> None:
        """Release everything and leave the mapper. Calling it again does nothing."""
        with self._lock:
            self._closed = True
            self._exports.clear()
            self._mapper._sessions.discard(self)
            released = self._take_released()
        _announce_release(released)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _touches(self, first: int, end: int) -> bool:
        return any(start < end and first < start + size for start, size in self._exports)

    def _break(self) -> Event | None:
        """Begin a fault; needs the lock. None if one is pending, so that no second wait begins."""
        if self._broken:
            return None
        self._broken = True
        self._resolved = Event()
        return self._resolved

    def _take_released(self) -> tuple[Event | None, threading.Timer | None]:
        """What to announce if nothing is held any more; needs the lock."""
        if self._exports:
            return None, None
        released = self._resolved, self._timer
        self._resolved = self._timer = None
        return released

    def _announce(self) -> None:
        """Tell the client of a fault, and start its time; without the lock."""
        self.fault.set()
        if self.time_limit is not None:
            self.hurry(self.time_limit)

    def hurry(self, seconds: float) -> None:
        """Revoke the session after so many seconds if it is in fault and holds memory still then.

        A limit that ends earlier stays. Without a fault that is pending, nothing happens.
        """
        seconds = check_seconds(seconds, "seconds")
        ends = time.monotonic() + seconds
        timer = threading.Timer(seconds, self._time_is_up, (seconds,))
        timer.daemon = True
        with self._lock:
            if self._resolved is None or (self._timer is not None and self._ends <= ends):
                return
            previous, self._timer, self._ends = self._timer, timer, ends
        if previous is not None:
            previous.cancel()
        timer.start()

    def _time_is_up(self, seconds: float) -> None:
        LOG.report(
            _log,
            logging.WARNING,
            "export session %d did not release its memory within %s s of a fault; it is revoked",
            self.id,
            seconds,
        )
        self.revoke()

    def move(self, mapper: BasicMemoryMapper) -> Event | None:
        """Go over to another mapper, as when an endpoint is attached to another domain.

        Memory that is held faults, as if its mapping had been removed.

        Args:
            mapper: Made with the present one as its ``sibling``, or the other way round.

        Returns:
            None, or the event that happens when everything is released.

        Raises:
            ValueError: The mappers are not siblings.
        """
        if not isinstance(mapper, BasicMemoryMapper):
            raise TypeError(f"mapper must be a BasicMemoryMapper, not {type(mapper).__name__}")
        if mapper._lock is not self._lock:
            raise ValueError("sessions move between sibling mappers only")
        with self._lock:
            if self._closed:
                return None
            self._mapper._sessions.discard(self)
            self._mapper = mapper
            mapper._sessions.add(self)
            begun = self._break() if self._exports else None
            pending = self._resolved
        if begun is not None:
            self._announce()
        return pending


def _announce_release(released: tuple[Event | None, threading.Timer | None]) -> None:
    event, timer = released
    if timer is not None:
        timer.cancel()
    if event is not None:
        event.set()


class BasicMemoryMapper(MemoryMapper):
    """The mappings of one domain, with any number of clients.

    Args:
        mask: Page sizes that can be mapped. It is only remembered; the device
            checks alignment.
        time_limit: What new sessions get as theirs, in seconds; None for no limit.
        sibling: A mapper whose sessions may :meth:`~ExportSession.move` to this one.

    Everything may be called from any thread; no callback runs while a lock is held.
    """

    _ids: ClassVar[Iterator[int]] = itertools.count()

    def __init__(
        self,
        mask: int = ADDRESS_SPACE - 1,
        *,
        time_limit: float | None = None,
        sibling: BasicMemoryMapper | None = None,
    ) -> None:
        if not 0 < check_int(mask, "mask") < ADDRESS_SPACE:
            raise ValueError(f"mask {mask:#x} names no page size in 64 bits")
        self._mask = mask
        if sibling is not None and not isinstance(sibling, BasicMemoryMapper):
            raise TypeError(f"sibling must be a BasicMemoryMapper, not {type(sibling).__name__}")
        self.time_limit = _check_limit(time_limit)
        self._id = next(self._ids)
        # A session may move between siblings because one lock guards them all.
        self._lock: threading.Lock = threading.Lock() if sibling is None else sibling._lock
        self._map = IntervalMap(merge=False)
        self._sessions: set[ExportSession] = set()
        self._single: ExportSession | None = None

    def __repr__(self) -> str:
        return (
            f"<BasicMemoryMapper {self._id}: {len(self._map)} mappings, "
            f"{len(self._sessions)} sessions>"
        )

    @property
    def mask(self) -> int:
        """Page sizes that can be mapped, one bit each."""
        return self._mask

    @property
    def id(self) -> int:
        """Identifies the mapper among those of its class in this process."""
        return self._id

    @property
    def supports_detach(self) -> bool:
        """True: a domain of it can be reset at any time."""
        return True

    def __len__(self) -> int:
        return len(self._map)

    def __bool__(self) -> bool:
        return True

    def add_map(self, info: MappingInfo) -> AddMapResult:
        """Add a mapping, or refuse it if any of its range is mapped. O(log n)."""
        if not isinstance(info, MappingInfo):
            raise TypeError(f"info must be a MappingInfo, not {type(info).__name__}")
        return self.add_range(info.iova, info.size, info.gpa, info.prot)

    def add_range(self, iova: int, size: int, gpa: int, prot: Permissions) -> AddMapResult:
        """As :meth:`add_map`, but ``gpa + size`` may pass ``2**64``.

        A virtio-iommu may not refuse such a request; what lies behind the wrap is no memory, and
        cannot be exported.

        Raises:
            TypeError, ValueError: Bad numbers, or a size of 0; nothing changed.
        """
        try:
            added = self._map.add(iova, size, gpa, prot)
        except (TypeError, ValueError):
            # Once more, with the names that the caller knows.
            check_range(iova, size, name="iova", length_name="size", empty=False)
            check_address(gpa, "gpa")
            _check_prot(prot)
            raise
        return AddMapResult.OK if added else AddMapResult.OVERLAP

    def remove_map(self, iova: int, size: int) -> RemoveMapResult:
        """Remove every mapping in a range, or none if one reaches out of it.

        Memory that is exported from the range, whether from one of the mappings removed or not,
        breaks the sessions that hold it. The event in the result happens when all of those have
        released everything; there is none if all of them were broken before.

        Raises:
            TypeError, ValueError: Bad numbers, or a size of 0; nothing changed.

        Cost: O((k + 1) log n + exports) for k mappings removed.
        """
        first, length = check_range(iova, size, name="iova", length_name="size", empty=False)
        with self._lock:
            if self._map.take(first, length) is None:
                return RemoveMapResult(overlap=True)
            broken = self._break_sessions(first, first + length)
        return RemoveMapResult(fault=_announce(broken))

    def reset_domain(self) -> Event | None:
        """Remove every mapping.

        Returns:
            None, or the event that happens when all that was exported has been released.
        """
        with self._lock:
            self._map.clear()
            broken = self._break_sessions(0, ADDRESS_SPACE)
        return _announce(broken)

    def mappings(
        self, iova: int = 0, size: int = ADDRESS_SPACE, *, limit: int | None = None
    ) -> list[MapEntry]:
        """The mappings that touch a range, unclipped: ``(iova, size, gpa, prot)``, ascending.

        Args:
            iova: First I/O virtual address.
            size: Bytes.
            limit: How many to list at most. Use it where a guest chooses the range.
        """
        if limit is None:
            return self._map.overlapping(*check_range(iova, size, name="iova", length_name="size"))
        first, length = check_range(iova, size, name="iova", length_name="size")
        limit = check_int(limit, "limit")
        if limit < 0:
            raise ValueError(f"limit {limit} must be >= 0")
        found = self._map.overlapping(first, min(length, 1))
        at = first
        while length and len(found) < limit:
            after = self._map.neighbours(at)[1]
            if after is None or after[0] >= first + length:
                break
            found.append(after)
            at = after[0] + after[1] - 1
        return found[:limit]

    def is_free(self, iova: int, size: int) -> bool:
        """Whether nothing of a range is mapped. O(log n)."""
        first, length = check_range(iova, size, name="iova", length_name="size", empty=False)
        after = self._map.neighbours(first)[1]
        return not self._map.overlapping(first, 1) and (after is None or after[0] >= first + length)

    def open_session(self, *, time_limit: float | None = None) -> ExportSession:
        """Begin to export to a client, beside those that there are.

        Args:
            time_limit: Seconds the client has to release everything after a fault before it is
                revoked; None takes the mapper's.
        """
        limit = self.time_limit if time_limit is None else _check_limit(time_limit)
        session = ExportSession(self, limit)
        with self._lock:
            self._sessions.add(session)
        return session

    @property
    def sessions(self) -> list[ExportSession]:
        """The open sessions, oldest first."""
        with self._lock:
            return sorted(self._sessions, key=lambda session: session.id)

    def start_export_session(self) -> Event:
        """Begin to export to the mapper's one client, for :meth:`export` and :meth:`release`.

        Use :meth:`open_session` where there are several clients.

        Returns:
            The client's fault event.

        Raises:
            ExportError: The session before this one still holds memory.
        """
        session = ExportSession(self, self.time_limit)
        with self._lock:
            previous = self._single
            if previous is not None and previous._exports:
                raise ExportError("the previous export session is still active: it holds memory")
            if previous is not None:
                self._sessions.discard(previous)
            self._sessions.add(session)
            self._single = session
        return session.fault

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """As :meth:`ExportSession.export`, for the mapper's one client.

        Raises:
            ExportError: There is no session, or it is broken.
        """
        return self._one().export(iova, size)

    def release(self, iova: int, size: int) -> None:
        """As :meth:`ExportSession.release`, for the mapper's one client.

        Raises:
            ExportError: There is no session.
        """
        self._one().release(iova, size)

    def pending_faults(self) -> list[Event]:
        """What has faulted and is not released yet: the events that say when it is."""
        with self._lock:
            return [s._resolved for s in self._sessions if s._resolved is not None]

    def _one(self) -> ExportSession:
        if self._single is None:
            raise ExportError("no export session; call start_export_session() first")
        return self._single

    def _break_sessions(self, first: int, end: int) -> list[tuple[ExportSession, Event]]:
        broken = []
        for session in self._sessions:
            if session._touches(first, end):
                event = session._break()
                if event is not None:
                    broken.append((session, event))
        return broken

    def _resolve(self, iova: int, size: int) -> list[MemRegion]:
        """The memory behind a range that is mapped throughout; needs the lock."""
        regions: list[MemRegion] = []
        at, end = iova, iova + size
        for start, length, gpa, prot in self._map.overlapping(iova, size):
            if start > at:
                break
            target, part = gpa + at - start, min(start + length, end) - at
            if target + part > ADDRESS_SPACE:
                raise CannotResolveError(
                    IovaRange(at, part), None, f"its memory at {target:#x} passes 2**64"
                )
            last = regions[-1] if regions else None
            if last is not None and last.gpa + last.length == target and last.prot == prot:
                regions[-1] = MemRegion(last.gpa, last.length + part, prot)
            else:
                regions.append(MemRegion(target, part, prot))
            at += part
        if at < end:
            raise CannotResolveError(IovaRange(at, end - at), None, "it is not mapped throughout")
        return regions


def _announce(broken: Iterable[tuple[ExportSession, Event]]) -> Event | None:
    events = []
    for session, event in broken:
        session._announce()
        events.append(event)
    return all_of(events)
