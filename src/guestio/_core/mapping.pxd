"""C view of host mappings."""

from guestio._core.border cimport u8, u32, u64

cdef extern from * nogil:
    """
    #ifndef GUESTIO_SPOT
    #define GUESTIO_SPOT
    #include <stdint.h>
    /* What the SIGBUS handler knows of a mapping. `vanished` is the lowest address whose file page
       turned out to be gone, UINTPTR_MAX while all is well. */
    typedef struct Spot {
        uintptr_t start;
        uintptr_t end;
        volatile uintptr_t vanished;
        uintptr_t page;
        int prot;
    } Spot;
    #endif
    """
    ctypedef struct Spot:
        size_t start
        size_t end
        size_t vanished
        size_t page
        int prot


cdef class HostMapping:
    cdef u8 *ptr
    cdef readonly size_t size
    cdef readonly bint writable
    cdef readonly size_t page_size
    cdef object lender
    cdef u8 *reserved
    cdef size_t reserved_size
    cdef int exports
    cdef Spot *spot

    cdef int adopt(self, object buffer) except -1
    cdef int map(self, int fd, object offset, object size, bint writable, bint guard) except -1
    cdef void unmap(self) noexcept
