"""What is where in the guest's address space, and every DMA target kept in step with it.

A *region* is a range of addresses with a priority: RAM, a ROM that shadows it, a device's BAR.
Its *mappings* say which parts of it lead to which memory; what is between them leads nowhere.
Of the regions that are mapped and overlap, the one with the highest priority is *active*; the
mappings of all active regions together are the truth that every target must hold.

An operation goes through three stages: check everything, carry out the steps at every target (on
failure take them back in reverse order), and only then change the regions. So what is readable
here is always the state before or after an operation, and memory is let go last.

Operations run one at a time, in order of arrival, each on its caller's thread. Targets are called
without a lock that readers need: everything that only reads goes
on. An operation that a target begins from inside a call is refused, because it could only wait
for itself. For the same reason a target must not wait for another thread's operation.
"""

from __future__ import annotations

import itertools
import mmap
from bisect import bisect_left, bisect_right, insort
from typing import TYPE_CHECKING, NamedTuple, Self, SupportsIndex, get_args

from guestio.addr import ADDRESS_SPACE, IovaRange, check_flag, check_int, check_range
from guestio.dma.changes import Entry, FairLock, Step, carry_out, meet, plan, raise_failures
from guestio.dma.dirty import DirtyMarks, DirtySupport, TrackingDmaTarget, is_tracked
from guestio.dma.ledger import DeviceFailures, Ledger, TargetDiff, TargetStats, keep
from guestio.dma.physical import PhysicalMap
from guestio.dma.target import DmaError, DmaMapRequest, DmaTarget, Journal, MappingType
from guestio.errors import MemoryRegionOverlapError, RegionError
from guestio.memory import AtomicBitmap
from guestio.memory.backing import Backing
from guestio.memory.followed import Followed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MAX_PRIORITY = 255


class SubMapping(NamedTuple):
    """A part of a region that leads to memory.

    Attributes:
        offset: Where in the region, in bytes.
        size: Bytes.
        backing: The memory.
        backing_offset: Where in the backing it begins.
        writable: Whether devices may write, if the region allows it too.
    """

    offset: int
    size: int
    backing: Backing
    backing_offset: int
    writable: bool


class Region:
    """A range of the guest's address space; made by :meth:`RegionManager.new_region`.

    A context manager that closes it. All methods may be called from any thread except from inside
    a call of a target.

    Attributes:
        name: For messages and listings.
        size: Bytes.
        priority: 0 to 255; the greater wins where regions overlap.
        kind: What its memory is.
    """

    def __init__(
        self,
        manager: RegionManager,
        name: str,
        start: int,
        size: int,
        priority: int,
        kind: MappingType,
        number: int,
    ) -> None:
        self._manager = manager
        # By age: of equal priorities, the lower number wins.
        self._number = number
        self.name = name
        self.size = size
        self.priority = priority
        self.kind = kind
        self._start = start
        self._mapped = False
        self._writable = True
        self._active = False
        self._closed = False
        # By offset, in the order in which they were added; `_offsets` is ascending.
        self._by_offset: dict[int, tuple[SubMapping, memoryview]] = {}
        self._offsets: list[int] = []

    @property
    def start(self) -> int:
        """First address; :meth:`move` changes it."""
        return self._start

    @property
    def end(self) -> int:
        """The first address after it; ``2**64`` is possible."""
        return self._start + self.size

    @property
    def mapped(self) -> bool:
        """Whether :meth:`map` was asked for; another region may cover it all the same."""
        return self._mapped

    @property
    def active(self) -> bool:
        """Whether its mappings are what devices reach: it is mapped and nothing covers it."""
        return self._active

    @property
    def writable(self) -> bool:
        """Whether its mappings may be writable."""
        return self._writable

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._closed

    @property
    def mappings(self) -> tuple[SubMapping, ...]:
        """Its mappings in the order in which they were added."""
        return tuple(mapping for mapping, _view in self._by_offset.copy().values())

    def add_mapping(
        self,
        offset: SupportsIndex,
        size: SupportsIndex,
        backing: Backing,
        backing_offset: SupportsIndex = 0,
        writable: bool = True,
    ) -> None:
        """Let a part of the region lead to memory; at once, if the region is active.

        The memory cannot be closed until the mapping is removed.

        Args:
            offset: Where in the region, in bytes.
            size: Bytes, greater than 0.
            backing: The memory.
            backing_offset: Where in the backing to begin.
            writable: Whether devices may write. They may not in any case where the region is
                mapped read-only or the backing is read-only.

        Raises:
            TypeError, ValueError: Bad numbers; not aligned to pages; outside the region or the
                backing; the region or the backing is closed.
            MemoryRegionOverlapError: Another mapping is there.
            DmaError: A target refused it, or needs a file and the backing has none.

        Whatever it raises, nothing has changed, except that a target which failed to undo what it
        had done is broken.
        """
        with self._manager._operations:
            self._check_open()
            mapping = self._checked_mapping(offset, size, backing, backing_offset, writable)
            self._manager._check_fds([self._request(mapping)])
            steps = [Step(None, self._entry(mapping))] if self._active else []
            view = keep(backing)
            try:
                self._manager._carry_out(steps)
            except BaseException:
                view.release()
                raise
            self._offsets.insert(bisect_right(self._offsets, mapping.offset), mapping.offset)
            self._by_offset[mapping.offset] = mapping, view

    def remove_mappings(self, offset: SupportsIndex, size: SupportsIndex) -> int:
        """Remove all mappings in a part of the region; targets are told first.

        Args:
            offset: Where in the region, in bytes.
            size: Bytes, greater than 0.

        Returns:
            How many there were.

        Raises:
            TypeError, ValueError: Bad numbers, outside the region, or the region is closed.
            RegionError: The part would cut a mapping in two; nothing has changed.
            DmaError: A target could not unmap one. The mappings are removed all the same; the
                target is broken and its memory is kept.
        """
        with self._manager._operations:
            self._check_open()
            first, length = self._checked_part(offset, size)
            gone = self._contained(first, first + length)
            steps = [Step(self._entry(m), None) for m in gone] if self._active else []
            failures = self._manager._carry_out(steps, onwards=True)
            for mapping in gone:
                del self._offsets[bisect_left(self._offsets, mapping.offset)]
                self._by_offset.pop(mapping.offset)[1].release()
        raise_failures(failures)
        return len(gone)

    def map(self, writable: bool = True) -> None:
        """Make the region count: active now, or as soon as nothing covers it.

        Regions that it covers become inactive. If it is mapped already, only ``writable`` is
        changed; where a target has no ``replace_dma``, each mapping is unmapped and mapped again,
        and a device's access in between faults.

        Args:
            writable: Whether its mappings may be writable.

        Raises:
            ValueError: The region is closed.
            DmaError: A target refused. Nothing has changed: what was active is active again and
                ``writable`` is not remembered; asking again tries again.
        """
        with self._manager._operations:
            self._check_open()
            self._manager._change(self, mapped=True, writable=check_flag(writable, "writable"))

    def unmap(self) -> None:
        """Make the region not count; what it covered becomes active.

        Raises:
            ValueError: The region is closed.
            DmaError: Either a target could not unmap: the region is unmapped all the same, the
                target is broken and its memory is kept. Or a target refused what becomes active:
                nothing has changed. :attr:`mapped` tells which.
        """
        with self._manager._operations:
            self._check_open()
            failures = self._manager._change(self, mapped=False, onwards=True)
        raise_failures(failures)

    def move(self, start: SupportsIndex) -> None:
        """Put the region elsewhere, with all its mappings.

        Targets hold the new place before they lose the old one, so an access through either does
        not fault; only where the two overlap is the old one unmapped first.

        Args:
            start: Its new first address.

        Raises:
            TypeError, ValueError: A bad address, or the region is closed.
            MemoryRegionOverlapError: It would overlap another region in a way that
                :meth:`RegionManager.new_region` refuses.
            DmaError: A target refused; nothing has changed.
        """
        with self._manager._operations:
            self._check_open()
            first, _ = self._manager._check_placement(start, self.size, self.priority, self)
            self._manager._change(self, mapped=self._mapped, start=first, make_first=True)

    def close(self) -> None:
        """Unmap it and remove it and its mappings. Closing it again does nothing.

        Raises:
            DmaError: As :meth:`unmap`; the region is closed if it is no longer :attr:`mapped`.
        """
        with self._manager._operations:
            if self._closed:
                return
            failures = self._manager._change(self, mapped=False, onwards=True)
            self._closed = True
            self._manager._remove(self)
            for _mapping, view in self._by_offset.values():
                view.release()
            self._by_offset, self._offsets = {}, []
        raise_failures(failures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "active" if self._active else "inactive"
        return (
            f"<Region {self.name!r} {self._start:#x}+{self.size:#x} {self.kind.value} "
            f"priority {self.priority} {state}>"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"region {self.name!r} is closed")

    def _checked_part(self, offset: SupportsIndex, size: SupportsIndex) -> tuple[int, int]:
        first, length = check_range(offset, size, name="offset", length_name="size", empty=False)
        self._manager._check_aligned("mapping", first, length)
        if first + length > self.size:
            raise ValueError(
                f"{first:#x}+{length:#x} is not inside region {self.name!r} of {self.size:#x} bytes"
            )
        return first, length

    def _checked_mapping(
        self,
        offset: SupportsIndex,
        size: SupportsIndex,
        backing: Backing,
        backing_offset: SupportsIndex,
        writable: bool,
    ) -> SubMapping:
        first, length = self._checked_part(offset, size)
        if not isinstance(backing, Backing):
            raise TypeError(f"backing must be a Backing, not {type(backing).__name__}")
        skip, _ = check_range(backing_offset, length, name="backing_offset", length_name="size")
        if backing.closed:
            raise ValueError(f"the backing for {first:#x}+{length:#x} is closed")
        if skip + length > backing.size:
            raise ValueError(
                f"{skip:#x}+{length:#x} is not inside the backing of {backing.size:#x} bytes"
            )
        self._manager._check_aligned("memory", backing.host_address + skip)
        at = bisect_right(self._offsets, first)
        for other in self._offsets[max(at - 1, 0) : at + 1]:
            there = self._by_offset[other][0]
            if there.offset < first + length and first < there.offset + there.size:
                raise MemoryRegionOverlapError(
                    f"mapping {first:#x}+{length:#x} overlaps {there.offset:#x}+{there.size:#x} "
                    f"in region {self.name!r}; remove that one first"
                )
        return SubMapping(first, length, backing, skip, check_flag(writable, "writable"))

    def _contained(self, first: int, end: int) -> list[SubMapping]:
        found = []
        at = max(bisect_right(self._offsets, first) - 1, 0)
        for index in range(at, bisect_left(self._offsets, end)):
            offset = self._offsets[index]
            mapping, _view = self._by_offset[offset]
            if offset + mapping.size <= first:
                continue
            if offset < first or offset + mapping.size > end:
                raise RegionError(
                    f"removing {first:#x}+{end - first:#x} would cut mapping "
                    f"{offset:#x}+{mapping.size:#x} of region {self.name!r}"
                )
            found.append(mapping)
        return found

    def _request(
        self, mapping: SubMapping, start: int | None = None, writable: bool | None = None
    ) -> DmaMapRequest:
        backing, skip = mapping.backing, mapping.backing_offset
        base = self._start if start is None else start
        allowed = self._writable if writable is None else writable
        return DmaMapRequest(
            start=base + mapping.offset,
            size=mapping.size,
            host_address=backing.host_address + skip,
            fd=backing.fd,
            file_offset=0 if backing.file_offset is None else backing.file_offset + skip,
            writable=mapping.writable and allowed and backing.writable,
            kind=self.kind,
        )

    def _entry(
        self, mapping: SubMapping, start: int | None = None, writable: bool | None = None
    ) -> Entry:
        return Entry(self._request(mapping, start, writable), mapping.backing)

    def _entries(self, start: int | None = None, writable: bool | None = None) -> list[Entry]:
        return [self._entry(m, start, writable) for m in self.mappings]


class TargetHandle:
    """A registered target; made by :meth:`RegionManager.add_target`.

    A context manager that closes it. A target is *broken* once it has failed to unmap something:
    the memory is kept, it gets no new mappings, and :meth:`retry` mends it.

    :meth:`stats` and :meth:`diff` may be called from any thread at any time; the others from any
    thread except from inside a call of a target.

    Attributes:
        target: The target.
        needs_fd: Whether it can only hold memory that has a file.
        device_failures: ``"record"`` or ``"raise"``, see :meth:`RegionManager.add_target`.
        marks_itself: Whether dirty tracking leaves it out.
    """

    def __init__(
        self,
        manager: RegionManager,
        target: DmaTarget,
        needs_fd: bool,
        device_failures: DeviceFailures,
        marks_itself: bool,
    ) -> None:
        self._manager = manager
        self.target = target
        self.needs_fd = needs_fd
        self.device_failures = device_failures
        self.marks_itself = marks_itself
        self._ledger = Ledger(target, device_failures)
        self._closed = False

    @property
    def broken(self) -> DmaError | None:
        """The failure that broke the target, or None."""
        return self._ledger.broken

    @property
    def closed(self) -> bool:
        """Whether it is no longer registered."""
        return self._closed

    def stats(self) -> TargetStats:
        """What the target holds, what it failed to hold and why, and its calls' counts."""
        return self._ledger.stats()

    def diff(self) -> TargetDiff:
        """How what the target holds differs from what it should hold."""
        return self._ledger.diff([] if self._closed else self._manager._truth())

    def dirty_support(self) -> DirtySupport:
        """How the target can tell what devices write, and what is missing if it cannot.

        Raises:
            DeviceError: It cannot be asked yet, such as a container without a device.
        """
        with self._manager._operations:
            if isinstance(self.target, TrackingDmaTarget):
                return self.target.dirty_support()
            return DirtySupport({}, f"{self.target!r} has no start_dirty_tracking")

    def retry(self) -> TargetDiff:
        """Mend the target: unmap what is in doubt, map what is missing.

        Returns:
            What still differs: mappings of kind ``DEVICE`` that it refused again.

        Raises:
            ValueError: The target is closed.
            DmaError: It failed again and is still broken.
        """
        with self._manager._operations:
            if self._closed:
                raise ValueError("this target is closed")
            self._ledger.reconcile(self._manager._truth())
            return self.diff()

    def close(self) -> None:
        """Unmap all that the target holds and forget it. Closing it again does nothing.

        Raises:
            DmaError: It could not unmap something. That memory is kept and the target stays
                registered, broken; close it again, or :meth:`forget` it once it is gone.
        """
        with self._manager._operations:
            if self._closed:
                return
            failures = self._ledger.release_all(self._manager._truth())
            if not failures:
                self._discard()
                self._ledger.stop_tracking()
        raise_failures(failures)

    def forget(self) -> None:
        """Drop the target without calling it, and let go of the memory kept for it.

        Only for a target that no longer exists, such as a container whose fd was closed: devices
        must not reach anything through it any more.
        """
        with self._manager._operations:
            if not self._closed:
                self._ledger.forget()
                self._discard()

    def _discard(self) -> None:
        self._closed = True
        self._manager._targets = tuple(t for t in self._manager._targets if t is not self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "broken" if self.broken else "live"
        return f"<TargetHandle {self.target!r} {state}>"


class _Places:
    """Regions by place, so that those that meet a range are found without a look at all.

    They are kept by size class, the number of bits of their size. A region of a class that meets
    a range begins less than the class's largest size before it; as regions only overlap where one
    contains the other, few of one class that begin there do not meet it.
    """

    def __init__(self) -> None:
        self._classes: dict[int, list[tuple[int, int, Region]]] = {}

    def add(self, region: Region) -> None:
        """Enter a region where it is now."""
        members = self._classes.setdefault(region.size.bit_length(), [])
        insort(members, (region.start, region._number, region))

    def remove(self, region: Region) -> None:
        """Take a region out, before its place changes."""
        bits = region.size.bit_length()
        members = self._classes[bits]
        del members[bisect_left(members, (region.start, region._number))]
        if not members:
            del self._classes[bits]

    def meeting(self, start: int, size: int) -> list[Region]:
        """The regions that share an address with a range."""
        found = []
        for bits, members in self._classes.items():
            first = bisect_right(members, (start - (1 << bits) + 1,))
            for at in range(first, bisect_left(members, (start + size,), first)):
                region = members[at][2]
                if region.end > start:
                    found.append(region)
        return found


class RegionManager:
    """Regions of a guest's address space and the targets that follow them.

    A context manager that closes everything. All methods may be called from any thread except from
    inside a call of a target; see the module's text for how operations are ordered.

    Args:
        page_size: What addresses, sizes and offsets must be multiples of, in bytes; the host's
            page size by default, because no IOMMU maps less.
    """

    def __init__(self, page_size: int = mmap.PAGESIZE) -> None:
        page = check_int(page_size, "page_size")
        if not 0 < page < ADDRESS_SPACE or page & (page - 1):
            raise ValueError(f"page_size {page} is not a power of two of 64 bits")
        self._page_size = page
        self._operations = FairLock()
        # By age. Readers take a copy, which is one step, so that they need no lock.
        self._regions: dict[int, Region] = {}
        self._places = _Places()
        self._numbers = itertools.count()
        # Replaced as a whole, for the same reason.
        self._targets: tuple[TargetHandle, ...] = ()
        # The mappings of all active regions, from the moment on when they were asked for.
        self._followed: Followed[PhysicalMap] | None = None
        # While what devices write is tracked.
        self._marks: DirtyMarks | None = None

    def __repr__(self) -> str:
        return f"<RegionManager: {len(self._regions)} regions, {len(self._targets)} targets>"

    @property
    def regions(self) -> tuple[Region, ...]:
        """All open regions in the order in which they were made."""
        return tuple(self._regions.copy().values())

    @property
    def targets(self) -> tuple[TargetHandle, ...]:
        """All registered targets in the order in which they were added."""
        return self._targets

    def mappings(self) -> tuple[DmaMapRequest, ...]:
        """What every target should hold: the mappings of all active regions."""
        return tuple(entry.request for entry in self._truth())

    def followed(self) -> Followed[PhysicalMap]:
        """For sources of mappings that lead to this memory, such as a virtio-iommu. Only follow it.

        Followers are told of a change after the targets, and before it is readable here; what they
        raise undoes it, except that what a target does not give up is treated as for targets.
        """
        if self._followed is None:
            with self._operations:
                if self._followed is None:
                    self._followed = Followed(PhysicalMap(self._truth()))
        return self._followed

    def new_region(
        self,
        name: str,
        start: SupportsIndex,
        size: SupportsIndex,
        priority: SupportsIndex = 0,
        kind: MappingType = MappingType.RAM,
    ) -> Region:
        """Make a region: empty, and not mapped.

        A region may overlap others only so that one covers the other: of two with different
        priorities, the one with the greater one must contain the other; two with the same one
        must have the same range, and the earlier wins.

        Args:
            name: For messages and listings.
            start: First address.
            size: Bytes, greater than 0.
            priority: 0 to 255; the greater wins.
            kind: What its memory is.

        Raises:
            TypeError, ValueError: Bad numbers, or not aligned to pages.
            MemoryRegionOverlapError: It would cover a part of a region.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, not {type(name).__name__}")
        if not isinstance(kind, MappingType):
            raise TypeError(f"kind must be a MappingType, not {type(kind).__name__}")
        rank = check_int(priority, "priority")
        if not 0 <= rank <= MAX_PRIORITY:
            raise ValueError(f"priority {rank} is not in [0, {MAX_PRIORITY}]")
        with self._operations:
            first, length = self._check_placement(start, size, rank)
            number = next(self._numbers)
            region = Region(self, name, first, length, rank, kind, number)
            self._places.add(region)
            self._regions[number] = region
        return region

    def add_target(
        self,
        target: DmaTarget,
        needs_fd: bool = False,
        *,
        device_failures: DeviceFailures = "record",
        marks_itself: bool = False,
    ) -> TargetHandle:
        """Make a target hold all active mappings, now and from now on.

        Args:
            target: Receives the mappings.
            needs_fd: Whether it can only hold memory that has a file. Mappings without one are
                refused as long as it is registered.
            device_failures: What happens when it refuses a mapping of kind ``DEVICE``, with a
                :class:`~guestio.GuestioError` or an OSError: ``"record"`` goes on and lists it in
                :meth:`TargetHandle.stats`, ``"raise"`` fails the operation, as for RAM. Any other
                exception is a bug of the target and always fails the operation.
            marks_itself: True if what is written through it is marked by the one who writes, such
                as a vhost-user back-end in its dirty log: dirty tracking leaves it out.

        Raises:
            TypeError, ValueError: Not a target, registered already, or a bad argument.
            DeviceError: Dirty tracking is on, and it cannot tell what devices write.
            DmaError: It refused a mapping, or a mapping has no file. It holds nothing then and
                is not registered; only if it failed even to undo does it stay in
                :attr:`targets`, broken.
        """
        if isinstance(target, type):
            raise TypeError(f"target must be an instance, not the class {target.__name__}")
        if not isinstance(target, DmaTarget):
            raise TypeError(f"target {type(target).__name__} has no map_dma and unmap_dma")
        needs_fd = check_flag(needs_fd, "needs_fd")
        marks_itself = check_flag(marks_itself, "marks_itself")
        if not isinstance(device_failures, str) or device_failures not in get_args(DeviceFailures):
            raise ValueError(f"device_failures {device_failures!r} is neither 'record' nor 'raise'")
        with self._operations:
            if any(handle.target is target for handle in self._targets):
                raise ValueError("this target is registered already")
            handle = TargetHandle(self, target, needs_fd, device_failures, marks_itself)
            if needs_fd:
                everything = [r._request(m) for r in self.regions for m in r.mappings]
                _check_fds(everything)
            if self._marks is not None and not marks_itself:
                # First, as devices may write as soon as something is mapped.
                handle._ledger.start_tracking(self._marks, self._tracked_ranges())
            try:
                carry_out([Step(None, entry) for entry in self._truth()], [handle._ledger])
            except BaseException as error:
                if not handle._ledger.empty:
                    self._targets = (*self._targets, handle)
                    raise
                journal = Journal()
                journal.did(handle._ledger.stop_tracking)
                for undoing in journal.undo():
                    error.add_note(f"while undoing: {undoing}")
                raise
            self._targets = (*self._targets, handle)
        return handle

    @property
    def dirty_tracking(self) -> AtomicBitmap | None:
        """Where what devices write is marked; None while that is not tracked."""
        return None if self._marks is None else self._marks.bitmap

    def start_dirty_tracking(self, marks: AtomicBitmap) -> None:
        """Note from now on what devices write through all targets, or through none.

        What had been written before is not told: a migration copies all memory once after this.
        Memory of kind ``DEVICE`` and memory that devices may only read is left out. Mappings that
        come while it is on are tracked as well. What was written in one that goes is marked
        before the operation returns.

        Args:
            marks: Covers all memory, by guest physical address from 0 on; what is written is
                marked there by :meth:`harvest_dirty`. It may have a dirty log
                (``AtomicBitmap(log=...)``), which then has it too.

        Raises:
            TypeError: ``marks`` is no AtomicBitmap.
            ValueError: Tracking is on.
            DmaError: Some memory lies beyond ``marks``.
            DeviceError: A target cannot: its message names the devices and what is missing.
                Nothing is tracked at any target.
        """
        if not isinstance(marks, AtomicBitmap):
            raise TypeError(f"marks must be an AtomicBitmap, not {type(marks).__name__}")
        with self._operations:
            if self._marks is not None:
                raise ValueError("dirty tracking is on; stop it first")
            tracked = DirtyMarks(marks)
            tracked.check(entry.request for entry in self._truth())
            ranges, journal = self._tracked_ranges(), Journal()
            try:
                for handle in self._targets:
                    if not handle.marks_itself:
                        handle._ledger.start_tracking(tracked, ranges)
                        journal.did(handle._ledger.stop_tracking)
            except BaseException as error:
                for undoing in journal.undo():
                    error.add_note(f"while undoing: {undoing}")
                raise
            self._marks = tracked

    def harvest_dirty(self) -> int:
        """Mark what devices have written since the last harvest, or the start.

        A page that is written meanwhile is marked by this harvest or the next. So once the devices
        have been stopped, one harvest more has everything.

        Returns:
            How many pages the targets reported; one that two of them report counts twice.

        Raises:
            ValueError: Tracking is off.
            DmaError: A target could not tell for some mapping; the first such error, the others
                are its notes. Everything there is marked, so nothing is lost, and all else was
                harvested; but it will not become less until tracking is stopped and started.

        Cost: a few system calls for each mapping and target, which walk the IOMMU's page tables;
        changes of regions wait.
        """
        with self._operations:
            if self._marks is None:
                raise ValueError("dirty tracking is off; start it first")
            found = 0
            failures: list[DmaError] = []
            for handle in self._targets:
                pages, failed = handle._ledger.harvest()
                found += pages
                failures += failed
        if failures:
            first, *others = failures
            for other in others:
                first.add_note(f"also: {other}")
            raise first
        return found

    def stop_dirty_tracking(self) -> None:
        """End it; what was written since the last harvest is not told. Off already: does nothing.

        Raises:
            OSError, DeviceError: A target failed; the first such error. It is off all the same.
        """
        with self._operations:
            self._marks = None
            journal = Journal()
            for handle in self._targets:
                journal.did(handle._ledger.stop_tracking)
            failures = journal.undo()
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Close all targets, the latest first, then all regions. Dirty tracking ends.

        Raises:
            DmaError: A target could not unmap something; it is the only thing left open.
        """
        failures: list[DmaError] = []
        closers: list[Callable[[], None]] = [t.close for t in reversed(self._targets)]
        closers += [r.close for r in reversed(self.regions)]
        closers.append(self.stop_dirty_tracking)
        for close in closers:
            try:
                close()
            except DmaError as error:
                failures.append(error)
        raise_failures(failures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _tracked_ranges(self) -> list[IovaRange]:
        """Where devices' writes are of interest."""
        requests = [entry.request for entry in self._truth()]
        return [IovaRange(r.start, r.size) for r in requests if is_tracked(r)]

    def _truth(self) -> list[Entry]:
        return [entry for region in self.regions if region._active for entry in region._entries()]

    def _remove(self, region: Region) -> None:
        self._places.remove(region)
        del self._regions[region._number]

    def _check_aligned(self, what: str, *numbers: int) -> None:
        if any(number % self._page_size for number in numbers):
            shown = "+".join(f"{number:#x}" for number in numbers)
            raise ValueError(f"{what} {shown} is not aligned to pages of {self._page_size:#x}")

    def _check_placement(
        self,
        start: SupportsIndex,
        size: SupportsIndex,
        priority: int,
        moving: Region | None = None,
    ) -> tuple[int, int]:
        first, length = check_range(start, size, name="start", length_name="size", empty=False)
        self._check_aligned("region", first, length)
        end = first + length
        for other in self._places.meeting(first, length):
            if other is moving:
                continue
            inside = other.start <= first and end <= other.end
            around = first <= other.start and other.end <= end
            if (priority <= other.priority and not inside) or (
                priority >= other.priority and not around
            ):
                raise MemoryRegionOverlapError(
                    f"region {first:#x}+{length:#x} with priority {priority} overlaps {other}; "
                    "the one with the greater priority must contain the other, and equal ones "
                    "must have the same range"
                )
        return first, length

    def _check_fds(self, requests: Iterable[DmaMapRequest]) -> None:
        if any(handle.needs_fd for handle in self._targets):
            _check_fds(requests)

    def _change(
        self,
        region: Region,
        *,
        mapped: bool,
        writable: bool | None = None,
        start: int | None = None,
        onwards: bool = False,
        make_first: bool = False,
    ) -> list[DmaError]:
        """Give a region another state, and every region it meets the activity that follows.

        Only regions that overlap its old or new place can be affected.
        """
        place = region._start if start is None else start
        allow = region._writable if writable is None else writable
        if (mapped, place, allow) == (region._mapped, region._start, region._writable):
            return []

        def state(other: Region) -> tuple[int, bool]:
            return (place, mapped) if other is region else (other._start, other._mapped)

        affected = {region._number: region}
        for start_of in {region._start, place}:
            for other in self._places.meeting(start_of, region.size):
                affected[other._number] = other
        active = {other: self._wins(other, state, region) for other in affected.values()}
        # What stays active as it is has nothing to do with the targets.
        changed = [
            other for other, now in active.items() if other is region or now is not other._active
        ]
        changed.sort(key=lambda other: other._number)
        before = [e for other in changed if other._active for e in other._entries()]
        after = []
        for other in changed:
            if active[other]:
                after += region._entries(place, allow) if other is region else other._entries()
        failures = self._carry_out(plan(before, after, make_first), onwards=onwards)
        if place != region._start:
            self._places.remove(region)
            region._start = place
            self._places.add(region)
        region._mapped, region._writable = mapped, allow
        for other in changed:
            other._active = active[other]
        return failures

    def _wins(
        self, region: Region, state: Callable[[Region], tuple[int, bool]], changing: Region
    ) -> bool:
        start, mapped = state(region)
        if not mapped:
            return False
        for other in {*self._places.meeting(start, region.size), changing}:
            there, counts = state(other)
            if not counts or not meet(start, region.size, there, other.size):
                continue
            if other.priority > region.priority:
                return False
            if other.priority == region.priority and other._number < region._number:
                return False
        return True

    def _carry_out(self, steps: Sequence[Step], *, onwards: bool = False) -> list[DmaError]:
        def tell_followers(failures: list[DmaError] | None) -> None:
            if self._followed is not None and steps:
                self._followed.replace(self._followed.value.after(steps), failures)

        if self._marks is not None:
            self._marks.check(step.new.request for step in steps if step.new is not None)
        ledgers = [handle._ledger for handle in self._targets]
        return carry_out(steps, ledgers, onwards=onwards, then=tell_followers)


def _check_fds(requests: Iterable[DmaMapRequest]) -> None:
    for request in requests:
        if request.fd is None:
            raise DmaError(
                "map",
                request.start,
                request.size,
                "the memory has no file, but a target needs one: use a memfd for it",
            )
