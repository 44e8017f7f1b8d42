"""Reads and writes of a block device between its file and guest memory (virtio 1.3, 5.2.6).

These are nearly all requests of a disk, so they are served where the ring is walked: no
Python object is made for one. Data moves without a copy in between; the system calls release the
GIL, with the translation of the memory held by its lease.

A read that would wait for the disk is left to the device, which may wait in another thread; writes
are never left (:mod:`guestio._core.memory.image`).
"""

cimport cython

from guestio._core.base.checks cimport as_size, u8, u32, u64
from guestio._core.memory.image cimport FAILED, WOULD_WAIT, ImageFile, Move
from guestio._core.virtio.chain cimport NOT_SERVED, Chain, Server, i64
from guestio._core.memory.vector cimport IoVector

cdef extern from "<endian.h>" nogil:
    u32 le32toh(u32)
    u64 le64toh(u64)

cdef enum:
    SECTOR = 512
    T_IN = 0
    T_OUT = 1
    T_FLUSH = 4
    FLUSH = 3     # as Latencies has it, where reads and writes follow theirs here
    S_OK = 0
    S_IOERR = 1


cdef struct Header:
    u32 kind
    u32 priority
    u64 sector


# What a request wants, how far it is, and what became of it.
cdef struct Plan:
    Move data
    u8 status


@cython.final   # its methods call each other once or more per request
cdef class BlockServer(Server):
    """Serves VIRTIO_BLK_T_IN and VIRTIO_BLK_T_OUT; leaves all else to the device.

    Args:
        image: The file, of a multiple of 512 bytes. Unless it ``waits``, a read of what is not in
            the page cache is left to the device.
        writable: Whether writes are served.
        inline_bytes: Bytes of a request that are moved where the ring is walked; larger ones are
            left to the device.
        report: Called with an errno (0: the image ended), the offset where it happened, the bytes
            of the request and whether it was a read, for each request that failed because of the
            file or the memory.

    Attributes:
        errors: Requests that failed because of the file or the memory.
        image: The file.

    Threads: several may serve requests at the same time.
    """

    cdef readonly ImageFile image
    cdef bint writable
    cdef readonly u64 errors
    cdef u64 inline_bytes
    cdef object report

    def __init__(
        self, ImageFile image not None, *, bint writable=True, inline_bytes=1 << 62, report=None
    ):
        self.image, self.writable = image, writable
        self.inline_bytes, self.report = as_size(inline_bytes, "inline_bytes"), report

    def retire(self):
        """Leave all requests of rings to the device from now on."""
        self.inline_bytes = 0

    def process(self, Chain chain not None, *, bint wait=True):
        """Serve one request.

        Args:
            chain: The request.
            wait: Whether to wait for the disk if need be.

        Returns:
            The bytes written; None if it is left to the device: it is not a read or write, or it
            would have to wait.
        """
        cdef i64 written = self.answer(chain, wait or self.image.waits)
        return None if written == NOT_SERVED else written

    def transfer(self, Chain chain not None):
        """A read or write to be served in slices, whatever it waits for.

        Returns:
            A :class:`Transfer`; None if the request is left to the device.
        """
        cdef Transfer transfer = Transfer.__new__(Transfer)
        if not self.understand(chain, &transfer.plan):
            return None
        transfer.server, transfer.chain = self, chain
        return transfer

    def is_large(self, Chain chain not None):
        """Whether a request moves more bytes than are moved where the ring is walked."""
        return chain.readable.total + chain.writable.total > self.inline_bytes

    cdef i64 serve(self, Chain chain) except -2:
        if chain.readable.total + chain.writable.total > self.inline_bytes:
            return NOT_SERVED
        return self.answer(chain, self.image.waits)

    cdef i64 answer(self, Chain chain, bint wait) except -2:
        cdef Plan plan
        cdef int outcome
        if not self.understand(chain, &plan):
            return NOT_SERVED
        if plan.status == S_OK:
            outcome = self.move(chain, &plan, plan.data.length, wait)
            if outcome == WOULD_WAIT:
                return NOT_SERVED
            if outcome == FAILED:
                self.count_error(&plan)
        return self.finish(chain, &plan)

    cdef bint understand(self, Chain chain, Plan *plan) noexcept:
        """Find out what a request wants; False if it is left to the device."""
        cdef Header header
        plan.data.done = plan.data.error = 0
        plan.status = S_OK
        if chain.readable.total < sizeof(Header) or not chain.writable.total:
            chain.kind = 0
            return False
        chain.readable.transfer(<u8 *>&header, 0, sizeof(Header), False)
        header.kind, header.sector = le32toh(header.kind), le64toh(header.sector)
        if header.kind > T_OUT or chain.readable.vanished(0, sizeof(Header)):
            chain.kind = FLUSH if header.kind == T_FLUSH else 0
            return False
        plan.data.reading = header.kind == T_IN
        chain.kind = 1 + <int>header.kind
        plan.data.start, plan.data.length = 0, chain.writable.total - 1
        if not plan.data.reading:
            plan.data.start = sizeof(Header)
            plan.data.length = chain.readable.total - sizeof(Header)
        if plan.data.length % SECTOR or header.sector > self.image.size_now // SECTOR or (
            plan.data.length > self.image.size_now - header.sector * SECTOR
        ) or not (plan.data.reading or self.writable):
            plan.status = S_IOERR
        chain.offset = plan.data.offset = header.sector * SECTOR
        return True

    cdef i64 finish(self, Chain chain, Plan *plan) noexcept:
        """Tell the driver what came of a request; the bytes written."""
        cdef IoVector answer = chain.writable
        cdef u64 last = answer.total - 1
        answer.transfer(&plan.status, last, 1, True)
        answer.mark(last, 1)
        if answer.vanished(last, 1):
            return 0
        if not last or (plan.data.reading and plan.status == S_OK):
            return <i64>(last + 1)
        return 0

    cdef int count_error(self, Plan *plan) except -1:
        self.errors += 1
        plan.status = S_IOERR
        if self.report is not None:
            self.report(
                plan.data.error, plan.data.offset + plan.data.done, plan.data.length,
                plan.data.reading,
            )
        return 0

    cdef int move(self, Chain chain, Plan *plan, u64 most, bint wait) noexcept:
        return self.image.move(
            chain.writable if plan.data.reading else chain.readable, &plan.data, most, wait
        )


cdef class Transfer:
    """A read or write under way; made by :meth:`BlockServer.transfer`.

    For one thread at a time.
    """

    cdef BlockServer server
    cdef Chain chain
    cdef Plan plan

    def __init__(self):
        raise TypeError("transfers come from a BlockServer")

    def step(self, most):
        """Move the next bytes, waiting for the disk.

        Args:
            most: Bytes to move at most; greater than 0.

        Returns:
            None as long as there is more to move, then the bytes written for the driver.
        """
        cdef u64 limit = as_size(most, "most")
        self.check()
        if self.chain.finished:
            return 0
        if self.plan.status == S_OK:
            if self.server.move(self.chain, &self.plan, limit, True) == FAILED:
                self.server.count_error(&self.plan)
            elif self.plan.data.done < self.plan.data.length:
                return None
        return self.finish()

    def abandon(self):
        """Tell the driver that the request failed; the bytes written for it."""
        self.check()
        self.plan.status = S_IOERR
        return self.finish()

    cdef int check(self) except -1:
        if self.chain is None:
            raise TypeError("transfers come from a BlockServer")
        return 0

    cdef object finish(self):
        # A stop that gave the request back has told the driver, and taken its memory away.
        return 0 if self.chain.finished else self.server.finish(self.chain, &self.plan)
