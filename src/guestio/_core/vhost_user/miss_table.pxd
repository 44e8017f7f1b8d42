"""C view of the misses in flight, for the code that reads their answers."""

from libc.stdint cimport int16_t, int64_t as i64, uint16_t

from guestio._core.base.checks cimport u8, u64
from guestio._core.base.capacity cimport MISS_BITS, MISS_SLOTS, READ_AHEAD
from guestio._core.memory.leases cimport pthread_mutex_t
from guestio._core.iommu.misses cimport PAGE_BYTES, Misses
from guestio._core.trace.latencies cimport Latencies

cdef enum:
    WAITERS = 256            # as many as a front-end can name queues
    WAITER_WORDS = 4


cdef struct Slot:
    u64 iova
    u64 waiting[WAITER_WORDS]
    u64 number               # misses up to this one, in the order in which they were sent
    double sent_at
    int16_t next             # of the same hash, or free
    int16_t batch            # messages that its acknowledgement speaks for, this one included
    u8 access
    bint fresh               # not sent yet
    bint open                # neither answered nor refused
    bint repeatable          # if it stays without an answer, it is to be sent once more
    bint expected            # its acknowledgement is still to come
    bint forbidden           # a translation came that does not allow the access


cdef class MissTable:
    cdef pthread_mutex_t mutex
    cdef double time_limit
    cdef Slot slots[MISS_SLOTS]
    cdef int16_t heads[MISS_SLOTS]
    cdef int16_t free_slot
    cdef int16_t order[MISS_SLOTS]     # a circle of the misses whose acknowledgement is to come
    cdef uint16_t order_first
    cdef int order_count
    cdef int under_way            # messages that no acknowledgement has spoken for yet
    cdef int unmarked             # those of them that none will: since the last to be acknowledged
    cdef u64 opened               # misses so far
    cdef u64 reached              # the latest of them that is known to have been dealt with
    cdef u64 reached_before       # as it was when it was last looked for what is late
    cdef double looked            # when that was
    cdef int open_count
    cdef int lacking[WAITERS]
    cdef u64 starved_waiters[WAITER_WORDS]
    cdef u8 buffer[READ_AHEAD]
    cdef public uint16_t origin   # the server's number, for records of tracepoints
    cdef readonly Latencies latencies
    cdef u64 answered_at          # when the answers came that are looked at, ns; 0: not known
    cdef double measured_sent     # when what was measured last was sent
    cdef u64 measured             # how long it took, ns
    cdef int measured_bucket
    cdef readonly u64 requested
    cdef readonly u64 refused
    cdef readonly u64 timeouts

    cdef void hold(self) noexcept
    cdef void let_go(self) noexcept
    cdef int clear(self) except -1
    cdef int16_t find(self, u64 iova, int access) noexcept
    cdef int16_t find_wider(self, u64 iova) noexcept
    cdef int16_t open_slot(self, u64 iova, int access, double now) noexcept
    cdef void expect(self, int16_t slot) noexcept
    cdef int16_t expected_next(self) noexcept
    cdef void enter(self, int16_t slot) noexcept
    cdef void unlink(self, int16_t slot) noexcept
    cdef void release(self, int16_t slot) noexcept
    cdef bint has_room(self, int fresh, double now) noexcept
    cdef void drop_stale(self, double now) noexcept
    cdef bytes request_all(self, int waiter, Misses wanted, double now, bint acknowledged, skip)
    cdef int request_range(
        self, int waiter, u64 first, u64 last, int access, double now, skip, int16_t *fresh,
        int *count,
    ) except -1
    cdef int request_page(
        self, int waiter, u64 iova, int access, double now, skip, int16_t *fresh, int *count,
    ) except -1
    cdef bint starving(self) noexcept
    cdef int relieve(self, list ready) except -1
    cdef int answer(self, u64 first, u64 span, int perm, list ready) except -1
    cdef int answer_range(self, u64 first, u64 span, int perm, list ready) except -1
    cdef void measure(self, double sent_at) noexcept
    cdef int answer_one(self, int16_t slot, int perm, list ready) except -1
    cdef int finish(self, int16_t slot, list ready) except -1
    cdef int acknowledge_one(self, bint refuse, list refused, list ready) except -1
    cdef bytes repeat_late(self, double now, list ready)
    cdef int take_expired(self, double now, list late) except -1
    cdef double earliest(self) noexcept
    cdef int refuse(self, int16_t slot, list refused, list ready) except -1
    cdef void trace_miss(self, int what, int16_t slot, i64 result) noexcept
    cdef object miss(self, int16_t slot)
    cdef bytes messages(self, const int16_t *which, int count, bint acknowledged, bint repeated)


cdef inline bint is_awaited(const Slot *miss) noexcept nogil:
    """Whether a waiter needs the answer."""
    cdef int word
    for word in range(WAITER_WORDS):
        if miss.waiting[word]:
            return True
    return False


cdef inline int hash_of(u64 iova) noexcept nogil:
    """All misses about a page are in one chain, whatever their access."""
    return <int>(((iova // PAGE_BYTES) * <u64>0x9E3779B97F4A7C15) >> (64 - MISS_BITS))
