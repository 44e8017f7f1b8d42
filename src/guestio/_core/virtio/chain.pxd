"""C view of requests, and of what serves them."""

from guestio._core.base.checks cimport u64
from guestio._core.memory.vector cimport IoVector

from libc.stdint cimport int64_t, uint16_t

ctypedef uint16_t u16
ctypedef int64_t i64


cdef enum:
    NOT_SERVED = -1


cdef class Chain:
    cdef object ring
    cdef readonly int head
    cdef readonly IoVector readable
    cdef readonly IoVector writable
    cdef IoVector end
    cdef readonly str fault
    cdef readonly list access_fails
    cdef u16 position
    cdef u64 written
    cdef u64 since        # when it was found available, ns, if that is measured
    cdef int kind         # of the operation, as in Latencies
    cdef u64 offset       # of a read or write in the image, bytes
    cdef u16 origin       # for records of tracepoints, once it was handed out
    cdef u16 queue
    cdef u64 charge       # pieces that its ring's quota counts for it
    cdef bint finished
    cdef bint done
    cdef bint blank       # its ring has not filled it since it was cleared

    cdef int clear(self) except -1


cdef Chain new_chain()


cdef inline bint is_moving(Chain chain) noexcept:
    """Whether a call is moving the data of a chain that has not been handed out."""
    return chain.readable.users or chain.writable.users


cdef inline bint is_in_use(Chain chain) noexcept:
    """As :meth:`Chain.in_use`."""
    return is_moving(chain) or (chain.end is not None and chain.end.users)


cdef class Quota:
    cdef readonly u64 used
    cdef readonly u64 most


cdef class Server:
    cdef i64 serve(self, Chain chain) except -2
