"""The way from an address that a device uses to memory of this process.

An :class:`AddressSpace` puts a translation in front of physical memory. What it finds is an
:class:`~guestio._core.memory.vector.IoVector`: host memory, held against revocation until it is closed.
Looking a translation up and taking the lease on it is one step: the GIL is held, and in between no
Python object is made and none goes. Either may run any code, which may let other threads run: the
collector's, or a finaliser.
"""

from cpython.buffer cimport (
    PyBUF_CONTIG, PyBUF_CONTIG_RO, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.pyport cimport PY_SSIZE_T_MAX

from guestio._core.base.checks cimport as_access, as_address, as_span, u8
from guestio._core.base.atomics cimport READ, WRITE
from guestio._core.iommu.tree cimport Cursor, Entry, floor_of, is_gap, step

from guestio._core.memory.slices import VolatileSlice
from guestio.addr import Permissions
from guestio.errors import InvalidAddressError


cdef class AddressSpace:
    """What a device can reach: physical memory, seen directly or through an IOTLB.

    Args:
        regions: Physical memory.
        iotlb: The map of the translation in front of it, or None if addresses are physical.
        bitmap: Where writes are marked by the address that was used, or None.
        mark_regions: Whether writes are marked in the regions' own bitmaps.
    """

    def __cinit__(
        self, RegionTable regions not None, IntervalMap iotlb=None, AtomicBitmap bitmap=None,
        *, bint mark_regions=True,
    ):
        self.regions, self.iotlb = regions, iotlb
        self.bitmap, self.mark_regions = bitmap, mark_regions

    # Private: rings show their space, and a change of this map does not wait for its users.
    @property
    def _map(self):
        return self.iotlb

    cdef int translate(
        self, IoVector out, u64 addr, u64 length, int access, Misses failed
    ) except -1:
        """Append the memory behind a range to ``out``, with a lease on its translation.

        Returns False if it could not be translated: what is missing or forbidden was then added
        to ``failed`` and ``out`` is as it was. The range is not empty and stays below 2**64.
        """
        cdef Span span = Span(addr, addr + (length - 1), False)
        cdef int count, leases
        cdef u64 total
        cdef Cursor at
        # Mostly it did already: a call less for each descriptor of a request.
        if out.table is not self.regions or out.second is not self.bitmap:
            out.adopt(self.regions, self.bitmap)
        count, leases, total = out.count, out.lease_count, out.total
        if self.iotlb is None:
            self.append_physical(out, addr, addr, length, access)
            return True
        at = floor_of(&self.iotlb.at.tree, span.first)
        if is_gap(&self.iotlb.at.tree, at, span.first, span.last):
            # As for each new request of a driver that maps what it needs.
            self.iotlb.misses += 1
            failed.add(span.first, span.last, access, False)
            return False
        out.push_lease(self.iotlb.leases, span.first, span.last)
        if self.walk(out, span, access, at):
            self.iotlb.hits += 1
            return True
        out.rewind(count, total, leases)
        self.iotlb.fails_of(span, access, failed)
        return False

    cdef bint walk(self, IoVector out, Span span, u64 wanted, Cursor at) except -1:
        """Append what a span translates to, from the floor of its start; False where it does not."""
        cdef Entry *entry
        cdef u64 x = span.first, last
        while at.leaf is not NULL and at.leaf.head.key[at.index] <= x:
            entry = &at.leaf.entry[at.index]
            if entry.last < x or wanted & ~entry.perm:
                return False
            last = min(entry.last, span.last)
            self.iotlb.touch(entry)
            if not out.stop:
                self.append_physical(out, x, x + entry.delta, last - x + 1, <int>wanted)
            if last == span.last:
                return True
            x = last + 1
            step(&at)
        return False

    cdef u64 append_physical(
        self, IoVector out, u64 addr, u64 target, u64 length, int access
    ) except? <u64>-1:
        return out.append_region(addr, target, length, access, self.mark_regions)

    def gather(self, addr, length, access):
        """Open a range of memory.

        Returns:
            An :class:`IoVector`. Translation is all or nothing; if the memory behind it ends, the
            vector holds what comes before.

        Raises:
            IotlbFails: Some of the range is not mapped, or not for this access.
            TypeError, ValueError: Bad numbers.
        """
        cdef Span span
        cdef IoVector out = IoVector()
        as_span(addr, length, &span, True)
        out.access, out.start = as_access(access), span.first
        if span.empty:
            return out
        if span.last - span.first >= <u64>PY_SSIZE_T_MAX:
            raise InvalidAddressError(
                span.first, length, Permissions(out.access), "more than a process can address"
            )
        failed = Misses()
        if not self.translate(out, span.first, span.last - span.first + 1, out.access, failed):
            raise failed.error()
        return out

    cdef IoVector open(self, object addr, object length, int access):
        """A whole range, or None if any of it is not there, not translated or not allowed."""
        cdef Span span
        cdef IoVector out = IoVector()
        as_span(addr, length, &span, True)
        out.access, out.start = access, span.first
        if span.empty:
            return out
        if span.last - span.first >= <u64>PY_SSIZE_T_MAX:
            return None
        out.adopt(self.regions, self.bitmap)
        if self.iotlb is None:
            self.append_physical(out, span.first, span.first, span.last - span.first + 1, access)
        else:
            out.push_lease(self.iotlb.leases, span.first, span.last)
            if not self.walk(out, span, access, floor_of(&self.iotlb.at.tree, span.first)):
                return None
            self.iotlb.hits += not out.stop
        return None if out.stop else out

    def read(self, addr, length):
        """A copy of a whole range, or None if any of it cannot be read as things are.

        The way for accesses that just work; :meth:`gather` finds out about the others.

        Raises:
            MemoryVanishedError: The file behind the memory is gone.
            TypeError, ValueError: Bad numbers.
        """
        cdef IoVector found = self.open(addr, length, READ)
        cdef bytes data
        if found is None:
            return None
        data = PyBytes_FromStringAndSize(NULL, found.total)
        found.copy_out(<u8 *>PyBytes_AS_STRING(data), 0, found.total)
        return data

    def readinto(self, addr, buffer):
        """Fill a buffer; False if nothing was done, otherwise as :meth:`read`."""
        cdef IoVector found
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_CONTIG)
        try:
            found = self.open(addr, view.len, READ)
            if found is None:
                return False
            found.copy_out(<u8 *>view.buf, 0, found.total)
            return True
        finally:
            PyBuffer_Release(&view)

    def write(self, addr, data):
        """Write all of ``data``; False if nothing was done, otherwise as :meth:`read`."""
        cdef IoVector found
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            found = self.open(addr, view.len, WRITE)
            if found is None:
                return False
            found.copy_in(<u8 *>view.buf, 0, found.total)
            return True
        finally:
            PyBuffer_Release(&view)

    def gather_ranges(self, addr, length, list ranges, access):
        """As :meth:`gather`, for targets that were translated elsewhere.

        Raises:
            RuntimeError: The targets do not sum to ``length``.
        """
        cdef IoVector out = IoVector()
        cdef Span span
        cdef u64 at, size, left
        as_span(addr, length, &span, True)
        out.access, out.start = as_access(access), span.first
        out.adopt(self.regions, self.bitmap)
        at, left = span.first, 0 if span.empty else span.last - span.first + 1
        for base, piece in ranges:
            size = as_address(piece, "length")
            if size > left:
                break
            if not out.stop:
                self.append_physical(out, at, as_address(base, "target"), size, out.access)
            at, left = at + size, left - size
        else:
            if not left:
                return out
        raise RuntimeError(
            f"the IOMMU translated {span.first:#x}+{length:#x} to ranges of another length"
        )
