"""C view of memory access, for the modules of the core that move or walk guest memory."""

from guestio._core.memory.bitmap cimport AtomicBitmap
from guestio._core.base.checks cimport Span, u64
from guestio._core.iommu.intervals cimport IntervalMap
from guestio._core.iommu.misses cimport Misses
from guestio._core.iommu.tree cimport Cursor
from guestio._core.memory.vector cimport IoVector, RegionTable


cdef class AddressSpace:
    cdef readonly RegionTable regions
    cdef IntervalMap iotlb  # None if addresses are physical
    cdef readonly AtomicBitmap bitmap
    cdef readonly bint mark_regions

    cdef IoVector open(self, object addr, object length, int access)
    cdef int translate(
        self, IoVector out, u64 addr, u64 length, int access, Misses failed
    ) except -1
    cdef bint walk(self, IoVector out, Span span, u64 wanted, Cursor at) except -1
    cdef u64 append_physical(
        self, IoVector out, u64 addr, u64 target, u64 length, int access
    ) except? <u64>-1
