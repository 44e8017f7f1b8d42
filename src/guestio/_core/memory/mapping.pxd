"""C view of host mappings."""

from guestio._core.base.checks cimport u8, u32, u64

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

    /* Whether any page of this process was found to be gone, ever. To be read after the access
       that may have met one: the fence keeps the read behind it. */
    static inline int met_holes(const uint64_t *holes)
    {
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        return __atomic_load_n(holes, __ATOMIC_RELAXED) != 0;
    }
    #endif
    """
    bint met_holes(const u64 *holes)
    ctypedef struct Spot:
        size_t start
        size_t end
        size_t vanished
        size_t page
        int prot


# Pages that the SIGBUS handler replaced, in all mappings. While there are none, which is nearly
# always, one look at this number spares a look at every fragment.
cdef u64 holes


cdef class HostMapping:
    cdef u8 *ptr
    cdef readonly size_t size
    cdef readonly bint writable
    cdef readonly size_t page_size
    cdef object lender
    cdef u8 *reserved
    cdef size_t reserved_size
    cdef int exports      # buffers that were taken of it
    cdef int tables       # region tables and other structures of the core that point into it
    cdef Spot *spot

    cdef int adopt(self, object buffer) except -1
    cdef int map(self, int fd, object offset, object size, bint writable, bint guard) except -1
    cdef void unmap(self) noexcept
