"""C view of a ring's areas."""

from guestio._core.iommu.address_space cimport AddressSpace, IoVector
from guestio._core.base.checks cimport u8, u32, u64
from guestio._core.virtio.chain cimport u16
from guestio._core.iommu.misses cimport Misses


cdef struct Sizes:
    u64 desc
    u64 avail
    u64 used


cdef class RingAreas:
    cdef readonly AddressSpace space
    cdef readonly u32 size
    cdef readonly u64 desc_addr
    cdef readonly u64 avail_addr
    cdef readonly u64 used_addr
    cdef readonly bint event_idx
    cdef readonly str broken
    cdef IoVector desc
    cdef IoVector avail
    cdef IoVector used
    cdef Misses ignored
    cdef bint resolved
    cdef bint begun
    cdef u64 generation

    cdef object wrong(self, str what)
    cdef bint vanished(self) noexcept
    cdef bint area(self, IoVector found, u64 addr, u64 size, int access, Misses misses) except -1
    cdef bint areas_ready(self, Misses misses) except -1
    cdef int measure(self, Sizes *sizes) except -1
    cdef int begin(self) except -1
    cdef bint reachable(self) except -1
    cdef int check_areas(self) except -1
    cdef u16 load16(self, IoVector area, u64 offset) except? 65535
    cdef int store16(self, IoVector area, u64 offset, u16 value) except -1


cdef inline bint current(RingAreas ring) noexcept:
    """Whether no translation was taken away since the areas were looked up."""
    return ring.space.iotlb is None or ring.space.iotlb.at.generation == ring.generation
