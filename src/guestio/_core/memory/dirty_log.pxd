"""C view of a dirty log in shared memory."""

from guestio._core.base.checks cimport u8, u64
from guestio._core.memory.mapping cimport HostMapping


cdef struct LogTarget:
    # Where marks go; looked at for each of them, so it is apart from the object.
    u8 *at            # one bit a page; NULL without a log
    u64 pages         # how many the log has room for
    u64 lost          # marks that it had no room for
    bint enabled


cdef class DirtyLog:
    cdef LogTarget target
    cdef HostMapping mapping

    cdef int let_go(self) except -1


# What a bitmap without a log marks in.
cdef LogTarget no_log

cdef void mark_log(LogTarget *log, u64 start, u64 length) noexcept nogil
