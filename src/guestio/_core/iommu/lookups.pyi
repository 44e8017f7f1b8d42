from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from guestio._core.iommu.intervals import IntervalMap
from guestio.addr import IovaRange, MappedRange, Permissions

@disjoint_base
class Lookups:
    """Lookups in an interval map that the object has. Everything may be called from any thread.

    Args:
        map: What is looked up in. It may be changed by the code that it is handed to besides.

    Attributes:
        capacity: Largest number of mappings, or None.
        hits: Lookups that resolved.
        misses: Lookups with an unmapped byte.
        access_fails: Lookups that were mapped throughout, but forbidden somewhere.
        evictions: Mappings dropped to keep within the capacity.
        invalidations: Calls that took a range of translations away, or all.
    """
    def __new__(cls, map: IntervalMap) -> Self: ...
    @property
    def _map(self) -> IntervalMap: ...
    @property
    def capacity(self) -> int | None: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def access_fails(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def invalidations(self) -> int: ...
    def lookup(self, start: int, length: int, access: Permissions) -> list[MappedRange]:
        """Resolve ``[start, start + length)`` for ``access``, whole or not at all.

        Returns:
            The targets as :class:`~guestio.MappedRange`, in order of the source; their lengths sum
            to ``length``. Empty for a length of 0, which touches nothing and always succeeds.

        Raises:
            IotlbFails: Lists every sub-range that is missing and every one that is forbidden.
            TypeError, ValueError: Bad numbers, or a range past ``2**64``.

        Cost: O(log n + k) for k mappings in the range.
        """
    def guard(
        self, start: int, length: int, access: Permissions
    ) -> AbstractContextManager[list[MappedRange]]:
        """Look a range up and hold the translation in one step.

        Returns:
            A context manager; entering it gives the list that :meth:`lookup` returns. Until it is
            left, :meth:`drain` of an overlapping range waits.

        Raises:
            As :meth:`lookup`.
        """
    def lookup_many(
        self,
        starts: npt.NDArray[np.integer[Any]] | Sequence[int],
        lengths: npt.NDArray[np.integer[Any]] | Sequence[int] | int,
        access: Permissions,
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """Resolve many ranges at once.

        Args:
            starts: First addresses: an integer array of numpy, or a list.
            lengths: Bytes for each, in the same way, or one number for all.
            access: What every one of them wants to do.

        Returns:
            ``(targets, status)``: a ``uint64`` and a ``uint8`` array. Status 0: ``targets`` holds
            where the range begins, and all of it is contiguous there. 1: some of it is unmapped,
            or it passes ``2**64``. 2: all is mapped but some forbids the access. 3: all is
            accessible, but it is not contiguous. The target is 0 where the status is not 0.
            A length of 0 has status 0.

        Raises:
            TypeError, ValueError: Not integers, negative, or arrays of different lengths.

        Cost: O(n log m + k) for n ranges that meet k of m mappings; the GIL is released.
        """
    def drain(self, start: int, length: int, timeout: float | None = None) -> bool:
        """Wait until no translation of this range that was looked up before now is in use.

        Returns:
            False if ``timeout`` seconds passed first.

        Raises:
            RuntimeError: This very thread holds one; it would wait for itself.
        """
    def check_drain(self, start: int, length: int) -> None:
        """Raise the RuntimeError that :meth:`drain` would raise now."""
    def pin(self, start: int, length: int) -> None:
        """Keep whatever is or becomes mapped in a range from being evicted. Counted."""
    def unpin(self, start: int, length: int) -> None:
        """Undo one :meth:`pin` of exactly this range.

        Raises:
            ValueError: The range is not pinned.
        """
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __iter__(self) -> Iterator[tuple[IovaRange, MappedRange, Permissions]]: ...
    def __contains__(self, addr: int) -> bool: ...
