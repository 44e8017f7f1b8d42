"""C view of dirty bitmaps."""

from guestio._core.border cimport u64


cdef class AtomicBitmap:
    cdef u64 *word
    cdef readonly u64 pages
    cdef readonly u64 byte_size
    cdef readonly u64 page_size

    cdef void mark(self, u64 start, u64 length) noexcept nogil
    cdef void clear_pages(self, u64 first, u64 last) noexcept nogil
    cdef int grow(self, u64 byte_size) except -1
    cdef int pages_of(self, object start, object length, u64 *first, u64 *last) except -1
