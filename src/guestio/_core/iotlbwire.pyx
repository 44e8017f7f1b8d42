"""IOTLB traffic of vhost-user, in bulk: one trip for all the messages that have arrived.

Behind an IOMMU a request of the driver costs a handful of these messages, so they are by far the
most frequent ones. Here are their bytes (struct vhost_iotlb_msg behind a vhost-user header), the
questions that are in flight, and what messages do to an IOTLB. Bytes go in and bytes come out;
what is not plain is left to the session, which knows all the rules.
"""

from collections import deque

from cpython.buffer cimport PyBUF_CONTIG_RO, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_Resize
from libc.string cimport memcpy, memset

from guestio._core.border cimport Span, as_address, u8, u32, u64
from guestio._core.intervals cimport IntervalMap
from guestio._core.tree cimport Cursor, Entry, floor_of

cdef enum:
    PAGE_BYTES = 4096
    HEADER_BYTES = 12
    MESSAGE_BYTES = HEADER_BYTES + 32
    ACK_BYTES = HEADER_BYTES + 8
    # Requests, by direction, and bits of a header's flags.
    FROM_BACKEND = 1
    FROM_FRONTEND = 22
    VERSION = 1
    VERSION_MASK = 3
    REPLY = 4
    NEED_REPLY = 8
    # Types of struct vhost_iotlb_msg.
    MISS = 1
    UPDATE = 2
    INVALIDATE = 3

PAGE = PAGE_BYTES
"""Front-ends answer a page at a time, so that is how they are asked."""

MAX_OUTSTANDING = 512
"""Questions in flight at a time. All of them fit in a socket's buffer, so asking never waits."""

cdef int LIMIT = MAX_OUTSTANDING


cdef struct Header:
    u32 request
    u32 flags
    u32 size


cdef struct Message:
    u64 iova
    u64 size
    u64 uaddr
    u8 perm
    u8 kind
    u8 padding[6]


cdef class Question:
    """A page whose translation was asked for.

    Attributes:
        iova: Its address.
        access: What is to be done with it.
        waiting: Who needs it, as numbers.
    """

    cdef readonly u64 iova
    cdef readonly int access
    cdef readonly list waiting
    cdef double asked
    cdef bint settled     # it is not in the table any more
    cdef bint forbidden   # a translation came that does not allow the access


cdef class MissTable:
    """Misses in flight, at most one for a page and access, and who waits for them.

    A waiter is a number, such as that of a queue. Not safe for several threads at once.

    Args:
        time_limit: Seconds after which an unanswered question counts as refused.

    Attributes:
        asked: Questions asked so far.
        refused: Questions refused or not answered in time so far.
        timeouts: Those of them that were not answered in time.
    """

    cdef double time_limit
    cdef dict open
    cdef object order
    cdef dict lacking
    cdef set starved_waiters
    cdef readonly u64 asked
    cdef readonly u64 refused
    cdef readonly u64 timeouts

    def __init__(self, time_limit):
        self.time_limit = time_limit
        self.open, self.order = {}, deque()
        self.lacking, self.starved_waiters = {}, set()

    def __len__(self):
        return len(self.open)

    def ask(self, waiter, missing, double now, *, bint acknowledged, skip=()):
        """Note that ``waiter`` needs ranges.

        Args:
            waiter: Who.
            missing: ``(IovaRange, access)`` each.
            now: The time.
            acknowledged: Whether the front-end will acknowledge each question, in order.
            skip: Pages ``(iova, access)`` that are not to be asked for.

        Returns:
            The messages to send, for what nobody has asked yet, as bytes. If too much is in flight
            already the rest is left out; the waiter is woken to ask again when there is room.
        """
        cdef bytearray out = bytearray()
        cdef u64 iova, last
        cdef int access
        for (base, length), access in missing:
            last = base + (length - 1)
            iova = <u64>base // PAGE_BYTES * PAGE_BYTES
            while True:
                if not skip or (iova, access) not in skip:
                    if not self.ask_page(out, waiter, iova, access, now, acknowledged):
                        return bytes(out)
                if last - iova < PAGE_BYTES:
                    break
                iova += PAGE_BYTES
        return bytes(out)

    cdef bint ask_page(
        self, bytearray out, object waiter, u64 iova, int access, double now, bint acknowledged
    ) except -1:
        cdef Question question = <Question>self.open.get(iova | <u64>access)
        if question is None:
            if len(self.order) >= LIMIT:
                self.drop_stale(now)
            if len(self.open) >= LIMIT or len(self.order) >= LIMIT:
                self.starved_waiters.add(waiter)
                return False
            question = Question.__new__(Question)
            question.iova, question.access, question.asked = iova, access, now
            question.waiting = []
            self.open[iova | <u64>access] = question
            if acknowledged:
                self.order.append(question)
            self.asked += 1
            put_miss(out, iova, access, acknowledged)
        if waiter not in question.waiting:
            question.waiting.append(waiter)
            self.lacking[waiter] = self.lacking.get(waiter, 0) + 1
        return True

    cdef int drop_stale(self, double now) except -1:
        """Expect no acknowledgement any more of questions that were settled long ago."""
        cdef Question oldest
        while self.order:
            oldest = <Question>self.order[0]
            if not oldest.settled or now - oldest.asked < self.time_limit:
                break
            self.order.popleft()
        return 0

    cdef int relieve(self, list ready) except -1:
        """Add those who could not ask for want of room, once there is some."""
        if self.starved_waiters and max(len(self.open), len(self.order)) <= LIMIT // 2:
            ready.extend(self.starved_waiters)
            self.starved_waiters.clear()
        return 0

    def answered(self, iova, size, int perm):
        """A translation of a range arrived.

        Args:
            iova, size: The range.
            perm: What it allows. Who needs more goes on waiting.

        Returns:
            The waiters that miss nothing any more.
        """
        cdef list ready = []
        cdef u64 first = as_address(iova, "iova")
        self.answer(first, size - 1, perm, ready)
        return ready

    cdef int answer(self, u64 first, u64 span, int perm, list ready) except -1:
        cdef Question question
        cdef int access
        if not self.open:
            return 0
        if span < PAGE_BYTES:
            for access in range(1, 4):
                question = <Question>self.open.get(
                    first // PAGE_BYTES * PAGE_BYTES | <u64>access
                )
                if question is not None:
                    self.answer_one(question, perm, ready)
        else:
            for question in list(self.open.values()):
                if question.iova + (PAGE_BYTES - 1) >= first and question.iova <= first + span:
                    self.answer_one(question, perm, ready)
        return self.relieve(ready)

    cdef int answer_one(self, Question question, int perm, list ready) except -1:
        if question.access & ~perm:
            question.forbidden = True
            return 0
        return self.settle(question, ready)

    cdef int settle(self, Question question, list ready) except -1:
        """Take a question off the table and note who misses nothing any more."""
        del self.open[question.iova | <u64>question.access]
        question.settled = True
        for waiter in question.waiting:
            left = self.lacking.get(waiter, 1) - 1
            self.lacking[waiter] = left
            if not left:
                ready.append(waiter)
        return 0

    def acknowledge(self, data):
        """Take the front-end's acknowledgements, oldest question first.

        Args:
            data: What has arrived on the back-end channel.

        Returns:
            ``(taken, refused, ready)``: how many bytes were acknowledgements, the questions that
            were refused, and the waiters that miss nothing any more. What follows is incomplete
            or no acknowledgement.
        """
        cdef Py_buffer view
        cdef Header header
        cdef u64 value, at = 0
        cdef list refused = [], ready = []
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            while view.len - at >= ACK_BYTES:
                memcpy(&header, <u8 *>view.buf + at, HEADER_BYTES)
                if header.request != FROM_BACKEND or header.size != 8 or (
                    header.flags & (VERSION_MASK | REPLY) != VERSION | REPLY
                ):
                    break
                memcpy(&value, <u8 *>view.buf + at + HEADER_BYTES, 8)
                self.acknowledge_one(value != 0, refused, ready)
                at += ACK_BYTES
        finally:
            PyBuffer_Release(&view)
        self.relieve(ready)
        return at, refused, ready

    cdef int acknowledge_one(self, bint refuse, list refused, list ready) except -1:
        cdef Question question
        if not self.order:
            return 0
        question = <Question>self.order.popleft()
        # Without a refusal, the translation may still be under way on the other channel.
        if question.settled or not (refuse or question.forbidden):
            return 0
        self.settle(question, ready)
        self.refused += 1
        refused.append(question)
        return 0

    def expired(self, double now):
        """Give up the questions whose time is over; they are refused.

        Returns:
            Those questions.
        """
        cdef Question question
        cdef list late = []
        for question in list(self.open.values()):
            if now - question.asked >= self.time_limit:
                self.settle(question, [])
                late.append(question)
        self.refused += len(late)
        self.timeouts += len(late)
        return late

    def starved(self, double now):
        """Waiters that could not ask for want of room, if there is room now."""
        cdef list ready = []
        self.drop_stale(now)
        self.relieve(ready)
        return ready

    def deadline(self):
        """When to call :meth:`expired` and :meth:`starved`; None if nothing is to be expected."""
        cdef Question question
        cdef double first = -1
        for question in self.open.values():
            first = question.asked
            break
        if self.starved_waiters and self.order:
            question = <Question>self.order[0]
            if first < 0 or question.asked < first:
                first = question.asked
        return None if first < 0 else first + self.time_limit

    def awaited(self, waiter):
        """How many questions of a waiter are not settled."""
        return self.lacking.get(waiter, 0)

    def reset(self):
        """Forget all questions, because no answer to them can be told from others any more.

        Returns:
            Everybody who waited and has to ask again.
        """
        waiters = self.starved_waiters.union(w for w, left in self.lacking.items() if left)
        self.open, self.order = {}, deque()
        self.lacking, self.starved_waiters = {}, set()
        return list(waiters)

    def forget(self, waiter):
        """Somebody does not wait any more."""
        cdef Question question
        self.starved_waiters.discard(waiter)
        self.lacking.pop(waiter, None)
        for question in self.open.values():
            if waiter in question.waiting:
                question.waiting.remove(waiter)


def touched(missing, known):
    """Those of the ``known`` pages ``(iova, access)`` that ranges touch, as a set."""
    cdef u64 iova, last
    cdef set found = set()
    if not known:
        return found
    for (base, length), access in missing:
        last = base + (length - 1)
        iova = <u64>base // PAGE_BYTES * PAGE_BYTES
        while True:
            page = (iova, access)
            if page in known:
                found.add(page)
            if last - iova < PAGE_BYTES:
                break
            iova += PAGE_BYTES
    return found


cdef class IotlbUpdater:
    """Applies UPDATE and INVALIDATE messages to an IOTLB.

    Args:
        iotlb: What is changed.
        users: Where the front-end's own addresses are in guest memory.
        misses: The questions that updates answer.

    Attributes:
        updates: UPDATE messages applied.
        invalidations: INVALIDATE messages applied.
    """

    cdef IntervalMap iotlb
    cdef public IntervalMap users
    cdef MissTable misses
    cdef readonly u64 updates
    cdef readonly u64 invalidations

    def __init__(self, IntervalMap iotlb not None, IntervalMap users not None,
                 MissTable misses not None):
        self.iotlb, self.users, self.misses = iotlb, users, misses

    def apply(self, data):
        """Apply the messages at the start of what has arrived, as long as they are plain.

        Plain is an UPDATE that lies in one piece of shared memory and an INVALIDATE, both of
        ranges that nobody is using at the moment.

        Returns:
            ``(taken, replies, ready)``: how many bytes were applied, the acknowledgements to send,
            and the waiters that miss nothing any more.

        Cost: O(log n) a message.
        """
        cdef Py_buffer view
        cdef Header header
        cdef Message message
        cdef u64 at = 0
        cdef list ready = []
        PyObject_GetBuffer(data, &view, PyBUF_CONTIG_RO)
        try:
            while view.len - at >= MESSAGE_BYTES:
                memcpy(&header, <u8 *>view.buf + at, HEADER_BYTES)
                memcpy(&message, <u8 *>view.buf + at + HEADER_BYTES, sizeof(Message))
                if header.request != FROM_FRONTEND or header.size != sizeof(Message) or (
                    header.flags & (VERSION_MASK | REPLY) != VERSION
                ) or not self.apply_one(&message, ready):
                    break
                at += MESSAGE_BYTES
        finally:
            PyBuffer_Release(&view)
        return at, acknowledgements(at // MESSAGE_BYTES), ready

    cdef bint apply_one(self, const Message *message, list ready) except -1:
        cdef Span span
        cdef Cursor at
        cdef Entry *entry
        cdef u64 rest = message.size - 1, last
        if not message.size or rest > <u64>-1 - message.iova:
            return False
        span.first, span.last, span.empty = message.iova, message.iova + rest, False
        if self.iotlb.leases.used(span.first, span.last):
            return False
        if message.kind == INVALIDATE:
            self.iotlb.begin_change(2)
            self.iotlb.cut_span(span)
            self.iotlb.invalidations += 1
            self.iotlb.end_change()
            self.invalidations += 1
            return True
        if message.kind != UPDATE or message.perm > 3 or rest > <u64>-1 - message.uaddr:
            return False
        last = message.uaddr + rest
        at = floor_of(&self.users.tree, message.uaddr)
        if at.leaf is NULL:
            return False
        entry = &at.leaf.entry[at.index]
        if entry.last < last:
            return False
        self.iotlb.begin_change(3)
        self.iotlb.overwrite_span(span, message.uaddr + entry.delta, message.perm)
        self.iotlb.end_change()
        self.updates += 1
        self.misses.answer(span.first, rest, message.perm, ready)
        return True


cdef int put_miss(bytearray out, u64 iova, int access, bint need_reply) except -1:
    cdef Header header = Header(
        FROM_BACKEND, VERSION | NEED_REPLY if need_reply else VERSION, sizeof(Message)
    )
    cdef Message message
    cdef Py_ssize_t end = len(out)
    memset(&message, 0, sizeof(Message))
    message.iova, message.perm, message.kind = iova, <u8>access, MISS
    message.size = PAGE_BYTES
    PyByteArray_Resize(out, end + MESSAGE_BYTES)
    memcpy(PyByteArray_AS_STRING(out) + end, &header, HEADER_BYTES)
    memcpy(PyByteArray_AS_STRING(out) + end + HEADER_BYTES, &message, sizeof(Message))
    return 0


cdef bytes acknowledgements(u64 count):
    cdef Header header = Header(FROM_FRONTEND, VERSION | REPLY, 8)
    cdef u8 one[ACK_BYTES]
    memset(one, 0, ACK_BYTES)
    memcpy(one, &header, HEADER_BYTES)
    return (<bytes>(<char *>one)[:ACK_BYTES]) * count
