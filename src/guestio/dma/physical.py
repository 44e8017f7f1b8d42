"""Guest physical memory as a list of mappings, for sources that lead to it by other addresses."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Self

from guestio.dma.changes import Entry
from guestio.dma.target import DmaMapRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from guestio.dma.changes import Step
    from guestio.memory.region import GuestRegionCollection


class PhysicalMap:
    """What is where in guest physical memory; it never changes.

    Args:
        entries: Mappings of guest physical addresses, which do not overlap.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = sorted(entries, key=lambda entry: entry.request.start)
        self._starts = [entry.request.start for entry in self._entries]

    @classmethod
    def of_memory(cls, memory: GuestRegionCollection) -> Self:
        """The map of a collection of regions. O(n)."""
        return cls(
            Entry(
                DmaMapRequest(
                    start=region.start,
                    size=region.size,
                    host_address=region.host_address(),
                    fd=region.backing.fd,
                    file_offset=region.backing.file_offset or 0,
                    writable=region.writable,
                ),
                region.backing,
            )
            for region in memory
        )

    def meeting(self, start: int, size: int) -> list[Entry]:
        """The mappings that share an address with a range, ascending. O(log n + k)."""
        first = bisect_right(self._starts, start)
        if first and self._entries[first - 1].request.end > start:
            first -= 1
        return self._entries[first : bisect_left(self._starts, start + size)]

    def after(self, steps: Sequence[Step]) -> PhysicalMap:
        """The map after some steps. O(n)."""
        changed = PhysicalMap()
        entries, starts = self._entries.copy(), self._starts.copy()
        for old, new in steps:
            if old is not None:
                at = bisect_left(starts, old.request.start)
                del entries[at], starts[at]
            if new is not None:
                at = bisect_left(starts, new.request.start)
                entries.insert(at, new)
                starts.insert(at, new.request.start)
        changed._entries, changed._starts = entries, starts
        return changed

    def differences(self, other: PhysicalMap) -> Ranges:
        """Where two maps differ. O(n)."""
        mine = {entry.request for entry in self._entries}
        theirs = {entry.request for entry in other._entries}
        return Ranges((request.start, request.end) for request in mine ^ theirs)


class Ranges:
    """Address ranges, for the question whether another one meets any of them."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(ranges):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def __bool__(self) -> bool:
        return bool(self._starts)

    def meet(self, start: int, size: int) -> bool:
        """Whether any of them shares an address with a range. O(log n)."""
        at = bisect_left(self._starts, start + size)
        return at > 0 and self._ends[at - 1] > start
