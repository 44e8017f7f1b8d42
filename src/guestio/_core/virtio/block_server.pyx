"""Reads and writes of a block device between its file and guest memory (virtio 1.3, 5.2.6).

These are nearly all requests of a disk, so they are served where the ring is walked: no
Python object is made for one. Data moves without a copy in between; the system calls release the
GIL, with the translation of the memory held by its lease.

A read can be limited to what the page cache has (RWF_NOWAIT of preadv2(2)): one that would wait is
left to the device, which may wait in another thread. The disk works on it from then on: looking
starts its readahead. Writes are never left. They go to the page cache, which does not wait for the
disk unless too much is dirty or a part of a page has to be read first, and there is no asking:
ext4 and tmpfs refuse RWF_NOWAIT for buffered writes (EOPNOTSUPP).
"""

cimport cython
from libc.errno cimport EAGAIN, EFAULT, EINTR, EOPNOTSUPP, errno

from guestio._core.base.checks cimport as_size, u8, u32, u64
from guestio._core.base.capacity cimport IOV_BATCH
from guestio._core.virtio.chain cimport NOT_SERVED, Chain, Server, i64
from guestio._core.memory.vector cimport IoVector, iovec

cdef extern from "<sys/uio.h>" nogil:
    Py_ssize_t preadv2(int, iovec *, int, long, int)
    Py_ssize_t pwritev(int, iovec *, int, long)
    int RWF_NOWAIT

cdef extern from "<endian.h>" nogil:
    u32 le32toh(u32)
    u64 le64toh(u64)

cdef enum:
    SECTOR = 512
    T_IN = 0
    T_OUT = 1
    S_OK = 0
    S_IOERR = 1
    # What came of moving data.
    MOVED = 0
    FAILED = 1
    WOULD_WAIT = 2


cdef struct Header:
    u32 kind
    u32 priority
    u64 sector


# What a request wants, how far it is, and what became of it.
cdef struct Plan:
    u64 offset        # in the image
    u64 start         # in the request's memory
    u64 length
    u64 done
    int error         # errno; 0 where the image ended
    u8 status
    bint reading


@cython.final   # its methods call each other once or more per request
cdef class BlockServer(Server):
    """Serves VIRTIO_BLK_T_IN and VIRTIO_BLK_T_OUT; leaves all else to the device.

    Args:
        fd: The image; it stays the caller's, who must not close it before :meth:`close` says so.
        size: Its bytes, a multiple of 512.
        writable: Whether writes are served.
        waits: Whether a request may wait for the disk where the ring is walked. If not, a read of
            what is not in the page cache is left to the device.
        inline_bytes: Bytes of a request that are moved where the ring is walked; larger ones are
            left to the device.
        report: Called with an errno (0: the image ended), the offset where it happened, the bytes
            of the request and whether it was a read, for each request that failed because of the
            file or the memory.

    Attributes:
        size: As given; requests that are understood later are held against what it is set to.
        waits: As given; True also once the file system turned out not to know RWF_NOWAIT, as
            tmpfs, which has nothing to wait for.
        errors: Requests that failed because of the file or the memory.

    Threads: several may serve requests at the same time.
    """

    cdef int fd
    cdef int users        # calls that use the image at this moment
    cdef object released  # called once there are none
    cdef u64 size_now
    cdef bint writable
    cdef readonly bint waits
    cdef readonly u64 errors
    cdef u64 inline_bytes
    cdef object report

    def __init__(
        self, int fd, size, *, bint writable=True, bint waits=True, inline_bytes=1 << 62,
        report=None,
    ):
        self.fd, self.size_now = fd, as_size(size, "size")
        self.writable, self.waits = writable, waits
        self.inline_bytes, self.report = as_size(inline_bytes, "inline_bytes"), report

    @property
    def size(self):
        return self.size_now

    @size.setter
    def size(self, value):
        self.size_now = as_size(value, "size")

    def retire(self):
        """Leave all requests of rings to the device from now on."""
        self.inline_bytes = 0

    def close(self, released=None):
        """Forget the image; requests that begin now fail.

        Args:
            released: Called once no call uses the image: only then may it be closed, as its number
                may soon be another file's. Now, or by the thread whose call is the last.
        """
        self.hold()
        self.fd, self.released = -1, released
        self.let_go()

    cpdef int hold(self) except -2:
        """Keep the image from being closed until :meth:`let_go`; its descriptor, -1 if closed."""
        self.users += 1
        return self.fd

    cpdef int let_go(self) except -1:
        """Undo one :meth:`hold`."""
        self.users -= 1
        if not self.users and self.released is not None:
            released, self.released = self.released, None
            released()
        return 0

    def process(self, Chain chain not None, *, bint wait=True):
        """Serve one request.

        Args:
            chain: The request.
            wait: Whether to wait for the disk if need be.

        Returns:
            The bytes written; None if it is left to the device: it is not a read or write, or it
            would have to wait.
        """
        cdef i64 written = self.answer(chain, wait or self.waits)
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
        return self.answer(chain, self.waits)

    cdef i64 answer(self, Chain chain, bint wait) except -2:
        cdef Plan plan
        cdef int outcome
        if not self.understand(chain, &plan):
            return NOT_SERVED
        if plan.status == S_OK:
            outcome = self.move(chain, &plan, plan.length, wait)
            if outcome == WOULD_WAIT:
                return NOT_SERVED
            if outcome == FAILED:
                self.count_error(&plan)
        return self.finish(chain, &plan)

    cdef bint understand(self, Chain chain, Plan *plan) noexcept:
        """Find out what a request wants; False if it is left to the device."""
        cdef Header header
        plan.done = plan.error = 0
        plan.status = S_OK
        if chain.readable.total < sizeof(Header) or not chain.writable.total:
            return False
        chain.readable.transfer(<u8 *>&header, 0, sizeof(Header), False)
        header.kind, header.sector = le32toh(header.kind), le64toh(header.sector)
        if header.kind > T_OUT or chain.readable.vanished(0, sizeof(Header)):
            return False
        plan.reading = header.kind == T_IN
        plan.start, plan.length = 0, chain.writable.total - 1
        if not plan.reading:
            plan.start, plan.length = sizeof(Header), chain.readable.total - sizeof(Header)
        if plan.length % SECTOR or header.sector > self.size_now // SECTOR or (
            plan.length > self.size_now - header.sector * SECTOR
        ) or not (plan.reading or self.writable):
            plan.status = S_IOERR
        plan.offset = header.sector * SECTOR
        return True

    cdef i64 finish(self, Chain chain, Plan *plan) noexcept:
        """Tell the driver what came of a request; the bytes written."""
        cdef IoVector answer = chain.writable
        cdef u64 last = answer.total - 1
        answer.transfer(&plan.status, last, 1, True)
        answer.mark(last, 1)
        if answer.vanished(last, 1):
            return 0
        if not last or (plan.reading and plan.status == S_OK):
            return <i64>(last + 1)
        return 0

    cdef int count_error(self, Plan *plan) except -1:
        self.errors += 1
        plan.status = S_IOERR
        if self.report is not None:
            self.report(plan.error, plan.offset + plan.done, plan.length, plan.reading)
        return 0

    cdef int move(self, Chain chain, Plan *plan, u64 most, bint wait) noexcept:
        """Move data from or to the file, from where it stands; fewer bytes than requested are an
        error of either.

        If a read would wait, the part of it that is there was moved, and will be again. Memory
        whose file was truncated fails the request, whichever side of the call found that out: what
        stands in for it is not the guest's, and must not reach the image as if it were.
        """
        cdef iovec batch[IOV_BATCH]
        cdef IoVector data = chain.writable if plan.reading else chain.readable
        cdef u64 done = plan.done, end = plan.done + min(most, plan.length - plan.done)
        cdef Py_ssize_t moved
        cdef long offset
        cdef int fd, n, error, outcome = MOVED, flags = 0 if wait else RWF_NOWAIT
        if not plan.reading and data.vanished(plan.start + done, end - done):
            plan.error = EFAULT
            return FAILED
        data.enter()
        # Others run while data moves, and may close the image.
        fd = self.hold()
        while done < end:
            n = data.window_batch(plan.start + done, end - done, batch)
            offset = <long>(plan.offset + done)
            with nogil:
                if plan.reading:
                    moved = preadv2(fd, batch, n, offset, flags)
                else:
                    moved = pwritev(fd, batch, n, offset)
                error = errno
            if moved > 0:
                done += moved
                continue
            if moved < 0 and error == EINTR:
                continue
            if moved < 0 and flags and error == EOPNOTSUPP:
                self.waits, flags = True, 0
                continue
            outcome = WOULD_WAIT if moved < 0 and flags and error == EAGAIN else FAILED
            plan.error = error if moved < 0 else 0
            break
        if plan.reading:
            # After a failure it is unknown how much of the rest was written.
            data.mark(plan.start + plan.done, end - plan.done)
        if outcome == MOVED and data.vanished(plan.start + plan.done, end - plan.done):
            outcome, plan.error = FAILED, EFAULT
        data.leave()
        # Last: it may close the image, in Python.
        self.let_go()
        if outcome != WOULD_WAIT:
            plan.done = done
        return outcome


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
            elif self.plan.done < self.plan.length:
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
