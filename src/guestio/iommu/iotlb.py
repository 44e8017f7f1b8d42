"""The IOTLB: translations that are known at this moment."""

from __future__ import annotations

from typing import Self

from guestio._core.intervals import IntervalMap
from guestio.addr import Permissions, check_range


class Iotlb(IntervalMap):
    """A cache of I/O virtual address translations.

    Mappings may have any alignment and length. Setting one replaces whatever it overlaps;
    neighbours that are contiguous on both sides and have equal permissions become one.
    :meth:`~guestio._core.intervals.IntervalMap.lookup` either resolves a whole range or lists all
    that is missing and all that is forbidden.

    Args:
        capacity: Largest number of entries; beyond it the least recently used one is evicted.
            None for no limit. Pinned ranges are never evicted.

    Threads: everything may be called from any thread. Lookups never wait. A change that takes a
    translation away returns only after everybody who was using it has finished (see
    :meth:`Iommu.translate <guestio.iommu.Iommu.translate>`).
    """

    def __new__(cls, capacity: int | None = None) -> Self:
        """Make an empty IOTLB."""
        return super().__new__(cls, merge=True, capacity=capacity)

    def set_mapping(self, iova: int, map_to: int, length: int, perm: Permissions) -> None:
        """Map ``[iova, iova + length)`` to ``map_to``, replacing what was there.

        Args:
            iova: First I/O virtual address.
            map_to: Address in the underlying space; ``map_to + length`` may wrap.
            length: Bytes, greater than 0; ``iova + length`` may be ``2**64``.
            perm: What is allowed.

        Raises:
            TypeError, ValueError: Bad numbers; nothing changed.
            RuntimeError: This thread itself uses a translation that would be replaced.

        Cost: O((k + 1) log n) for k entries replaced, plus the wait for their users.
        """
        self.check_drain(iova, length)
        if self.overwrite(iova, length, map_to, perm):
            self.drain(iova, length)

    def invalidate_mapping(self, iova: int, length: int) -> None:
        """Forget every translation in ``[iova, iova + length)``, splitting mappings at its ends.

        When this returns, nobody uses the old translations any more.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.
            RuntimeError: This thread itself uses one of them.

        Cost: O((k + 1) log n) for k entries removed, plus the wait for their users.
        """
        check_range(iova, length, name="iova", empty=False)
        self.check_drain(iova, length)
        self.cut(iova, length)
        self.drain(iova, length)

    def invalidate_all(self) -> None:
        """Forget every translation; returns once nobody uses one any more."""
        self.check_drain(0, 1 << 64)
        self.clear()
        self.drain(0, 1 << 64)

    def explain(self, iova: int, length: int, access: Permissions) -> str:
        """Say in a few lines what an access would meet and which mappings are near.

        It counts as no lookup. Meant for people; the wording may change.
        """
        check_range(iova, length, name="iova")
        wanted = Permissions(access)
        lines = [f"{iova:#x}+{length:#x} for {wanted.name}:"]
        at, end = iova, iova + length
        for start, size, target, perm in self.overlapping(iova, length):
            if start > at:
                lines.append(f"  {at:#x}+{start - at:#x} is not mapped")
            first, last = max(start, at), min(start + size, end)
            verdict = "ok" if perm.allows(wanted) else "refused"
            lines.append(
                f"  {first:#x}+{last - first:#x} -> {(target + first - start) % 2**64:#x} "
                f"{perm.name}: {verdict}"
            )
            at = last
        if at < end:
            lines.append(f"  {at:#x}+{end - at:#x} is not mapped")
        if length == 0:
            lines.append("  an access of 0 bytes always succeeds")
        for label, near in zip(("before", "after"), self.neighbours(iova), strict=True):
            if near is not None:
                start, size, target, perm = near
                lines.append(f"  {label}: {start:#x}+{size:#x} -> {target:#x} {perm.name}")
        return "\n".join(lines)
