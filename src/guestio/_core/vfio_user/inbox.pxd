"""C view of what has arrived at a socket."""

from guestio._core.base.checks cimport u8, u64
from guestio._core.vfio_user.wire cimport Header, PASSED_AT_ONCE


# Descriptors, and where in the stream the message begins that they are with.
cdef struct Passed:
    u64 at
    int count
    int fd[PASSED_AT_ONCE]


cdef class Inbox:
    cdef u8 *data
    cdef size_t room
    cdef size_t most          # bytes of a message at most
    cdef size_t start         # the first message that was not taken
    cdef size_t end           # what has arrived
    cdef u64 before           # bytes of the stream that came before `data`
    cdef Passed passed[2]     # of the messages before and after the last read's beginning
    cdef int passed_count
    cdef readonly int odd

    cdef Py_ssize_t receive(self, int fd) except? -1
    cdef int place_fds(self, size_t began) noexcept
    cdef bint whole(self, Header *header) noexcept
    cdef Passed *with_first(self) noexcept
    cdef void drop_first(self, size_t size) noexcept
