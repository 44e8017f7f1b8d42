"""The IOTLB: translations that are known at this moment."""

from __future__ import annotations

from typing import NamedTuple, Self

from guestio._core.iommu.intervals import IntervalMap
from guestio._core.iommu.lookups import Lookups
from guestio.addr import Permissions, check_access, check_range

EXPLAINED = 64
"""Pieces of an access that `Iotlb.explain` shows one by one."""


class IotlbStats(NamedTuple):
    """What an :class:`Iotlb` has counted since it was made.

    A batch counts each of its lookups. A range that is looked up again after its translation was
    asked for counts twice.
    """

    entries: int
    """Mappings held now."""
    capacity: int | None
    """Largest number of mappings, or None."""
    hits: int
    """Lookups that resolved."""
    misses: int
    """Lookups with an unmapped byte."""
    access_fails: int
    """Lookups that were mapped throughout, but forbidden somewhere."""
    evictions: int
    """Mappings dropped to keep within the capacity."""
    invalidations: int
    """Calls of ``invalidate_mapping`` and ``invalidate_all``."""


class Iotlb(Lookups):
    """A cache of I/O virtual address translations.

    Mappings may have any alignment and length. Setting one replaces whatever it overlaps;
    neighbors that are contiguous on both sides and have equal permissions become one.
    :meth:`lookup` either resolves a whole range or lists all that is missing and all that is
    forbidden.

    Args:
        capacity: Largest number of entries; beyond it the least recently used one is evicted.
            None for no limit. Pinned ranges (:meth:`pin`) and translations in use at that moment
            are never evicted, even if that exceeds it.

    Threads: everything may be called from any thread. Lookups never wait. A change that takes a
    translation away returns only after every use of it has ended (see
    :meth:`Iommu.translate <guestio.iommu.Iommu.translate>`).
    """

    def __new__(cls, capacity: int | None = None) -> Self:
        """Make an empty IOTLB."""
        return super().__new__(cls, IntervalMap(capacity=capacity))

    # Changes of the map do not wait for users. Below are those that do; devices of guestio that
    # take many translations away and wait for all at once are handed the map itself.

    @classmethod
    def _of(cls, map_: IntervalMap) -> Self:
        """An IOTLB that has a map which others have already."""
        return super().__new__(cls, map_)

    def set_mapping(self, iova: int, map_to: int, length: int, perm: Permissions) -> None:
        """Map ``[iova, iova + length)`` to ``map_to``, replacing what was there.

        Args:
            iova: First I/O virtual address.
            map_to: Address in the underlying space; ``map_to + length`` may wrap.
            length: Bytes, greater than 0; ``iova + length`` may be ``2**64``.
            perm: What is allowed.

        Raises:
            TypeError, ValueError: Bad numbers; nothing changed.
            RuntimeError: This thread itself uses a translation that would be moved or restricted;
                nothing changed.

        Cost: O((k + 1) log n) for k entries replaced. If that takes a translation away (moves it
        or restricts it), plus the wait for its users.
        """
        self._map.overwrite(iova, length, map_to, perm, drain=True)

    def invalidate_mapping(self, iova: int, length: int) -> None:
        """Forget every translation in ``[iova, iova + length)``, splitting mappings at its ends.

        When this returns, the old translations are no longer in use.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.
            RuntimeError: This thread itself uses one of them; nothing changed.

        Cost: O((k + 1) log n) for k entries removed, plus the wait for their users.
        """
        self._map.cut(iova, length, drain=True)

    def invalidate_all(self) -> None:
        """Forget every translation; returns once none is in use any more.

        Raises:
            RuntimeError: This thread itself uses one; nothing changed.
        """
        self._map.clear(drain=True)

    def __repr__(self) -> str:
        room = "" if self.capacity is None else f" of {self.capacity}"
        return f"<Iotlb: {len(self)}{room} mappings, {self.hits} hits, {self.misses} misses>"

    def stats(self) -> IotlbStats:
        """The counters at this moment."""
        return IotlbStats(
            len(self),
            self.capacity,
            self.hits,
            self.misses,
            self.access_fails,
            self.evictions,
            self.invalidations,
        )

    def explain(self, iova: int, length: int, access: Permissions) -> str:
        """Say in a few lines what an access would meet and which mappings are near.

        It counts as no lookup. Meant for people; the wording may change. Of many pieces, the first
        64 are shown and all are counted; the cost is linear in the mappings that the access meets.
        """
        at, size = check_range(iova, length, name="iova")
        wanted, end = check_access(access), at + size
        parts: list[str] = []
        missing = refused = pieces = 0
        for start, extent, target, perm in self._map.overlapping(at, size):
            if start > at:
                if len(parts) < EXPLAINED:
                    parts.append(f"  {at:#x}+{start - at:#x} is not mapped")
                missing += 1
            pieces += 1
            first, last = max(start, at), min(start + extent, end)
            allowed = perm.allows(wanted)
            refused += not allowed
            if len(parts) < EXPLAINED:
                parts.append(
                    f"  {first:#x}+{last - first:#x} -> {(target + first - start) % 2**64:#x} "
                    f"{perm.name}: {'ok' if allowed else f'{wanted.name} is refused'}"
                )
            at = last
        if at < end:
            if len(parts) < EXPLAINED:
                parts.append(f"  {at:#x}+{end - at:#x} is not mapped")
            missing += 1
        if pieces + missing > len(parts):
            parts.append(f"  and {pieces + missing - len(parts)} more pieces")
        if missing or refused:
            verdict = f"fails: {missing} ranges not mapped, {refused} refused"
        else:
            verdict = "succeeds" if size else "succeeds: an access of 0 bytes touches nothing"
        before = self._map.neighbours(iova)[0]
        after = self._map.neighbours(end - 1 if size else iova)[1]
        for label, near in (("before", before), ("after", after)):
            if near is None:
                parts.append(f"  {label}: nothing is mapped")
            else:
                start, extent, target, perm = near
                parts.append(f"  {label}: {start:#x}+{extent:#x} -> {target:#x} {perm.name}")
        return "\n".join([f"{iova:#x}+{size:#x} for {wanted.name} {verdict}", *parts])
