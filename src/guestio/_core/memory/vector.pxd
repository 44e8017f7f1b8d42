"""C view of gathered guest memory."""

from guestio._core.memory.bitmap cimport AtomicBitmap, logs_alone, takes_marks
from guestio._core.base.checks cimport u8, u64
from guestio._core.base.capacity cimport VECTOR_INSIDE
from guestio._core.memory.leases cimport Leases
from guestio._core.memory.mapping cimport Spot

cdef extern from "<sys/uio.h>" nogil:
    ctypedef struct iovec "struct iovec":
        void *iov_base
        size_t iov_len


cdef enum Stop:
    # Why a gather ended early.
    STOP_NONE = 0
    STOP_HOLE = 1
    STOP_READ_ONLY = 2


cdef struct Origin:
    # Where a fragment stands: what to look at after touching it and what to mark after writing.
    # The bitmaps are borrowed; the IoVector or slice that holds the fragment keeps them alive.
    Spot *spot
    void *bitmap
    u64 offset
    void *second
    u64 second_offset
    bint writable
    int region        # in the table of the vector; -1 for a slice of its own


cdef class RegionTable:
    cdef int count
    cdef u64 *first
    cdef u64 *last
    cdef u8 **host
    cdef Origin *origin
    cdef readonly list mappings
    cdef readonly list bitmaps
    cdef readonly list owners

    cdef int find(self, u64 addr) noexcept nogil


cdef class Held:
    cdef object guard


cdef class IoVector:
    cdef iovec *vec
    cdef Origin *origin
    cdef u64 *addr
    cdef iovec vec_inside[VECTOR_INSIDE]
    cdef Origin origin_inside[VECTOR_INSIDE]
    cdef u64 addr_inside[VECTOR_INSIDE]
    cdef readonly int count
    cdef int capacity
    cdef readonly u64 total
    cdef readonly int access
    cdef readonly u64 start
    cdef readonly int stop
    cdef readonly u64 stop_addr
    cdef readonly u64 stop_target
    cdef int stop_index
    cdef RegionTable table
    cdef AtomicBitmap second
    cdef list slices_held
    cdef Leases leases
    cdef int *lease
    cdef int lease_inside[VECTOR_INSIDE]
    cdef int lease_count
    cdef int lease_capacity
    cdef Held guard
    cdef list loans           # one to a fragment, once slices of it were given away
    cdef int users            # calls that use the memory without the GIL
    cdef bint closing         # closed meanwhile: the last of them gives the memory back
    cdef int stamp            # 1 + what is to be its last byte then, or 0

    cdef int adopt(self, RegionTable table, AtomicBitmap second) except -1
    cdef int push(self, void *base, size_t size, u64 addr, const Origin *origin) except -1
    cdef int grow(self) except -1
    cdef int push_lease(self, Leases leases, u64 first, u64 last) except -1
    cdef u64 append_region(
        self, u64 addr, u64 target, u64 length, int access, bint mark_regions,
    ) except? <u64>-1
    cdef int finish_close(self) except -1
    cdef void enter(self) noexcept nogil
    cdef int leave(self) except -1
    cdef int put_stamp(self) except -1
    cdef int mark_loans(self) except -1
    cdef IoVector last_byte(self)
    cdef void release(self) noexcept
    cdef void rewind(self, int count, u64 total, int leases) noexcept
    cdef bint vanished(self, u64 start, u64 count) noexcept nogil
    cdef void mark(self, u64 start, u64 count) noexcept nogil
    cdef int log_pieces(self, int i, u64 start, u64 *count) noexcept nogil
    cdef bint is_marked_with(self, u64 first, u64 last) noexcept nogil
    cdef u64 transfer(self, u8 *buffer, u64 start, u64 count, bint to_guest) noexcept nogil
    cdef int check_window(self, object start, object count, u64 *at, u64 *length) except -1
    cdef object gone(self, u64 start, u64 count)
    cdef object target_of(self, int i, u64 skip)
    cdef object region_of(self, int i)
    cdef int check_writable(self) except -1
    cdef int copy_out(self, u8 *buffer, u64 at, u64 length) except -1
    cdef int copy_in(self, const u8 *buffer, u64 at, u64 length) except -1
    cdef int finish_write(self, u64 at, u64 length) except -1
    cdef void set_bytes(self, int byte, u64 start, u64 count) noexcept nogil
    cdef void *atomic_at(self, int width) except NULL
    cdef int window_batch(self, u64 start, u64 count, iovec *batch) noexcept nogil
    cdef object move_file(
        self, object fd, object file_offset, object start, object count, bint once, bint to_guest
    )
    cdef object move_window(
        self, object fd, object file_offset, object start, object count, bint once, bint to_guest
    )
    cdef object move_error(self, int number, u64 at, u64 length)
