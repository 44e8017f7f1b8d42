"""What one target was told, what of it the target holds, and how to take steps back.

A change of the mappings is a list of steps, each carried out at every target in turn. A target's
ledger carries a step out, remembers its outcome and notes in a journal how to undo it; it asks
the target to unmap only what the target really holds. Memory is kept from being closed for as
long as a ledger says that a device may reach it.

Every source of mappings has a ledger for each of its targets: a region manager, and a virtio-iommu.
They differ in what follows when a target does not give a mapping up. A region manager's owner hears
of it and calls ``retry()``, so until then the target gets nothing new. A virtio-iommu's driver
hears of a refused request at most, so its ledgers mend themselves: only the range in question is
*stuck*, and is tried again before something else is mapped there.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from guestio.addr import ADDRESS_SPACE
from guestio.dma.changes import Step, plan
from guestio.dma.dirty import TrackingDmaTarget, finest, is_tracked
from guestio.dma.target import (
    DmaError,
    DmaMapRequest,
    DmaTarget,
    Journal,
    MappingType,
)
from guestio.errors import DeviceError, GuestioError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from guestio.addr import IovaRange
    from guestio.dma.changes import Entry
    from guestio.dma.dirty import DirtyMarks
    from guestio.memory.backing import Backing


DeviceFailures = Literal["record", "raise"]
"""What a target's refusal of a mapping of kind ``DEVICE`` is: noted, or the operation's failure."""


def keep(backing: Backing) -> memoryview:
    """A buffer of the memory: while it exists, the backing refuses to be closed."""
    return memoryview(backing._mapping)


@dataclass(frozen=True, slots=True)
class FailedMapping:
    """A mapping of kind ``DEVICE`` that a target could not hold, and why."""

    request: DmaMapRequest
    error: Exception


@dataclass(frozen=True, slots=True)
class TargetStats:
    """What a target holds and how its calls went.

    Attributes:
        mappings: Mappings it holds now.
        mapped_bytes: Sum of their sizes.
        maps: Calls of ``map_dma`` that succeeded.
        unmaps: Calls of ``unmap_dma`` that succeeded.
        replaces: Calls of ``replace_dma`` that succeeded.
        map_failures: Calls of ``map_dma`` or ``replace_dma`` that raised.
        unmap_failures: Calls of ``unmap_dma`` that raised.
        failed: Mappings of kind ``DEVICE`` it should hold and does not, with the reason.
        quarantined: Mappings whose unmapping failed; their memory is kept.
        broken: Whether it gets no new mappings until ``retry()`` has succeeded.
    """

    mappings: int
    mapped_bytes: int
    maps: int
    unmaps: int
    replaces: int
    map_failures: int
    unmap_failures: int
    failed: tuple[FailedMapping, ...]
    quarantined: tuple[DmaMapRequest, ...]
    broken: bool


@dataclass(frozen=True, slots=True)
class TargetDiff:
    """How a target differs from what it should hold; false if it does not.

    Attributes:
        missing: Mappings it should hold and does not, in the order they would be made.
        stale: Mappings that it may still hold although they should be gone, or whose state is
            unknown because unmapping them failed.
    """

    missing: tuple[DmaMapRequest, ...]
    stale: tuple[DmaMapRequest, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.stale)


@dataclass(slots=True)
class _Held:
    entry: Entry
    # The call that makes it has not returned.
    pending: bool = True
    # Why it is stuck: unmapping it failed, it may be reachable wholly, partly or not at all.
    error: DmaError | None = None


@dataclass(frozen=True, slots=True)
class _Failure:
    entry: Entry
    error: Exception


@dataclass(slots=True)
class _Kept:
    view: memoryview
    mappings: int = 0


class Ledger:
    """The record of one target.

    Steps are carried out by one thread at a time; :meth:`stats` and :meth:`diff` may be called
    from any thread at any time.

    Args:
        target: The target.
        device_failures: ``"record"`` to go on without a mapping of kind ``DEVICE`` that the target
            refuses, ``"raise"`` to treat it like RAM.
        self_mending: What follows when the target does not give up a mapping that must go. False:
            it is broken, and gets nothing new until :meth:`reconcile` succeeds. True: that range
            is stuck, and is unmapped before something else is mapped there, or by :meth:`unstick`.
            What an undo could not map again is listed in :meth:`missing`.
    """

    def __init__(
        self,
        target: DmaTarget,
        device_failures: DeviceFailures = "record",
        *,
        self_mending: bool = False,
    ) -> None:
        self.target = target
        self._self_mending = self_mending
        self._records_failures = device_failures == "record"
        # Optional; see ReplacingDmaTarget.
        self._replace_dma: Callable[[DmaMapRequest, DmaMapRequest], None] | None = getattr(
            target, "replace_dma", None
        )
        self.broken: DmaError | None = None
        # Where what devices write is marked, while that is tracked at this target.
        self.marks: DirtyMarks | None = None
        self._held: dict[int, _Held] = {}
        self._stuck: set[int] = set()
        self._failed: dict[int, _Failure] = {}
        # What an undo could not map again, where the ledger mends itself.
        self._lost: dict[int, _Failure] = {}
        # The memory of all that is held, each once.
        self._kept: dict[int, _Kept] = {}
        self._calls = dict.fromkeys(("map", "unmap", "replace"), 0)
        self._errors = dict.fromkeys(("map", "unmap", "replace"), 0)
        # Guards the fields above for readers; never held while the target is called.
        self._lock = threading.Lock()

    def carry_out(
        self, step: Step, journal: Journal, failures: list[DmaError] | None = None
    ) -> None:
        """Take one step at this target.

        Args:
            step: What to do.
            journal: Notes how to undo it.
            failures: Collects unmappings that failed, instead of raising them; they are stuck.

        Raises:
            DmaError: The target refused; the journal holds what had been done before.
        """
        old, new = step
        if (
            old is not None
            and new is not None
            and self._replace_dma is not None
            and self._holds(old.request)
            and self.broken is None
            # An exchange would forget what was written in the old memory.
            and self.marks is None
        ):
            self._replace(old, new, journal)
            return
        if old is not None:
            try:
                self.unmap(old, journal)
            except DmaError as error:
                if failures is None:
                    raise
                self._stick(old.request.start, error, journal)
                failures.append(error)
        if new is not None:
            if failures is not None and self._self_mending and self._stuck:
                try:
                    self.unstick(new.request.start, new.request.end)
                except DmaError as error:
                    self._note(self._lost, _Failure(new, _without_stack(error)), journal)
                    failures.append(error)
                    return
            self.map(new, journal)

    def map(self, entry: Entry, journal: Journal) -> None:
        """Map at the target, unless it is broken.

        Raises:
            DmaError: It refused memory that it must hold, has a bug, or did not give up what is
                stuck there.
        """
        if self.broken is not None:
            return
        if self._stuck:
            self.unstick(entry.request.start, entry.request.end)
        self._map(entry, journal)

    def _map(self, entry: Entry, journal: Journal) -> None:
        request = entry.request
        # Entered before the call: an interrupt that arrives while the target returns must not
        # lose a mapping it has made.
        self._enter(_Held(entry))
        journal.did(lambda: self._take_back(request.start))
        try:
            self.target.map_dma(request)
        except Exception as error:
            self._drop(request.start)
            self._count("map", failed=True)
            if not self._does_without(request, error):
                raise _as_dma_error("map", request, error) from _cause(error)
            self._note(self._failed, _Failure(entry, _without_stack(error)), journal)
            return
        self._held[request.start].pending = False
        self._count("map")
        if self._lost:
            self._unnote(self._lost, entry, journal)

    def unmap(self, entry: Entry, journal: Journal) -> None:
        """Take a mapping away from the target, if the target holds it.

        Raises:
            DmaError: It failed. The memory is kept and the target is broken, or with
                ``self_mending`` counts as holding it still.
        """
        start = entry.request.start
        for notes in (self._failed, self._lost):
            if notes:
                self._unnote(notes, entry, journal)
        if self._holds(entry.request):
            self._unmap_held(start)
            journal.did(lambda: self._map_again(entry))

    def steps_to(self, wanted: Sequence[Entry]) -> list[Step]:
        """What leads from what it holds, or should hold, to ``wanted``; see :func:`plan`."""
        with self._lock:
            before = [held.entry for held in self._held.values() if held.error is None]
            for notes in (self._failed, self._lost):
                before += [failure.entry for failure in notes.values()]
        before.sort(key=lambda entry: entry.request.start)
        return self.steps_between(before, wanted)

    def steps_between(self, before: Sequence[Entry], after: Sequence[Entry]) -> list[Step]:
        """As :func:`plan`; but what an undo could not map again, and is to stay, is tried again."""
        with self._lock:
            lost = {failure.entry.request for failure in self._lost.values()}
        if lost:
            before = [entry for entry in before if entry.request not in lost]
            kept = {entry.request for entry in after}
            gone = [f.entry for f in self._lost.values() if f.entry.request not in kept]
            return [Step(entry, None) for entry in gone] + plan(before, after, make_first=False)
        return plan(before, after, make_first=False)

    def unstick(self, start: int = 0, end: int = ADDRESS_SPACE) -> None:
        """Unmap what is stuck in a range.

        Raises:
            DmaError: The target still does not give something up.
        """
        for at in sorted(self._stuck):
            request = self._held[at].entry.request
            if request.start < end and start < request.end:
                self._unmap_held(at)

    def note_missing(self, entry: Entry, error: Exception) -> None:
        """Note that the target does not hold a mapping that it should."""
        self._note(self._lost, _Failure(entry, _without_stack(error)), Journal())

    def missing(self) -> dict[int, str]:
        """What it should hold and does not, by first address, and why."""
        with self._lock:
            notes = [*self._failed.values(), *self._lost.values()]
            return {note.entry.request.start: str(note.error) for note in notes}

    def stuck(self) -> dict[int, str]:
        """What should be gone and the target did not give up, by first address, and why."""
        with self._lock:
            return {start: str(self._held[start].error) for start in sorted(self._stuck)}

    def release_all(self, entries: Iterable[Entry]) -> list[DmaError]:
        """Unmap ``entries`` in order, then whatever else is held; returns what failed."""
        starts = [entry.request.start for entry in entries]
        failures = []
        for start in dict.fromkeys([*starts, *self._held]):
            if start in self._held:
                try:
                    self._unmap_held(start)
                except DmaError as error:
                    failures.append(error)
        if not failures:
            with self._lock:
                self._failed.clear()
        return failures

    def reconcile(self, wanted: Sequence[Entry]) -> None:
        """Make the target hold ``wanted`` again: unmap what is in doubt, map what is missing.

        Raises:
            DmaError: It refused. New mappings are taken back; it stays broken if it was.
        """
        by_start = {entry.request.start: entry.request for entry in wanted}
        for start, held in list(self._held.items()):
            if held.error is not None or by_start.get(start) != held.entry.request:
                self._unmap_held(start)
        with self._lock:
            failed, self._failed = self._failed, {}
        journal = Journal()
        try:
            for entry in wanted:
                if not self._holds(entry.request):
                    self._map(entry, journal)
        except BaseException:
            journal.undo()
            with self._lock:
                self._failed = failed
            raise
        self.broken = None

    def start_tracking(self, marks: DirtyMarks, ranges: Sequence[IovaRange]) -> None:
        """Have the target note what devices write from now on; see :class:`TrackingDmaTarget`.

        Raises:
            DeviceError: It cannot; nothing has changed.
        """
        target = self.target
        if not isinstance(target, TrackingDmaTarget):
            raise DeviceError(
                f"{target!r} cannot tell what devices write: it has no start_dirty_tracking; add "
                "it with marks_itself=True if what writes through it marks that elsewhere"
            )
        target.start_dirty_tracking(ranges)
        self.marks = marks

    def stop_tracking(self) -> None:
        """Have it note nothing any more; does nothing if it does not."""
        marks, self.marks = self.marks, None
        if marks is not None:
            assert isinstance(self.target, TrackingDmaTarget)
            self.target.stop_dirty_tracking()

    def harvest(self) -> tuple[int, list[DmaError]]:
        """Mark what devices have written; where that is not known, everything.

        Returns:
            How many pages were reported, and where it is not known.
        """
        marks, target = self.marks, self.target
        found, failures = 0, []
        if marks is None:
            return 0, []
        assert isinstance(target, TrackingDmaTarget)
        for held in list(self._held.values()):
            request = held.entry.request
            if not is_tracked(request):
                continue
            unit = finest(request, marks.bitmap.page_size)
            bits = None
            try:
                bits = target.read_dirty(request.start, request.size, unit)
            except DmaError as error:
                failures.append(_kept_error(error))
            finally:
                # Also when interrupted: what the target gave away then, is nowhere else.
                found += marks.take(request, bits)
        return found, failures

    def forget(self) -> None:
        """Let go of everything without calling the target, which is gone."""
        if self.marks is not None:
            # It took along what was written through it since the last harvest.
            for held in self._held.values():
                if is_tracked(held.entry.request):
                    self.marks.take(held.entry.request, None)
            self.marks = None
        for start in list(self._held):
            self._drop(start)
        with self._lock:
            self._failed.clear()

    def stats(self) -> TargetStats:
        """See :class:`TargetStats`."""
        with self._lock:
            held = [item for item in self._held.values() if not item.pending]
            return TargetStats(
                mappings=len(held),
                mapped_bytes=sum(item.entry.request.size for item in held),
                maps=self._calls["map"],
                unmaps=self._calls["unmap"],
                replaces=self._calls["replace"],
                map_failures=self._errors["map"] + self._errors["replace"],
                unmap_failures=self._errors["unmap"],
                failed=tuple(
                    FailedMapping(failure.entry.request, failure.error)
                    for failure in self._failed.values()
                ),
                quarantined=tuple(item.entry.request for item in held if item.error is not None),
                broken=self.broken is not None,
            )

    def diff(self, wanted: Sequence[Entry]) -> TargetDiff:
        """Compare with what the target should hold."""
        with self._lock:
            held = [item for item in self._held.values() if not item.pending]
        actual = {item.entry.request: item for item in held}
        intended = {entry.request: entry for entry in wanted}
        return TargetDiff(
            missing=tuple(request for request in intended if request not in actual),
            stale=tuple(
                r for r, item in actual.items() if item.error is not None or r not in intended
            ),
        )

    @property
    def empty(self) -> bool:
        """Whether the target holds nothing."""
        return not self._held

    def _replace(self, old: Entry, new: Entry, journal: Journal) -> None:
        assert self._replace_dma is not None
        self._keep(new.backing)
        try:
            self._replace_dma(old.request, new.request)
        except Exception as error:
            self._let_go(new.backing)
            self._count("replace", failed=True)
            if not self._does_without(new.request, error):
                raise _as_dma_error("replace", new.request, error) from _cause(error)
            self.unmap(old, journal)
            self._note(self._failed, _Failure(new, _without_stack(error)), journal)
            return
        except BaseException:
            self._let_go(new.backing)
            raise
        with self._lock:
            gone = self._held[new.request.start]
            self._held[new.request.start] = _Held(new, pending=False)
            self._stuck.discard(new.request.start)
        self._let_go(gone.entry.backing)
        self._count("replace")
        journal.did(lambda: self._replace_again(new, old))

    def _replace_again(self, old: Entry, new: Entry) -> None:
        try:
            self._replace(old, new, Journal())
        except DmaError as error:
            self._break(error)
            if self._self_mending:
                self._stick(old.request.start, error)
                self.note_missing(new, error)
            raise

    def _map_again(self, entry: Entry) -> None:
        """Undo an unmapping, also at a target that broke meanwhile."""
        request = entry.request
        try:
            if self.broken is not None:
                self._check_free(request)
            self._map(entry, Journal())
        except DmaError as error:
            self._break(error)
            if self._self_mending:
                self.note_missing(entry, error)
            raise

    def _take_back(self, start: int) -> None:
        """Undo a mapping."""
        try:
            self._unmap_held(start)
        except DmaError as error:
            self._stick(start, error)
            raise

    def _check_free(self, request: DmaMapRequest) -> None:
        for item in self._held.values():
            other = item.entry.request
            if other.start < request.end and request.start < other.end:
                reason = f"{other.start:#x}+{other.size:#x}, which could not be unmapped, is there"
                raise DmaError("map", request.start, request.size, reason)

    def _unmap_held(self, start: int) -> None:
        held = self._held.get(start)
        if held is None:
            return
        request = held.entry.request
        try:
            self._unmap_at_target(request)
        except BaseException as error:
            # One that is not raised: it would refer to this frame, and this frame to it.
            failure = _kept_error(_as_dma_error("unmap", request, error))
            if held.pending and failure.errno == errno.ENOENT:
                # The call that was to make it was interrupted before it had.
                self._drop(start)
                return
            self._count("unmap", failed=True)
            self._break(failure)
            if not isinstance(error, Exception):
                self._stick(start, failure)
                raise
            if not self._self_mending:
                self._stick(start, failure)
            raise _as_dma_error("unmap", request, error) from _cause(error)
        self._count("unmap")
        self._drop(start)

    def _unmap_at_target(self, request: DmaMapRequest) -> None:
        marks, target = self.marks, self.target
        if marks is None or not is_tracked(request):
            target.unmap_dma(request.start, request.size)
            return
        assert isinstance(target, TrackingDmaTarget)
        unit = finest(request, marks.bitmap.page_size)
        marks.take(request, target.unmap_dirty(request.start, request.size, unit))

    def _stick(self, start: int, error: DmaError, journal: Journal | None = None) -> None:
        """Note that a mapping must go and the target did not give it up."""
        with self._lock:
            held = self._held.get(start)
            if held is not None:
                held.error, held.pending = _kept_error(error), False
                self._stuck.add(start)
        if journal is not None and held is not None and self._self_mending:
            journal.did(lambda: self._unstick_again(start, held))

    def _unstick_again(self, start: int, held: _Held) -> None:
        """Undo :meth:`_stick`: the mapping is wanted again, and there as far as is known."""
        with self._lock:
            if self._held.get(start) is held:
                held.error = None
                self._stuck.discard(start)

    def _break(self, error: DmaError) -> None:
        if self.broken is None and not self._self_mending:
            self.broken = _kept_error(error)

    def _does_without(self, request: DmaMapRequest, error: Exception) -> bool:
        """Whether an operation goes on although the target raised for a mapping.

        Only a refusal counts, which is the kernel's or ours. Anything else (a TypeError, say) is a
        bug of the target and says nothing about the mapping.
        """
        return (
            self._records_failures
            and request.kind is MappingType.DEVICE
            and isinstance(error, (OSError, GuestioError))
        )

    def _note(self, notes: dict[int, _Failure], failure: _Failure, journal: Journal) -> None:
        start = failure.entry.request.start
        with self._lock:
            notes[start] = failure

        def forget() -> None:
            with self._lock:
                notes.pop(start, None)

        journal.did(forget)

    def _unnote(self, notes: dict[int, _Failure], entry: Entry, journal: Journal) -> None:
        start = entry.request.start
        failure = notes.get(start)
        if failure is not None and failure.entry.request == entry.request:
            with self._lock:
                del notes[start]
            journal.did(lambda: self._note(notes, failure, Journal()))

    def _holds(self, request: DmaMapRequest) -> bool:
        held = self._held.get(request.start)
        return held is not None and held.entry.request == request

    def _enter(self, held: _Held) -> None:
        self._keep(held.entry.backing)
        with self._lock:
            self._held[held.entry.request.start] = held

    def _drop(self, start: int) -> None:
        with self._lock:
            held = self._held.pop(start)
            self._stuck.discard(start)
        self._let_go(held.entry.backing)

    def _keep(self, backing: Backing) -> None:
        kept = self._kept.get(id(backing))
        if kept is None:
            kept = self._kept[id(backing)] = _Kept(keep(backing))
        kept.mappings += 1

    def _let_go(self, backing: Backing) -> None:
        kept = self._kept[id(backing)]
        kept.mappings -= 1
        if not kept.mappings:
            del self._kept[id(backing)]
            kept.view.release()

    def _count(self, call: str, *, failed: bool = False) -> None:
        with self._lock:
            (self._errors if failed else self._calls)[call] += 1


def _as_dma_error(operation: str, request: DmaMapRequest, error: BaseException) -> DmaError:
    if isinstance(error, DmaError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return DmaError(operation, request.start, request.size, reason, errno=number)


def _kept_error(error: DmaError) -> DmaError:
    """An error to be kept: not the same, whose traceback keeps everything on the stack alive."""
    return DmaError(error.operation, error.start, error.size, error.reason, errno=error.errno)


def _cause(error: BaseException) -> BaseException | None:
    """What to chain to a :class:`DmaError` made of ``error``; it may be that very error."""
    return error.__cause__ if isinstance(error, DmaError) else error


def _without_stack(error: Exception) -> Exception:
    """An error to be kept: without the tracebacks, which would keep the stack's objects alive."""
    link: BaseException | None = error
    seen = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
