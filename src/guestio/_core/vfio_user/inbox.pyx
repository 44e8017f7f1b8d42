"""What has arrived at a vfio-user socket: many messages with one system call, in their order.

Descriptors are passed with the first byte that one call of `sendmsg` sends, and the kernel ends a
read behind the bytes of such a call. So if each message with descriptors is sent by a call of its
own, as clients do, they belong to the last message that begins in the read that they came with.
"""

from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove

from guestio._core.base.capacity cimport GUESTIO_ASSERT
from guestio._core.base.checks cimport as_size, u8, u64
from guestio._core.vfio_user.wire cimport (
    HEADER_BYTES, INBOX_READ, ODD_BESIDE, PASSED_AT_ONCE, Header, receive_with_fds,
)

import os


cdef class Inbox:
    """Messages that have arrived, and their descriptors.

    Args:
        most: Bytes of a message at most, its header included.

    Attributes:
        odd: What came beside bytes that no peer may send: 0 for nothing, 1 for more descriptors
            than this process may open, 2 for other data, 3 for descriptors in the middle of a
            message. The stream is of no more use then.

    For one thread.
    """

    def __cinit__(self, most):
        self.most = as_size(most, "most")
        if self.most < HEADER_BYTES:
            raise ValueError(f"most {most} has no room for a header")
        # A message, and what is read behind it.
        self.room = self.most + INBOX_READ
        self.data = <u8 *>malloc(self.room)
        if self.data is NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.data)

    cdef Py_ssize_t receive(self, int fd) except? -1:
        """Read once what is there; to be called while no message is whole.

        Returns:
            The bytes, 0 if the peer has closed the connection, or a negative errno.
        """
        cdef size_t began
        cdef Py_ssize_t got
        cdef int fds[PASSED_AT_ONCE]
        cdef int count, odd, i
        cdef Passed *passed
        if self.start == self.end:
            self.before += self.end
            self.start = self.end = 0
        elif self.room - self.end < INBOX_READ:
            memmove(self.data, self.data + self.start, self.end - self.start)
            self.before += self.start
            self.end -= self.start
            self.start = 0
        began = self.end
        GUESTIO_ASSERT(self.room - self.end >= INBOX_READ)
        with nogil:
            got = receive_with_fds(fd, self.data + began, INBOX_READ, fds, &count, &odd)
        if got > 0:
            self.end += got
        if odd:
            self.odd = odd
        if count:
            # Two sets at most: that of a message whose rest is missing, and one that came now.
            GUESTIO_ASSERT(self.passed_count < 2)
            passed = &self.passed[self.passed_count]
            self.passed_count += 1
            passed.count = count
            for i in range(count):
                passed.fd[i] = fds[i]
            passed.at = self.before + began
            if not self.place_fds(began) and not self.odd:
                self.odd = ODD_BESIDE
        return got

    cdef int place_fds(self, size_t began) noexcept:
        """Say which message the last descriptors are with; False if none began in the last read.

        Plain C on the inbox's own memory: it cannot raise.
        """
        cdef Header header
        cdef size_t at = self.start, last = self.start
        while at < self.end:
            last = at
            if self.end - at < HEADER_BYTES:
                break
            memcpy(&header, self.data + at, HEADER_BYTES)
            if header.size < HEADER_BYTES or header.size > self.most:
                break
            at += header.size
        if last < began:
            return False
        self.passed[self.passed_count - 1].at = self.before + last
        return True

    cdef bint whole(self, Header *header) noexcept:
        """Whether the first message is there as a whole, and its header. Plain C, it cannot raise.

        A size that cannot be makes a message of its header.
        """
        cdef size_t left = self.end - self.start
        if left < HEADER_BYTES:
            return False
        memcpy(header, self.data + self.start, HEADER_BYTES)
        return header.size < HEADER_BYTES or header.size > self.most or header.size <= left

    cdef Passed *with_first(self) noexcept:
        """The descriptors with the first message, or NULL. Plain C, it cannot raise."""
        if self.passed_count and self.passed[0].at == self.before + self.start:
            return &self.passed[0]
        return NULL

    cdef void drop_first(self, size_t size) noexcept:
        """Go on behind the first message, whose descriptors were taken. Plain C, it cannot raise."""
        if self.passed_count and self.passed[0].at == self.before + self.start:
            self.passed_count -= 1
            if self.passed_count:
                memcpy(&self.passed[0], &self.passed[1], sizeof(Passed))
        self.start += size
        GUESTIO_ASSERT(self.start <= self.end)

    def read(self, int fd):
        """Read once what is there.

        Returns:
            How many bytes; 0 if the peer has closed the connection.

        Raises:
            OSError: There is nothing (BlockingIOError), or it cannot be read.
            ValueError: A message is there already, which is to be taken first.
        """
        cdef Header header
        if self.whole(&header):
            raise ValueError("a message that has arrived was not taken")
        cdef Py_ssize_t got = self.receive(fd)
        if got < 0:
            raise OSError(-got, os.strerror(-got))
        return got

    def take(self):
        """Take the first message.

        Returns:
            ``(header, payload, fds)``, or None if its rest has not come. The descriptors are the
            caller's. A header whose size cannot be comes alone, and stays.
        """
        cdef Header header
        cdef Passed *passed
        cdef list fds = []
        cdef int i
        if not self.whole(&header):
            return None
        cdef bytes head = (<char *>self.data)[self.start:self.start + HEADER_BYTES]
        if header.size < HEADER_BYTES or header.size > self.most:
            return head, b"", fds
        cdef bytes payload = (<char *>self.data)[
            self.start + HEADER_BYTES:self.start + header.size
        ]
        taken = head, payload, fds
        passed = self.with_first()
        if passed is not NULL:
            fds += [passed.fd[i] for i in range(passed.count)]
        self.drop_first(header.size)
        return taken

    def header(self):
        """The header of the first message, whose rest may not have come; None without one."""
        if self.end - self.start < HEADER_BYTES:
            return None
        return (<char *>self.data)[self.start:self.start + HEADER_BYTES]

    def drop(self):
        """Forget everything; the descriptors that were not taken, which are the caller's to close."""
        cdef int i, k
        cdef list fds = []
        for k in range(self.passed_count):
            fds += [self.passed[k].fd[i] for i in range(self.passed[k].count)]
        self.passed_count = 0
        self.before += self.end
        self.start = self.end = 0
        return fds

    @property
    def unfinished(self):
        """Whether something has arrived that was not taken."""
        return self.start < self.end or self.passed_count > 0

    @property
    def position(self):
        """Where in the stream the first message that was not taken begins."""
        return self.before + self.start
