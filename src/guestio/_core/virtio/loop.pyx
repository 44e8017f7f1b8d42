"""The event loop in C: it waits, serves queues, and handles plain translation messages.

Most of what arrives is a kick whose requests can be served at once, or an answer to a miss after
which a queue can go on. None of that needs Python. Whatever is out of the ordinary (a request for
the device's Python code, a refusal, a broken ring, any other message) is returned as it is.

Translations arrive through a :class:`Feed`, which a transport provides; the loop knows none of
their messages.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, errno
from libc.math cimport INFINITY

from guestio._core.base.capacity cimport (
    LOOP_EVENTS, LOOP_QUEUE_TURNS, LOOP_REQUESTS, LOOP_TURNS,
)
from guestio._core.base.checks cimport as_address, as_milliseconds, as_moment, as_seconds, u64
from guestio._core.base.clock cimport now_ns, now_seconds
from guestio._core.iommu.misses cimport Misses
from guestio._core.virtio.chain cimport Server
from guestio._core.virtio.counters cimport Counters
from guestio._core.virtio.ring cimport Ring

from guestio.errors import GuestioError

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int epoll_wait(int epfd, epoll_event *events, int most, int timeout)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef enum:
    WORK_BYTES = 64   # that take as long to move as a descriptor takes to be looked at


cdef class Feed:
    """How translations reach the queues of one device without entering Python. Abstract.

    Args:
        callback: Called by the event loop when the feed has something for Python.
        patience: Seconds that a request may wait for translations in all.
    """

    def __cinit__(self, callback, patience, *_, **__):
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {type(callback).__name__}")
        self.callback = callback
        self.patience = as_seconds(patience, "patience", INFINITY)
        self.source = -1
        self.queues, self.ready = {}, []

    cdef bint receive(self, list woken) except -1:
        """Handle plain messages at the source; add the waiters that lack nothing any more.

        False, and nothing is taken, if there is a message for Python.
        """
        return False

    cdef bint request(self, int waiter, Misses missing, double now) except -1:
        """Request what a queue lacks; False, and nothing is done, if Python must decide."""
        return False

    def take_ready(self):
        """The waiters that lack nothing any more and are not active in the loop; once."""
        ready, self.ready = self.ready, []
        return ready


cdef class ActiveQueue:
    """A queue that the loop serves, as long as nothing is to be decided about it.

    Args:
        ring: Its ring.
        server: Serves its requests.
        kick: The eventfd that announces them, waited for by its edge.
        call: The eventfd to notify the driver with, or -1.
        feed: Requests translations for it; None if its addresses are physical.
        waiter: Its number for the feed.
        counters: Where its requests are counted.
        callback: Called by the event loop with what its ring's ``run_once`` returned or raised, or
            with None if the queue is only very busy. The queue is not active any more then.

    Attributes:
        waits_since: Since when it waits for translations (monotonic time), or 0.
    """

    def __init__(
        self, Ring ring not None, Server server, int kick, int call, *, Feed feed, int waiter,
        Counters counters not None, callback
    ):
        self.ring, self.server, self.kick, self.call = ring, server, kick, call
        self.feed, self.waiter, self.counters = feed, waiter, counters
        self.callback = callback


cdef class CoreLoop:
    """Waits for descriptors, and serves the active queues on the way.

    Args:
        round_bytes: Bytes of requests that queues are served between two looks at the descriptors;
            those that are left then are returned as very busy.

    Attributes:
        watch: Seconds to look out for more after a feed or a queue was served, before sleeping.
            That spends a processor's time on waking up sooner.

    For one thread.
    """

    cdef dict by_kick
    cdef list feeds
    cdef u64 moved        # bytes served in this round
    cdef u64 round_bytes
    cdef u64 watch_ns
    cdef u64 watch_until  # 0: nothing was served since the last sleep

    def __init__(self, round_bytes=1 << 62):
        self.round_bytes = as_address(round_bytes, "round_bytes")
        self.by_kick, self.feeds = {}, []

    @property
    def watch(self):
        return self.watch_ns / 1e9

    @watch.setter
    def watch(self, seconds):
        self.watch_ns = <u64>(as_seconds(seconds, "watch", 60) * 1e9)

    def add_feed(self, Feed feed not None):
        """Handle a feed's messages from now on."""
        if feed not in self.feeds:
            self.feeds.append(feed)

    def remove_feed(self, Feed feed not None):
        """Handle a feed's messages no more; unknown ones are ignored."""
        if feed in self.feeds:
            self.feeds.remove(feed)

    def add(self, ActiveQueue queue not None):
        """Serve a queue from now on."""
        self.by_kick[queue.kick] = queue
        if queue.feed is not None:
            queue.feed.queues[queue.waiter] = queue

    def remove(self, ActiveQueue queue not None):
        """Serve a queue no more; unknown ones are ignored."""
        if self.by_kick.get(queue.kick) is queue:
            del self.by_kick[queue.kick]
        if queue.feed is not None and queue.feed.queues.get(queue.waiter) is queue:
            del queue.feed.queues[queue.waiter]

    def wait(self, int epfd, double seconds):
        """Wait until something is to be done that is not done here.

        Args:
            epfd: Waits for the sources of the feeds and the kicks of the active queues, and for
                all else.
            seconds: How long to wait at most; negative for any time.

        Returns:
            ``(fds, feeds, outcomes)``: descriptors with something else to do, each feed that has
            something for Python, and ``(queue, outcome)`` for each queue that is not active any
            more.

        Raises:
            OSError: ``epfd`` cannot be waited for.
        """
        cdef epoll_event events[LOOP_EVENTS]
        cdef int count, rounds, timeout = -1
        cdef double until = 0
        cdef list fds = [], outcomes = []
        cdef Feed feed
        cdef bint pending = False
        if as_moment(seconds, "seconds") >= 0:
            timeout = as_milliseconds(seconds)
            until = now_seconds() + seconds
        for rounds in range(LOOP_TURNS):
            # A handler that ran during the last round may want this thread to stop.
            PyErr_CheckSignals()
            count = 0
            if self.watch_until and timeout:
                count = self.look_out(epfd, events, until)
                if timeout > 0:
                    timeout = as_milliseconds(until - now_seconds())
            if not count:
                with nogil:
                    count = epoll_wait(epfd, events, LOOP_EVENTS, timeout)
            if count < 0:
                if errno != EINTR:
                    raise OSError(errno, "waiting for descriptors failed")
                PyErr_CheckSignals()
                break
            self.moved = 0
            for feed in self.feeds:
                if feed.source >= 0:
                    self.serve_feed(feed, events, count, fds, outcomes)
            self.serve_kicks(events, count, fds, outcomes)
            for feed in self.feeds:
                pending |= feed.pending
            if self.watch_ns and count > len(fds):
                self.watch_until = now_ns() + self.watch_ns
            if fds or outcomes or pending or not count:
                break
            if timeout > 0:
                timeout = as_milliseconds(until - now_seconds())
        return fds, [feed for feed in self.feeds if feed.pending] if pending else [], outcomes

    cdef int look_out(self, int epfd, epoll_event *events, double latest) except? -1:
        """Wait without sleeping, as long as that may pay; what ``epoll_wait`` returns.

        Threads that wait for this processor have it first.
        """
        cdef u64 until = self.watch_until
        cdef int count = 0
        self.watch_until = 0
        if latest:
            until = min(until, <u64>(latest * 1e9))
        with nogil:
            while not count and now_ns() < until:
                sched_yield()
                count = epoll_wait(epfd, events, LOOP_EVENTS, 0)
        return count

    cdef int serve_feed(
        self, Feed feed, epoll_event *events, int count, list fds, list outcomes
    ) except -1:
        """Serve a feed's source, before all else, and the queues that can go on."""
        cdef int i
        cdef list woken = []
        cdef object waiter
        cdef ActiveQueue queue
        for i in range(count):
            if events[i].data.fd == feed.source:
                if not feed.receive(woken):
                    fds.append(events[i].data.fd)
                events[i].data.fd = -1
                break
        for waiter in woken:
            queue = feed.queues.get(waiter)
            if queue is None:
                feed.ready.append(waiter)
                feed.pending = True
            else:
                self.serve(queue, outcomes)
        return 0

    cdef int serve_kicks(
        self, const epoll_event *events, int count, list fds, list outcomes
    ) except -1:
        cdef int i, fd
        cdef ActiveQueue queue
        for i in range(count):
            fd = events[i].data.fd
            if fd < 0:
                continue
            queue = self.by_kick.get(fd)
            if queue is None:
                fds.append(fd)
            else:
                self.serve(queue, outcomes)
        return 0

    cdef int serve(self, ActiveQueue queue, list outcomes) except -1:
        """Serve a queue; if something is to be decided, it is not active any more."""
        cdef list chains = []
        cdef Misses misses
        cdef bint idle = False
        cdef int served, batches
        cdef object outcome = None
        for batches in range(LOOP_QUEUE_TURNS):
            if self.moved >= self.round_bytes:
                break
            misses = Misses()
            try:
                served = queue.ring.run_once_into(
                    queue.server, LOOP_REQUESTS, queue.call, True, chains, misses, &idle
                )
            except GuestioError as error:
                outcome = error
                break
            if chains or (misses.count and not self.request(queue, misses)):
                outcome = chains, misses, served, idle
                break
            queue.counters.requests += served
            self.moved += queue.ring.moved + queue.ring.work * WORK_BYTES
            if not misses.count:
                queue.waits_since = 0
            if idle:
                return 0
        self.remove(queue)
        outcomes.append((queue, outcome))
        return 0

    cdef bint request(self, ActiveQueue queue, Misses missing) except -1:
        """Request what a queue lacks; False, and nothing is done, if there is more to it."""
        cdef double now
        if queue.feed is None:
            return False
        now = now_seconds()
        if not queue.waits_since or queue.waits_for != queue.ring.progress:
            queue.waits_since, queue.waits_for = now, queue.ring.progress
        elif now - queue.waits_since >= queue.feed.patience:
            return False
        return queue.feed.request(queue.waiter, missing, now)
