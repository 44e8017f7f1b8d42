"""Requests that were taken from a ring, and what may serve them in the core."""

from guestio._core.base.naming cimport publish_type
from guestio._core.base.checks cimport as_address
from guestio._core.trace.tracepoints cimport CONTENTS, tracing
from guestio._core.virtio.contents cimport trace_answer

from libc.stdint cimport uint32_t

cdef enum:
    READ = 1
    WRITE = 2


cdef class Chain:
    """One request of the driver: what it gave to read and what it gave to write.

    No framing may be assumed: what belongs together may be split anywhere (section 2.6.4).

    Attributes:
        head: Identifies the request in its ring.
        readable: Memory that the device reads.
        writable: Memory that the device writes, in order.
        fault: Why the request cannot be served: part of its memory cannot be reached. Then
            ``readable`` and ``writable`` hold only what could be. None if all is well.
        tail: The last device-writable byte, where many devices put a status; None if there is none
            or it cannot be reached. It lasts as long as ``writable``.
        access_fails: With a fault, the ranges whose mapping forbids the access.
    """

    def __cinit__(self):
        # Here, so that an object of a subclass that is not initialized has them, too.
        self.readable, self.writable = IoVector(), IoVector()
        self.readable.access, self.writable.access = READ, WRITE
        self.access_fails = []

    def __init__(self):
        raise TypeError("chains come from a ring")

    def __repr__(self):
        cdef str state = "" if self.fault is None else f", refused: {self.fault}"
        if self.done or self.finished:
            state = ", completed" if self.done else ", answered"
        return (
            f"<Chain {self.head}: {self.readable.total} bytes to read, {self.writable.total} to "
            f"write{state}>"
        )

    cdef int clear(self) except -1:
        """Give its memory back and be ready for another request."""
        self.readable.release()
        self.writable.release()
        cdef IoVector tail = self.end
        self.end = self.fault = None
        self.finished = self.done = False
        if self.access_fails:
            self.access_fails = []
        self.blank = True
        return 0

    def in_use(self):
        """Whether a call is moving its data at this moment, without the GIL."""
        return is_in_use(self)

    def stamp(self, value):
        """Have ``value`` be the last writable byte once no call moves the data any more.

        For the status of a request that failed: a call that is under way may write it over. Does
        nothing if there is none.

        Raises:
            ValueError: It is no byte.
        """
        cdef u64 byte = as_address(value, "value")
        if byte > 255:
            raise ValueError(f"value {value} is not in 0..255")
        if self.writable.users:
            self.writable.stamp = 1 + <int>byte

    @property
    def tail(self):
        # Without a fault all was reached, and the leases of the whole hold for its last byte.
        if self.end is None and self.fault is None and self.writable.total:
            self.end = self.writable.last_byte()
        return self.end

    def hand_over(self):
        """Let another thread use the memory: a revocation of its translation waits for that thread.

        Without this, a revocation by the thread that took the request is a mistake: it would wait
        for itself.
        """
        hand_over(self.readable)
        hand_over(self.writable)
        if self.end is not None:
            hand_over(self.end)

    def finish(self, written):
        """Give the memory back, with the number of bytes written to it.

        The request is complete once its ring is told so as well, by ``complete``. Any thread. The
        memory may not be touched any more. A thread that is copying at this moment nevertheless
        finishes with memory that is kept for it; revocations wait for it, and so does
        ``complete``.

        Raises:
            ValueError: It was finished before, or has less room.
        """
        cdef u64 count = as_address(written, "written")
        if self.finished:
            raise ValueError(f"request {self.head} was completed before")
        if count > self.writable.total:
            raise ValueError(
                f"{count} bytes written to a request with room for {self.writable.total}"
            )
        self.finished, self.written = True, count
        if self.writable.stamp and not self.writable.users:
            self.writable.put_stamp()
        if tracing & CONTENTS and self.ring is not None:
            trace_answer(self.writable, count, self.origin, self.queue, <uint32_t>self.head)
        # What was written through buffers of its slices is marked dirty by this.
        self.readable.close()
        self.writable.close()
        if self.end is not None:
            self.end.close()


cdef void hand_over(IoVector memory) noexcept:
    cdef int i
    for i in range(memory.lease_count):
        memory.leases.disown(memory.lease[i])


cdef Chain new_chain():
    return Chain.__new__(Chain)


cdef class Quota:
    """Limits the memory of the requests that devices hold, of several rings together.

    Args:
        most: Pieces of memory that they may consist of. A ring takes no more while they do, except
            for one request if its device holds none of it, so that every ring goes on in the end.

    Attributes:
        used: Pieces of those that are held. A request counts as some even if it has none.
        most: As given.
    """

    def __init__(self, most):
        self.most = as_address(most, "most")


cdef class Server:
    """Serves the simple requests of a device without leaving the core."""

    cdef i64 serve(self, Chain chain) except -2:
        """Serve a request; the bytes written, or NOT_SERVED if it is left to the device."""
        return NOT_SERVED


publish_type(Chain, "guestio.virtio.Chain", "Chain(*args, **kwargs)\n--\n\n")
