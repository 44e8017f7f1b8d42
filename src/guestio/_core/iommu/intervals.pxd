"""C view of the interval map, for the modules of the core that look addresses up in bulk."""

from libc.stdint cimport uint16_t as u16

from guestio._core.base.checks cimport Span, u8, u32, u64
from guestio._core.iommu.eviction cimport Queue
from guestio._core.memory.leases cimport Guard, Leases
from guestio._core.iommu.misses cimport Misses
from guestio._core.iommu.pieces cimport Outcome, Pieces
from guestio._core.iommu.tree cimport Entry, Tree

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_rwlock_t:
        pass
    ctypedef struct pthread_rwlockattr_t:
        pass
    int PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP
    int pthread_rwlockattr_init(pthread_rwlockattr_t *)
    int pthread_rwlockattr_setkind_np(pthread_rwlockattr_t *, int)
    int pthread_rwlock_init(pthread_rwlock_t *, pthread_rwlockattr_t *)
    int pthread_rwlock_destroy(pthread_rwlock_t *)
    int pthread_rwlock_rdlock(pthread_rwlock_t *)
    int pthread_rwlock_trywrlock(pthread_rwlock_t *)
    int pthread_rwlock_wrlock(pthread_rwlock_t *)
    int pthread_rwlock_unlock(pthread_rwlock_t *)


# What a map has for itself, or shares with those that follow it.
cdef struct Mappings:
    Tree tree
    pthread_rwlock_t lock
    u64 generation


cdef class IntervalMap:
    cdef Mappings *at          # what lookups see: its own, or those of `source`
    cdef Mappings own
    cdef IntervalMap source    # None unless it follows another map
    cdef bint merging
    cdef size_t limit
    cdef u64 tick
    cdef Queue queue
    cdef readonly Leases leases
    cdef readonly u64 hits
    cdef readonly u64 misses
    cdef readonly u64 access_fails
    cdef readonly u64 evictions
    cdef public u16 origin     # the number of its server, for records of tracepoints
    cdef u64 cuts
    cdef u64 seen_cuts         # those of `source` before it was followed

    cdef int begin_change(self, int inserts) except -1
    # What is noexcept is plain C on the map's own memory, under the GIL where it counts: the room
    # that a change needs was reserved when it began.
    cdef void end_change(self) noexcept
    cdef void refuse_change(self) noexcept
    cdef void put(self, u64 first, Entry entry) noexcept
    cdef bint cut_span(self, Span span) noexcept
    cdef void overwrite_span(self, Span span, u64 target, u64 perm) noexcept
    cdef bint takes_away(self, Span span, u64 target, u64 perm) noexcept
    cdef void touch(self, Entry *entry) noexcept nogil
    cdef int collect(self, Span span, Pieces *found) except -1
    cdef Outcome resolve(self, Span span, u64 wanted, Pieces *found) except -1
    cdef Outcome resolve_to(
        self, Span span, u64 wanted, list found, list misses, list refused
    ) except -1
    cdef void count_outcome(self, Outcome outcome) noexcept
    cpdef list lookup(self, start, length, access)
    cpdef Guard guard(self, start, length, access)
    cdef list lookup_span(self, Span span, u64 wanted)
    cdef int fails_of(self, Span span, u64 wanted, Misses failed) except -1
