"""C view of the leases, for the modules of the core that translate and use in one step."""

from guestio._core.base.checks cimport Span, u64

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct timespec "struct timespec":
        long tv_sec
        long tv_nsec
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_condattr_init(pthread_condattr_t *)
    int pthread_condattr_setclock(pthread_condattr_t *, int)
    int pthread_cond_init(pthread_cond_t *, pthread_condattr_t *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, timespec *)


cdef struct Lease:
    u64 first
    u64 last
    u64 serial        # 0: the slot is free
    unsigned long owner
    int next_free


cdef class Leases:
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t released
    cdef Lease *slot
    cdef int slots
    cdef int free_slot
    cdef int waiting
    cdef int held
    cdef u64 serial

    cdef int enter(self, u64 first, u64 last) except -1
    cdef void leave(self, int slot) noexcept nogil
    cdef void disown(self, int slot) noexcept nogil
    cdef bint busy(self, Span span, u64 before) noexcept nogil
    cdef bint used(self, u64 first, u64 last) noexcept nogil
    cdef bint used_by_me(self, Span span, Lease *found) noexcept
    cdef Guard hold(self, Span span)
    cdef bint wait(self, Span span, timeout)
    cdef int check_self(self, Span span) except -1
    cdef int refuse(self, Span span, Lease mine) except -1


cdef class Guard:
    cdef Leases leases
    cdef int slot
    cdef readonly list ranges
