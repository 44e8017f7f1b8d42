"""C view of dirty bitmaps."""

from guestio._core.base.checks cimport u8, u64
from guestio._core.memory.dirty_log cimport DirtyLog, LogTarget

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_rwlock_t:
        pass
    int pthread_rwlock_init(pthread_rwlock_t *, void *)
    int pthread_rwlock_destroy(pthread_rwlock_t *)
    int pthread_rwlock_rdlock(pthread_rwlock_t *)
    int pthread_rwlock_wrlock(pthread_rwlock_t *)
    int pthread_rwlock_unlock(pthread_rwlock_t *)


cdef class AtomicBitmap:
    cdef u64 *word
    cdef readonly u64 pages
    cdef readonly u64 byte_size
    cdef readonly u64 page_size
    cdef pthread_rwlock_t lock
    cdef bint own          # whether it has bits itself
    cdef readonly DirtyLog log
    cdef LogTarget *target # where the log is, or `no_log`
    cdef u64 log_start

    cdef void mark(self, u64 start, u64 length) noexcept nogil
    cdef void mark_pages(self, u64 base, u64 first, u64 count, u64 unit) noexcept
    cdef void clear_pages(self, u64 first, u64 last) noexcept nogil
    cdef int grow(self, u64 byte_size) except -1
    cdef int pages_of(self, object start, object length, u64 *first, u64 *last) except -1
    cdef object snapshot(self, bint clear)
    cdef void trace_harvest(self, u64 first, u64 pages, u64 found) noexcept
    cdef object pages_in(self, u64 first, u64 last, bint clear, u64 group)
    cdef void take_chunk(
        self, u64 at, size_t words, u64 first, u64 last, bint clear, u64 *taken
    ) noexcept nogil


cdef inline bint takes_marks(void *bitmap) noexcept nogil:
    """Whether a bitmap, as fragments of memory refer to it, has anywhere to mark in now."""
    return (<AtomicBitmap>bitmap).pages or (<AtomicBitmap>bitmap).target.enabled


cdef inline bint logs_alone(void *bitmap) noexcept nogil:
    """Whether a bitmap that takes marks keeps none itself: they go to a dirty log and nowhere else."""
    return not (<AtomicBitmap>bitmap).pages


cdef class BitmapSlice:
    cdef readonly AtomicBitmap bitmap
    cdef readonly u64 offset

    cdef object within(self, object start, object length)
