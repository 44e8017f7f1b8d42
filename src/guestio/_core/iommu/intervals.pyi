from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from guestio._core.memory.leases import Leases
from guestio.addr import IovaRange, MappedRange, Permissions

@disjoint_base
class IntervalMap:
    """Disjoint address ranges, each with a target and permissions.

    Args:
        merge: Join neighbors whose targets are contiguous too and whose permissions are equal.
        capacity: Largest number of entries; beyond it the least recently used one that is neither
            pinned nor in use is evicted. A change looks at a limited number of those that are;
            the capacity is exceeded until it finds others. None for no limit.

    Attributes:
        hits: Lookups that resolved.
        misses: Lookups with an unmapped byte.
        access_fails: Lookups that were mapped throughout but forbidden somewhere.
        evictions: Entries dropped to keep within the capacity.
        origin: The number of its server, for records of tracepoints.

    Several maps can show the mappings of one, see :func:`follow`.

    Memory: 50 to 65 bytes an entry, up to twice as much after removals; with a capacity, up to 64
    more.
    """
    def __new__(cls, *, merge: bool = True, capacity: int | None = None) -> Self: ...
    @property
    def leases(self) -> Leases: ...
    @property
    def generation(self) -> int:
        """Changes whenever a mapping is removed, cut, replaced or evicted."""
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def access_fails(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    origin: int
    @property
    def invalidations(self) -> int:
        """Calls of :meth:`cut` and :meth:`clear`, also those that were seen while following."""
    @property
    def capacity(self) -> int | None:
        """Largest number of entries, or None."""
    def overwrite(
        self, start: int, length: int, target: int, perm: Permissions, *, drain: bool = False
    ) -> bool:
        """Map ``[start, start + length)`` to ``target``, replacing whatever overlaps.

        Targets are taken modulo ``2**64``. What reaches out of the range stays mapped as it was.

        Args:
            start: First address.
            length: Bytes, greater than 0.
            target: Where ``start`` leads.
            perm: What is allowed.
            drain: If a translation was removed, return only when it is no longer in use.

        Returns:
            Whether a translation was taken away: moved elsewhere or restricted.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.
            RuntimeError: ``drain``, and this very thread uses what would be taken away; nothing
                changed.

        Cost: O((k + 1) log n) for k entries replaced.
        """
    def cut(self, start: int, length: int, *, drain: bool = False) -> bool:
        """Unmap ``[start, start + length)``, splitting mappings that reach out of it.

        Args:
            start: First address.
            length: Bytes, greater than 0.
            drain: Return only when no translation of the range is in use any more.

        Returns:
            Whether anything was mapped there.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.
            RuntimeError: ``drain``, and this very thread uses a translation of the range; nothing
                changed.

        Cost: O((k + 1) log n) for k entries met.
        """
    def clear(self, *, drain: bool = False) -> None:
        """Unmap everything; ``drain`` as for :meth:`cut`. Cost: O(n), if little."""
    def add(self, start: int, length: int, target: int, perm: Permissions) -> bool:
        """Map ``[start, start + length)`` to ``target`` unless any of it is mapped already.

        Returns:
            False if something overlaps; nothing changed then.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.

        Cost: O(log n).
        """
    def take(self, start: int, length: int) -> list[tuple[int, int, int, Permissions]] | None:
        """Unmap all that lies in ``[start, start + length)``, if nothing reaches out of it.

        Returns:
            The removed mappings as ``(start, length, target, perm)``, ascending, or None if one
            of them would have to be split; nothing changed then.

        Raises:
            TypeError, ValueError: Bad numbers, or a length of 0; nothing changed.

        Cost: O((k + 1) log n) for k entries removed.
        """
    def lookup(self, start: int, length: int, access: Permissions) -> list[MappedRange]:
        """See :meth:`Lookups.lookup <guestio._core.iommu.lookups.Lookups.lookup>`."""
    def guard(
        self, start: int, length: int, access: Permissions
    ) -> AbstractContextManager[list[MappedRange]]:
        """See :meth:`Lookups.guard <guestio._core.iommu.lookups.Lookups.guard>`."""
    def drain(self, start: int, length: int, timeout: float | None = None) -> bool:
        """See :meth:`Lookups.drain <guestio._core.iommu.lookups.Lookups.drain>`."""
    def check_drain(self, start: int, length: int) -> None:
        """Raise the RuntimeError that :meth:`drain` would raise now."""
    def lookup_many(
        self,
        starts: npt.NDArray[np.integer[Any]] | Sequence[int],
        lengths: npt.NDArray[np.integer[Any]] | Sequence[int] | int,
        access: Permissions,
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """See :meth:`Lookups.lookup_many <guestio._core.iommu.lookups.Lookups.lookup_many>`."""
    def overlapping(self, start: int, length: int) -> list[tuple[int, int, int, Permissions]]:
        """The mappings that touch ``[start, start + length)``, unclipped, ascending.

        Returns:
            ``(start, length, target, perm)`` each.

        Cost: O(log n + k).
        """
    def survey(
        self, start: int, length: int, parts: int, most: int
    ) -> tuple[npt.NDArray[np.uint64], tuple[int, int] | None]:
        """What is mapped in each of equal parts of a range, without going through all of it.

        Args:
            start: First address.
            length: Bytes, greater than 0; a multiple of ``parts``.
            parts: How many, 2 or more.
            most: Entries that are looked at in a part; 1 or more.

        Returns:
            ``(rows, extent)``. A row of 64-bit numbers for each part: entries, bytes that they map,
            bytes at its end that were not looked at because ``most`` entries came before, a bit
            ``1 << perm`` for each kind of permission, the first address that is mapped and its
            target. The extent is the first and the last address of all mappings, or None.

        It counts as no lookup and is no use of an entry. The parts are not of one moment: a change
        waits for SURVEY_PARTS of them at most, and lookups do not wait.

        Cost: O(parts * (log n + most)); the GIL is released.
        """
    def neighbours(
        self, addr: int
    ) -> tuple[tuple[int, int, int, Permissions] | None, tuple[int, int, int, Permissions] | None]:
        """The mapping before and the one after ``addr``, as in :meth:`overlapping`, or None each.

        A mapping that holds ``addr`` is neither. Cost: O(log n).
        """
    def pin(self, start: int, length: int) -> None:
        """Keep whatever is or becomes mapped in a range from being evicted. Counted."""
    def unpin(self, start: int, length: int) -> None:
        """Undo one :meth:`pin` of exactly this range; ValueError if it is not pinned."""
    def check(self) -> None:
        """Walk every invariant of the structure; for tests.

        Raises:
            AssertionError: One does not hold.
        """
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[IovaRange, MappedRange, Permissions]]: ...

def follow(map: IntervalMap, source: IntervalMap | None) -> None:
    """Have lookups in a map see the mappings of another one instead of its own.

    It must have none of its own. Lookups count and hold leases in the follower, so
    :meth:`~IntervalMap.drain` of each follower waits for its own users only. Changes are made at
    ``source`` and seen at once; at the follower they raise RuntimeError. Whoever takes a mapping
    away there, or has a map follow something else, waits afterwards for those who use it:
    :func:`users_of`, :meth:`~IntervalMap.drain`.

    Args:
        map: The follower.
        source: A map without capacity that follows none; None to see nothing again.

    Raises:
        ValueError: ``map`` has mappings or a capacity, or ``source`` is not such a map.

    Cost: O(1).
    """

def users_of(maps: dict[int, IntervalMap], start: int, length: int) -> list[IntervalMap]:
    """Those of several maps of which a translation in a range is in use at this moment.

    Args:
        maps: The maps, as values.
        start: First address.
        length: Bytes, greater than 0.

    Cost: O(maps + leases).
    """
