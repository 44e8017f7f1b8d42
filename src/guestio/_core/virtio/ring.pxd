"""C view of a virtqueue."""

from guestio._core.iommu.address_space cimport IoVector
from guestio._core.virtio.areas cimport RingAreas
from guestio._core.base.checks cimport u32, u64
from guestio._core.virtio.chain cimport Chain, Quota, Server, i64, u16
from guestio._core.virtio.inflight cimport InflightQueue
from guestio._core.iommu.misses cimport Misses
from guestio._core.trace.latencies cimport Latencies


cdef struct UsedElem:
    u32 head
    u32 written


# A request that was completed, at the place in the used ring that it is for.
cdef struct Completed:
    UsedElem element
    int done              # 1 + the kind of its operation, and whether `noted` has it; not positive
                          # once it is published
    u64 since
    u64 offset


# What of a request that the core has served is written once it is published, besides that.
cdef struct Noted:
    u64 address
    u32 taken             # ns from when its batch was found
    u32 served            # the same
    u32 readable
    u32 writable
    u16 position


cdef class Ring(RingAreas):
    cdef readonly bint indirect
    cdef readonly bint ordered
    cdef readonly InflightQueue inflight
    cdef readonly u16 next_avail
    cdef readonly u16 next_used
    cdef readonly int outstanding
    cdef readonly int held_count
    cdef readonly u64 progress
    cdef bint signalled_valid
    cdef bint notify_due
    cdef Chain scratch
    cdef u16 *held
    cdef int held_at      # the first of those that were not taken again
    cdef u16 held_from    # the position of the first of them all
    cdef u16 taken_at     # the position of the request that was taken last
    cdef u16 first_new    # where the batch of requests that were not in flight begins
    cdef u16 *published
    cdef Completed *pending
    cdef u32 pending_count
    cdef u16 publish_at
    cdef u64 work
    cdef u64 moved        # bytes of the requests served in this batch
    cdef u64 batch_bytes
    cdef Quota quota
    cdef u64 charged      # pieces of this ring's requests that the quota counts
    cdef public u16 queue        # its number and its server's, for records of tracepoints
    cdef public u16 origin
    cdef public Latencies latencies
    cdef u64 since               # when this batch began, ns, if that is measured
    cdef u64 turned              # when the request that is served was turned to, ns; 0: not known
    cdef Noted *noted            # with `pending`: of requests that are written once published
    cdef u32 noted_count         # those of them that are not published yet
    cdef bint deferred           # the request that is served has not been written as taken
    cdef readonly u64 returned
    cdef readonly u64 completions
    cdef readonly u64 notifications
    cdef readonly u64 bytes
    cdef readonly bint crowded   # no request is taken until another one is completed

    cdef u16 used_position(self) except? 65535
    cdef int waiting(self) except -1
    cdef bint has_next(self) except -1
    cdef int put_used(self, const UsedElem *element) except -1
    cdef int publish_used(self) except -1
    cdef int run_once_into(
        self, Server server, int limit, int call, bint rearm, list chains, Misses misses,
        bint *idle,
    ) except -1
    cdef int take(self, int limit, Server server, list chains, Misses misses) except -1
    cdef int take_held(self, int limit, Server server, list chains, Misses misses) except -1
    cdef int take_new(self, int limit, Server server, list chains, Misses misses) except -1
    cdef void advance(self, int head) noexcept
    cdef void forget_held(self) noexcept
    cdef int dispatch(self, Server server, list chains) except -1
    cdef int lacking_head(self) except -2
    cpdef disable_kicks(self)
    cdef bint more_after_request(self) except -1
    cdef bint more_beyond(self, u16 ahead) except -1
    cdef bint look(self, int head, Misses misses, bint lenient) except -1
    cdef int head_at(self, u16 position) except -1
    cdef Chain hand_out(self)
    cdef int keep_nothing(self) except -1
    cdef void note_refused(self, Chain chain, Misses misses, size_t since)
    cdef void add_pending(self, Chain chain, bint noted) noexcept
    cdef int publish_pending(self) except -1
    cdef int walk(self, Chain chain, Misses misses, bint lenient) except -1
    cdef int add_buffer(
        self, u64 addr, u32 size, bint writes, Chain chain, u64 *sizes, Misses misses, bint lenient
    ) except -1
    cdef IoVector last_byte(self, u64 addr)
    cdef void begin_batch(self) noexcept
    cdef void count_notification(self) noexcept
    cdef void trace_turn(self, bint core, Chain chain) noexcept
    cdef void trace_left(self, Chain chain) noexcept
    cdef void trace_served(self, Chain chain, i64 written) noexcept
    cdef void spell_out(self) noexcept
    cdef void trace_head(self, int what, Chain chain, i64 result, u64 time) noexcept
    cdef void trace_buffers(self, IoVector memory, u32 head) noexcept
    cdef void trace_available(self, int count) noexcept
    cdef void trace_lacking(self, int head, Misses misses, size_t known) noexcept
    cdef void trace_stalled(self, Misses misses) noexcept
    cdef void measure_published(self, u32 count, u64 now) noexcept
    cdef void trace_published(self, u32 count, u64 now) noexcept
    cdef bint wants_notification(self, u16 before) except -1
