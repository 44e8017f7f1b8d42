"""C view of the choice of entries to evict."""

from libc.stdint cimport uint16_t as u16

from guestio._core.base.checks cimport u64
from guestio._core.memory.leases cimport Leases
from guestio._core.iommu.tree cimport Tree


cdef struct Waiting:
    # A candidate; stale if its entry was used or removed since.
    u64 stamp
    u64 first


cdef struct Pin:
    u64 first
    u64 last
    u64 reach         # the greatest last address of this pin and those before it


cdef struct Queue:
    # A binary heap, least recently used first; and the ranges that are never evicted, ascending.
    Waiting *heap
    size_t count
    size_t room
    Pin *pins
    size_t pin_count
    size_t pin_room


# What is noexcept is plain C on the queue and the tree; room is made by `make_room` and `add_pin`.
cdef void close_queue(Queue *queue) noexcept nogil
cdef int make_room(Queue *queue, const Tree *tree, int inserts) except -1
cdef void enqueue(Queue *queue, u64 stamp, u64 first) noexcept nogil
cdef size_t evict(
    Queue *queue, Tree *tree, Leases leases, size_t limit, u64 *tick, u16 origin
) noexcept
cdef int add_pin(Queue *queue, u64 first, u64 last) except -1
cdef bint drop_pin(Queue *queue, u64 first, u64 last) noexcept
cdef int check_queue(const Queue *queue) except -1
