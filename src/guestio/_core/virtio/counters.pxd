"""C view of what is counted in the core."""

from guestio._core.base.checks cimport u64


cdef class Counters:
    cdef public u64 requests
    cdef public u64 failed_requests
    cdef public u64 misses
    cdef public u64 updates
    cdef public u64 invalidations
