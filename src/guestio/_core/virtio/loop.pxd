"""C view of the event loop, for what feeds it."""

from guestio._core.base.checks cimport u64
from guestio._core.iommu.misses cimport Misses
from guestio._core.virtio.chain cimport Server
from guestio._core.virtio.counters cimport Counters
from guestio._core.virtio.ring cimport Ring


cdef class Feed:
    cdef int source           # the socket that it reads, or -1 while Python reads it
    cdef bint pending         # it has something for Python: waiters, or what could not be sent
    cdef double patience
    cdef dict queues          # the active queues that it serves, by waiter
    cdef list ready
    cdef readonly object callback

    cdef bint receive(self, list woken) except -1
    cdef bint request(self, int waiter, Misses missing, double now) except -1


cdef class ActiveQueue:
    cdef Ring ring
    cdef Server server
    cdef int kick
    cdef int call
    cdef readonly int waiter
    cdef Feed feed
    cdef Counters counters
    cdef readonly object callback
    # Since when the oldest request that lacks a translation does, and which one that is.
    cdef readonly double waits_since
    cdef u64 waits_for
