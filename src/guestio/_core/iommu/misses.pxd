"""C view of what a translation lacks."""

from guestio._core.base.checks cimport u8, u64


cdef enum:
    PAGE_BYTES = 4096        # a miss, and a front-end's answer, is about one page


cdef struct Miss:
    # Inclusive, so that the last byte of the space is reachable.
    u64 first
    u64 last
    u8 access
    bint refused


cdef class Misses:
    cdef Miss *item
    cdef size_t count
    cdef size_t room

    cdef object range_at(self, size_t at)
    cdef object error(self)
    cdef int add(self, u64 first, u64 last, int access, bint refused) except -1
