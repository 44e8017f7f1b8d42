"""Which entries of a bounded interval map go when it is full: the least recently used.

Every entry carries the stamp of its last use. The queue holds a candidate for each entry with the
stamp that it had then; a candidate whose entry was used since is put back at its new place when it
comes up, so that a use costs no more than a store.
"""

from cpython.exc cimport PyErr_NoMemory
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

from guestio._core.base.checks cimport u32, u64
from guestio._core.base.capacity cimport (
    EVICTION_FIRST, EVICTION_KEPT, EVICTION_LEASES, EVICTION_STALE, GUESTIO_ASSERT, PINS_FIRST,
)
from guestio._core.memory.leases cimport Leases
from guestio._core.iommu.tree cimport Cursor, Entry, Leaf, Tree, erase_entry, floor_of
from guestio._core.trace.tracepoints cimport (
    TRANSLATIONS, TraceRecord, WHAT_EVICTED, trace, trace_record, tracing,
)


cdef void close_queue(Queue *queue) noexcept nogil:
    free(queue.heap)
    free(queue.pins)


cdef int make_room(Queue *queue, const Tree *tree, int inserts) except -1:
    """Allocate ahead what so many insertions can need.

    Candidates of entries that are gone make room first, if they are the greater part: a map whose
    entries come and go without ever being too many evicts nothing.
    """
    cdef Waiting *grown
    cdef size_t room
    if queue.count + inserts > queue.room and queue.count > 2 * tree.entries + EVICTION_FIRST:
        rebuild(queue, tree)
    if queue.count + inserts > queue.room:
        room = max(queue.room * 2 + EVICTION_FIRST, queue.count + inserts)
        grown = <Waiting *>realloc(queue.heap, room * sizeof(Waiting))
        if grown is NULL:
            PyErr_NoMemory()
        queue.heap, queue.room = grown, room
    return 0


cdef void enqueue(Queue *queue, u64 stamp, u64 first) noexcept nogil:
    """Add a candidate; the room was reserved. O(log n)."""
    cdef size_t at = queue.count, parent
    GUESTIO_ASSERT(queue.count < queue.room)
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


cdef size_t evict(
    Queue *queue, Tree *tree, Leases leases, size_t limit, u64 *tick, u16 origin
) noexcept:
    """Drop the entries beyond the limit that were used least recently; the number of them.

    Plain C on memory that is there already: it cannot raise, amid a change.

    What is pinned or in use at this moment stays, and counts as used now. Once so many of those
    came up (EVICTION_KEPT, fewer if many leases had to be looked at) the rest is left to the next
    change, and the limit is exceeded meanwhile. So is a change bounded that follows many uses:
    after EVICTION_STALE entries that were used since they were queued, the next one goes even if
    it was, too.
    """
    cdef Cursor at
    cdef Waiting oldest
    cdef Entry *entry
    cdef TraceRecord record
    cdef size_t kept = 0, stale = 0, gone = 0
    while tree.entries > limit and queue.count and kept < EVICTION_KEPT:
        oldest = dequeue(queue)
        at = floor_of(tree, oldest.first)
        if at.leaf is NULL or at.leaf.head.key[at.index] != oldest.first:
            continue
        entry = &at.leaf.entry[at.index]
        if entry.stamp != oldest.stamp and stale < EVICTION_STALE:
            stale += 1
            enqueue(queue, entry.stamp, oldest.first)
        elif pinned(queue, oldest.first, entry.last) or leases.used(oldest.first, entry.last):
            kept += 1 + <size_t>leases.slots // EVICTION_LEASES
            tick[0] += 1
            entry.stamp = tick[0]
            enqueue(queue, entry.stamp, oldest.first)
        else:
            if tracing & TRANSLATIONS:
                record = trace_record(WHAT_EVICTED, origin)
                record.address, record.length = oldest.first, entry.last - oldest.first + 1
                record.detail, record.access = oldest.first + entry.delta, <u16>entry.perm
                trace(&record)
            erase_entry(tree, oldest.first)
            gone += 1
    return gone


cdef size_t pins_up_to(const Queue *queue, u64 first) noexcept nogil:
    """How many pins begin at or below an address. O(log pins)."""
    cdef size_t low = 0, high = queue.pin_count, middle
    while low < high:
        middle = (low + high) // 2
        if queue.pins[middle].first <= first:
            low = middle + 1
        else:
            high = middle
    return low


cdef bint pinned(const Queue *queue, u64 first, u64 last) noexcept nogil:
    cdef size_t at = pins_up_to(queue, last)
    return at > 0 and queue.pins[at - 1].reach >= first


cdef void renew_reach(Queue *queue, size_t at) noexcept nogil:
    cdef u64 reach = queue.pins[at - 1].reach if at else 0
    for at in range(at, queue.pin_count):
        reach = max(reach, queue.pins[at].last)
        queue.pins[at].reach = reach


cdef int add_pin(Queue *queue, u64 first, u64 last) except -1:
    """Pin a range. O(pins), if little."""
    cdef size_t at, room
    cdef Pin *grown
    if queue.pin_count == queue.pin_room:
        room = queue.pin_room * 2 + PINS_FIRST
        grown = <Pin *>realloc(queue.pins, room * sizeof(Pin))
        if grown is NULL:
            PyErr_NoMemory()
        queue.pins, queue.pin_room = grown, room
    at = pins_up_to(queue, first)
    memmove(&queue.pins[at + 1], &queue.pins[at], (queue.pin_count - at) * sizeof(Pin))
    queue.pins[at] = Pin(first, last, 0)
    queue.pin_count += 1
    renew_reach(queue, at)
    return 0


cdef bint drop_pin(Queue *queue, u64 first, u64 last) noexcept:
    """Undo one :func:`add_pin` of exactly this range; False if there is none."""
    cdef size_t at = pins_up_to(queue, first)
    while at and queue.pins[at - 1].first == first:
        at -= 1
        if queue.pins[at].last == last:
            queue.pin_count -= 1
            memmove(&queue.pins[at], &queue.pins[at + 1], (queue.pin_count - at) * sizeof(Pin))
            renew_reach(queue, at)
            return True
    return False


cdef int check_queue(const Queue *queue) except -1:
    """Walk every invariant of the structure; for tests."""
    cdef size_t i
    cdef u64 reach = 0
    assert queue.count <= queue.room
    for i in range(1, queue.count):
        assert queue.heap[(i - 1) // 2].stamp <= queue.heap[i].stamp, "the heap is out of order"
    assert queue.pin_count <= queue.pin_room
    for i in range(queue.pin_count):
        assert not i or queue.pins[i - 1].first <= queue.pins[i].first, "pins are out of order"
        reach = max(reach, queue.pins[i].last)
        assert queue.pins[i].reach == reach, "a pin's reach was not kept"
    return 0
