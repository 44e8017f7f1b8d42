"""The IOTLB misses that are in flight, and the waiters that need their answers.

Behind an IOMMU a request of the driver costs a handful of them. They live in a table of fixed size,
found by page and access in O(1), and no Python object is made for one unless it is refused.

An acknowledgement costs both sides a system call and wakes us, and mostly it says nothing that the
translation did not say before. So misses are sent without the flag NEED_REPLY (vhost-user
specification, section VHOST_USER_PROTOCOL_F_REPLY_ACK), and what has no answer after `REPEAT_AFTER`
is sent once more, with it: that names what is refused, and costs nothing but a miss if the
translation was only late. A front-end deals with messages in their order (QEMU: backend_read in
hw/virtio/vhost-user.c, which goes on only when its UPDATE was acknowledged). So as long as answers
come, a miss that was sent after the last answered one is not overdue, only queued.

Each MISS_BATCH-th miss (256th) is acknowledged in any case: the only sign that
the front-end reads them at all, and that there is room for more in the socket.
"""

from libc.errno cimport ETIMEDOUT
from libc.math cimport INFINITY
from libc.string cimport memcpy, memset

from guestio._core.base.checks cimport Span, as_address, as_moment, as_seconds, as_span
from guestio._core.base.capacity cimport GUESTIO_ASSERT, MISS_BATCH, MISS_SLOTS
from guestio._core.base.clock cimport now_ns
from guestio._core.memory.leases cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_trylock,
    pthread_mutex_unlock,
)
from guestio._core.iommu.misses cimport PAGE_BYTES, Misses
from guestio._core.trace.latencies cimport Latencies, latency_bucket
from guestio._core.trace.tracepoints cimport (
    MEASURE, TRANSLATIONS, TraceRecord, WHAT_MISS, WHAT_REFUSED, trace, trace_record, tracing,
)
from guestio._core.vhost_user.iotlb_message cimport (
    ACK_BYTES, FROM_BACKEND, HEADER_BYTES, MESSAGE_BYTES, MISS, NEED_REPLY, REPLY, VERSION,
    VERSION_MASK, Header, Message, look, put_message, take,
)

cdef extern from * nogil:
    """
    #define lowest_bit(v) __builtin_ctzll(v)
    """
    int lowest_bit(u64 v)

PAGE = PAGE_BYTES
"""Front-ends answer a page at a time, so each miss names one page."""

MAX_OUTSTANDING = MISS_SLOTS // 2
"""Misses in flight at a time.

All of them, each sent twice, fit in a socket's buffer, so sending does not wait; unless nearly each
is sent alone, as the buffer holds fewer than 300 messages that are.
"""

REPEAT_AFTER = 0.005
"""Seconds without an answer after which a miss is sent again.

A front-end that is awake answers in 20 to 50 us; one that waits for a processor of a busy machine
has it within a time slice, which is 3 to 4 ms in Linux. Only refusals take this long, and those are
mistakes of a driver.
"""

cdef double LATE = REPEAT_AFTER
cdef int LIMIT = MAX_OUTSTANDING

cdef enum:
    READ = 1
    READ_WRITE = 3


cdef class PendingMiss:
    """A page whose translation was refused, or not given in time.

    Attributes:
        iova: Its address.
        access: What was to be done with it.
        waiting: The waiters that need it, as numbers.
    """

    cdef readonly u64 iova
    cdef readonly int access
    cdef readonly list waiting


cdef class MissTable:
    """Misses in flight, at most one for a page and access, and their waiters.

    What is needed for reading and for writing at the same time is requested once, for both. A
    waiter is a number below 256, such as that of a queue.

    Every method may be called from any thread. Messages of several threads must be sent in the
    order in which the messages were made, because acknowledgements come in that order.

    Args:
        time_limit: Seconds after which an unanswered miss counts as refused.

    Attributes:
        requested: Messages sent so far; a miss may take two.
        refused: Misses refused or not answered in time so far.
        timeouts: Those of them that were not answered in time.
        latencies: How long answers took, while that is measured.
        origin: The server's number, for records of tracepoints.
    """

    def __cinit__(self):
        self.latencies = Latencies()
        if pthread_mutex_init(&self.mutex, NULL):
            raise MemoryError
        self.clear()

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)

    def __init__(self, time_limit):
        self.time_limit = as_seconds(time_limit, "time_limit", INFINITY)

    cdef void hold(self) noexcept:
        """Keep other threads out. The GIL alone does not: making an object may let go of it.

        Python's own locks ask for the time even if there is nothing to wait for.
        """
        if pthread_mutex_trylock(&self.mutex):
            with nogil:
                pthread_mutex_lock(&self.mutex)

    cdef void let_go(self) noexcept:
        pthread_mutex_unlock(&self.mutex)

    cdef int clear(self) except -1:
        """Forget everything but the counts."""
        cdef int i
        memset(self.slots, 0, sizeof(self.slots))
        memset(self.lacking, 0, sizeof(self.lacking))
        for i in range(MISS_SLOTS):
            self.heads[i] = -1
            self.slots[i].next = i + 1 if i + 1 < MISS_SLOTS else -1
        self.free_slot = 0
        self.order_first, self.order_count, self.open_count = 0, 0, 0
        self.under_way, self.unmarked = 0, 0
        self.opened, self.reached, self.reached_before, self.looked = 0, 0, 0, 0
        memset(self.starved_waiters, 0, sizeof(self.starved_waiters))
        return 0

    def __len__(self):
        return self.open_count

    cdef int16_t find(self, u64 iova, int access) noexcept:
        """The open miss about a page and access, or -1."""
        cdef int16_t slot = self.heads[hash_of(iova)]
        while slot >= 0 and (self.slots[slot].iova != iova or self.slots[slot].access != access):
            slot = self.slots[slot].next
        return slot

    cdef void enter(self, int16_t slot) noexcept:
        """Make an open miss findable."""
        cdef int at = hash_of(self.slots[slot].iova)
        self.slots[slot].next = self.heads[at]
        self.heads[at] = slot

    cdef void unlink(self, int16_t slot) noexcept:
        cdef int16_t *link = &self.heads[hash_of(self.slots[slot].iova)]
        while link[0] != slot:
            link = &self.slots[link[0]].next
        link[0] = self.slots[slot].next

    cdef int16_t open_slot(self, u64 iova, int access, double now) noexcept:
        """A new miss; there must be room."""
        cdef int16_t slot = self.free_slot
        cdef Slot *miss = &self.slots[slot]
        GUESTIO_ASSERT(0 <= slot < MISS_SLOTS)
        GUESTIO_ASSERT(not miss.open and not miss.expected)
        self.free_slot = miss.next
        memset(miss, 0, sizeof(Slot))
        miss.iova, miss.access, miss.sent_at = iova, <u8>access, now
        miss.open, miss.fresh = True, True
        self.opened += 1
        miss.number = self.opened
        self.enter(slot)
        self.open_count += 1
        return slot

    cdef void expect(self, int16_t slot) noexcept:
        """Await an acknowledgement; it speaks for all messages since the last one before it."""
        self.slots[slot].expected, self.slots[slot].batch = True, <int16_t>self.unmarked
        GUESTIO_ASSERT(self.order_count < MISS_SLOTS)
        self.order[(self.order_first + self.order_count) % MISS_SLOTS] = slot
        self.order_count += 1
        self.unmarked = 0

    cdef int16_t expected_next(self) noexcept:
        """Await the next acknowledgement no more; whose it was. There must be one."""
        cdef int16_t slot = self.order[self.order_first % MISS_SLOTS]
        GUESTIO_ASSERT(self.order_count > 0)
        self.order_first += 1
        self.order_count -= 1
        self.under_way -= self.slots[slot].batch
        self.slots[slot].expected = False
        return slot

    cdef void release(self, int16_t slot) noexcept:
        """Use a slot again once nothing is to come for it any more."""
        if not self.slots[slot].open and not self.slots[slot].expected:
            self.slots[slot].next = self.free_slot
            self.free_slot = slot

    cdef void drop_stale(self, double now) noexcept:
        """Expect no acknowledgement any more of misses that were answered long ago."""
        cdef Slot *miss
        while self.order_count:
            miss = &self.slots[self.order[self.order_first % MISS_SLOTS]]
            if miss.open or now - miss.sent_at < self.time_limit:
                break
            self.release(self.expected_next())

    cdef bint has_room(self, int fresh, double now) noexcept:
        """Whether one more may be sent, beyond ``fresh`` ones that are not sent yet."""
        if self.under_way + fresh >= LIMIT:
            self.drop_stale(now)
        return self.open_count < LIMIT and self.under_way + fresh < LIMIT

    def request(self, waiter, missing, double now, *, bint acknowledged, skip=()):
        """Note that ``waiter`` needs ranges.

        Args:
            waiter: The number of the waiter.
            missing: ``(IovaRange, access)`` each.
            now: The time.
            acknowledged: Whether the front-end acknowledges misses, in order, on request.
            skip: Pages ``(iova, access)`` that are not to be requested.

        Returns:
            The messages to send, for what is not requested yet, as bytes. If too much is in flight
            already the rest is left out; the waiter is woken to request it again when there is room.

        Raises:
            ValueError: ``waiter`` is not below 256.

        Cost: O(1) a page.
        """
        as_moment(now, "now")
        cdef int who = waiter_of(waiter)
        cdef Misses wanted
        cdef Span span
        if isinstance(missing, Misses):
            wanted = missing
        else:
            wanted = Misses()
            for (base, length), access in missing:
                as_span(base, length, &span, False)
                wanted.add(span.first, span.last, access, False)
        self.hold()
        try:
            return self.request_all(who, wanted, now, acknowledged, skip or None)
        finally:
            self.let_go()

    cdef bytes request_all(self, int waiter, Misses wanted, double now, bint acknowledged, skip):
        cdef int16_t fresh[MISS_SLOTS]
        cdef int count = 0
        cdef size_t i
        for i in range(wanted.count):
            if not self.request_range(
                waiter, wanted.item[i].first, wanted.item[i].last, wanted.item[i].access, now,
                skip, fresh, &count,
            ):
                break
        return self.messages(fresh, count, acknowledged, False)

    cdef bytes messages(self, const int16_t *which, int count, bint acknowledged, bint repeated):
        """Misses as messages; each repeated one is to be acknowledged."""
        cdef bytearray out = bytearray(count * MESSAGE_BYTES)
        cdef u8[::1] view = out
        cdef Header header = Header(FROM_BACKEND, VERSION, sizeof(Message))
        cdef Message message
        cdef Slot *miss
        cdef int i
        self.requested += count
        memset(&message, 0, sizeof(Message))
        message.kind, message.size = MISS, PAGE_BYTES
        for i in range(count):
            miss = &self.slots[which[i]]
            miss.fresh = False
            if tracing & TRANSLATIONS:
                self.trace_miss(WHAT_MISS, which[i], repeated)
            header.flags = VERSION
            if acknowledged:
                self.under_way += 1
                self.unmarked += 1
                miss.repeatable = not repeated and self.unmarked < MISS_BATCH
                if not miss.repeatable:
                    self.expect(which[i])
                    header.flags = VERSION | NEED_REPLY
            message.iova, message.perm = miss.iova, miss.access
            put_message(&view[i * MESSAGE_BYTES], &header, &message)
        return bytes(out)

    cdef int request_range(
        self, int waiter, u64 first, u64 last, int access, double now, skip, int16_t *fresh,
        int *count,
    ) except -1:
        """Request the pages of a range; False once there is no room."""
        cdef u64 iova = first // PAGE_BYTES * PAGE_BYTES
        while True:
            if skip is None or (iova, access) not in skip:
                if not self.request_page(waiter, iova, access, now, skip, fresh, count):
                    return False
            if last - iova < PAGE_BYTES:
                return True
            iova += PAGE_BYTES

    cdef int request_page(
        self, int waiter, u64 iova, int access, double now, skip, int16_t *fresh, int *count,
    ) except -1:
        cdef int16_t slot = self.find(iova, access)
        cdef Slot *miss
        if slot < 0 and (skip is None or (iova, READ_WRITE) not in skip):
            slot = self.find_wider(iova)
        if slot < 0:
            if not self.has_room(count[0], now):
                self.starved_waiters[waiter // 64] |= <u64>1 << (waiter % 64)
                return False
            slot = self.open_slot(iova, access, now)
            fresh[count[0]] = slot
            count[0] += 1
        miss = &self.slots[slot]
        if not miss.waiting[waiter // 64] >> (waiter % 64) & 1:
            miss.waiting[waiter // 64] |= <u64>1 << (waiter % 64)
            self.lacking[waiter] += 1
        return True

    cdef int16_t find_wider(self, u64 iova) noexcept:
        """A miss for both accesses, made of one that is not sent yet if need be; or -1."""
        cdef int16_t slot = self.heads[hash_of(iova)], fresh = -1
        while slot >= 0:
            if self.slots[slot].iova == iova:
                if self.slots[slot].access == READ_WRITE:
                    return slot
                if self.slots[slot].fresh:
                    fresh = slot
            slot = self.slots[slot].next
        if fresh >= 0:
            self.slots[fresh].access = READ_WRITE
        return fresh

    def answered(self, iova, size, int perm):
        """A translation of a range arrived.

        Args:
            iova, size: The range.
            perm: What it allows. A waiter that needs more goes on waiting.

        Returns:
            The waiters that miss nothing any more.

        Cost: O(1) for a page; O(misses) for more.
        """
        cdef list ready = []
        cdef u64 first = as_address(iova, "iova")
        self.answered_at = 0
        self.answer(first, size - 1, perm, ready)
        return ready

    cdef int answer(self, u64 first, u64 span, int perm, list ready) except -1:
        if self.open_count:
            # Once for answers that came together.
            if tracing & MEASURE and not self.answered_at:
                self.answered_at, self.measured_sent = now_ns(), -1.0
            self.hold()
            try:
                self.answer_range(first, span, perm, ready)
                self.relieve(ready)
            finally:
                self.let_go()
        return 0

    cdef int answer_range(self, u64 first, u64 span, int perm, list ready) except -1:
        cdef int16_t slot, following
        cdef u64 page = first // PAGE_BYTES * PAGE_BYTES
        if span < PAGE_BYTES:
            slot = self.heads[hash_of(page)]
            while slot >= 0:
                following = self.slots[slot].next
                if self.slots[slot].iova == page:
                    self.answer_one(slot, perm, ready)
                slot = following
        else:
            for slot in range(MISS_SLOTS):
                page = self.slots[slot].iova
                if self.slots[slot].open and (
                    page + (PAGE_BYTES - 1) >= first and page <= first + span
                ):
                    self.answer_one(slot, perm, ready)
        return 0

    cdef int answer_one(self, int16_t slot, int perm, list ready) except -1:
        if self.slots[slot].access & ~perm:
            self.slots[slot].forbidden = True
            return 0
        # An answer means that all misses before it were handled.
        self.reached = max(self.reached, self.slots[slot].number)
        if self.answered_at:
            self.measure(self.slots[slot].sent_at)
        return self.finish(slot, ready)

    # Plain C on tables that are there: it cannot raise.
    cdef void measure(self, double sent_at) noexcept:
        """Count how long an answer took; many were requested together and came together."""
        cdef u64 sent
        if sent_at != self.measured_sent:
            sent = <u64>(1e9 * sent_at)
            self.measured_sent = sent_at
            self.measured = self.answered_at - sent if self.answered_at > sent else 0
            self.measured_bucket = latency_bucket(self.measured)
        self.latencies.bucket[0][self.measured_bucket] += 1
        self.latencies.sums[0] += self.measured

    cdef int finish(self, int16_t slot, list ready) except -1:
        """Take a miss off the table and add the waiters that lack nothing any more to ``ready``."""
        cdef Slot *miss = &self.slots[slot]
        cdef u64 left
        cdef int word, waiter
        self.unlink(slot)
        miss.open = False
        self.open_count -= 1
        for word in range(WAITER_WORDS):
            left = miss.waiting[word]
            while left:
                waiter = 64 * word + lowest_bit(left)
                left &= left - 1
                self.lacking[waiter] -= 1
                if not self.lacking[waiter]:
                    ready.append(waiter)
        self.release(slot)
        return 0

    cdef bint starving(self) noexcept:
        """Whether a waiter could not send a request for want of room."""
        cdef int word
        for word in range(WAITER_WORDS):
            if self.starved_waiters[word]:
                return True
        return False

    cdef int relieve(self, list ready) except -1:
        """Add the waiters that could not send for want of room, once there is some."""
        cdef int waiter
        if max(self.open_count, self.under_way) <= LIMIT // 2 and self.starving():
            for waiter in range(WAITERS):
                if self.starved_waiters[waiter // 64] >> (waiter % 64) & 1:
                    ready.append(waiter)
            memset(self.starved_waiters, 0, sizeof(self.starved_waiters))
        return 0

    cdef object miss(self, int16_t slot):
        """A miss as Python sees it; to be made before its slot is used again."""
        cdef PendingMiss found = PendingMiss.__new__(PendingMiss)
        found.iova, found.access = self.slots[slot].iova, self.slots[slot].access
        found.waiting = [
            waiter for waiter in range(WAITERS)
            if self.slots[slot].waiting[waiter // 64] >> (waiter % 64) & 1
        ]
        return found

    def receive(self, int fd):
        """Take the front-end's acknowledgements from a socket, oldest miss first.

        An acknowledgement should not be taken before the UPDATE messages that arrived earlier were
        applied, or else what they answer may count as refused.

        Args:
            fd: The back-end channel's socket; no message on it may be taken in part, and one thread
                at a time may receive.

        Returns:
            ``(all, refused, ready)``: whether there was something and all of it was whole
            acknowledgements, the misses that were refused, and the waiters that miss nothing
            any more. What follows stays in the socket.

        Cost: O(1) an acknowledgement.
        """
        cdef Header header
        cdef u64 value
        cdef size_t size, at = 0
        cdef list refused = [], ready = []
        with nogil:
            size = look(fd, self.buffer)
        self.hold()
        try:
            while size - at >= ACK_BYTES:
                memcpy(&header, self.buffer + at, HEADER_BYTES)
                if header.request != FROM_BACKEND or header.size != 8 or (
                    header.flags & (VERSION_MASK | REPLY) != VERSION | REPLY
                ):
                    break
                memcpy(&value, self.buffer + at + HEADER_BYTES, 8)
                self.acknowledge_one(value != 0, refused, ready)
                at += ACK_BYTES
            self.relieve(ready)
        finally:
            self.let_go()
        with nogil:
            take(fd, self.buffer, at)
        return size > 0 and at == size, refused, ready

    def acknowledge(self, value):
        """Take one acknowledgement; returns ``(refused, ready)`` as :meth:`receive` does."""
        cdef list refused = [], ready = []
        self.hold()
        try:
            self.acknowledge_one(value != 0, refused, ready)
            self.relieve(ready)
        finally:
            self.let_go()
        return refused, ready

    cdef int acknowledge_one(self, bint refuse, list refused, list ready) except -1:
        """Take the next acknowledgement."""
        cdef int16_t slot
        if not self.order_count:
            return 0
        slot = self.expected_next()
        self.reached = max(self.reached, self.slots[slot].number)
        # Without a refusal, the translation may still be under way on the other channel.
        if self.slots[slot].open and (refuse or self.slots[slot].forbidden):
            self.refuse(slot, refused, ready)
        else:
            self.release(slot)
        return 0

    def repeat(self, double now):
        """Send again, to be acknowledged, what should have been answered by now.

        Only of front-ends that acknowledge. A miss waits for `REPEAT_AFTER`, and while others
        are answered until one is that was sent after it.

        Args:
            now: The time.

        Returns:
            ``(messages, ready)``: what to send, as bytes, and the waiters that could not send for
            want of room and may try again.

        Cost: O(misses).
        """
        as_moment(now, "now")
        cdef list ready = []
        self.hold()
        try:
            if now < self.looked + LATE:
                return b"", ready
            return self.repeat_late(now, ready), ready
        finally:
            self.let_go()

    cdef bytes repeat_late(self, double now, list ready):
        cdef int16_t again[MISS_SLOTS]
        cdef int16_t slot
        cdef int count = 0, left = self.open_count
        cdef bint quiet = self.reached == self.reached_before
        cdef Slot *miss
        self.looked, self.reached_before = now, self.reached
        for slot in range(MISS_SLOTS):
            if not left:
                break
            miss = &self.slots[slot]
            if not miss.open:
                continue
            left -= 1
            if not miss.repeatable or now < miss.sent_at + LATE:
                continue
            if quiet or miss.number < self.reached:
                again[count] = slot
                count += 1
        self.relieve(ready)
        return self.messages(again, count, True, True)

    # Plain C: it cannot raise.
    cdef void trace_miss(self, int what, int16_t slot, i64 result) noexcept:
        """Write what becomes of a miss, for the first of its waiters."""
        cdef const Slot *miss = &self.slots[slot]
        cdef TraceRecord record = trace_record(<uint16_t>what, self.origin)
        cdef int word
        record.address, record.length, record.access = miss.iova, PAGE_BYTES, miss.access
        record.since, record.result = <u64>(1e9 * miss.sent_at), result
        for word in range(WAITER_WORDS):
            if miss.waiting[word]:
                record.queue = <uint16_t>(64 * word + lowest_bit(miss.waiting[word]))
                break
        trace(&record)

    cdef int refuse(self, int16_t slot, list refused, list ready) except -1:
        if tracing & TRANSLATIONS:
            self.trace_miss(WHAT_REFUSED, slot, 0)
        refused.append(self.miss(slot))
        self.refused += 1
        return self.finish(slot, ready)

    def expired(self, double now):
        """Give up the misses whose time is over; they are refused.

        Returns:
            Those misses, oldest first.

        Cost: O(misses).
        """
        as_moment(now, "now")
        cdef list late = []
        self.hold()
        try:
            self.take_expired(now, late)
        finally:
            self.let_go()
        return [miss for _, _, miss in sorted(late)]

    cdef int take_expired(self, double now, list late) except -1:
        cdef list unused = []
        cdef int16_t slot
        cdef int left = self.open_count
        for slot in range(MISS_SLOTS):
            if not left:
                break
            if not self.slots[slot].open:
                continue
            left -= 1
            if now - self.slots[slot].sent_at >= self.time_limit:
                if tracing & TRANSLATIONS:
                    self.trace_miss(WHAT_REFUSED, slot, -ETIMEDOUT)
                late.append((self.slots[slot].sent_at, len(late), self.miss(slot)))
                self.finish(slot, unused)
        self.refused += len(late)
        self.timeouts += len(late)
        return 0

    def starved(self, double now):
        """Waiters that could not send for want of room, if there is room now."""
        as_moment(now, "now")
        cdef list ready = []
        self.hold()
        try:
            self.drop_stale(now)
            self.relieve(ready)
        finally:
            self.let_go()
        return ready

    def deadline(self):
        """When to call :meth:`expired`, :meth:`repeat` and :meth:`starved`; None if never.

        Cost: O(misses).
        """
        cdef double first
        self.hold()
        first = self.earliest()
        self.let_go()
        return None if first < 0 else first

    cdef double earliest(self) noexcept:
        """When the next miss is overdue; negative if none is."""
        cdef int16_t slot
        cdef int left = self.open_count
        cdef double first = -1, due
        for slot in range(MISS_SLOTS):
            if not left:
                break
            if self.slots[slot].open:
                left -= 1
                due = self.slots[slot].sent_at + self.time_limit
                if self.slots[slot].repeatable:
                    due = min(due, max(self.slots[slot].sent_at, self.looked) + LATE)
                if first < 0 or due < first:
                    first = due
        if self.order_count and self.starving():
            due = self.slots[self.order[self.order_first % MISS_SLOTS]].sent_at + self.time_limit
            if first < 0 or due < first:
                first = due
        return first

    def kept_waiting(self, double now):
        """The waiters of answers that are overdue.

        Cost: O(misses).
        """
        as_moment(now, "now")
        cdef int16_t slot
        cdef int left = self.open_count, word, waiter
        cdef u64 waiting[WAITER_WORDS]
        memset(waiting, 0, sizeof(waiting))
        for slot in range(MISS_SLOTS):
            if not left:
                break
            if self.slots[slot].open:
                left -= 1
                if now >= self.slots[slot].sent_at + LATE:
                    for word in range(WAITER_WORDS):
                        waiting[word] |= self.slots[slot].waiting[word]
        return [
            waiter for waiter in range(WAITERS) if waiting[waiter // 64] >> (waiter % 64) & 1
        ]

    def awaited(self, waiter):
        """How many misses of a waiter are not answered."""
        return self.lacking[waiter_of(waiter)]

    def is_open(self, iova, int access):
        """Whether an answer about the page of an address and an access is still to come."""
        cdef u64 page = as_address(iova, "iova") // PAGE_BYTES * PAGE_BYTES
        return self.find(page, access) >= 0 or self.find(page, READ_WRITE) >= 0

    def reset(self):
        """Forget all misses, because no answer to them can be told from others any more.

        Returns:
            Every waiter, each of which must request again.
        """
        cdef int waiter
        cdef list waiters = []
        self.hold()
        for waiter in range(WAITERS):
            if self.lacking[waiter] or self.starved_waiters[waiter // 64] >> (waiter % 64) & 1:
                waiters.append(waiter)
        self.clear()
        self.let_go()
        return waiters

    def forget(self, waiter):
        """End the waiting of one waiter; what only that one waited for is requested anew next time.

        An answer that comes later may say what was true when the miss was sent.

        Returns:
            Others that could not send for want of room and may try again.
        """
        cdef int who = waiter_of(waiter)
        cdef int16_t slot
        cdef u64 others = ~(<u64>1 << (who % 64))
        cdef list unused = [], ready = []
        self.hold()
        try:
            self.starved_waiters[who // 64] &= others
            self.lacking[who] = 0
            for slot in range(MISS_SLOTS):
                self.slots[slot].waiting[who // 64] &= others
                if self.slots[slot].open and not is_awaited(&self.slots[slot]):
                    self.finish(slot, unused)
            self.relieve(ready)
        finally:
            self.let_go()
        return ready


cdef int waiter_of(object waiter) except -1:
    cdef u64 number = as_address(waiter, "waiter")
    if number >= WAITERS:
        raise ValueError(f"waiter {number} is not below {WAITERS}")
    return <int>number
