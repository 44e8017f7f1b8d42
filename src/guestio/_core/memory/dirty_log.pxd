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


cdef extern from * nogil:
    """
    #ifndef GUESTIO_LOG_BITS
    #define GUESTIO_LOG_BITS
    #include <stdint.h>
    /* The look at a bit comes after the write that it is about. Bytes, because a log need not be
       aligned, nor end with a word. */
    static inline void guestio_mark_byte(uint8_t *byte, uint8_t bits)
    {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        if ((__atomic_load_n(byte, __ATOMIC_RELAXED) & bits) != bits)
            __atomic_fetch_or(byte, bits, __ATOMIC_RELEASE);
    }
    #endif
    """
    void mark_byte "guestio_mark_byte"(u8 *byte, u8 bits)


# What a bitmap without a log marks in.
cdef LogTarget no_log

cdef void mark_log(LogTarget *log, u64 start, u64 length) noexcept nogil
