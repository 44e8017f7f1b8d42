"""C view of the split virtqueue."""

from guestio._core.access cimport AddressSpace, IoVector
from guestio._core.border cimport u8, u32, u64
from guestio._core.misses cimport Misses

from libc.stdint cimport int64_t, uint16_t

ctypedef uint16_t u16
ctypedef int64_t i64


cdef struct Desc:
    u64 addr
    u32 size
    u16 flags
    u16 next


cdef struct UsedElem:
    u32 head
    u32 written


cdef enum:
    NOT_SERVED = -1


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

    cdef void clear(self) noexcept


cdef class Server:
    cdef i64 serve(self, Chain chain) except -2


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
    cdef IoVector table
    cdef Misses ignored
    cdef bint resolved
    cdef bint notify_due
    cdef Chain spare
    cdef u64 generation
    cdef readonly int outstanding
    cdef UsedElem *pending
    cdef u32 pending_count
    cdef u64 work

    cdef object wrong(self, str what)
    cdef bint vanished(self) noexcept
    cdef bint current(self) noexcept
    cdef int waiting(self) except -1
    cdef bint reachable(self) except -1
    cdef bint areas_ready(self, Misses misses) except -1
    cdef bint area(self, IoVector found, u64 addr, u64 size, int access, Misses misses) except -1
    cdef int take(self, int limit, Server server, list chains, Misses misses) except -1
    cdef Chain chain_at(self, u16 position)
    cdef Chain hand_out(self)
    cdef void keep_nothing(self) noexcept
    cdef bint served(self, Server server, Chain chain) except -1
    cdef void note_refused(self, Chain chain, Misses misses, size_t since)
    cdef void finish(self, int head, u64 written) noexcept
    cdef int show_pending(self) except -1
    cdef int check_areas(self) except -1
    cdef u16 load16(self, IoVector area, u64 offset) except? 65535
    cdef int store16(self, IoVector area, u64 offset, u16 value) except -1
    cdef int walk(self, Chain chain, Misses misses, bint lenient) except -1
    cdef int walk_table(
        self, IoVector table, u64 entries, u16 index, bint nested, Chain chain, u64 *sizes,
        Misses misses, bint lenient,
    ) except -1
    cdef int add_buffer(
        self, const Desc *desc, Chain chain, u64 *sizes, Misses misses, bint lenient
    ) except -1
    cdef int walk_indirect(
        self, const Desc *desc, bint nested, Chain chain, u64 *sizes, Misses misses, bint lenient
    ) except -1
    cdef IoVector last_byte(self, u64 addr)
    cdef bint wants_notification(self, u16 before) except -1
