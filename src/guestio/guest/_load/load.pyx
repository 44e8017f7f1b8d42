"""Load for a block device, compiled: keeps virtqueues full of requests and measures the answers.

A :class:`LoadDriver` is a guest's driver of virtio-blk over split rings in memory of this process.
Behind an IOMMU it also answers the back-end's misses, through an
:class:`~guestio.guest._load.iotlb_front.IotlbFront`, in the same loop, which never waits, so the
requests of a whole queue can be mapped, served and unmapped at the same time.

Everything happens in :meth:`LoadDriver.run`, in one thread and without the GIL.
"""

from libc.errno cimport EINTR, errno
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset
from posix.unistd cimport close

from guestio._core.base.checks cimport as_address, as_size, u32, u64
from guestio._core.base.capacity cimport (
    LOAD_EVENTS, LOAD_SPINS, LOAD_SPINS_TRANSLATING, LOAD_TURNS,
)
from guestio.guest._load.driver cimport (
    FINE, GONE, NO_ROOM, RING_ERROR, STALLED, SYSTEM, UNASKED, IOTLB, Ring, Trouble, fail, ring_add,
    ring_arm, ring_close, ring_has, ring_next, ring_open, ring_publish, ring_quieten,
)
from guestio.guest._load.iotlb_front cimport IotlbFront
from guestio.guest._load.requests cimport MOST_DESCS, RequestMaker, Slot, close_slot

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        u64 u64
    struct epoll_event:
        u32 events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int count, int timeout)
    int EPOLL_CLOEXEC
    int EPOLL_CTL_ADD
    u32 EPOLLIN
    u32 EPOLLHUP
    u32 EPOLLRDHUP
    u32 EPOLLERR
    u32 EPOLLET

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <time.h>
    #if defined(__x86_64__)
    #define spin_pause() __builtin_ia32_pause()
    #else
    #define spin_pause() ((void)0)
    #endif
    static uint64_t clock_ns(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    static inline unsigned bit_length(uint64_t v) { return v ? 64 - __builtin_clzll(v) : 0; }
    """
    void spin_pause()
    u64 clock_ns()
    unsigned bit_length(u64 v)

cdef enum:
    MOST_QUEUES = 64
    NO_LIMIT = 0xFFFFFFFFFFFFFFFF
    BUCKETS = 58 * 64
    ON_CALL = 0
    ON_ERROR = 1
    ON_FRONT = 2
    ON_BACK = 3
    NAP_MS = 100

cdef enum Outcome:
    TIME_OVER = 0
    ALL_DONE = 1
    SIGNAL = 2
    TROUBLE = 3

cdef tuple NAMES = (
    "fine", "used-index", "used-id", "used-length", "status", "short", "contents", "overrun",
    "stalled", "gone", "unasked", "ring-error", "iotlb", "system", "no-room",
)

cdef struct Queue:
    Ring ring
    u32 depth
    u32 worst              # descriptors that a request may take
    u32 in_use             # requests begun and not finished
    Slot *slots
    u32 slot_count
    u32 *free_slots        # a circle
    u64 free_first
    u64 free_next
    u64 *strides           # a stack
    u32 stride_count


cdef class LoadDriver:
    """Keeps queues of a block device full of requests.

    Not safe for several threads at once. The memory that it is given, and the fds, must stay until
    it is gone.

    Args:
        block: Bytes per request, a multiple of 512.
        blocks: Blocks of the disk to use.
        front: The front-end's socket; with an IOMMU it is the IOMMU's.
        back: Our end of the back-end's channel, of the IOMMU; -1 without.
        iotlb: The IOMMU, or None for physical addresses.
        strict: Whether each request maps what it uses and unmaps it afterwards.
        stride: Pages of the IOMMU's window that the mappings of one request may take; see
            :meth:`add_stride`.
        separate: Whether header and status are mapped apart although they share a page.
        indirect: Whether VIRTIO_RING_F_INDIRECT_DESC was negotiated; then it is used.
        event_idx: Whether VIRTIO_RING_F_EVENT_IDX was negotiated.
        polling: Whether to look for completions without pause rather than to sleep.
        batches: Whether to begin as many requests as fit at once, and the next only when all of
            them are finished. Then what the device does for each does not depend on its speed.
        verify: Whether requests are laid out at random and contents are checked.
        timeout: Nanoseconds without any progress after which the device counts as stalled.
        seed: Of all choices, and of what is written.

    Attributes:
        reads: Requests finished since :meth:`reset_counts`.
        writes: The same.
        latency_sum: Nanoseconds that they took together.
        latency_max: That the slowest took.
        interrupts: Notifications taken.

    Raises:
        ValueError: A number is out of range.
    """

    cdef IotlbFront iotlb
    cdef RequestMaker maker
    cdef bint translating
    cdef bint strict
    cdef bint polling
    cdef bint batches
    cdef bint reuse_first
    cdef u64 timeout
    cdef u64 progress          # when something was finished or begun last
    cdef u64 left              # when the loop was
    cdef int epoll
    cdef Queue *queues
    cdef u32 queue_count
    cdef u32 in_use
    cdef u64 remaining
    cdef Trouble *trouble_found
    cdef u64 *buckets
    cdef readonly u64 reads
    cdef readonly u64 writes
    cdef readonly u64 latency_sum
    cdef readonly u64 latency_max
    cdef readonly u64 interrupts

    def __cinit__(
        self,
        block,
        blocks,
        int front,
        int back=-1,
        *,
        IotlbFront iotlb=None,
        bint strict=False,
        stride=0,
        bint separate=False,
        bint indirect=True,
        bint polling=False,
        bint batches=False,
        bint verify=False,
        timeout=10_000_000_000,
        seed=0,
    ):
        self.epoll = -1
        self.maker = RequestMaker(
            block, blocks, iotlb, strict, stride, separate, indirect, verify, seed
        )
        self.trouble_found = &self.maker.trouble
        self.iotlb, self.translating, self.strict = iotlb, iotlb is not None, strict
        # What was used last is in the cache. To verify, what was used first: a device that
        # still writes to the memory of a finished request must not find the next one there.
        self.polling, self.batches, self.reuse_first = polling, batches, verify
        self.timeout = as_address(timeout, "timeout")
        self.progress = self.left = clock_ns()
        self.buckets = <u64 *>calloc(BUCKETS, sizeof(u64))
        self.queues = <Queue *>calloc(MOST_QUEUES, sizeof(Queue))
        if self.buckets == NULL or self.queues == NULL:
            raise MemoryError
        self.epoll = epoll_create1(EPOLL_CLOEXEC)
        if self.epoll < 0:
            raise OSError(errno, "epoll_create1")
        self.watch(front, ON_FRONT, 0, EPOLLIN | EPOLLRDHUP)
        if self.translating:
            self.watch(back, ON_BACK, 0, EPOLLIN)

    def __dealloc__(self):
        cdef u32 i, j
        if self.epoll >= 0:
            close(self.epoll)
        for i in range(self.queue_count):
            ring_close(&self.queues[i].ring)
            for j in range(self.queues[i].slot_count):
                close_slot(&self.queues[i].slots[j])
            free(self.queues[i].slots)
            free(self.queues[i].free_slots)
            free(self.queues[i].strides)
        free(self.queues)
        free(self.buckets)

    cdef int watch(self, int fd, u32 what, u32 queue, u32 events) except -1:
        cdef epoll_event event
        event.events = events
        event.data.u64 = what | <u64>queue << 8
        if epoll_ctl(self.epoll, EPOLL_CTL_ADD, fd, &event):
            raise OSError(errno, f"cannot watch fd {fd}")
        return 0

    # Setting up

    def add_queue(
        self, size, depth, desc, avail, used, int kick, int call, int error, *,
        bint event_idx=True, bytes message=b"",
    ):
        """Add a queue that was started, with its indices at 0.

        Args:
            size: Entries.
            depth: Requests to keep in it.
            desc: Where each page of the descriptor table is in this process.
            avail: The same of the available ring.
            used: The same of the used ring.
            kick: Eventfd to notify the device; or with ``message`` the socket to send that to.
            call: Eventfd that it notifies us by.
            error: Eventfd that tells that it found the ring broken; -1 for none.
            event_idx: Whether VIRTIO_RING_F_EVENT_IDX was negotiated.
            message: What notifies the device, at most 64 bytes; nothing for an eventfd.

        Returns:
            The queue's number here.

        Raises:
            ValueError: A number is out of range, or pages are missing.
        """
        cdef Queue *queue = &self.queues[self.queue_count]
        cdef u32 entries = as_size(size, "size")
        if self.queue_count == MOST_QUEUES:
            raise ValueError(f"more than {MOST_QUEUES} queues")
        if not 0 < depth <= size:
            raise ValueError(f"depth {depth} in a queue of {size} entries")
        self.queue_count += 1
        queue.depth = depth
        ring_open(&queue.ring, entries, event_idx, desc, avail, used, kick, message)
        self.watch(call, ON_CALL, self.queue_count - 1, EPOLLIN | EPOLLET)
        if error >= 0:
            self.watch(error, ON_ERROR, self.queue_count - 1, EPOLLIN)
        return self.queue_count - 1

    def add_slot(self, number, first, second, table):
        """Give a queue memory for one more request.

        An extent is ``(device addresses of its pages, host addresses of them, where in the
        first page it begins)``. Without ``verify``, the first has room for header and status in one
        page, and the second for the data. With it, the first has room for header and data from any
        byte of its first page on, and the second for data and status.

        Args:
            number: Number of the queue.
            first: An extent.
            second: An extent.
            table: An extent for an indirect table; contiguous for the device unless ``strict``.

        Raises:
            ValueError: There are too many slots, an extent is short, or a request could take more
                descriptors than the ring has.
        """
        cdef Queue *queue = self.queue_at(number)
        cdef u32 count = queue.slot_count
        if count >= 4 * queue.ring.size or count == 1 << 16:
            raise ValueError(f"queue {number} has {count} slots already")
        queue.slots = <Slot *>_grown(queue.slots, (count + 1) * sizeof(Slot))
        queue.free_slots = <u32 *>_grown(queue.free_slots, (count + 1) * sizeof(u32))
        memset(&queue.slots[count], 0, sizeof(Slot))
        queue.slot_count += 1
        self.maker.open_slot(&queue.slots[count], first, second, table)
        queue.worst = max(queue.worst, self.maker.most_descs(&queue.slots[count]))
        if queue.worst > min(queue.ring.size, <u32>MOST_DESCS):
            raise ValueError(
                f"a request takes up to {queue.worst} descriptors, the ring has {queue.ring.size}"
            )
        queue.free_slots[count] = count
        queue.free_next = queue.slot_count

    def add_stride(self, number, page):
        """Give a queue a range of the IOMMU's window for the mappings of one request.

        Args:
            number: Number of the queue.
            page: First page of it in the window.

        Raises:
            ValueError: It leaves the window.
        """
        cdef Queue *queue = self.queue_at(number)
        cdef u64 first = as_address(page, "page")
        if not self.translating or first + self.maker.stride_pages > self.iotlb.pages:
            raise ValueError(f"pages from {page} are not in the window")
        queue.strides = <u64 *>_grown(queue.strides, (queue.stride_count + 1) * sizeof(u64))
        queue.strides[queue.stride_count] = first
        queue.stride_count += 1

    cdef Queue *queue_at(self, object number) except NULL:
        if not 0 <= number < self.queue_count:
            raise ValueError(f"queue {number} of {self.queue_count}")
        return &self.queues[<u32>number]

    # Running

    def begin(self, *, read_percent, bint random, limit=None, first=0):
        """Choose what to do from now on.

        Args:
            read_percent: How many of 100 requests read; the others write.
            random: Whether blocks are chosen at random, or one after the other.
            limit: Requests to begin; None for no limit.
            first: Block to begin at if not at random.

        Raises:
            ValueError: A number is out of range.
        """
        if not 0 <= read_percent <= 100 or not 0 <= first < self.maker.blocks:
            raise ValueError(f"{read_percent} % reads from block {first} on")
        self.remaining = NO_LIMIT if limit is None else as_address(limit, "limit")
        self.maker.read_percent, self.maker.random = read_percent, random
        self.maker.cursor = first

    def run(self, nanoseconds):
        """Work for so long.

        Returns:
            0 when the time is over, 1 when all of the limit is done and nothing is in flight, 2
            when a signal ended a wait, 3 when something is wrong: see :attr:`trouble`.
        """
        cdef u64 length = as_address(nanoseconds, "nanoseconds")
        cdef Outcome outcome
        cdef u64 now
        with nogil:
            now = clock_ns()
            # While its misses were not answered, the device could not go on.
            self.progress += now - self.left
            outcome = self.loop(now + length)
            self.left = clock_ns()
        return <int>outcome

    @property
    def trouble(self):
        """What is wrong, or None: ``(name, queue, four numbers that say more)``.

        Names and numbers: ``used-index`` (index found, collected, outstanding), ``used-id``
        (descriptor, entry), ``used-length`` (sector, bytes told, bytes there are), ``status``
        (sector, whether a write, status), ``short`` (sector, bytes told, bytes wanted),
        ``contents`` (sector, version, sector and version found, or 2**64-1 and the first word),
        ``overrun`` (sector, whether a write, byte written, where the buffer begins), ``stalled``
        (requests in flight, nanoseconds), ``gone``, ``unasked``, ``ring-error``, ``iotlb`` (see the
        IOTLB's failure), ``system`` (errno), ``no-room`` (of ours).
        """
        cdef Trouble *found = self.trouble_found
        if found.code == FINE:
            return None
        return NAMES[found.code], found.queue, tuple([found.values[i] for i in range(4)])

    @property
    def in_flight(self):
        """Requests begun and not finished."""
        return self.in_use

    @property
    def most_descriptors(self):
        """Descriptors that a request may take, header and status included."""
        cdef u32 i, most = 0
        for i in range(self.queue_count):
            most = max(most, self.queues[i].worst)
        return most

    @property
    def kicks(self):
        """Notifications sent."""
        cdef u32 i
        cdef u64 total = 0
        for i in range(self.queue_count):
            total += self.queues[i].ring.kicks
        return total

    def reset_counts(self):
        """Begin to count and to measure anew."""
        cdef u32 i
        memset(self.buckets, 0, BUCKETS * sizeof(u64))
        self.reads = self.writes = self.latency_sum = self.latency_max = self.interrupts = 0
        for i in range(self.queue_count):
            self.queues[i].ring.kicks = 0
        if self.translating:
            self.iotlb.reset_counts()

    def histogram(self):
        """How long requests took: pairs of nanoseconds (the middle of a range) and how many.

        The ranges are 1/64 of their values wide. Ascending; empty ones are left out.
        """
        cdef list found = []
        cdef u64 i, shift
        for i in range(BUCKETS):
            if self.buckets[i]:
                shift = i // 64 - 1 if i >= 128 else 0
                found.append((((i - 64 * shift) << shift) + ((<u64>1 << shift) >> 1),
                              self.buckets[i]))
        return found

    cdef Outcome loop(self, u64 deadline) noexcept nogil:
        cdef u32 spins = 0, rounds = 0
        cdef bint moved = False
        cdef u64 now
        while True:
            if self.run_once():
                moved = True
                rounds += 1
                if rounds % LOAD_TURNS:
                    continue
                if self.translating and self.look(0) == SIGNAL:
                    return SIGNAL
            elif self.trouble_found.code:
                return TROUBLE
            elif not self.remaining and not self.in_use and (
                not self.translating or self.iotlb.idle()
            ):
                return ALL_DONE
            elif self.polling:
                spin_pause()
                spins += 1
                if spins % (LOAD_SPINS_TRANSLATING if self.translating else LOAD_SPINS):
                    continue
                if self.look(0) == SIGNAL:
                    return SIGNAL
            elif self.arm():
                continue
            elif self.look(self.nap(deadline)) == SIGNAL:
                return SIGNAL
            now = clock_ns()
            if moved:
                moved, self.progress = False, now
            if now - self.progress > self.timeout:
                fail(self.trouble_found, STALLED, self.in_use, now - self.progress)
            elif now >= deadline:
                return TIME_OVER

    cdef bint run_once(self) noexcept nogil:
        """Take what is finished and begin anew; whether there was anything to do."""
        cdef u32 i
        cdef bint moved = False
        for i in range(self.queue_count):
            moved |= self.collect(i)
        if self.strict:
            moved |= self.collect_unmapped()
        for i in range(self.queue_count):
            moved |= self.submit(i)
        if self.translating and self.iotlb.flush():
            fail(self.trouble_found, IOTLB)
        return moved and not self.trouble_found.code

    cdef int nap(self, u64 deadline) noexcept nogil:
        """Milliseconds to wait for something to happen."""
        cdef u64 now = clock_ns()
        if now >= deadline:
            return 0
        # What the sockets did not take is offered again soon.
        if self.translating and self.iotlb.waiting_to_send():
            return 1
        return <int>min((deadline - now) // 1000000 + 1, <u64>NAP_MS)

    cdef bint arm(self) noexcept nogil:
        """Ask for interrupts; whether there is something to collect already."""
        cdef u32 i
        cdef bint ready = False
        for i in range(self.queue_count):
            ready |= ring_arm(&self.queues[i].ring, self.wanted(&self.queues[i]))
        return ready

    cdef u32 wanted(self, const Queue *queue) noexcept nogil:
        """How many finished requests of a queue are worth a look."""
        return max(queue.ring.outstanding, <u32>1) if self.batches else 1

    cdef Outcome look(self, int timeout) noexcept nogil:
        """Wait for the device and the sockets at most so many milliseconds."""
        cdef epoll_event events[LOAD_EVENTS]
        cdef int i, count = epoll_wait(self.epoll, events, LOAD_EVENTS, timeout)
        cdef u32 what, queue
        if count < 0:
            if errno == EINTR:
                return SIGNAL
            fail(self.trouble_found, SYSTEM, errno)
        for i in range(count):
            what, queue = events[i].data.u64 & 0xFF, events[i].data.u64 >> 8
            if what == ON_CALL:
                # Noticed by its edge and never read.
                self.interrupts += 1
                if not self.queues[queue].ring.event_idx:
                    ring_quieten(&self.queues[queue].ring)
            elif what == ON_ERROR:
                self.fail_at(queue, RING_ERROR)
            elif what == ON_FRONT and not self.translating:
                self.fail_at(
                    0, GONE if events[i].events & (EPOLLHUP | EPOLLRDHUP | EPOLLERR) else UNASKED
                )
            elif self.iotlb.take_acks() if what == ON_FRONT else self.iotlb.take_requests():
                fail(self.trouble_found, IOTLB)
        return TIME_OVER

    cdef int fail_at(self, u32 queue, int code) noexcept nogil:
        self.trouble_found.queue = queue
        return fail(self.trouble_found, code)

    cdef bint submit(self, u32 number) noexcept nogil:
        """Fill a queue up and tell the device; whether anything was begun."""
        cdef Queue *queue = &self.queues[number]
        cdef u64 now
        cdef u32 index
        if queue.in_use >= queue.depth or not self.remaining or (self.batches and queue.in_use):
            return False
        now = clock_ns()
        while (
            queue.in_use < queue.depth
            and self.remaining
            and queue.free_first != queue.free_next
            and queue.ring.free_descs >= (1 if self.maker.indirect else queue.worst)
        ):
            index = self.take_slot(queue)
            if not self.maker.choose(&queue.slots[index]):
                self.give_slot(queue, index)
                break
            if self.remaining != NO_LIMIT:
                self.remaining -= 1
            if self.strict:
                queue.stride_count -= 1
                queue.slots[index].stride = queue.strides[queue.stride_count]
            queue.slots[index].started = now
            self.maker.make(&queue.slots[index], queue.ring.free_descs)
            ring_add(&queue.ring, self.maker.chain, self.maker.chain_count, index)
            queue.in_use += 1
            self.in_use += 1
        return ring_publish(&queue.ring)

    cdef u32 take_slot(self, Queue *queue) noexcept nogil:
        if self.reuse_first:
            queue.free_first += 1
            return queue.free_slots[(queue.free_first - 1) % queue.slot_count]
        queue.free_next -= 1
        return queue.free_slots[queue.free_next % queue.slot_count]

    cdef void give_slot(self, Queue *queue, u32 index) noexcept nogil:
        queue.free_slots[queue.free_next % queue.slot_count] = index
        queue.free_next += 1

    cdef bint collect(self, u32 number) noexcept nogil:
        """Take what the device finished; whether there was something."""
        cdef Queue *queue = &self.queues[number]
        cdef u32 index, written
        cdef u64 now = 0
        cdef int found
        if self.batches and not ring_has(&queue.ring, self.wanted(queue)):
            return False
        while True:
            found = ring_next(&queue.ring, &index, &written, self.trouble_found)
            if found <= 0:
                break
            if not now:
                now = clock_ns()
            queue.slots[index].written = written
            found = self.unmap(number, index) if self.strict else self.finish(number, index, now)
            if found < 0:
                break
        if found < 0 and self.trouble_found.queue == 0:
            self.trouble_found.queue = number
        return now != 0

    cdef int unmap(self, u32 number, u32 index) noexcept nogil:
        """Take away what a request had mapped; it is finished once the back-end agreed."""
        cdef Slot *slot = &self.queues[number].slots[index]
        cdef u32 i
        slot.acks = slot.maps
        for i in range(slot.maps):
            if self.iotlb.forget(slot.mapped[i].page, slot.mapped[i].count, number << 16 | index):
                return fail(self.trouble_found, NO_ROOM)
        return 0

    cdef bint collect_unmapped(self) noexcept nogil:
        """Finish the requests whose mappings the back-end has forgotten."""
        cdef Slot *slot
        cdef u64 now = 0
        cdef u32 tag
        while self.iotlb.finished_first != self.iotlb.finished_next:
            if not now:
                now = clock_ns()
            tag = self.iotlb.finished[self.iotlb.finished_first & self.iotlb.mask]
            self.iotlb.finished_first += 1
            slot = &self.queues[tag >> 16].slots[tag & 0xFFFF]
            slot.acks -= 1
            if not slot.acks and self.finish(tag >> 16, tag & 0xFFFF, now) < 0:
                self.trouble_found.queue = tag >> 16
                break
        return now != 0

    cdef int finish(self, u32 number, u32 index, u64 now) noexcept nogil:
        """Judge a request that the device cannot reach any more, and give its memory back."""
        cdef Queue *queue = &self.queues[number]
        cdef Slot *slot = &queue.slots[index]
        if self.maker.judge(slot) < 0:
            return -1
        if self.strict:
            queue.strides[queue.stride_count] = slot.stride
            queue.stride_count += 1
        self.give_slot(queue, index)
        queue.in_use -= 1
        self.in_use -= 1
        if slot.write:
            self.writes += 1
        else:
            self.reads += 1
        self.count_latency(now - slot.started)
        return 0

    cdef void count_latency(self, u64 took) noexcept nogil:
        cdef unsigned bits = bit_length(took)
        cdef u64 shift = bits - 7 if bits > 7 else 0
        self.buckets[64 * shift + (took >> shift)] += 1
        self.latency_sum += took
        if took > self.latency_max:
            self.latency_max = took


cdef void *_grown(void *array, size_t size) except NULL:
    cdef void *grown = realloc(array, size)
    if grown == NULL:
        raise MemoryError
    return grown
