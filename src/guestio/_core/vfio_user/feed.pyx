"""Plain messages of a vfio-user client, handled without entering Python: a feed of the event loop.

Behind an IOMMU a request of a driver costs two doorbells, a mapping and an unmap, so nearly all
messages are of these kinds. The rest is left for the session, which knows all the rules, in its
order.
"""

from libc.string cimport memcpy

from guestio._core.base.capacity cimport GUESTIO_ASSERT
from guestio._core.base.checks cimport as_seconds, u8, u32, u64
from guestio._core.base.clock cimport now_seconds
from guestio._core.base.sockets cimport MSG_DONTWAIT, MSG_NOSIGNAL, c_send
from guestio._core.pci.doorbell cimport Doorbells
from guestio._core.vfio_user.dma_table cimport DmaTable
from guestio._core.vfio_user.inbox cimport Inbox, Passed
from guestio._core.vfio_user.wire cimport (
    DMA_MAP, DMA_UNMAP, DMA_UNMAP_AT_ONCE, EAGAIN, HEADER_BYTES, NO_REPLY, REGION_WRITE, REPLY,
    Header, MapRequest, UnmapRequest, WriteRequest, close_memory,
)
from guestio._core.virtio.loop cimport Feed

cdef enum:
    ANSWERS = 256     # that are sent at a time
    ACCESS_BYTES = 16 # that the answer to a write repeats
    BARS = 6


cdef class DmaCounters:
    """What is counted of a client's messages.

    Attributes:
        dma_maps: Mappings made.
        dma_unmaps: Requests to remove mappings.
        region_reads: Reads of BARs and of the configuration space.
        region_writes: Writes to them.
        plain: Messages that were handled in the core.
    """

    cdef public u64 dma_maps
    cdef public u64 dma_unmaps
    cdef public u64 region_reads
    cdef public u64 region_writes
    cdef public u64 plain


cdef class ClientFeed(Feed):
    """Plain messages of one client: doorbells, and mappings of files that are known.

    A plain message is handled and answered exactly as the session would. Doorbells that were rung
    serve once all messages that had arrived are answered.

    Args:
        callback: Called by the event loop when something is left to do: answers to send, messages
            to handle, doorbells to serve.
        turn: Seconds after which the loop's others have their turn, however much arrives.
        inbox: What has arrived.
        table: What the client has mapped.
        doorbells: The device's.
        counters: Where to count.

    Attributes:
        main: The socket, or -1 while it is not to be read here.
        unmaps: Whether unmaps are handled here: not while accesses by messages are under way, which
            they end.

    For the thread of the event loop.
    """

    cdef Inbox inbox
    cdef DmaTable table
    cdef Doorbells doorbells
    cdef DmaCounters counters
    cdef bytes unsent
    cdef public bint unmaps
    cdef double turn
    cdef double until         # when the turn is over
    cdef u8 answer[ANSWERS * (HEADER_BYTES + ACCESS_BYTES)]
    cdef size_t answered      # bytes of them

    def __init__(
        self, callback, turn, *, Inbox inbox not None, DmaTable table not None,
        Doorbells doorbells not None, DmaCounters counters not None,
    ):
        self.inbox, self.table, self.doorbells = inbox, table, doorbells
        self.counters = counters
        self.turn = as_seconds(turn, "turn", 3600)
        self.unsent = b""
        self.unmaps = True

    @property
    def main(self):
        return self.source

    @main.setter
    def main(self, int fd):
        self.source = fd

    def take_unsent(self):
        """Answers that could not be sent without waiting; once."""
        unsent, self.unsent = self.unsent, b""
        self.pending, self.until = False, 0
        return unsent

    def run(self, int fd):
        """Handle the plain messages that have arrived before the first other one.

        What comes while Python has its turn is read once, so that a client that is quicker than
        Python does not keep all its messages from the core.

        Args:
            fd: The socket that they are answered on.

        Returns:
            ``(unsent, more, dry)``: answers that could not be sent; whether doorbells are still to
            be served, which are not if there are such answers; and whether nothing is left.
        """
        cdef Py_ssize_t got = 0
        self.handle_plain(fd)
        if not self.unsent and self.inbox.start == self.inbox.end and not self.inbox.odd:
            got = self.inbox.receive(fd)
            if got > 0:
                self.handle_plain(fd)
        unsent = self.unsent
        self.unsent = b""
        more = self.doorbells.rung_any() if unsent else self.doorbells.serve(False)
        return unsent, more, got == -EAGAIN

    cdef bint receive(self, list woken) except -1:
        """Handle what arrives, until nothing does, or something is for Python."""
        cdef Header header
        cdef Py_ssize_t got
        if not self.until:
            self.until = now_seconds() + self.turn
        while self.source >= 0:
            if not self.inbox.whole(&header):
                got = self.inbox.receive(self.source)
                if got == -EAGAIN:
                    # The rest of a message is waited for by Python, for a limited time.
                    return self.inbox.start == self.inbox.end
                if got <= 0 or self.inbox.odd:
                    return False
            self.handle_plain(self.source)
            if self.unsent or self.doorbells.serve(False) or now_seconds() >= self.until:
                self.pending = True
                return True
            if self.inbox.whole(&header):
                return False
            if self.inbox.start == self.inbox.end:
                return True
        return True

    cdef int handle_plain(self, int fd) except -1:
        """Handle and answer plain messages, up to one that is not, or that has to wait its turn."""
        cdef Header header
        # Each of them may remove as many mappings; what follows is left to Python, and the loop.
        cdef u64 most = self.table.removed + DMA_UNMAP_AT_ONCE
        try:
            while (
                not self.unsent and self.table.removed < most and self.inbox.whole(&header)
                and self.handle_one(&header)
            ):
                self.counters.plain += 1
                if not header.flags & NO_REPLY:
                    self.answer_first(&header)
                self.inbox.drop_first(header.size)
                if self.answered > sizeof(self.answer) - (HEADER_BYTES + ACCESS_BYTES):
                    self.send_answers(fd)
        finally:
            self.send_answers(fd)
        return 0

    cdef void answer_first(self, const Header *header) noexcept:
        """Note the answer to the first message. Plain C: it cannot raise."""
        cdef size_t body = sizeof(WriteRequest) if header.request == REGION_WRITE else 0
        cdef Header head = Header(
            header.number, header.request, <u32>(HEADER_BYTES + body), REPLY, 0
        )
        GUESTIO_ASSERT(self.answered + HEADER_BYTES + body <= sizeof(self.answer))
        memcpy(self.answer + self.answered, &head, HEADER_BYTES)
        self.answered += HEADER_BYTES
        # Where it wrote, and how much.
        memcpy(
            self.answer + self.answered,
            self.inbox.data + self.inbox.start + HEADER_BYTES, body,
        )
        self.answered += body

    cdef int send_answers(self, int fd) except -1:
        cdef size_t size = self.answered
        cdef Py_ssize_t sent
        if not size:
            return 0
        self.answered = 0
        with nogil:
            sent = max(c_send(fd, self.answer, size, MSG_DONTWAIT | MSG_NOSIGNAL), 0)
        if <size_t>sent < size:
            self.unsent = (<char *>self.answer)[sent:size]
        return 0

    cdef bint handle_one(self, const Header *header) except -1:
        """Obey the first message; False, and nothing is done, if it is not plain."""
        cdef Passed *passed = self.inbox.with_first()
        cdef const u8 *payload = self.inbox.data + self.inbox.start + HEADER_BYTES
        cdef size_t size
        if self.inbox.odd or header.flags & ~<u64>NO_REPLY:
            return False
        if header.size < HEADER_BYTES or header.size > self.inbox.most:
            return False
        size = header.size - HEADER_BYTES
        if header.request == REGION_WRITE:
            return passed is NULL and self.write(payload, size)
        if header.request == DMA_UNMAP:
            return passed is NULL and self.unmaps and self.unmap(payload, size)
        if header.request == DMA_MAP:
            return passed is not NULL and self.map(payload, size, passed)
        return False

    cdef bint write(self, const u8 *payload, size_t size) except -1:
        """A write that rings a doorbell."""
        cdef WriteRequest request
        cdef u64 value = 0
        cdef int place
        if not sizeof(WriteRequest) < size <= sizeof(WriteRequest) + 8:
            return False
        memcpy(&request, payload, sizeof(WriteRequest))
        if request.count != size - sizeof(WriteRequest) or request.region >= BARS:
            return False
        place = self.doorbells.find(request.region, request.offset, request.count)
        if place < 0:
            return False
        # Little-endian, as the host is.
        memcpy(&value, payload + sizeof(WriteRequest), request.count)
        if not self.doorbells.ring(place, request.offset, value, <int>request.count):
            return False
        self.counters.region_writes += 1
        return True

    cdef bint unmap(self, const u8 *payload, size_t size) except -1:
        cdef UnmapRequest request
        if size != sizeof(UnmapRequest):
            return False
        memcpy(&request, payload, sizeof(UnmapRequest))
        if request.flags or request.argsz < sizeof(UnmapRequest):
            return False
        if not self.table.unmap_idle(request.address, request.size):
            return False
        self.counters.dma_unmaps += 1
        return True

    cdef bint map(self, const u8 *payload, size_t size, const Passed *passed) except -1:
        cdef MapRequest request
        if size != sizeof(MapRequest) or passed.count != 1:
            return False
        memcpy(&request, payload, sizeof(MapRequest))
        if request.argsz < sizeof(MapRequest):
            return False
        if not self.table.map_known(
            request.address, request.size, request.flags, passed.fd[0], request.offset
        ):
            return False
        # Memory of the kernel's own: closing it does not wait.
        with nogil:
            close_memory(passed.fd[0])
        self.counters.dma_maps += 1
        return True
