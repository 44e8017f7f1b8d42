"""What users of translations may do with an interval map: look up, hold, wait, pin; change nothing.

The part of :class:`~guestio.Iotlb` that is compiled, because a lookup is about as short as a call
of Python.
"""

cimport cython

from guestio._core.base.checks cimport as_address, u64
from guestio._core.iommu.tree cimport Cursor, floor_of


# Nothing sets the map up again, so it must be there until the object goes.
@cython.no_gc_clear
cdef class Lookups:
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

    def __cinit__(self, IntervalMap map not None):
        self._map = map

    @property
    def capacity(self):
        return self._map.capacity

    @property
    def hits(self):
        return self._map.hits

    @property
    def misses(self):
        return self._map.misses

    @property
    def access_fails(self):
        return self._map.access_fails

    @property
    def evictions(self):
        return self._map.evictions

    @property
    def invalidations(self):
        return self._map.invalidations

    def lookup(self, start, length, access):
        """Resolve ``[start, start + length)`` for ``access``, whole or not at all.

        Returns:
            The targets as :class:`~guestio.MappedRange`, in order of the source; their lengths sum
            to ``length``. Empty for a length of 0, which touches nothing and always succeeds.

        Raises:
            IotlbFails: Lists every sub-range that is missing and every one that is forbidden.
            TypeError, ValueError: Bad numbers, or a range past ``2**64``.

        Cost: O(log n + k) for k mappings in the range.
        """
        return self._map.lookup(start, length, access)

    def guard(self, start, length, access):
        """Look a range up and hold the translation in one step.

        Returns:
            A context manager; entering it gives the list that :meth:`lookup` returns. Until it is
            left, :meth:`drain` of an overlapping range waits.

        Raises:
            As :meth:`lookup`.
        """
        return self._map.guard(start, length, access)

    def lookup_many(self, starts, lengths, access):
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
        return self._map.lookup_many(starts, lengths, access)

    def drain(self, start, length, timeout=None):
        """Wait until no translation of this range that was looked up before now is in use.

        Returns:
            False if ``timeout`` seconds passed first.

        Raises:
            RuntimeError: This very thread holds one; it would wait for itself.
        """
        return self._map.drain(start, length, timeout)

    def check_drain(self, start, length):
        """Raise the RuntimeError that :meth:`drain` would raise now."""
        self._map.check_drain(start, length)

    def pin(self, start, length):
        """Keep whatever is or becomes mapped in a range from being evicted. Counted."""
        self._map.pin(start, length)

    def unpin(self, start, length):
        """Undo one :meth:`pin` of exactly this range.

        Raises:
            ValueError: The range is not pinned.
        """
        self._map.unpin(start, length)

    def __len__(self):
        return self._map.at.tree.entries

    def __bool__(self):
        """True, also while nothing is mapped: an empty cache is a cache."""
        return True

    def __iter__(self):
        """The mappings as they are now: ``(IovaRange, MappedRange, Permissions)``, ascending."""
        return iter(self._map)

    def __contains__(self, addr):
        """Whether an address is mapped, whatever it allows. It counts as no lookup. O(log n)."""
        cdef u64 x = as_address(addr)
        cdef Cursor at = floor_of(&self._map.at.tree, x)
        return at.leaf is not NULL and at.leaf.entry[at.index].last >= x
