"""Reads and writes of a block device between its file and guest memory (virtio 1.3, 5.2.6).

These are nearly all that a disk is asked for, so they are served where the ring is walked: no
Python object is made for one. Data moves without a copy in between; the system calls release the
GIL, with the translation of the memory held by its lease.

A read can be limited to what the page cache has (RWF_NOWAIT of preadv2(2)): one that would wait is
left to the device, which may have somebody else wait. The disk works on it from then on: looking
starts its readahead. Writes are never left. They go to the page cache, which does not wait for the
disk unless too much is dirty or a part of a page has to be read first, and there is no asking:
ext4 and tmpfs refuse RWF_NOWAIT for buffered writes (EOPNOTSUPP).
"""

from libc.errno cimport EAGAIN, EINTR, EOPNOTSUPP, errno

from guestio._core.border cimport as_size, u8, u32, u64
from guestio._core.capacity cimport IOV_BATCH
from guestio._core.chain cimport NOT_SERVED, Chain, Server, i64
from guestio._core.vector cimport IoVector, iovec

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


cdef class BlockServer(Server):
    """Serves VIRTIO_BLK_T_IN and VIRTIO_BLK_T_OUT; leaves all else to the device.

    Args:
        fd: The image; it stays the caller's and must outlive this object.
        size: Its bytes, a multiple of 512.
        writable: Whether writes are served.
        waits: Whether a request may wait for the disk where the ring is walked. If not, a read of
            what is not in the page cache is left to the device.

    Attributes:
        waits: As given; True also once the file system turned out not to know RWF_NOWAIT, as
            tmpfs, which has nothing to wait for.
        errors: Requests that failed because of the file or the memory.

    Threads: several may serve requests at the same time.
    """

    cdef int fd
    cdef u64 size
    cdef bint writable
    cdef readonly bint waits
    cdef readonly u64 errors

    def __init__(self, int fd, size, *, bint writable=True, bint waits=True):
        self.fd, self.size = fd, as_size(size, "size")
        self.writable, self.waits = writable, waits

    def close(self):
        """Forget the image: its number may be another file's soon. All requests fail from now on."""
        self.fd = -1

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

    cdef i64 serve(self, Chain chain) except -2:
        return self.answer(chain, self.waits)

    cdef i64 answer(self, Chain chain, bint wait) except -2:
        cdef Header header
        cdef IoVector answer = chain.writable, data = answer
        cdef u64 start = 0, length, last
        cdef u8 status = S_OK
        cdef bint reading
        cdef int outcome
        if chain.readable.total < sizeof(Header) or not answer.total:
            return NOT_SERVED
        last = answer.total - 1
        chain.readable.transfer(<u8 *>&header, 0, sizeof(Header), False)
        header.kind, header.sector = le32toh(header.kind), le64toh(header.sector)
        if header.kind > T_OUT or chain.readable.vanished(0, sizeof(Header)):
            return NOT_SERVED
        reading = header.kind == T_IN
        length = last
        if not reading:
            data, start, length = chain.readable, sizeof(Header), chain.readable.total - sizeof(Header)
        if length % SECTOR or header.sector > self.size // SECTOR or (
            length > self.size - header.sector * SECTOR
        ) or not (reading or self.writable):
            status = S_IOERR
        else:
            outcome = self.move(data, start, length, header.sector * SECTOR, reading, wait)
            if outcome == WOULD_WAIT:
                return NOT_SERVED
            if outcome == FAILED:
                status = S_IOERR
                self.errors += 1
        answer.transfer(&status, last, 1, True)
        answer.mark(last, 1)
        if answer.vanished(last, 1):
            return 0
        if not last or (reading and status == S_OK):
            return <i64>(last + 1)
        return 0

    cdef int move(
        self, IoVector data, u64 start, u64 length, u64 offset, bint to_guest, bint wait
    ) noexcept:
        """Move a window from or to the file; fewer bytes than asked for is an error of either.

        If a read would wait, the part of it that is there was moved, and will be again. Memory
        whose file was truncated fails the request, whichever side of the call found that out: what
        stands in for it is not the guest's, and must not reach the image as if it were.
        """
        cdef iovec batch[IOV_BATCH]
        cdef u64 done = 0
        cdef Py_ssize_t moved
        cdef int n, error, outcome = MOVED, flags = 0 if wait else RWF_NOWAIT
        if not to_guest and data.vanished(start, length):
            return FAILED
        data.enter()
        while done < length:
            n = data.window_batch(start + done, length - done, batch)
            with nogil:
                if to_guest:
                    moved = preadv2(self.fd, batch, n, <long>(offset + done), flags)
                else:
                    moved = pwritev(self.fd, batch, n, <long>(offset + done))
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
            break
        if to_guest:
            # After a failure it is unknown how much of the rest was written.
            data.mark(start, length)
        if outcome == MOVED and data.vanished(start, length):
            outcome = FAILED
        data.leave()
        return outcome
