"""A back-end's thread while there is nothing to decide: wait, serve, ask, acknowledge, wait.

Most of what arrives is a kick whose requests can be served at once, or plain IOTLB traffic that
wakes at most a queue that can go on. None of it needs Python, so the thread stays here. Whatever is
out of the ordinary (a request that the device must see, a refusal, a broken ring, any other message)
goes back to the caller as it is.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.math cimport INFINITY

from guestio._core.base.checks cimport as_address, as_milliseconds, as_moment, as_seconds, u64
from guestio._core.base.capacity cimport (
    LOOP_EVENTS, LOOP_QUEUE_TURNS, LOOP_REQUESTS, LOOP_TURNS,
)
from guestio._core.virtio.chain cimport Server
from guestio._core.vhost_user.iotlb_feed cimport IotlbUpdater
from guestio._core.iommu.misses cimport Misses
from guestio._core.vhost_user.miss_table cimport MissTable
from guestio._core.virtio.ring cimport SplitRing
from guestio._core.vhost_user.iotlb_message cimport MSG_DONTWAIT, MSG_NOSIGNAL, c_send

from guestio.errors import GuestioError

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int epoll_wait(int epfd, epoll_event *events, int most, int timeout)

cdef extern from * nogil:
    """
    #include <time.h>
    static double now_seconds(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
    }
    """
    double now_seconds()

cdef enum:
    WORK_BYTES = 64   # that take as long to move as a descriptor takes to be looked at


cdef class Attended:
    """A queue that is served here, as long as nothing is to be decided about it.

    Args:
        ring: Its ring.
        server: Serves its requests.
        kick: The eventfd that announces them, waited for by its edge.
        call: The eventfd to notify the driver with, or -1.
        waiter: Its number among those who wait for translations.
    """

    cdef SplitRing ring
    cdef Server server
    cdef int kick
    cdef int call
    cdef readonly int waiter
    # Since when the oldest request that lacks a translation does, and which one that is.
    cdef double waits_since
    cdef u64 waits_for

    def __init__(
        self, SplitRing ring not None, Server server, int kick, int call, int waiter
    ):
        self.ring, self.server, self.kick, self.call = ring, server, kick, call
        self.waiter = waiter


cdef class Intake:
    """Waits for a back-end's descriptors, and deals with what is ordinary on the way.

    Args:
        updater: Serves the main channel.
        misses: The questions in flight.
        patience: Seconds that a request may wait for translations in all.
        round_bytes: Bytes of requests that queues are served between two looks at the descriptors;
            those whose turn would come then are returned as very busy.

    Attributes:
        main: The main channel's socket, or -1 while that is not to be served here.
        back: The back-end channel's socket, or -1 while that is not to be used here.
        acknowledged: Whether the front-end acknowledges questions if asked to.
        alarm: When the questions will be looked at (monotonic time).
        look_after: Seconds within which a new question wants to be looked at.

    For one thread.
    """

    cdef IotlbUpdater updater
    cdef MissTable misses
    cdef double patience
    cdef dict by_kick
    cdef dict by_waiter
    cdef bytes unasked
    cdef u64 moved        # bytes served in this round
    cdef u64 round_bytes
    cdef public int main
    cdef public int back
    cdef public bint acknowledged
    cdef double alarm_at
    cdef double look_within

    def __init__(
        self, IotlbUpdater updater not None, MissTable misses not None, patience, *,
        round_bytes=1 << 62
    ):
        self.round_bytes = as_address(round_bytes, "round_bytes")
        self.updater, self.misses = updater, misses
        self.patience = as_seconds(patience, "patience", INFINITY)
        self.by_kick, self.by_waiter, self.unasked = {}, {}, b""
        self.main = self.back = -1
        self.alarm_at = self.look_within = INFINITY

    @property
    def alarm(self):
        return self.alarm_at

    @alarm.setter
    def alarm(self, double value):
        self.alarm_at = as_moment(value, "alarm")

    @property
    def look_after(self):
        return self.look_within

    @look_after.setter
    def look_after(self, value):
        self.look_within = as_seconds(value, "look_after", INFINITY)

    def attend(self, Attended queue not None):
        """Serve a queue here from now on."""
        self.leave(queue.waiter)
        self.by_waiter[queue.waiter] = self.by_kick[queue.kick] = queue

    def leave(self, int waiter):
        """Serve a queue no more; returns what it was attended by, if it was."""
        cdef Attended queue = self.by_waiter.pop(waiter, None)
        if queue is not None:
            self.by_kick.pop(queue.kick, None)
        return queue

    def wait(self, int epfd, double seconds):
        """Wait until something is to be done that is not done here.

        Args:
            epfd: Waits for both sockets, as long as they are readable, and for all else.
            seconds: How long to wait at most; negative for any time.

        Returns:
            ``(fds, ready, unsent, unasked, outcomes)``: descriptors with something else to do; the
            waiters that miss nothing any more and are not attended; acknowledgements for the main
            channel, and questions for the back-end channel, that could not be sent without waiting;
            and ``(waiter, outcome)`` for each attended queue that needs a decision: what its
            ring's ``turn`` returned or raised, or None if it is only very busy.

        Raises:
            OSError: ``epfd`` cannot be waited for.
        """
        cdef epoll_event events[LOOP_EVENTS]
        cdef int count, rounds, timeout = -1
        cdef double until = 0
        cdef list fds = [], ready = [], outcomes = []
        if as_moment(seconds, "seconds") >= 0:
            timeout = as_milliseconds(seconds)
            until = now_seconds() + seconds
        for rounds in range(LOOP_TURNS):
            # A handler that ran during the last round may want this thread to stop.
            PyErr_CheckSignals()
            with nogil:
                count = epoll_wait(epfd, events, LOOP_EVENTS, timeout)
            if count < 0:
                if errno != EINTR:
                    raise OSError(errno, "waiting for descriptors failed")
                PyErr_CheckSignals()
                break
            self.moved = 0
            self.serve_main(events, count, fds, ready, outcomes)
            self.serve_kicks(events, count, fds, outcomes)
            if fds or ready or outcomes or self.updater.unsent or self.unasked or not count:
                break
            if timeout > 0:
                timeout = as_milliseconds(until - now_seconds())
        unasked, self.unasked = self.unasked, b""
        return fds, ready, self.updater.take_unsent(), unasked, outcomes

    cdef int serve_main(
        self, const epoll_event *events, int count, list fds, list ready, list outcomes
    ) except -1:
        """Serve the main channel, before all else, and the queues that can go on."""
        cdef int i
        cdef list woken = []
        cdef object waiter
        for i in range(count):
            if events[i].data.fd == self.main and not self.updater.receive_plain(
                self.main, woken
            ):
                fds.append(self.main)
        for waiter in woken:
            queue = self.by_waiter.get(waiter)
            if queue is None:
                ready.append(waiter)
            else:
                self.serve(queue, outcomes)
        return 0

    cdef int serve_kicks(
        self, const epoll_event *events, int count, list fds, list outcomes
    ) except -1:
        cdef int i, fd
        for i in range(count):
            fd = events[i].data.fd
            if fd == self.main:
                continue
            queue = self.by_kick.get(fd)
            if queue is None:
                fds.append(fd)
            else:
                self.serve(queue, outcomes)
        return 0

    cdef int serve(self, Attended queue, list outcomes) except -1:
        """Serve a queue; what needs a decision is added to the outcomes, and it is left."""
        cdef list chains = []
        cdef Misses misses
        cdef bint resting = False
        cdef int served, turns
        cdef object outcome = None
        for turns in range(LOOP_QUEUE_TURNS):
            if self.moved >= self.round_bytes:
                break
            misses = Misses()
            try:
                served = queue.ring.run_turn(
                    queue.server, LOOP_REQUESTS, queue.call, True, chains, misses, &resting
                )
            except GuestioError as error:
                outcome = error
                break
            if chains or (misses.count and not self.ask(queue, misses)):
                outcome = chains, misses, served, resting
                break
            self.updater.traffic.requests += served
            self.moved += queue.ring.moved + queue.ring.work * WORK_BYTES
            if not misses.count:
                queue.waits_since = 0
            if resting:
                return 0
        self.leave(queue.waiter)
        outcomes.append((queue.waiter, outcome))
        return 0

    cdef bint ask(self, Attended queue, Misses missing) except -1:
        """Ask for what a queue lacks; False, and nothing is done, if there is more to it."""
        cdef bytes questions
        cdef double now = now_seconds()
        cdef Py_ssize_t sent
        cdef const char *data
        cdef size_t size
        if self.back < 0 or self.unasked or now + self.look_within < self.alarm_at:
            return False
        if not queue.waits_since or queue.waits_for != queue.ring.progress:
            queue.waits_since, queue.waits_for = now, queue.ring.progress
        elif now - queue.waits_since >= self.patience:
            return False
        questions = self.misses.ask(queue.waiter, missing, now, acknowledged=self.acknowledged)
        if questions:
            self.updater.traffic.count_questions(questions)
            data, size = questions, len(questions)
            with nogil:
                sent = max(c_send(self.back, data, size, MSG_DONTWAIT | MSG_NOSIGNAL), 0)
            self.unasked = questions[sent:]
        return True
