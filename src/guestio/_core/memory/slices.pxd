"""C view of slices of guest memory."""

from guestio._core.memory.bitmap cimport AtomicBitmap
from guestio._core.base.checks cimport u8, u64
from guestio._core.memory.mapping cimport HostMapping, Spot


cdef class Loan:
    cdef int buffers          # that may be written, of the slices of one fragment


cdef class VolatileSlice:
    cdef HostMapping mapping
    cdef object owner
    cdef u8 *ptr
    cdef size_t size
    cdef bint writable
    cdef readonly AtomicBitmap bitmap
    cdef u64 bitmap_at
    cdef readonly AtomicBitmap second
    cdef u64 second_at
    cdef Spot *spot
    cdef Loan loan            # tells the vector that the slice was taken from, or None

    cdef VolatileSlice part(self, size_t at, size_t length)
    cdef int check_open(self, u64 at, object length, int access) except -1
    cdef int check_there(self, size_t at, size_t length, int access) except -1
    cdef size_t clip(self, object offset, object length, int access, size_t *at) except? <size_t>-1
    cdef size_t end_of(self, object at, object length) except? <size_t>-1
    cdef void mark(self, size_t at, size_t length) noexcept
    cdef int finish_write(self, size_t at, size_t length) except -1
    cdef size_t copy_out(self, object offset, u8 *buffer, object length) except? <size_t>-1
    cdef size_t copy_in(self, object offset, const u8 *buffer, object length) except? <size_t>-1
    cdef u8 *atomic_at(self, object offset, int width, int access, size_t *at) except NULL


cdef int as_width(object width) except -1
cdef int as_load_order(object ordering) except -1
cdef int as_store_order(object ordering) except -1
cdef u64 as_value(object value, int width) except? <u64>-1
