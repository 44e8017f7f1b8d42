"""The IOMMU's side of a vhost-user connection, compiled: mappings, misses, invalidations.

An :class:`IotlbFront` holds the translations of one window of I/O virtual addresses in a flat table,
answers the back-end's misses from it and has the back-end forget what is unmapped. It speaks on the
two sockets directly and waits for nothing: messages go out in batches, many under way at a time,
and their acknowledgements are taken when they come.

Everything is told in one row, so an UPDATE never follows the INVALIDATE of what it says. A miss is
acknowledged once its UPDATE was, as QEMU does.

Source: QEMU docs/interop/vhost-user.rst, "IOMMU support", VHOST_USER_IOTLB_MSG and
VHOST_USER_BACKEND_IOTLB_MSG; linux/vhost_types.h (struct vhost_iotlb_msg); QEMU hw/virtio/vhost.c
(`vhost_device_iotlb_miss`) for what an answer covers.
"""

from libc.errno cimport EAGAIN, ECONNRESET, EINTR, EPIPE, ENOTCONN, errno
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset

from guestio._core.base.checks cimport as_access, as_address, as_size
from guestio._core.base.capacity cimport LOAD_ANSWERS, LOAD_PAYLOAD, LOAD_READ_AHEAD

cdef extern from "sys/socket.h" nogil:
    ssize_t c_recv "recv"(int fd, void *buffer, size_t size, int flags)
    ssize_t c_send "send"(int fd, const void *buffer, size_t size, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef enum:
    PAGE = 4096
    PAGE_SHIFT = 12
    IOTLB_MSG = 22               # from a front-end
    BACK_IOTLB_MSG = 1           # from a back-end
    BACK_CONFIG_CHANGE = 2
    VERSION = 1
    VERSION_MASK = 3
    REPLY = 4
    NEED_REPLY = 8
    IOTLB_MISS = 1
    IOTLB_UPDATE = 2
    IOTLB_INVALIDATE = 3
    IOTLB_ACCESS_FAIL = 4

# What is expected, in the order of what was sent. Below SENT nothing was sent: a request that is
# answered in order without a message to the back-end.
cdef enum:
    ANSWER_DONE = 0
    ANSWER_FAILED = 1
    SENT = 2
    SENT_UPDATE = 2
    SENT_PUSH = 3
    SENT_INVALIDATE = 4
    KIND = 7
    WANTS_REPLY = 8              # the back-end requests an acknowledgement
    REQUEST_SHIFT = 8            # and of which request, so that it can be named in the reply

cdef packed struct Header:
    u32 request
    u32 flags
    u32 size

cdef packed struct IotlbBody:
    u64 iova
    u64 size
    u64 uaddr
    u8 perm
    u8 type
    u8 padding[6]

cdef packed struct IotlbMessage:
    Header header
    IotlbBody body

cdef packed struct Ack:
    Header header
    u64 status


cdef class IotlbFront:
    """Translations of a window of I/O virtual addresses, and the talk about them.

    Not safe for several threads at once. While it is in use no other code may use the back-end's
    channel, nor the front-end's socket unless :attr:`quiet`.

    Args:
        base: First address of the window, a multiple of 4096.
        pages: Pages of 4096 bytes in it.
        front: The front-end's socket.
        back: Our end of the back-end's channel.
        whole: Whether an answer covers as much around the address as is mapped alike and lies in
            a row in this process, rather than one page.
        room: Invalidations that may be under way at a time.
        each: Whether a message is sent only when the one before it was acknowledged, as QEMU does;
            otherwise they are sent in bulk.

    Raises:
        ValueError: The window is empty, unaligned, or passes ``2**64``.
    """

    def __cinit__(
        self, base, pages, int front, int back, *, bint whole=False, room=1024, bint each=False
    ):
        cdef u64 start = as_address(base, "base")
        cdef size_t count = as_size(pages, "pages")
        cdef size_t most = as_size(room, "room")
        cdef size_t capacity = 1
        if start % PAGE or not count or (count << PAGE_SHIFT) - 1 > <u64>-1 - start:
            raise ValueError(f"a window of {pages} pages at {base:#x}")
        if count > 1 << 40 or most > 1 << 20:
            raise ValueError(f"a window of {pages} pages with room for {room} invalidations")
        while capacity < most + LOAD_ANSWERS:
            capacity *= 2
        self.base, self.pages, self.whole, self.each = start, count, whole, each
        self.mask, self.invalidations_room = capacity - 1, most
        self.table = <u64 *>calloc(count, sizeof(u64))
        self.expected = <Expected *>calloc(capacity, sizeof(Expected))
        self.finished = <u32 *>calloc(capacity, sizeof(u32))
        if self.table == NULL or self.expected == NULL or self.finished == NULL:
            raise MemoryError
        _open(&self.front, front, capacity * sizeof(IotlbMessage))
        _open(&self.back, back, capacity * sizeof(Ack))

    def __dealloc__(self):
        free(self.table)
        free(self.expected)
        free(self.finished)
        _free(&self.front)
        _free(&self.back)

    def map(self, page, host_address, perm):
        """Let the device reach a page of this process; it is told on a miss.

        Args:
            page: Number of the page in the window.
            host_address: Where the page is in this process, a multiple of 4096.
            perm: What the device may do there.

        Raises:
            ValueError: The page is outside of the window, or the address is not a page's.
        """
        cdef u64 number = as_address(page, "page")
        cdef u64 host = as_address(host_address, "host_address")
        cdef int access = as_access(perm, "perm")
        if number >= self.pages or host % PAGE or not access:
            raise ValueError(f"page {page} of {self.pages} at {host:#x} for {perm!r}")
        self.put(number, host, access)

    def unmap(self, page, count, tag=0):
        """Take translations away, and have the back-end forget them.

        Args:
            page: Number of the first page.
            count: Pages.
            tag: What :meth:`exchange` returns once the back-end has acknowledged; 32 bits.

        Raises:
            ValueError: The pages are not all in the window, or there is no room.
        """
        cdef u64 number = as_address(page, "page")
        cdef u64 length = as_address(count, "count")
        if not length or length > self.pages or number > self.pages - length:
            raise ValueError(f"{count} pages from {page}, the window has {self.pages}")
        if self.forget(number, length, tag):
            raise ValueError("too many invalidations are under way")

    def push(self, page):
        """Send a translation before a miss, as QEMU does for used rings.

        Raises:
            ValueError: It is not mapped, or there is no room.
        """
        cdef u64 number = as_address(page, "page")
        if number >= self.pages or not self.table[number] or self.answers >= LOAD_ANSWERS:
            raise ValueError(f"page {page} cannot be pushed")
        self.tell(number, SENT_PUSH)

    def exchange(self):
        """Send and take what can be, without waiting.

        Returns:
            The tags of invalidations that were acknowledged.
        """
        cdef list done = []
        with nogil:
            self.flush()
            self.take_acks()
            self.take_requests()
            self.flush()
        while self.finished_first != self.finished_next:
            done.append(self.finished[self.finished_first & self.mask])
            self.finished_first += 1
        return done

    @property
    def quiet(self):
        """Whether everything was sent and acknowledged."""
        return self.idle()

    @property
    def failure(self):
        """``(kind, detail)`` of what broke the connection, or None while it lives.

        Kinds: 1 gone, 2 protocol (a request's code), 3 INVALIDATE refused, 4 errno.
        """
        return (self.trouble, self.detail) if self.trouble else None

    def reset_counts(self):
        """Begin to count anew."""
        self.misses = self.updates = self.invalidations = self.refused = self.access_fails = 0

    cdef void put(self, u64 page, u64 host, int perm) noexcept nogil:
        self.table[page] = host | <u64>perm

    cdef int forget(self, u64 page, u64 count, u32 tag) noexcept nogil:
        """Unmap pages and queue the INVALIDATE; -1 if there is no room."""
        cdef IotlbMessage message
        cdef u64 i
        if self.invalidations_due >= self.invalidations_room:
            return -1
        for i in range(count):
            self.table[page + i] = 0
        self.invalidations_due += 1
        memset(&message, 0, sizeof(message))
        message.header = Header(IOTLB_MSG, VERSION | NEED_REPLY, sizeof(IotlbBody))
        message.body.iova = self.base + (page << PAGE_SHIFT)
        message.body.size = count << PAGE_SHIFT
        message.body.type = IOTLB_INVALIDATE
        _append(&self.front, &message, sizeof(message))
        self.expect(SENT_INVALIDATE, tag)
        return 0

    cdef int tell(self, u64 page, u32 kind) noexcept nogil:
        """Queue the UPDATE for a page that is mapped."""
        cdef IotlbMessage message
        cdef u64 first = page, last = page, entry = self.table[page]
        if self.whole:
            while first and self.table[first - 1] and self.table[first - 1] == entry - (
                (page - first + 1) << PAGE_SHIFT
            ):
                first -= 1
            while last + 1 < self.pages and self.table[last + 1] == entry + (
                (last + 1 - page) << PAGE_SHIFT
            ):
                last += 1
        memset(&message, 0, sizeof(message))
        message.header = Header(IOTLB_MSG, VERSION | NEED_REPLY, sizeof(IotlbBody))
        message.body.iova = self.base + (first << PAGE_SHIFT)
        message.body.size = (last - first + 1) << PAGE_SHIFT
        message.body.uaddr = self.table[first] & ~<u64>(PAGE - 1)
        message.body.perm = entry & 3
        message.body.type = IOTLB_UPDATE
        _append(&self.front, &message, sizeof(message))
        self.updates += 1
        self.answers += 1
        self.expect(kind, 0)
        return 0

    cdef int flush(self) noexcept nogil:
        """Send what is queued, as far as the sockets take it."""
        self.send(&self.front)
        self.send(&self.back)
        return self.trouble

    cdef bint waiting_to_send(self) noexcept nogil:
        return (
            (self.front.unsent_start != self.front.unsent_end and not self.awaited)
            or self.back.unsent_start != self.back.unsent_end
        )

    cdef bint idle(self) noexcept nogil:
        return self.first == self.next and not self.waiting_to_send()

    cdef void expect(self, u32 kind, u32 tag) noexcept nogil:
        self.expected[self.next & self.mask] = Expected(kind, tag)
        self.next += 1

    cdef int take_acks(self) noexcept nogil:
        """Take acknowledgements from the front-end's socket; what they finish is in `finished`."""
        cdef Stream *stream = &self.front
        cdef u32 at = 0
        cdef Ack ack
        if self.trouble:
            return self.trouble
        while self.receive(stream) > 0:
            at = 0
            while stream.received_end - at >= sizeof(Ack):
                memcpy(&ack, stream.received + at, sizeof(Ack))
                at += sizeof(Ack)
                if (
                    ack.header.request != IOTLB_MSG
                    or ack.header.size != sizeof(u64)
                    or not ack.header.flags & REPLY
                    or ack.header.flags & VERSION_MASK != VERSION
                    or self.first == self.next
                ):
                    return self.fail(FRONT_PROTOCOL, ack.header.request)
                self.take_acknowledgement(ack.status)
                if self.trouble:
                    return self.trouble
            _consume(stream, at)
        return self.trouble

    cdef void take_acknowledgement(self, u64 status) noexcept nogil:
        """The back-end acknowledged the oldest message that we sent."""
        cdef Expected oldest = self.expected[self.first & self.mask]
        self.first += 1
        self.awaited = False
        if oldest.kind & KIND == SENT_INVALIDATE:
            self.invalidations_due -= 1
            self.invalidations += 1
            if status:
                self.fail(FRONT_REFUSED, status)
            self.finished[self.finished_next & self.mask] = oldest.tag
            self.finished_next += 1
        else:
            self.answers -= 1
            if oldest.kind & KIND == SENT_UPDATE:
                self.refused += status != 0
                self.reply(oldest.kind, status)
        self.reply_to_covered()

    cdef void reply_to_covered(self) noexcept nogil:
        """Answer what waited only for earlier answers."""
        cdef Expected *oldest
        while self.first != self.next:
            oldest = &self.expected[self.first & self.mask]
            if oldest.kind & KIND >= SENT:
                return
            self.first += 1
            self.answers -= 1
            self.reply(oldest.kind, oldest.kind & KIND)

    cdef void reply(self, u32 kind, u64 status) noexcept nogil:
        cdef Ack ack
        if kind & WANTS_REPLY:
            ack.header = Header(kind >> REQUEST_SHIFT, VERSION | REPLY, sizeof(u64))
            ack.status = status != 0
            _append(&self.back, &ack, sizeof(ack))

    cdef int take_requests(self) noexcept nogil:
        """Take the back-end's requests, and queue the answers."""
        cdef Stream *stream = &self.back
        cdef Header header
        cdef u32 at
        while not self.full() and not self.trouble:
            at = 0
            while stream.received_end - at >= sizeof(Header) and not self.full():
                memcpy(&header, stream.received + at, sizeof(Header))
                if (
                    header.flags & VERSION_MASK != VERSION
                    or header.flags & REPLY
                    or header.size > LOAD_PAYLOAD
                    or header.request >> (32 - REQUEST_SHIFT)
                ):
                    return self.fail(FRONT_PROTOCOL, header.request)
                if stream.received_end - at - sizeof(Header) < header.size:
                    break
                at += sizeof(Header)
                if self.answer(header.request, header.flags, stream.received + at, header.size):
                    return self.trouble
                at += header.size
            _consume(stream, at)
            if self.full() or self.receive(stream) <= 0:
                break
        return self.trouble

    cdef bint full(self) noexcept nogil:
        # A peer that does not read the answers is not sent more of them.
        return self.answers + (
            (self.back.unsent_end - self.back.unsent_start) // sizeof(Ack)
        ) >= LOAD_ANSWERS

    cdef int answer(self, u32 request, u32 flags, const u8 *payload, u32 size) noexcept nogil:
        cdef IotlbBody body
        cdef u64 page, entry
        cdef u32 back = (WANTS_REPLY if flags & NEED_REPLY else 0) | request << REQUEST_SHIFT
        cdef u32 kind = ANSWER_FAILED
        if request == BACK_CONFIG_CHANGE:
            kind = ANSWER_DONE
        elif request == BACK_IOTLB_MSG:
            if size != sizeof(IotlbBody):
                return self.fail(FRONT_PROTOCOL, request)
            memcpy(&body, payload, sizeof(body))
            if body.type == IOTLB_MISS:
                self.misses += 1
                page = (body.iova - self.base) >> PAGE_SHIFT
                entry = self.table[page] if body.iova >= self.base and page < self.pages else 0
                if entry and not body.perm & ~entry & 3:
                    return self.tell(page, SENT_UPDATE | back)
                self.refused += 1
            else:
                # QEMU does not act on an ACCESS_FAIL and answers that it failed.
                self.access_fails += body.type == IOTLB_ACCESS_FAIL
        self.answers += 1
        self.expect(kind | back, 0)
        self.reply_to_covered()
        return 0

    cdef int fail(self, int trouble, u64 detail) noexcept nogil:
        if not self.trouble:
            self.trouble, self.detail = trouble, detail
        return self.trouble

    cdef int send(self, Stream *stream) noexcept nogil:
        cdef ssize_t sent
        cdef size_t size
        cdef bint alone = self.each and stream == &self.front
        while stream.unsent_start != stream.unsent_end and not self.trouble:
            size = stream.unsent_end - stream.unsent_start
            if alone:
                if self.awaited:
                    return 0
                size = self.sending or sizeof(IotlbMessage)
            sent = c_send(
                stream.fd, stream.unsent + stream.unsent_start, size, MSG_DONTWAIT | MSG_NOSIGNAL
            )
            if sent >= 0:
                stream.unsent_start += sent
                if alone:
                    self.sending = size - sent
                    self.awaited = not self.sending
            elif errno == EAGAIN or errno == EINTR:
                return 0
            elif errno == EPIPE or errno == ECONNRESET or errno == ENOTCONN:
                self.fail(FRONT_GONE, 0)
            else:
                self.fail(FRONT_SYSTEM, errno)
        if stream.unsent_start == stream.unsent_end:
            stream.unsent_start = stream.unsent_end = 0
        return self.trouble

    cdef int receive(self, Stream *stream) noexcept nogil:
        """Read once; 1 if something came, 0 if not, -1 on failure."""
        cdef ssize_t got = c_recv(
            stream.fd,
            stream.received + stream.received_end,
            LOAD_READ_AHEAD - stream.received_end,
            MSG_DONTWAIT,
        )
        if got > 0:
            stream.received_end += <u32>got
            return 1
        if got < 0 and (errno == EAGAIN or errno == EINTR):
            return 0
        if got == 0 or errno == ECONNRESET:
            self.fail(FRONT_GONE, 0)
        else:
            self.fail(FRONT_SYSTEM, errno)
        return -1


cdef int _open(Stream *stream, int fd, size_t room) except -1:
    stream.fd, stream.room = fd, room
    stream.received = <u8 *>calloc(1, LOAD_READ_AHEAD)
    stream.unsent = <u8 *>calloc(1, room)
    if stream.received == NULL or stream.unsent == NULL:
        raise MemoryError
    return 0


cdef void _free(Stream *stream) noexcept:
    free(stream.received)
    free(stream.unsent)


cdef void _append(Stream *stream, const void *data, size_t size) noexcept nogil:
    # There is always room: every message unsent is among those expected, which are bounded.
    if stream.unsent_end + size > stream.room:
        memmove(
            stream.unsent,
            stream.unsent + stream.unsent_start,
            stream.unsent_end - stream.unsent_start,
        )
        stream.unsent_end -= stream.unsent_start
        stream.unsent_start = 0
    memcpy(stream.unsent + stream.unsent_end, data, size)
    stream.unsent_end += size


cdef void _consume(Stream *stream, u32 count) noexcept nogil:
    if count:
        stream.received_end -= count
        memmove(stream.received, stream.received + count, stream.received_end)
