"""C view of the region that tracks requests in flight."""

from guestio._core.base.checks cimport u8, u32, u64
from guestio._core.memory.mapping cimport HostMapping

from libc.stdint cimport uint16_t

ctypedef uint16_t u16


cdef struct DescState:
    # DescStateSplit of the specification.
    u8 inflight
    u8 padding[5]
    u16 next
    u64 counter


cdef struct QueueRegion:
    # QueueRegionSplit; `desc_num` times DescState follow.
    u64 features
    u16 version
    u16 desc_num
    u16 last_batch_head
    u16 used_idx


cdef class InflightQueue:
    cdef HostMapping mapping
    cdef QueueRegion *region
    cdef DescState *desc
    cdef readonly u32 size
    cdef u64 counter

    cpdef void take(self, u16 head) noexcept
    cdef void release(self, u16 head) noexcept
    cpdef void batch(self, u16 head) noexcept
    cdef void published(self, const u16 *heads, u32 count, u16 used_idx) noexcept
    cpdef list recover(self, u16 used_idx)
    cpdef void forget(self) noexcept
    cdef void begin(self, u16 used_idx) noexcept
    cdef int finish_batch(self, u16 used_idx) except -1
    cdef list in_order(self)
    cdef int check_there(self) except -1
    cdef object wrong(self, str what)
