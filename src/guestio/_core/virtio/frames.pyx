"""Frames of a network device between descriptors and guest memory (virtio 1.4, section 5.1.6).

A frame is moved by one system call, straight from or to guest memory: :class:`FrameSender` writes
the requests of a transmit queue where the ring is walked, :class:`FrameFiller` reads into the
buffers of a receive queue, with the translation of the memory held by its lease. The descriptor does
not block, so a call takes microseconds, and letting go of the GIL for each one would be a sixth of
all instructions: the GIL is released in every eighth call (`GIL_EACH`), for threads that wait for it.

A buffer that no frame was read into stays in the ring: it is looked at again for the next frame,
and holds no lease in between.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_NoMemory
from libc.errno cimport EAGAIN, EFAULT, EINTR, EPIPE, errno
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

from collections import deque

from guestio._core.base.capacity cimport IOV_BATCH, RING_LOOK_WORK, RING_PUBLISH_EACH
from guestio._core.base.checks cimport as_size, u8, u32, u64
from guestio._core.base.syscalls cimport notify
from guestio._core.iommu.misses cimport Misses
from guestio._core.memory.vector cimport IoVector, iovec
from guestio._core.trace.tracepoints cimport CONTENTS, REQUESTS, WHAT_TAKEN, tracing
from guestio._core.virtio.areas cimport current
from guestio._core.virtio.chain cimport NOT_SERVED, Chain, Server, i64, u16
from guestio._core.virtio.contents cimport trace_answer
from guestio._core.virtio.ring cimport Ring

cdef extern from "<sys/uio.h>" nogil:
    Py_ssize_t readv(int, iovec *, int)
    Py_ssize_t writev(int, iovec *, int)

cdef enum:
    ETHERNET = 14             # bytes of the shortest frame: addresses and type
    HEADER_MOST = 12
    # Bytes of the longest frame with its header: an IPv6 packet of 64 KiB with two VLAN tags.
    FRAME_MOST = HEADER_MOST + ETHERNET + 8 + 40 + 65535
    MERGE_MOST = 1024         # buffers that a frame is spread over
    NUM_BUFFERS_AT = 10       # in the header (section 5.1.6)
    LOOK_AHEAD = 16           # buffers whose translations are requested together
    PIECES_MOST = 1022        # of a frame, besides its header and a rest: IOV_MAX is 1024
    GIL_EACH = 8              # frames for which the GIL is released once

# What became of a call of `FrameFiller.fill`.
cdef enum Filled:
    IDLE = 0          # the source has no frame any more
    BUSY = 1          # the budget is used up
    FULL = 2          # the next frame needs more buffers; kicks are enabled
    LACKING = 3       # a translation is missing
    BROKEN = 4        # the source fails, see `error`
    # Within this file.
    USELESS = 5       # the buffer cannot take a part of a frame
    AGAIN = 6         # the budget is used up, or a translation changed, before a frame was moved

cdef bytes NO_OFFLOADS = bytes(HEADER_MOST)

FILLED_IDLE = IDLE
FILLED_BUSY = BUSY
FILLED_FULL = FULL
FILLED_LACKING = LACKING
FILLED_BROKEN = BROKEN


# Both are plain system calls.
cdef Py_ssize_t write_frame(int fd, iovec *pieces, int count) noexcept nogil:
    """Write a frame; minus the errno if that fails."""
    cdef Py_ssize_t moved
    while True:
        moved = writev(fd, pieces, count)
        if moved >= 0 or errno != EINTR:
            return moved if moved >= 0 else -errno


cdef Py_ssize_t read_frame(int fd, iovec *pieces, int count) noexcept nogil:
    """Read a frame; minus the errno if that fails."""
    cdef Py_ssize_t moved
    while True:
        moved = readv(fd, pieces, count)
        if moved >= 0 or errno != EINTR:
            return moved if moved >= 0 else -errno


# Pieces of a request with one more before and one behind them.
cdef struct Batch:
    iovec before
    iovec pieces[IOV_BATCH]
    iovec behind


@cython.final
cdef class FrameSender(Server):
    """Sends the requests of a transmit queue as frames, by one writev each.

    A frame that cannot be sent is dropped and counted: the driver gets its buffer back either way.

    Attributes:
        fd: Where to; each frame is written with a header of 12 bytes, as a tap with IFF_VNET_HDR
            takes it. It must not block. -1 leaves all requests to the device.
        discard: Whether to drop all frames.
        header_size: Bytes of the header that the driver writes: 10 or 12.
        offloads: Whether the header's requests for checksums and segmentation are passed on. If
            not, a header of zeros is.
        frames: Frames sent.
        sent_bytes: Their bytes, without headers.
        dropped: Frames dropped.
        error: The errno of the last write that failed.

    For one thread at a time.
    """

    cdef public int fd
    cdef public bint discard
    cdef public bint offloads
    cdef public int error
    cdef readonly int header_size
    cdef readonly u64 frames
    cdef readonly u64 sent_bytes
    cdef readonly u64 dropped
    cdef u32 calls
    cdef u8 *bounce

    def __cinit__(self):
        self.fd, self.header_size = -1, HEADER_MOST

    def __dealloc__(self):
        free(self.bounce)

    def set_header_size(self, int size):
        """Set the bytes of the driver's header, 10 or 12."""
        if size != 10 and size != 12:
            raise ValueError(f"a header of {size} bytes; it has 10 or 12")
        self.header_size = size

    def count(self, size):
        """Count a frame of ``size`` bytes that the device sent by itself."""
        self.frames += 1
        self.sent_bytes += as_size(size, "size")

    def count_dropped(self):
        """Count a frame that the device dropped."""
        self.dropped += 1

    cdef i64 serve(self, Chain chain) except -2:
        cdef Batch batch
        cdef u8 header[HEADER_MOST]
        cdef IoVector data = chain.readable
        cdef u64 skip = 0 if self.offloads else self.header_size
        cdef u64 total = data.total, length
        cdef iovec *first = batch.pieces
        cdef Py_ssize_t moved
        cdef int n, fd = self.fd
        if fd < 0 and not self.discard:
            return NOT_SERVED
        if self.discard or total < <u64>(self.header_size + ETHERNET) or total > FRAME_MOST or (
            data.vanished(0, total)
        ):
            self.dropped += 1
            return 0
        length = total - skip
        n = data.window_batch(skip, length, batch.pieces)
        if data.count > min(IOV_BATCH, PIECES_MOST):
            # A frame is one write.
            if self.bounce is NULL:
                self.bounce = <u8 *>malloc(FRAME_MOST)
                if self.bounce is NULL:
                    PyErr_NoMemory()
            data.transfer(self.bounce, skip, length, False)
            batch.pieces[0].iov_base, batch.pieces[0].iov_len = self.bounce, length
            n = 1
        if not self.offloads:
            memset(header, 0, HEADER_MOST)
            batch.before.iov_base, batch.before.iov_len = header, HEADER_MOST
            first = &batch.before
            n += 1
        self.calls += 1
        if self.calls % GIL_EACH:
            moved = write_frame(fd, first, n)
        else:
            data.enter()
            with nogil:
                moved = write_frame(fd, first, n)
            data.leave()
        if moved < 0:
            self.dropped += 1
            self.error = <int>-moved
        else:
            self.frames += 1
            self.sent_bytes += total - self.header_size
        return 0


@cython.final
cdef class FrameFiller:
    """Fills the buffers of a receive queue with frames: those of a descriptor, or given ones.

    Args:
        frames: Frames moved in one call of :meth:`fill`.
        size: Bytes of guest memory filled in one call; the last frame may exceed it.
        backlog: Frames that wait for buffers at most.
        backlog_bytes: Their bytes at most.

    Attributes:
        fd: Where frames come from, with a header of 12 bytes each, as from a tap with
            IFF_VNET_HDR; it must not block. -1 if frames are only given.
        discard: Whether to drop all frames.
        mergeable: Whether a frame may be spread over several buffers (VIRTIO_NET_F_MRG_RXBUF).
        header_size: Bytes of the header that the driver expects: 10 or 12.
        offloads: Whether a frame's header is passed on. If not, the driver gets zeros.
        frames: Frames received.
        received_bytes: Their bytes, without headers.
        dropped: Frames dropped: too long for the driver's buffers, in memory that went, or
            given while too many waited.
        filtered: Frames that the driver did not want.
        waiting: Frames that were given and not moved yet, and one that was read and waits.
        error: The errno with which reading failed.

    For one thread at a time.
    """

    cdef public int fd
    cdef public bint discard
    cdef public bint mergeable
    cdef public bint offloads
    cdef readonly int header_size
    cdef readonly int error
    cdef readonly u64 frames
    cdef readonly u64 received_bytes
    cdef readonly u64 dropped
    cdef readonly u64 filtered
    cdef u32 calls
    cdef int frames_most
    cdef u64 size_most
    cdef size_t backlog_most
    cdef u64 backlog_bytes_most
    cdef u64 backlog_bytes
    cdef object given
    # A frame with its header that was read and is to be spread over buffers.
    cdef u8 *kept
    cdef u64 kept_length
    # What the driver wants.
    cdef bint promiscuous
    cdef bint all_multicast
    cdef bint all_unicast
    cdef bint no_multicast
    cdef bint no_unicast
    cdef bint no_broadcast
    cdef u8 address[6]
    cdef bytes table

    def __cinit__(self, *, int frames, size, size_t backlog, backlog_bytes):
        self.fd, self.header_size, self.frames_most = -1, HEADER_MOST, frames
        self.size_most = as_size(size, "size")
        self.backlog_most = backlog
        self.backlog_bytes_most = as_size(backlog_bytes, "backlog_bytes")
        self.given, self.table, self.promiscuous = deque(), b"", True
        self.kept = <u8 *>malloc(FRAME_MOST)
        if self.kept is NULL:
            PyErr_NoMemory()

    def __dealloc__(self):
        free(self.kept)

    def set_header_size(self, int size):
        """Set the bytes of the driver's header, 10 or 12."""
        if size != 10 and size != 12:
            raise ValueError(f"a header of {size} bytes; it has 10 or 12")
        self.header_size = size

    def set_filter(
        self, bytes address not None, *, bint promiscuous=True, bint all_multicast=False,
        bint all_unicast=False, bint no_multicast=False, bint no_unicast=False,
        bint no_broadcast=False, bytes table not None=b"",
    ):
        """Set which destinations are received (section 5.1.6.5.1).

        Args:
            address: The device's own address, 6 bytes.
            promiscuous: Receive all.
            all_multicast: Receive all multicasts.
            all_unicast: Receive all unicasts.
            no_multicast: Receive no multicast.
            no_unicast: Receive no unicast.
            no_broadcast: Receive no broadcast.
            table: More addresses to receive, 6 bytes each.
        """
        if len(address) != 6 or len(table) % 6:
            raise ValueError("a MAC address has 6 bytes")
        memcpy(self.address, PyBytes_AS_STRING(address), 6)
        self.promiscuous, self.all_multicast, self.all_unicast = (
            promiscuous, all_multicast, all_unicast
        )
        self.no_multicast, self.no_unicast, self.no_broadcast = (
            no_multicast, no_unicast, no_broadcast
        )
        self.table = table

    @property
    def waiting(self):
        return len(self.given) + (self.kept_length != 0)

    def give(self, bytes frame not None, bytes header=None):
        """Have a frame moved by the next :meth:`fill`.

        Args:
            frame: Without a header.
            header: Of 12 bytes, for offloads; zeros by default.

        Returns:
            Whether it will be; False if it was dropped: too many frames wait, it is no frame, or
            the driver does not want it.
        """
        cdef u64 size = <u64>PyBytes_GET_SIZE(frame)
        if header is None:
            header = NO_OFFLOADS
        if len(header) != HEADER_MOST:
            raise ValueError(f"a header of {len(header)} bytes; it has {HEADER_MOST}")
        if not <u64>ETHERNET <= size <= <u64>(FRAME_MOST - HEADER_MOST) or self.discard or (
            <size_t>len(self.given) >= self.backlog_most
            or self.backlog_bytes + size > self.backlog_bytes_most
        ):
            self.dropped += 1
            return False
        if not self.wanted(<const u8 *>PyBytes_AS_STRING(frame)):
            self.filtered += 1
            return False
        self.given.append(header + frame)
        self.backlog_bytes += size
        return True

    def forget(self):
        """Drop the frames that wait."""
        self.dropped += len(self.given) + (self.kept_length != 0)
        self.given.clear()
        self.backlog_bytes = self.kept_length = 0

    # Plain C on the filter, which is never None.
    cdef bint wanted(self, const u8 *destination) noexcept:
        """Whether the driver wants frames for an address."""
        cdef Py_ssize_t at
        cdef const u8 *table = <const u8 *>PyBytes_AS_STRING(self.table)
        if self.promiscuous:
            return True
        if destination[0] & 1:
            if memcmp(destination, b"\xff\xff\xff\xff\xff\xff", 6) == 0:
                return not self.no_broadcast
            if self.no_multicast or self.all_multicast:
                return not self.no_multicast
        elif self.no_unicast:
            return False
        elif self.all_unicast or memcmp(destination, self.address, 6) == 0:
            return True
        for at in range(0, PyBytes_GET_SIZE(self.table), 6):
            if memcmp(destination, table + at, 6) == 0:
                return True
        return False

    def fill(self, Ring ring not None, int call=-1):
        """Move frames into the available buffers of a ring.

        Args:
            ring: The receive queue's ring.
            call: Eventfd to notify the driver with, or -1.

        Returns:
            ``(state, missing, buffers)``: one of the ``FILLED`` constants, what lacks a
            translation, and how many buffers were given back to the driver.

        Raises:
            QueueError: The driver broke a rule of the ring.

        Cost: a system call for each frame of a descriptor, and a lookup for each piece of memory.
        """
        cdef Misses misses = Misses()
        cdef int state = IDLE, frames = 0, buffers = 0
        cdef u64 before = self.received_bytes, progress = ring.progress
        self.error = 0
        try:
            ring.begin_batch()
            while ring.areas_ready(misses):
                if frames >= self.frames_most or self.received_bytes - before >= self.size_most or (
                    ring.work >= RING_LOOK_WORK
                ):
                    state = BUSY
                    break
                frames += 1
                state = self.move_one(ring, misses)
                if state == AGAIN:
                    state = BUSY
                    break
                if state != BUSY:
                    break
                if ring.pending_count >= RING_PUBLISH_EACH and ring.reachable():
                    ring.publish_pending()
            if misses.count:
                state = LACKING
                self.look_ahead(ring, misses)
            # Other threads ran while data moved.
            if ring.pending_count and ring.reachable():
                ring.publish_pending()
            ring.check_areas()
        finally:
            ring.keep_nothing()
        buffers = <int>(ring.progress - progress)
        if ring.notify_due:
            ring.count_notification()
            if call >= 0:
                with nogil:
                    notify(call)
        return state, misses, buffers

    cdef int move_one(self, Ring ring, Misses misses) except -1:
        """Move the next frame; BUSY if one was moved or dropped."""
        cdef bytes frame
        cdef int state
        if self.kept_length:
            state = self.spread(ring, self.kept, self.kept_length, misses)
            if state == BUSY:
                self.kept_length = 0
        elif self.given:
            frame = self.given[0]
            state = self.spread(
                ring, <const u8 *>PyBytes_AS_STRING(frame), <u64>PyBytes_GET_SIZE(frame), misses
            )
            if state == BUSY:
                self.given.popleft()
                self.backlog_bytes -= <u64>PyBytes_GET_SIZE(frame) - HEADER_MOST
        elif self.fd >= 0:
            state = self.read_one(ring, misses)
        else:
            state = IDLE
        return state

    cdef int read_one(self, Ring ring, Misses misses) except -1:
        """Read a frame straight into the next buffer; spread it if that is too small."""
        cdef Batch batch
        cdef iovec *vec = <iovec *>&batch
        cdef u8 header[HEADER_MOST]
        cdef u8 destination[6]
        cdef Chain chain
        cdef IoVector data
        cdef u64 direct = 0, room, length
        cdef Py_ssize_t moved
        cdef int i, n, fd = self.fd
        cdef int state = self.look_at(ring, 0, misses)
        if state != BUSY:
            return state
        chain = ring.scratch
        data = chain.writable
        room = min(data.total - self.header_size, <u64>(FRAME_MOST - HEADER_MOST))
        n = min(data.window_batch(self.header_size, room, vec + 1), PIECES_MOST)
        for i in range(1, n + 1):
            direct += vec[i].iov_len
        vec[0].iov_base, vec[0].iov_len = header, HEADER_MOST
        # What the buffer has no room for is read behind what it has, to be spread from there.
        vec[n + 1].iov_base = self.kept + HEADER_MOST + direct
        vec[n + 1].iov_len = FRAME_MOST - HEADER_MOST - direct
        self.calls += 1
        if self.calls % GIL_EACH:
            moved = read_frame(fd, vec, n + 2)
        else:
            data.enter()
            with nogil:
                moved = read_frame(fd, vec, n + 2)
            data.leave()
        if moved < 0:
            if moved == -EAGAIN:
                return IDLE
            if moved == -EFAULT:
                # The buffer's memory is gone, and the frame with it.
                data.mark(self.header_size, direct)
                self.dropped += 1
                self.consume(ring, chain, 0)
                return BUSY
            self.error = <int>-moved
            return BROKEN
        if not moved:
            # The other end is gone.
            self.error = EPIPE
            return BROKEN
        length = <u64>max(moved - HEADER_MOST, 0)
        # Also of a frame that is not wanted: a dirty log tells all that was written.
        data.mark(0, self.header_size + min(length, direct))
        # One that fills everything may have been longer.
        if moved < HEADER_MOST + ETHERNET or moved >= FRAME_MOST or self.discard:
            self.dropped += 1
            return BUSY
        if data.vanished(0, self.header_size + min(length, direct)):
            self.dropped += 1
            self.consume(ring, chain, 0)
            return BUSY
        if not self.promiscuous:
            if direct < 6:
                data.transfer(self.kept + HEADER_MOST, self.header_size, direct, False)
                memcpy(destination, self.kept + HEADER_MOST, 6)
            else:
                data.transfer(destination, self.header_size, 6, False)
            if not self.wanted(destination):
                self.filtered += 1
                return BUSY
        if length > direct:
            memcpy(self.kept, header, HEADER_MOST)
            data.transfer(self.kept + HEADER_MOST, self.header_size, direct, False)
            self.kept_length = <u64>moved
            return BUSY
        self.complete_header(header, 1)
        data.transfer(header, 0, self.header_size, True)
        self.consume(ring, chain, self.header_size + length)
        self.frames += 1
        self.received_bytes += length
        return BUSY

    # Plain C on a header that the caller holds.
    cdef void complete_header(self, u8 *header, u32 buffers) noexcept:
        """Make a header what the driver is to get."""
        if not self.offloads:
            memset(header, 0, HEADER_MOST)
        header[NUM_BUFFERS_AT], header[NUM_BUFFERS_AT + 1] = buffers & 0xFF, buffers >> 8 & 0xFF

    cdef int look_at(self, Ring ring, int ahead, Misses misses) except -1:
        """Fill the ring's scratch chain with the buffer that is ``ahead`` of the next; BUSY if it
        can be used.

        A buffer that no frame can begin in is given back unused.
        """
        cdef int known, head
        while True:
            known = ring.held_count
            if ahead < known:
                head = ring.held[ring.held_at + ahead]
            else:
                if ahead - known >= ring.waiting() and not ring.more_beyond(<u16>(ahead - known)):
                    return FULL
                head = ring.head_at(<u16>(ring.next_avail + ahead - known))
            if not ring.look(head, misses, False):
                return LACKING
            if not current(ring):
                return AGAIN
            if ring.scratch.fault is None and ring.scratch.writable.total >= (
                1 if ahead else self.header_size
            ):
                return BUSY
            if ahead:
                return USELESS
            self.consume(ring, ring.scratch, 0)
            if ring.work >= RING_LOOK_WORK:
                return AGAIN

    cdef int look_ahead(self, Ring ring, Misses misses) except -1:
        """Collect what more of the next buffers lacks, to be requested at once.

        They hold no lease for it, and frames for them will come soon, or have come already.
        """
        cdef int ahead, available
        if ring.held_count or not ring.reachable():
            return 0
        available = min(ring.waiting(), LOOK_AHEAD)
        for ahead in range(1, available):
            if ring.work >= RING_LOOK_WORK or not current(ring):
                break
            ring.look(ring.head_at(<u16>(ring.next_avail + ahead)), misses, False)
        return 0

    cdef int spread(self, Ring ring, const u8 *frame, u64 size, Misses misses) except -1:
        """Copy a frame with its header into as many buffers as it needs; BUSY if that is done, or
        if the frame was dropped.

        All of its buffers are published at once, as the driver expects (section 5.1.6.4).
        """
        cdef u8 header[HEADER_MOST]
        cdef list chains = []
        cdef Chain chain
        cdef u64 left = size - HEADER_MOST, at = HEADER_MOST, n, skip = self.header_size
        cdef u64 room = 0
        cdef int state
        cdef bint gone = False
        while room < left + self.header_size:
            if chains and (not self.mergeable or len(chains) >= MERGE_MOST or (
                <u32>len(chains) >= ring.size
            )):
                self.dropped += 1
                return BUSY
            state = self.look_at(ring, <int>len(chains), misses)
            if state == USELESS:
                # One of the buffers is of no use: the frame is lost, and they go back.
                chains.append(ring.scratch)
                ring.scratch = None
                for chain in chains:
                    self.consume(ring, chain, 0)
                self.dropped += 1
                return BUSY
            if state != BUSY:
                return state
            chain = ring.scratch
            chains.append(chain)
            room += chain.writable.total
            ring.scratch = None
        memcpy(header, frame, HEADER_MOST)
        self.complete_header(header, <u32>len(chains))
        for chain in chains:
            if skip:
                chain.writable.transfer(header, 0, skip, True)
            n = min(chain.writable.total - skip, left)
            chain.writable.transfer(<u8 *>frame + at, skip, n, True)
            chain.writable.mark(0, skip + n)
            chain.written = skip + n
            gone |= chain.writable.vanished(0, skip + n)
            at, left, skip = at + n, left - n, 0
        for chain in chains:
            self.consume(ring, chain, 0 if gone else chain.written)
        if gone:
            self.dropped += 1
            return BUSY
        self.frames += 1
        self.received_bytes += size - HEADER_MOST
        return BUSY

    cdef int consume(self, Ring ring, Chain chain, u64 written) except -1:
        """Give the next buffer back to the driver; it is published later."""
        if ring.held_count:
            ring.forget_held()
        else:
            ring.advance(chain.head)
        chain.position = ring.taken_at
        ring.bytes += written
        if tracing & REQUESTS:
            ring.trace_head(WHAT_TAKEN, chain, chain.position, 0)
            if tracing & CONTENTS:
                trace_answer(chain.writable, written, ring.origin, ring.queue, <u32>chain.head)
        chain.clear()
        chain.written = written
        ring.add_pending(chain, False)
        return 0
