"""C view of images: files whose contents are moved to guest memory and back."""

from guestio._core.base.checks cimport u64
from guestio._core.memory.vector cimport IoVector


cdef enum:
    # What came of moving data.
    MOVED = 0
    FAILED = 1
    WOULD_WAIT = 2


# What is to be moved, and how far it is.
cdef struct Move:
    u64 offset        # in the image
    u64 start         # in the vector
    u64 length
    u64 done
    int error         # errno; 0 where the image ended
    bint reading


cdef class ImageFile:
    cdef int fd
    cdef int users        # calls that use the file at this moment
    cdef object released  # called once there are none
    cdef u64 size_now
    cdef readonly bint waits

    cpdef int hold(self) except -2
    cpdef int let_go(self) except -1
    cdef int move(self, IoVector data, Move *plan, u64 most, bint wait) noexcept
