"""C view of the split virtqueue."""

from guestio._core.access cimport AddressSpace, IoVector
from guestio._core.border cimport u8, u32, u64

from libc.stdint cimport uint16_t

ctypedef uint16_t u16


cdef struct Desc:
    u64 addr
    u32 size
    u16 flags
    u16 next


cdef struct UsedElem:
    u32 head
    u32 written


cdef class SplitRing


cdef class Chain:
    cdef SplitRing ring
    cdef readonly int head
    cdef readonly IoVector readable
    cdef readonly IoVector writable
    cdef readonly IoVector tail
    cdef readonly str fault
    cdef readonly list access_fails
    cdef bint done


cdef class SplitRing:
    cdef readonly AddressSpace space
    cdef readonly u32 size
    cdef readonly u64 desc_addr
    cdef readonly u64 avail_addr
    cdef readonly u64 used_addr
    cdef readonly bint event_idx
    cdef readonly bint indirect
    cdef readonly u16 next_avail
    cdef readonly u16 next_used
    cdef readonly str broken
    cdef u16 signalled
    cdef bint signalled_valid
    cdef bint used_known
    cdef IoVector desc
    cdef IoVector avail
    cdef IoVector used
    cdef u64 generation
    cdef readonly int outstanding
    cdef UsedElem *pending
    cdef u32 pending_count
    cdef u64 work

    cdef object wrong(self, str what)
    cdef bint vanished(self) noexcept
    cdef bint current(self) noexcept
    cdef int waiting(self) except -1
    cdef bint areas_ready(self, list misses) except -1
    cdef IoVector area(self, u64 addr, u64 size, int access, list misses)
    cdef int check_areas(self) except -1
    cdef u16 load16(self, IoVector area, u64 offset) except? 65535
    cdef int store16(self, IoVector area, u64 offset, u16 value) except -1
    cdef int walk(self, Chain chain, list misses, bint lenient) except -1
    cdef int walk_table(
        self, IoVector table, u64 entries, u16 index, bint nested, Chain chain, u64 *sizes,
        list misses, bint lenient,
    ) except -1
    cdef int add_buffer(
        self, const Desc *desc, Chain chain, u64 *sizes, list misses, bint lenient
    ) except -1
    cdef int walk_indirect(
        self, const Desc *desc, bint nested, Chain chain, u64 *sizes, list misses, bint lenient
    ) except -1
    cdef IoVector last_byte(self, u64 addr)
    cdef bint wants_notification(self, u16 before) except -1
