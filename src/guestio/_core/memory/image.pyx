"""Moves data between a disk's image and guest memory, without a copy in between.

The system calls release the GIL, with the translation of the memory held by its lease.

A read can be limited to what the page cache has (RWF_NOWAIT of preadv2(2)): one that would wait is
left to the caller, who may wait in another thread. The disk works on it from then on: looking
starts its readahead. Writes go to the page cache, which does not wait for the disk unless too much
is dirty or a part of a page has to be read first, and there is no asking: ext4 and tmpfs refuse
RWF_NOWAIT for buffered writes (EOPNOTSUPP).
"""

cimport cython
from libc.errno cimport EAGAIN, EFAULT, EINTR, EOPNOTSUPP, errno

from guestio._core.base.checks cimport as_size
from guestio._core.base.capacity cimport IOV_BATCH
from guestio._core.memory.vector cimport iovec

cdef extern from "<sys/uio.h>" nogil:
    Py_ssize_t preadv2(int, iovec *, int, long, int)
    Py_ssize_t pwritev(int, iovec *, int, long)
    int RWF_NOWAIT


@cython.final   # called once or more per request
cdef class ImageFile:
    """A file that disks are served from, which stays open as long as a call uses it.

    Args:
        fd: The file; it stays the caller's, who must not close it before :meth:`close` says so.
        size: Its bytes.
        waits: Whether reads may wait for the disk where they are begun.

    Attributes:
        size: As given; requests that are understood later are held against what it is set to.
        waits: As given; True also once the file system turned out not to know RWF_NOWAIT, as
            tmpfs, which has nothing to wait for.

    Threads: several may use it at the same time.
    """

    def __init__(self, int fd, size, *, bint waits=True):
        self.fd, self.size_now, self.waits = fd, as_size(size, "size"), waits

    @property
    def size(self):
        return self.size_now

    @size.setter
    def size(self, value):
        self.size_now = as_size(value, "size")

    def close(self, released=None):
        """Forget the file; requests that begin now fail.

        Args:
            released: Called once no call uses the file: only then may it be closed, as its number
                may soon be another file's. Now, or by the thread whose call is the last.
        """
        self.hold()
        self.fd, self.released = -1, released
        self.let_go()

    cpdef int hold(self) except -2:
        """Keep the file from being closed until :meth:`let_go`; its descriptor, -1 if closed."""
        self.users += 1
        return self.fd

    cpdef int let_go(self) except -1:
        """Undo one :meth:`hold`."""
        self.users -= 1
        if not self.users and self.released is not None:
            released, self.released = self.released, None
            released()
        return 0

    # The data has been moved whatever comes after: what closing the image raises, in Python, is
    # printed and does not become the request's error. All else that it calls is plain C here.
    cdef int move(self, IoVector data, Move *plan, u64 most, bint wait) noexcept:
        """Move data from or to the file, from where it stands; fewer bytes than requested are an
        error of either.

        If a read would wait, the part of it that is there was moved, and will be again. Memory
        whose file was truncated fails the request, whichever side of the call found that out: what
        stands in for it is not the guest's, and must not reach the image as if it were.
        """
        cdef iovec batch[IOV_BATCH]
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
