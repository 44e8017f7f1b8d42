"""C view of the split format."""

from guestio._core.base.checks cimport u32, u64
from guestio._core.iommu.address_space cimport IoVector
from guestio._core.iommu.misses cimport Misses
from guestio._core.virtio.chain cimport Chain, u16
from guestio._core.virtio.ring cimport Ring


cdef struct Desc:
    u64 addr
    u32 size
    u16 flags
    u16 next


cdef class SplitRing(Ring):
    cdef IoVector table
    cdef u16 unmarked     # used entries that were written and not marked dirty yet

    cdef int walk_table(
        self, IoVector table, u64 entries, u16 index, bint nested, Chain chain, u64 *sizes,
        Misses misses, bint lenient,
    ) except -1
    cdef int walk_indirect(
        self, const Desc *desc, bint nested, Chain chain, u64 *sizes, Misses misses, bint lenient
    ) except -1
