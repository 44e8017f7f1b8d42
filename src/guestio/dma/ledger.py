"""What one target was told, what of it the target holds, and how to take steps back.

A change of the mappings is a list of steps, each carried out at every target in turn. A target's
ledger carries a step out, remembers its outcome and notes in a journal how to undo it; it asks
the target to unmap only what the target really holds. Memory is kept from being closed for as
long as a ledger says that a device may reach it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from guestio.dma.target import (
    DmaError,
    DmaMapRequest,
    DmaTarget,
    Journal,
    MappingType,
)
from guestio.errors import GuestioError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from guestio.dma.changes import Entry, Step
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
    view: memoryview
    # The call that makes it has not returned.
    pending: bool = True
    # Unmapping it failed: it may be reachable wholly, partly or not at all.
    stuck: bool = False


class Ledger:
    """The record of one target.

    Steps are carried out by one thread at a time; :meth:`stats` and :meth:`diff` may be called
    from any thread at any time.

    Args:
        target: The target.
        device_failures: ``"record"`` to go on without a mapping of kind ``DEVICE`` that the target
            refuses, ``"raise"`` to treat it like RAM.
    """

    def __init__(self, target: DmaTarget, device_failures: DeviceFailures = "record") -> None:
        self.target = target
        self._records_failures = device_failures == "record"
        # Optional; see ReplacingDmaTarget.
        self._replace_dma: Callable[[DmaMapRequest, DmaMapRequest], None] | None = getattr(
            target, "replace_dma", None
        )
        self.broken: DmaError | None = None
        self._held: dict[int, _Held] = {}
        self._failed: dict[int, FailedMapping] = {}
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
            failures: Collects unmappings that failed, instead of raising them.

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
        ):
            self._replace(old, new, journal)
            return
        if old is not None:
            try:
                self.unmap(old, journal)
            except DmaError as error:
                if failures is None:
                    raise
                failures.append(error)
        if new is not None:
            self.map(new, journal)

    def map(self, entry: Entry, journal: Journal) -> None:
        """Map at the target, unless it is broken.

        Raises:
            DmaError: It refused memory that it must hold, or it has a bug.
        """
        if self.broken is None:
            self._map(entry, journal)

    def _map(self, entry: Entry, journal: Journal) -> None:
        request = entry.request
        held = _Held(entry, keep(entry.backing))
        # Entered before the call: an interrupt that arrives while the target returns must not
        # lose a mapping it has made.
        with self._lock:
            self._held[request.start] = held
        journal.did(lambda: self._unmap_held(request.start))
        try:
            self.target.map_dma(request)
        except Exception as error:
            self._drop(request.start)
            self._count("map", failed=True)
            if not self._does_without(request, error):
                raise _as_dma_error("map", request, error) from _cause(error)
            self._note_failure(FailedMapping(request, _without_stack(error)), journal)
            return
        held.pending = False
        self._count("map")

    def unmap(self, entry: Entry, journal: Journal) -> None:
        """Take a mapping away from the target, if the target holds it.

        Raises:
            DmaError: It failed. The memory is kept and the target is broken.
        """
        start = entry.request.start
        failed = self._failed.get(start)
        if failed is not None and failed.request == entry.request:
            with self._lock:
                del self._failed[start]
            journal.did(lambda: self._note_failure(failed, Journal()))
        if self._holds(entry.request):
            self._unmap_held(start)
            journal.did(lambda: self._map_again(entry))

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
            if held.stuck or by_start.get(start) != held.entry.request:
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

    def forget(self) -> None:
        """Let go of everything without calling the target, which is gone."""
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
                failed=tuple(self._failed.values()),
                quarantined=tuple(item.entry.request for item in held if item.stuck),
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
            stale=tuple(r for r, item in actual.items() if item.stuck or r not in intended),
        )

    @property
    def empty(self) -> bool:
        """Whether the target holds nothing."""
        return not self._held

    def _replace(self, old: Entry, new: Entry, journal: Journal) -> None:
        assert self._replace_dma is not None
        view = keep(new.backing)
        try:
            self._replace_dma(old.request, new.request)
        except Exception as error:
            view.release()
            self._count("replace", failed=True)
            if not self._does_without(new.request, error):
                raise _as_dma_error("replace", new.request, error) from _cause(error)
            self.unmap(old, journal)
            self._note_failure(FailedMapping(new.request, _without_stack(error)), journal)
            return
        except BaseException:
            view.release()
            raise
        with self._lock:
            gone = self._held[new.request.start]
            self._held[new.request.start] = _Held(new, view, pending=False)
        gone.view.release()
        self._count("replace")
        journal.did(lambda: self._replace_again(new, old))

    def _replace_again(self, old: Entry, new: Entry) -> None:
        try:
            self._replace(old, new, Journal())
        except DmaError as error:
            self._break(error)
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
            self.target.unmap_dma(request.start, request.size)
        except BaseException as error:
            with self._lock:
                held.stuck, held.pending = True, False
            self._count("unmap", failed=True)
            self._break(_as_dma_error("unmap", request, error))
            if not isinstance(error, Exception):
                raise
            raise _as_dma_error("unmap", request, error) from _cause(error)
        self._count("unmap")
        self._drop(start)

    def _break(self, error: DmaError) -> None:
        if self.broken is None:
            # Not the error itself: its traceback would keep everything on the stack alive.
            self.broken = DmaError(
                error.operation, error.start, error.size, error.reason, errno=error.errno
            )

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

    def _note_failure(self, failure: FailedMapping, journal: Journal) -> None:
        start = failure.request.start
        with self._lock:
            self._failed[start] = failure

        def forget() -> None:
            with self._lock:
                self._failed.pop(start, None)

        journal.did(forget)

    def _holds(self, request: DmaMapRequest) -> bool:
        held = self._held.get(request.start)
        return held is not None and held.entry.request == request

    def _drop(self, start: int) -> None:
        with self._lock:
            held = self._held.pop(start)
        held.view.release()

    def _count(self, call: str, *, failed: bool = False) -> None:
        with self._lock:
            (self._errors if failed else self._calls)[call] += 1


def _as_dma_error(operation: str, request: DmaMapRequest, error: BaseException) -> DmaError:
    if isinstance(error, DmaError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return DmaError(operation, request.start, request.size, reason, errno=number)


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
