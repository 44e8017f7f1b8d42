"""IOTLB traffic of vhost-user, in bulk: one trip for all the messages that have arrived.

Behind an IOMMU a request of the driver costs a handful of these messages, so they are by far the
most frequent ones. What is not plain stays in the socket, for the session, which knows all the
rules.
"""

from libc.math cimport INFINITY
from libc.stdint cimport uint16_t
from libc.string cimport memcpy, memset

from guestio._core.base.checks cimport Span, as_moment, as_seconds, u8, u64
from guestio._core.base.sockets cimport MSG_DONTWAIT, MSG_NOSIGNAL, c_send
from guestio._core.iommu.intervals cimport IntervalMap
from guestio._core.iommu.misses cimport Misses
from guestio._core.iommu.tree cimport Cursor, Entry, floor_of
from guestio._core.trace.tracepoints cimport (
    TRANSLATIONS, TraceRecord, WHAT_INVALIDATE, WHAT_UPDATE, trace, trace_record, tracing,
)
from guestio._core.vhost_user.iotlb_message cimport (
    ACK_BYTES, FROM_FRONTEND, HEADER_BYTES, INVALIDATE, MESSAGE_BYTES, REPLY, UPDATE, VERSION,
    VERSION_MASK, Header, Message, look, take,
)
from guestio._core.vhost_user.miss_table cimport MissTable
from guestio._core.virtio.counters cimport Counters
from guestio._core.virtio.loop cimport Feed


cdef class IotlbUpdater:
    """Applies UPDATE and INVALIDATE messages to an IOTLB.

    Args:
        iotlb: The map of the IOTLB, which is changed.
        user_addresses: Where the front-end's own addresses are in guest memory.
        misses: The pending misses that updates answer.
        counters: Where to count.
    """

    def __init__(
        self, IntervalMap iotlb not None, IntervalMap user_addresses not None,
        MissTable misses not None, Counters counters not None,
    ):
        self.iotlb, self.user_addresses = iotlb, user_addresses
        self.misses, self.counters = misses, counters
        self.unsent = b""

    def receive(self, int fd):
        """Apply the messages at the start of what has arrived at a socket, as long as they are plain.

        Plain is an UPDATE that lies in one piece of shared memory and an INVALIDATE, both of
        ranges that are not in use at the moment. They are taken from the socket and acknowledged.

        Args:
            fd: The socket; no message on it may be taken in part.

        Returns:
            ``(taken, unsent, ready)``: how many messages were applied, the acknowledgements that
            could not be sent without waiting, and the waiters that miss nothing any more.

        Cost: O(log n) a message, and three system calls.
        """
        cdef list ready = []
        cdef size_t taken = self.receive_plain(fd, ready)
        return taken, self.take_unsent(), ready

    cdef bytes take_unsent(self):
        cdef bytes unsent = self.unsent
        self.unsent = b""
        return unsent

    cdef size_t receive_plain(self, int fd, list ready) except? 0:
        """As :meth:`receive`; appends to ``ready``."""
        cdef size_t size, at = 0
        with nogil:
            size = look(fd, self.buffer)
        self.misses.answered_at = 0
        while size - at >= MESSAGE_BYTES and self.apply_one(self.buffer + at, ready):
            at += MESSAGE_BYTES
        if not at:
            return 0
        self.unsent += self.acknowledge(fd, at // MESSAGE_BYTES)
        # Only now: to take them wakes the peer's thread if it sleeps on its socket, for nothing.
        with nogil:
            take(fd, self.buffer, at)
        return at // MESSAGE_BYTES

    cdef bytes acknowledge(self, int fd, size_t count):
        """Send so many acknowledgements; what could not be sent."""
        cdef Header header = Header(FROM_FRONTEND, VERSION | REPLY, 8)
        cdef size_t i, size = count * ACK_BYTES
        cdef Py_ssize_t sent
        # They are smaller than what they acknowledge, so there is room.
        memset(self.buffer, 0, size)
        for i in range(count):
            memcpy(self.buffer + i * ACK_BYTES, &header, HEADER_BYTES)
        # A driver waits for these before it uses its memory for something else.
        with nogil:
            sent = max(c_send(fd, self.buffer, size, MSG_DONTWAIT | MSG_NOSIGNAL), 0)
        return (<char *>self.buffer)[sent:size]

    cdef bint apply_one(self, const u8 *data, list ready) except -1:
        """Apply a message; False if it is not plain."""
        cdef Header header
        cdef Message message
        memcpy(&header, data, HEADER_BYTES)
        memcpy(&message, data + HEADER_BYTES, sizeof(Message))
        if header.request != FROM_FRONTEND or header.size != sizeof(Message):
            return False
        if header.flags & (VERSION_MASK | REPLY) != VERSION:
            return False
        return self.change(&message, ready)

    cdef bint change(self, const Message *message, list ready) except -1:
        cdef Span span
        cdef u64 rest = message.size - 1, target = 0
        cdef bint done
        if not message.size or rest > <u64>-1 - message.iova:
            return False
        span.first, span.last, span.empty = message.iova, message.iova + rest, False
        if message.kind == UPDATE:
            if not self.find_target(message, rest, &target):
                return False
        elif message.kind != INVALIDATE:
            return False
        self.iotlb.begin_change(3)
        done = self.replace(span, message, target)
        self.iotlb.end_change()
        if done and message.kind == UPDATE:
            self.misses.answer(span.first, rest, message.perm, ready)
        return done

    cdef bint find_target(self, const Message *message, u64 rest, u64 *target) noexcept:
        """Where in guest memory an UPDATE leads to; False if it is not plain."""
        cdef Cursor at
        cdef Entry *entry
        if message.perm > 3 or rest > <u64>-1 - message.uaddr:
            return False
        at = floor_of(&self.user_addresses.at.tree, message.uaddr)
        if at.leaf is NULL:
            return False
        entry = &at.leaf.entry[at.index]
        target[0] = message.uaddr + entry.delta
        return entry.last >= message.uaddr + rest

    cdef bint replace(self, Span span, const Message *message, u64 target) noexcept:
        """Change the IOTLB, which is locked, unless the translation is in use.

        The GIL is held since it was locked, and needed for a lease, so that no
        use of it can begin in between. Nothing in here can fail: room was reserved when it was locked.
        """
        if self.iotlb.leases.held and self.iotlb.leases.used(span.first, span.last):
            return False
        if message.kind == INVALIDATE:
            self.iotlb.cut_span(span)
            self.iotlb.cuts += 1
            self.counters.invalidations += 1
        else:
            self.iotlb.overwrite_span(span, target, message.perm)
            self.counters.updates += 1
        if tracing & TRANSLATIONS:
            trace_message(self.iotlb.origin, message, target)
        return True


cdef void trace_message(uint16_t origin, const Message *message, u64 target) noexcept:
    """Write what was done with a plain message. Plain C: it cannot raise."""
    cdef TraceRecord record = trace_record(
        WHAT_UPDATE if message.kind == UPDATE else WHAT_INVALIDATE, origin
    )
    record.address, record.length, record.detail = message.iova, message.size, target
    record.access = message.perm
    trace(&record)


cdef class IotlbFeed(Feed):
    """Plain IOTLB messages and misses of one front-end, for the event loop.

    Args:
        callback: As for :class:`~guestio._core.virtio.loop.Feed`.
        patience: Seconds that a request may wait for translations in all.
        updater: Applies what arrives on the main channel.
        misses: The pending misses.
        counters: Where misses are counted.

    Attributes:
        main: The main channel's socket, or -1 while it is not to be read here.
        back: The back-end channel's socket, or -1 while it is not to be written here.
        acknowledged: Whether the front-end acknowledges misses on request.
        alarm: When the pending misses will be looked at (monotonic time).
        look_after: Seconds within which a new miss wants to be looked at.

    For the thread of the event loop.
    """

    cdef IotlbUpdater updater
    cdef MissTable misses
    cdef Counters counters
    cdef bytes unrequested
    cdef public int back
    cdef public bint acknowledged
    cdef double alarm_at
    cdef double look_within

    def __init__(
        self, callback, patience, IotlbUpdater updater not None, MissTable misses not None,
        Counters counters not None,
    ):
        self.updater, self.misses, self.counters = updater, misses, counters
        self.unrequested = b""
        self.back = -1
        self.alarm_at = self.look_within = INFINITY

    @property
    def main(self):
        return self.source

    @main.setter
    def main(self, int fd):
        self.source = fd

    @property
    def alarm(self):
        return self.alarm_at

    @alarm.setter
    def alarm(self, double value):
        self.alarm_at = as_moment(value, "alarm")

    @property
    def look_after(self):
        return self.look_within

    @look_after.setter
    def look_after(self, value):
        self.look_within = as_seconds(value, "look_after", INFINITY)

    def take_unsent(self):
        """What could not be sent without waiting: acknowledgements for the main channel, and
        misses for the back-end channel; once."""
        unrequested, self.unrequested = self.unrequested, b""
        self.pending = False
        return self.updater.take_unsent(), unrequested

    cdef bint receive(self, list woken) except -1:
        cdef bint taken = self.updater.receive_plain(self.source, woken) != 0
        if self.updater.unsent:
            self.pending = True
        return taken

    cdef bint request(self, int waiter, Misses missing, double now) except -1:
        cdef bytes messages
        cdef Py_ssize_t sent
        cdef const char *data
        cdef size_t size
        if self.back < 0 or self.unrequested or now + self.look_within < self.alarm_at:
            return False
        messages = self.misses.request(waiter, missing, now, acknowledged=self.acknowledged)
        if messages:
            data, size = messages, len(messages)
            self.counters.misses += size // MESSAGE_BYTES
            with nogil:
                sent = max(c_send(self.back, data, size, MSG_DONTWAIT | MSG_NOSIGNAL), 0)
            if <size_t>sent < size:
                self.unrequested, self.pending = messages[sent:], True
        return True
