"""C view of what a vfio-user client has mapped for DMA."""

from guestio._core.base.checks cimport Span, u64
from guestio._core.iommu.intervals cimport IntervalMap
from guestio._core.iommu.pieces cimport Pieces


# A file of the client that is mapped here; its number is that of its window.
cdef struct File:
    u64 device
    u64 inode
    u64 size          # that is mapped; 0 of a number that is free
    u64 mappings      # that lead to it
    bint writable


cdef class DmaTable:
    cdef readonly IntervalMap map
    cdef File *files
    cdef size_t file_count
    cdef size_t latest        # the file that was found last
    cdef size_t most
    cdef u64 removed          # mappings, so far

    cdef bint map_known(
        self, u64 address, u64 size, u64 perm, int fd, u64 offset
    ) except -1
    cdef bint unmap_idle(self, u64 address, u64 size) except -1
    cdef bint cuts(self, u64 first, u64 last) noexcept
    cdef size_t find(self, u64 device, u64 inode, bint writable) noexcept
    cdef u64 forget_span(self, u64 first, u64 last, u64 most, u64 *reached) noexcept
    cdef int collect_used(self, Span span, Pieces *found) except -1
    cdef void trace_map(self, u64 address, u64 size, u64 target, u64 perm) noexcept
    cdef void trace_unmap(self, u64 first, u64 last, u64 count) noexcept
