"""How a change of mappings reaches every target or none, one change at a time.

A change is planned as a list of steps, and each step is carried out at every target in turn. What
was done is noted in a journal; when a target refuses, it is undone in reverse order.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from guestio.dma.target import DmaError, DmaMapRequest, Journal
from guestio.errors import GuestioError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guestio.dma.ledger import Ledger
    from guestio.memory.backing import Backing


class ReentrantCallError(GuestioError, RuntimeError):
    """A target called the manager or virtio-iommu that is calling it; nothing was changed."""


class Entry(NamedTuple):
    """A mapping that targets should hold, and the memory to keep while one does."""

    request: DmaMapRequest
    backing: Backing


class Step(NamedTuple):
    """One change: ``old`` goes, ``new`` comes. With both, they are the same range."""

    old: Entry | None
    new: Entry | None


class FairLock:
    """A lock that operations get in order of arrival."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._owner: int | None = None

    def __enter__(self) -> None:
        me, ticket = threading.get_ident(), object()
        with self._changed:
            if self._owner == me:
                raise ReentrantCallError(
                    "a DMA target called its region manager back from inside a call; "
                    "do that after the call has returned"
                )
            self._waiting.append(ticket)
            try:
                while self._owner is not None or self._waiting[0] is not ticket:
                    self._changed.wait()
            finally:
                # Also when the wait is interrupted, or the threads behind would wait for ever.
                self._waiting.remove(ticket)
                self._changed.notify_all()
            self._owner = me

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._owner = None
            self._changed.notify_all()


def meet(start: int, size: int, other: int, length: int) -> bool:
    """Whether two ranges share an address."""
    return start < other + length and other < start + size


def plan(before: Sequence[Entry], after: Sequence[Entry], make_first: bool) -> list[Step]:
    """The steps from one list of mappings to another.

    What is in both stays untouched. A range that leads elsewhere or changes its permission is one
    step, so that a target can exchange it. Otherwise what goes goes first, or with ``make_first``
    last, except where something new needs its place.
    """
    stay = {e.request for e in before} & {e.request for e in after}
    going = {(e.request.start, e.request.size): e for e in before if e.request not in stay}
    coming = {(e.request.start, e.request.size): e for e in after if e.request not in stay}
    exchanged = going.keys() & coming.keys()
    away = [Step(entry, None) for place, entry in going.items() if place not in exchanged]
    into = [Step(going.get(place), entry) for place, entry in coming.items()]
    if not make_first:
        return away + into
    places = sorted(coming)
    blocking = [step for step in away if _blocks(step, places)]
    return blocking + into + [step for step in away if not _blocks(step, places)]


def _blocks(step: Step, places: Sequence[tuple[int, int]]) -> bool:
    """Whether what goes is in the way of what comes; ``places`` are ascending and disjoint."""
    assert step.old is not None
    request = step.old.request
    at = bisect_left(places, (request.end,))
    return at > 0 and meet(request.start, request.size, *places[at - 1])


def carry_out(
    steps: Sequence[Step],
    ledgers: Sequence[Ledger],
    *,
    onwards: bool = False,
    then: Callable[[list[DmaError] | None], None] | None = None,
) -> list[DmaError]:
    """Take every step at every target, or none.

    Args:
        steps: What to do.
        ledgers: The targets.
        then: Called when that is done, with where it may put unmappings that failed, or None.
            What it raises has everything undone.
        onwards: Whether an unmapping that fails is collected instead of undoing everything:
            memory that is to be taken away is taken away wherever that works.

    Returns:
        The unmappings that failed.
    """
    journal = Journal()
    failures: list[DmaError] = []
    try:
        for step in steps:
            for ledger in ledgers:
                ledger.carry_out(step, journal, failures if onwards else None)
        if then is not None:
            then(failures if onwards else None)
    except BaseException as error:
        for failure in failures:
            error.add_note(f"before that: {failure}")
        for undoing in journal.undo():
            error.add_note(f"while undoing: {undoing}")
        raise
    return failures


def raise_failures(failures: list[DmaError]) -> None:
    """Raise what targets failed at, the first with the others as notes; nothing if nothing."""
    if not failures:
        return
    failures[0].add_note("the memory is kept, the target is broken until retry() succeeds")
    for other in failures[1:]:
        failures[0].add_note(f"also: {other}")
    first = failures[0]
    # Callers keep the list while the error passes: together they would be a cycle, and whatever
    # the error's traceback refers to would wait for the garbage collector.
    failures.clear()
    try:
        raise first
    finally:
        del first
