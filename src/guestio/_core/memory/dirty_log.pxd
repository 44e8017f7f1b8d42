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
    /* A look at a bit comes after the write that it is about, so this comes between. Else a
       harvest in between could take the bit and still read the page as it was before. */
    #define guestio_write_before_look() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    /* Bytes, because a log need not be aligned, nor end with a word. */
    static inline void guestio_log_page(uint8_t *log, uint64_t page)
    {
        uint8_t *byte = log + (page >> 3);
        if (!(__atomic_load_n(byte, __ATOMIC_RELAXED) >> (page & 7) & 1))
            __atomic_fetch_or(byte, (uint8_t)(1u << (page & 7)), __ATOMIC_RELEASE);
    }
    #endif
    """
    void write_before_look "guestio_write_before_look"()
    void log_page "guestio_log_page"(u8 *log, u64 page)


cdef enum:
    LOG_PAGE_SHIFT = 12   # VHOST_LOG_PAGE


# What a bitmap without a log marks in.
cdef LogTarget no_log

cdef void mark_log(LogTarget *log, u64 start, u64 length) noexcept nogil
