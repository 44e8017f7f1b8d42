"""Which entries of a bounded interval map go when it is full: the least recently used.

Every entry carries the stamp of its last use. The queue holds a candidate for each entry with the
stamp that it had then; a candidate whose entry was used since is put back at its new place when it
comes up, so that a use costs no more than a store.
"""

from cpython.exc cimport PyErr_NoMemory
from libc.stdlib cimport free, realloc

from guestio._core.border cimport u32, u64
from guestio._core.capacity cimport EVICTION_FIRST, GUESTIO_ASSERT
from guestio._core.leases cimport Leases
from guestio._core.tree cimport Cursor, Leaf, Tree, erase_entry, floor_of


cdef void close_queue(Queue *queue) noexcept nogil:
    free(queue.heap)
    free(queue.pins)


cdef int make_room(Queue *queue, const Tree *tree, int inserts) except -1:
    """Allocate ahead what so many insertions can need.

    Candidates of entries that are gone make room first, if they are the greater part: a map whose
    entries come and go without ever being too many evicts nothing.
    """
    cdef Waiting *grown
    if queue.count + inserts <= queue.room:
        return 0
    if queue.count > 2 * tree.entries + EVICTION_FIRST:
        rebuild(queue, tree)
    else:
        grown = <Waiting *>realloc(queue.heap, (queue.room * 2 + EVICTION_FIRST) * sizeof(Waiting))
        if grown is NULL:
            PyErr_NoMemory()
        queue.heap, queue.room = grown, queue.room * 2 + EVICTION_FIRST
    return 0


cdef void enqueue(Queue *queue, u64 stamp, u64 first) noexcept nogil:
    """Add a candidate; the room was reserved. O(log n)."""
    cdef size_t at = queue.count, parent
    while at:
        parent = (at - 1) // 2
        if queue.heap[parent].stamp <= stamp:
            break
        queue.heap[at] = queue.heap[parent]
        at = parent
    queue.heap[at] = Waiting(stamp, first)
    queue.count += 1


cdef Waiting dequeue(Queue *queue) noexcept nogil:
    """Take the candidate with the least stamp. O(log n)."""
    cdef Waiting *heap = queue.heap
    cdef Waiting oldest = heap[0], moved
    cdef size_t at = 0, child = 1
    queue.count -= 1
    moved = heap[queue.count]
    while child < queue.count:
        if child + 1 < queue.count and heap[child + 1].stamp < heap[child].stamp:
            child += 1
        if moved.stamp <= heap[child].stamp:
            break
        heap[at] = heap[child]
        at, child = child, 2 * child + 1
    heap[at] = moved
    return oldest


cdef void rebuild(Queue *queue, const Tree *tree) noexcept nogil:
    """Queue every entry once, as it is now."""
    cdef Leaf *leaf = tree.first_leaf
    cdef u32 i
    queue.count = 0
    while leaf is not NULL:
        for i in range(leaf.head.count):
            enqueue(queue, leaf.entry[i].stamp, leaf.head.key[i])
        leaf = leaf.next


cdef size_t evict(Queue *queue, Tree *tree, Leases leases, size_t limit) noexcept:
    """Drop the entries beyond the limit that were used least recently.

    What is pinned or in use at this moment stays, even if the limit is exceeded; it is set aside
    at the far end of the heap's own memory meanwhile. Returns how many were dropped.
    """
    cdef Cursor at
    cdef Waiting oldest
    cdef size_t kept = 0, gone = 0
    cdef u64 last
    while tree.entries > limit and queue.count:
        oldest = dequeue(queue)
        at = floor_of(tree, oldest.first)
        if at.leaf is NULL or at.leaf.head.key[at.index] != oldest.first:
            continue
        last = at.leaf.entry[at.index].last
        if at.leaf.entry[at.index].stamp != oldest.stamp:
            enqueue(queue, at.leaf.entry[at.index].stamp, oldest.first)
        elif pinned(queue, oldest.first, last) or leases.used(oldest.first, last):
            kept += 1
            queue.heap[queue.room - kept] = oldest
        else:
            erase_entry(tree, oldest.first)
            gone += 1
    while kept:
        oldest = queue.heap[queue.room - kept]
        kept -= 1
        enqueue(queue, oldest.stamp, oldest.first)
    return gone


cdef bint pinned(const Queue *queue, u64 first, u64 last) noexcept nogil:
    cdef size_t i
    for i in range(queue.pin_count):
        if queue.pins[i].first <= last and first <= queue.pins[i].last:
            return True
    return False


cdef int add_pin(Queue *queue, Pin pin) except -1:
    cdef Pin *grown = <Pin *>realloc(queue.pins, (queue.pin_count + 1) * sizeof(Pin))
    if grown is NULL:
        PyErr_NoMemory()
    queue.pins = grown
    queue.pins[queue.pin_count] = pin
    queue.pin_count += 1
    return 0


cdef bint drop_pin(Queue *queue, Pin pin) noexcept:
    """Undo one :func:`add_pin` of exactly this range; False if there is none."""
    cdef size_t i
    for i in range(queue.pin_count):
        if queue.pins[i].first == pin.first and queue.pins[i].last == pin.last:
            queue.pin_count -= 1
            queue.pins[i] = queue.pins[queue.pin_count]
            return True
    return False


cdef int check_queue(const Queue *queue) except -1:
    """Walk every invariant of the structure; for tests."""
    cdef size_t i
    for i in range(1, queue.count):
        assert queue.heap[(i - 1) // 2].stamp <= queue.heap[i].stamp, "the heap is out of order"
    return 0
