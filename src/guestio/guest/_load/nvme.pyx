"""Load for an NVMe controller, compiled: keeps one queue pair full of reads or writes of a page.

An :class:`NvmeDriver` is the part of a guest's NVMe driver that runs for each command: it fills the
submission queue, rings the doorbell once for all of them, takes completions by their phase, and
sleeps on the interrupt's eventfd. Doorbells are messages that it sends itself. The controller is
not trusted: a completion that matches no command in flight is reported and never followed.

Source: NVM Express Base Specification 1.4, sections 4.1 (queues), 4.2 (commands), 4.6 (completions).
"""

from libc.errno cimport EINTR, errno
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from guestio._core.base.checks cimport as_address, as_size, u8, u32, u64

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    short POLLIN
    short POLLHUP
    short POLLERR

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <poll.h>
    #include <stdint.h>
    #include <sys/socket.h>
    #include <time.h>
    #include <unistd.h>
    #define nvme_load16(p) __atomic_load_n((const uint16_t *)(p), __ATOMIC_ACQUIRE)
    #define nvme_release() __atomic_thread_fence(__ATOMIC_RELEASE)
    static uint64_t nvme_clock_ns(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    /* A server that does not read for a second counts as stalled later, for want of progress. */
    static void nvme_send(int fd, const unsigned char *data, size_t left)
    {
        while (left) {
            ssize_t sent = send(fd, data, left, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (sent > 0) {
                data += sent;
                left -= sent;
            } else if (errno == EAGAIN) {
                struct pollfd room = {fd, POLLOUT, 0};
                if (poll(&room, 1, 1000) <= 0)
                    return;
            } else if (errno != EINTR) {
                return;
            }
        }
    }
    static void nvme_drain(int fd)
    {
        uint64_t value;
        ssize_t got = read(fd, &value, sizeof value);
        (void)got;
    }
    """
    unsigned short nvme_load16(const void *p)
    void nvme_release()
    u64 nvme_clock_ns()
    void nvme_send(int fd, const unsigned char *data, size_t left)
    void nvme_drain(int fd)

ctypedef unsigned short u16

cdef enum:
    COMMAND_BYTES = 64
    COMPLETION_BYTES = 16
    MOST_ENTRIES = 4096
    MOST_MESSAGE = 64
    NAP_MS = 100
    WRITE_COMMAND = 1
    READ_COMMAND = 2

cdef enum Found:
    FINE = 0
    COMMAND = 1
    STATUS = 2
    STALLED = 3
    GONE = 4

cdef tuple NAMES = ("fine", "command", "status", "stalled", "gone")


cdef class NvmeDriver:
    """Keeps a queue pair of an NVMe controller full of commands of one page each.

    Not safe for several threads at once. The memory that it is given, and the descriptors, must
    stay until it is gone.

    Args:
        submission: Where the submission queue is in this process.
        completion: Where the completion queue is, all zeroes.
        entries: Entries of each.
        depth: Commands to keep in flight, fewer than there are entries.
        data: I/O virtual address of ``depth`` pages for the data.
        blocks: Pages of the namespace to use.
        sectors: Logical blocks to a page.
        front: The socket to the server, to which doorbells are sent.
        tail: The message that rings the submission queue's doorbell; its last four bytes are the
            tail.
        head: The same of the completion queue's, with the head.
        call: Eventfd that the controller interrupts by, which does not block.
        writes: Whether to write rather than to read.
        timeout: Nanoseconds without any progress after which the controller counts as stalled.
        seed: Of the choice of blocks.

    Attributes:
        requests: Commands finished since :meth:`reset_counts`.
        doorbells: Doorbells rung.
        interrupts: Interrupts taken.
        latency_sum: Nanoseconds that the commands took together.
        latency_max: That the slowest took.

    Raises:
        ValueError: A number is out of range, or a message too long or too short.
    """

    cdef u8 *submission
    cdef u8 *completion
    cdef u64 *begun
    cdef u32 entries
    cdef u32 depth
    cdef u64 data
    cdef u64 blocks
    cdef u32 sectors
    cdef int front
    cdef int call
    cdef u8 tail_message[MOST_MESSAGE]
    cdef u8 head_message[MOST_MESSAGE]
    cdef u32 tail_bytes
    cdef u32 head_bytes
    cdef u32 tail
    cdef u32 head
    cdef u32 phase
    cdef u32 in_flight_count
    cdef bint writes
    cdef u64 timeout
    cdef u64 state
    cdef int code
    cdef u64 values[2]
    cdef readonly u64 requests
    cdef readonly u64 doorbells
    cdef readonly u64 interrupts
    cdef readonly u64 latency_sum
    cdef readonly u64 latency_max

    def __cinit__(
        self, submission, completion, entries, depth, data, blocks, sectors, int front,
        bytes tail, bytes head, int call, *, bint writes=False, u64 timeout=10_000_000_000,
        seed=0,
    ):
        cdef u32 size = as_size(entries, "entries")
        if not 2 <= size <= MOST_ENTRIES or not 0 < depth < size:
            raise ValueError(f"depth {depth} in queues of {entries} entries, at most {MOST_ENTRIES}")
        if blocks < 1 or not 1 <= sectors <= 8:
            raise ValueError(f"{blocks} pages of {sectors} logical blocks")
        for message in (tail, head):
            if not 4 <= len(message) <= MOST_MESSAGE:
                raise ValueError(f"a message of {len(message)} bytes, 4 to {MOST_MESSAGE}")
        self.submission = <u8 *><size_t>as_address(submission, "submission")
        self.completion = <u8 *><size_t>as_address(completion, "completion")
        self.entries, self.depth = size, depth
        self.data, self.blocks, self.sectors = as_address(data, "data"), blocks, sectors
        self.front, self.call, self.writes, self.timeout = front, call, writes, timeout
        self.tail_bytes, self.head_bytes = len(tail), len(head)
        memcpy(self.tail_message, <const u8 *>tail, len(tail))
        memcpy(self.head_message, <const u8 *>head, len(head))
        self.phase = 1
        self.state = <u64>(seed + 1) * 0x9E3779B97F4A7C15u
        self.begun = <u64 *>calloc(size, sizeof(u64))
        if self.begun == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.begun)

    def reset_counts(self):
        """Begin to count and to measure anew."""
        self.requests = self.doorbells = self.interrupts = 0
        self.latency_sum = self.latency_max = 0

    @property
    def in_flight(self):
        """Commands begun and not finished."""
        return self.in_flight_count

    @property
    def trouble(self):
        """What was wrong: a name and two numbers that say more; None if nothing was.

        ``command`` (identifier, head), ``status`` (identifier, status), ``stalled`` (commands in
        flight, nanoseconds), ``gone``.
        """
        if not self.code:
            return None
        return NAMES[self.code], (self.values[0], self.values[1])

    def run(self, u64 nanoseconds, *, bint begin=True):
        """Work for so long, or without ``begin`` until nothing is in flight.

        Returns:
            True unless something was wrong; see :attr:`trouble`.
        """
        cdef bint fine
        with nogil:
            fine = self.loop(nvme_clock_ns() + nanoseconds, begin)
        return fine

    cdef bint loop(self, u64 deadline, bint begin) noexcept nogil:
        cdef u64 now = nvme_clock_ns(), progress = now
        cdef bint moved
        while not self.code:
            moved = self.collect(now)
            if begin:
                moved |= self.submit(now)
            elif not self.in_flight_count:
                return True
            now = nvme_clock_ns()
            if moved:
                progress = now
            elif now - progress > self.timeout:
                self.fail(STALLED, self.in_flight_count, now - progress)
            elif not self.code:
                self.nap()
                now = nvme_clock_ns()
            if now >= deadline:
                return not self.code
        return False

    cdef void fail(self, int code, u64 first, u64 second) noexcept nogil:
        if not self.code:
            self.code = code
            self.values[0], self.values[1] = first, second

    cdef void nap(self) noexcept nogil:
        """Sleep until the controller interrupts."""
        cdef pollfd fds[2]
        fds[0].fd, fds[0].events, fds[0].revents = self.call, POLLIN, 0
        fds[1].fd, fds[1].events, fds[1].revents = self.front, 0, 0
        if poll(fds, 2, NAP_MS) < 0 and errno != EINTR:
            self.fail(GONE, 0, 0)
        if fds[1].revents & (POLLHUP | POLLERR):
            self.fail(GONE, 0, 0)
        if fds[0].revents & POLLIN:
            self.interrupts += 1
            nvme_drain(self.call)

    cdef bint collect(self, u64 now) noexcept nogil:
        """Take what is finished; whether there was anything."""
        cdef u8 *entry
        cdef u32 status, identifier, taken = 0
        cdef u64 took
        while True:
            entry = self.completion + COMPLETION_BYTES * self.head
            status = nvme_load16(entry + 14)
            if status & 1 != self.phase or taken == self.entries:
                break
            identifier = (<u16 *>(entry + 12))[0]
            if identifier >= self.depth or not self.begun[identifier]:
                self.fail(COMMAND, identifier, self.head)
                return False
            if status >> 1:
                self.fail(STATUS, identifier, status >> 1)
                return False
            took = now - self.begun[identifier] if now > self.begun[identifier] else 0
            self.begun[identifier] = 0
            self.latency_sum += took
            if took > self.latency_max:
                self.latency_max = took
            self.requests += 1
            self.in_flight_count -= 1
            taken += 1
            self.head += 1
            if self.head == self.entries:
                self.head, self.phase = 0, self.phase ^ 1
        if taken:
            memcpy(self.head_message + self.head_bytes - 4, &self.head, 4)
            nvme_send(self.front, self.head_message, self.head_bytes)
            self.doorbells += 1
        return taken > 0

    cdef bint submit(self, u64 now) noexcept nogil:
        """Fill the queue and ring; whether anything was begun."""
        cdef u8 *command
        cdef u32 i
        cdef bint any_begun = False
        cdef u64 block
        if self.in_flight_count == self.depth:
            return False
        for i in range(self.depth):
            if self.begun[i]:
                continue
            # xorshift64; the choice need not be better.
            self.state ^= self.state << 13
            self.state ^= self.state >> 7
            self.state ^= self.state << 17
            block = self.state % self.blocks * self.sectors
            command = self.submission + COMMAND_BYTES * self.tail
            memset(command, 0, COMMAND_BYTES)
            (<u32 *>command)[0] = (WRITE_COMMAND if self.writes else READ_COMMAND) | i << 16
            (<u32 *>command)[1] = 1
            (<u64 *>command)[3] = self.data + <u64>i * 4096
            (<u64 *>command)[5] = block
            (<u32 *>command)[12] = self.sectors - 1
            self.begun[i] = now
            self.in_flight_count += 1
            self.tail = self.tail + 1 if self.tail + 1 < self.entries else 0
            any_begun = True
        if any_begun:
            nvme_release()
            memcpy(self.tail_message + self.tail_bytes - 4, &self.tail, 4)
            nvme_send(self.front, self.tail_message, self.tail_bytes)
            self.doorbells += 1
        return any_begun
