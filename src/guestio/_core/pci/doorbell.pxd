"""C view of doorbells, for devices that have some and for transports that ring them."""

from guestio._core.base.checks cimport u64


cdef class Doorbell:
    cdef bint rung            # in the list of those to serve
    cdef int registered       # how often
    cdef bint in_python       # it calls Python, and serves from the loop's callbacks only

    cdef bint ring(self, u64 offset, u64 value, int size) except -1
    cdef bint serve(self) except -1
    cdef int forget(self) except -1


# Writes of up to `width` bytes, aligned, that lie within [first, last] of a BAR.
cdef struct DoorbellRange:
    u64 bar
    u64 first
    u64 last
    int width


cdef class Doorbells:
    cdef DoorbellRange *range_of   # ascending, as are the doorbells beside them
    cdef int count
    cdef list doorbells
    cdef list rung
    cdef u64 lives                 # how often what was rung for was forgotten
    cdef int serving               # how deep
    cdef object failed
    cdef bint reported
    cdef public u64 silent         # the BARs, as bits, whose writes ring nothing

    cdef int find(self, u64 bar, u64 offset, u64 size) noexcept
    cdef bint ring(self, int place, u64 offset, u64 value, int size) except -1
    cdef int report(self, str method) except -1
    cdef bint serve(self, bint may_call_python) except -1
    cdef int serve_each(self, list rung, bint may_call_python) except -1
    cdef bint rung_any(self) noexcept
