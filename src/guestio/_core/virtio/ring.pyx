"""The device's side of a virtqueue: policy, whatever the format of the ring (virtio 1.4, section 2).

Everything in a ring was written by a driver that may be hostile and may change it while it is
read: an index is loaded once and judged once, a descriptor is copied before it is looked at. Where
the ring itself is may change at any time as well; see :mod:`guestio._core.virtio.areas`.

Indices are published with one release store each, after everything they cover.
"""

from cpython.exc cimport PyErr_NoMemory
from libc.stdlib cimport calloc, free

from guestio._core.iommu.address_space cimport AddressSpace, IoVector
from guestio._core.virtio.areas cimport RingAreas, current
from guestio._core.base.checks cimport as_address, as_seconds, u8
from guestio._core.base.clock cimport now_ns
from guestio._core.base.capacity cimport RING_LOOK_WORK, RING_LOOKS, RING_PUBLISH_EACH
from guestio._core.base.ticks cimport ticks_begin, ticks_exact, ticks_soon
from guestio._core.virtio.chain cimport (
    NOT_SERVED, Chain, Quota, Server, i64, is_in_use, is_moving, new_chain,
)
from guestio._core.base.syscalls cimport notify
from guestio._core.virtio.contents cimport trace_answer, trace_given
from guestio._core.virtio.inflight cimport InflightQueue
from guestio._core.memory.mapping cimport holes, met_holes
from guestio._core.trace.latencies cimport Latencies, add_latencies
from guestio._core.trace.tracepoints cimport (
    BUFFERS, CONTENTS, MEASURE, REQUESTS, TRACE_WHOLE, TraceRecord, TraceSlot, WHAT_AVAILABLE,
    WHAT_BUFFER, WHAT_COMPLETED, WHAT_INTERRUPT, WHAT_LACKING, WHAT_SERVED, WHAT_STALLED,
    WHAT_TAKEN, trace, trace_all, trace_record, tracing,
)
from guestio._core.iommu.misses cimport Misses

from guestio.errors import QueueError

cdef extern from * nogil:
    """
    #if defined(__x86_64__)
    #define relax() __builtin_ia32_pause()
    #else
    #define relax() ((void)0)
    #endif
    #include <poll.h>
    static int readable(int fd)
    {
        /* An epoll descriptor keeps what is only looked at, edges included. */
        struct pollfd one = {.fd = fd, .events = POLLIN};
        return poll(&one, 1, 0) != 0;
    }
    """
    void relax()
    bint readable(int fd)

cdef enum:
    READ = 1
    WRITE = 2
    CHAIN_PIECES = 1 << 21      # more than 4 GiB in pages have
    CHAIN_CHARGE = 16           # pieces that a request costs besides its own
    SPIN_MOST = 60              # seconds that a ring may be watched: nothing else runs
    IS_WHOLE = 16               # in a chain's kind, and with it in Completed.done
    WRITE_AT_ONCE = 16          # records of completions, at least three

cdef u64 CHAIN_BYTES = <u64>1 << 32

ticks_begin()


cdef inline void discharge(Ring ring, Chain chain) noexcept:  # plain C on plain memory
    """Give back what a request was charged."""
    if chain.charge:   # not that of a request that was served at once
        ring.charged -= chain.charge
        ring.quota.used -= chain.charge
        chain.charge = 0


cdef class Ring(RingAreas):
    """A virtqueue as its device sees it: what is taken, held, published, and in which order.

    Abstract: how the ring lies in memory is decided by a format, a subclass such as
    :class:`~guestio._core.virtio.split.SplitRing`, which provides what the section "Ring format" at
    the end of this class lists.

    Args:
        space: Where the addresses of rings, tables and buffers lead.
        size: Entries, a power of two up to 32768.
        desc, avail, used: Addresses of the three areas, aligned to 16, 2 and 4.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        base: Index of the next available entry.
        ordered: Publish completed requests in the order in which they were taken, so that the used
            index says where to resume after a stop or a crash, and as VIRTIO_F_IN_ORDER promises.
            Otherwise they are published as they complete.
        inflight: Where to note which requests are in flight, for the successor after a crash.
            Requests that are noted in it already are taken first, whatever ``base`` is.
        batch_bytes: Bytes of requests that one :meth:`run_once` serves, so that other queues are
            not starved; the last one may exceed it.
        quota: Limits the memory of requests that were taken and not completed, together with other
            rings; None for no limit.

    Attributes:
        next_avail: The ring position that is taken next.
        outstanding: Requests taken and not completed; those not published yet are not counted.
        held_count: Requests that were in flight when the device before this one ended, and that
            were not taken again yet.
        progress: Requests taken so far, those that were put back included.
        returned: Those of them that were put back.
        completions: Requests published so far.
        notifications: Notifications that the driver wanted so far.
        bytes: Bytes of the requests taken so far.
        queue, origin: Its number and that of its server, for records of tracepoints.
        latencies: Where to count how long requests took, while that is measured.
        crowded: Whether the last attempt to take requests ended because the quota is used up.
        broken: Why the ring stopped, or None.

    One thread at a time.
    """

    def __cinit__(
        self, space, size, desc, avail, used, *, event_idx=False, bint indirect=False, base=0,
        bint ordered=False, InflightQueue inflight=None, batch_bytes=1 << 62,
        Quota quota=None,
    ):
        cdef u32 entries = self.size
        self.quota = Quota(1 << 62) if quota is None else quota
        self.batch_bytes = as_address(batch_bytes, "batch_bytes")
        self.indirect = indirect
        if inflight is not None and inflight.size < entries:
            raise ValueError(
                f"{inflight.size} requests in flight can be noted of a ring of {entries}"
            )
        self.ordered, self.inflight = ordered, inflight
        self.next_avail = self.publish_at = as_address(base, "base") & 0xFFFF
        self.pending = <Completed *>calloc(entries, sizeof(Completed))
        self.held = <u16 *>calloc(entries, sizeof(u16))
        self.published = <u16 *>calloc(entries, sizeof(u16))
        if self.pending is NULL or self.held is NULL or self.published is NULL:
            PyErr_NoMemory()

    def __dealloc__(self):
        # Nothing is charged of a ring that could not be made, whose quota is not even None.
        if self.charged and self.quota is not None:
            self.quota.used -= self.charged
        free(self.pending)
        free(self.held)
        free(self.published)
        free(self.noted)

    def __repr__(self):
        cdef str state = "" if self.broken is None else f", broken: {self.broken}"
        return (
            f"<{type(self).__name__} of {self.size} entries: next available {self.next_avail}, next "
            f"used {self.next_used}, {self.outstanding} outstanding{state}>"
        )

    cdef int begin(self) except -1:
        """Find out where the driver is, and what was in flight when the predecessor stopped."""
        cdef u16 head
        self.next_used = self.used_position()
        if self.inflight is None:
            return 0
        try:
            heads = self.inflight.recover(self.next_used)
        except QueueError as error:
            self.broken = str(error)
            raise
        for head in heads:
            if self.held_count < <int>self.size:
                self.held[self.held_count] = head
                self.held_count += 1
        self.outstanding = self.held_count
        self.held_from = self.publish_at = self.next_used
        self.next_avail = self.next_used + <u16>self.held_count
        return 0

    def pop(self, int limit=64):
        """Take the available requests, as far as they can be translated.

        Requests are taken in the order in which the driver made them available. One that lacks
        translations ends the list and stays in the ring; those behind it are looked at too, so
        that everything that is missing can be requested at once.

        Args:
            limit: Requests to look at, at most; fewer if they are very large.

        Returns:
            ``(chains, misses)``: the requests taken, and ``(IovaRange, access)`` for everything
            that is not mapped, or not for this access. Misses of the ring itself are among them.

        Raises:
            QueueError: The driver broke a rule; the ring is broken from now on.

        Cost: O(descriptors) plus a lookup for each.
        """
        cdef list chains = []
        cdef Misses misses = Misses()
        try:
            self.take(limit, None, chains, misses)
        finally:
            self.keep_nothing()
        return chains, list(misses)

    def run_once(self, Server server, int limit=64, int call=-1, bint rearm=False):
        """Serve one batch of requests: all that can be done for the ring inside the core.

        What was completed before is published; the available requests are taken, as by :meth:`pop`;
        those that the server can serve at once are served, and published every few requests; and
        the driver is notified if it wants to be.

        Args:
            server: Serves requests; what it leaves is returned. None returns them all.
            limit: As for :meth:`pop`.
            call: Eventfd to notify the driver with, or -1.
            rearm: Whether to enable kicks if no request is left, as :meth:`enable_kicks` does. They
                stay disabled while requests wait for translations: those that come then are found
                when the answers do.

        Returns:
            ``(chains, misses, served, idle)``: as from :meth:`pop`, but the misses as
            :class:`~guestio._core.iommu.misses.Misses`; how many requests were served; and
            whether nothing but the chains and the misses is left to do until the next kick.

        Raises:
            QueueError: As :meth:`pop`.
        """
        cdef list chains = []
        cdef Misses misses = Misses()
        cdef bint idle
        cdef int served = self.run_once_into(server, limit, call, rearm, chains, misses, &idle)
        return chains, misses, served, idle

    cdef int run_once_into(
        self, Server server, int limit, int call, bint rearm, list chains, Misses misses,
        bint *idle,
    ) except -1:
        """As :meth:`run_once`; adds to the lists, and returns how many requests were served."""
        cdef int served = 0
        idle[0] = True
        try:
            if self.areas_ready(misses):
                if self.pending_count:
                    self.publish_pending()
                self.disable_kicks()
                served = self.take(limit, server, chains, misses)
                # Other threads ran while data moved.
                if self.areas_ready(misses):
                    if self.pending_count:
                        self.publish_pending()
                    if chains or not rearm or self.moved >= self.batch_bytes or (
                        self.held_count and not misses.count and not self.crowded
                    ):
                        idle[0] = False
                    elif not misses.count:
                        idle[0] = not self.more_after_request()
        finally:
            self.keep_nothing()
        if self.notify_due:
            self.count_notification()
            if call >= 0:
                with nogil:
                    notify(call)
        return served

    cdef int take(self, int limit, Server server, list chains, Misses misses) except -1:
        """Take requests into the list; the number of those that were served instead."""
        cdef int served = 0
        self.begin_batch()
        if not self.areas_ready(misses):
            return served
        self.first_new = self.next_avail
        if self.held_count:
            served = self.take_held(limit, server, chains, misses)
        # Nothing overtakes what waits, so that after a stop an index says where to resume.
        if not self.held_count and self.areas_ready(misses):
            served += self.take_new(limit - served - len(chains), server, chains, misses)
        self.bytes += self.moved
        if misses.count and tracing & REQUESTS:
            self.trace_stalled(misses)
        self.check_areas()
        return served

    cdef void begin_batch(self) noexcept:
        """Begin to take requests, which share the time of now. Plain C: it cannot raise."""
        self.work = self.moved = 0
        self.crowded = False
        self.since = max(ticks_exact(), self.turned) if tracing & (REQUESTS | MEASURE) else 0
        self.turned = self.since

    cdef int take_held(self, int limit, Server server, list chains, Misses misses) except -1:
        """Take what was in flight before, up to the first that lacks something."""
        cdef int at = 0, head, left = limit, served = 0
        while left > 0 and at < self.held_count and may_take(self):
            head = self.held[self.held_at + at]
            self.look(head, misses, False)
            if misses.count:
                at += 1
            elif current(self):
                self.forget_held()
                left -= 1
                served += self.dispatch(server, chains)
        return served

    cdef void forget_held(self) noexcept:
        """Go on behind the oldest of the requests that the notes had in flight."""
        self.progress += 1
        self.taken_at = self.held_from + <u16>self.held_at
        self.held_at += 1
        self.held_count -= 1

    cdef int take_new(self, int limit, Server server, list chains, Misses misses) except -1:
        """Take requests that are new; those behind one that waits are only looked at."""
        cdef u16 at = self.next_avail
        cdef int head, left = self.waiting(), served = 0
        if left and tracing & REQUESTS:
            self.trace_available(left)
        left = min(left, limit)
        while left > 0 and may_take(self):
            left -= 1
            head = self.head_at(at)
            self.look(head, misses, False)
            if not current(self):
                break
            at += 1
            if misses.count:
                continue
            self.advance(head)
            served += self.dispatch(server, chains)
            # Other threads ran while the data moved; what is missing now is found by the caller.
            if not self.reachable():
                break
        return served

    cdef void advance(self, int head) noexcept:
        """Take the next request of the ring."""
        self.taken_at = self.next_avail
        self.next_avail += 1
        self.outstanding += 1
        self.progress += 1
        if self.inflight is not None:
            self.inflight.take(<u16>head)

    cdef bint look(self, int head, Misses misses, bint lenient) except -1:
        """Fill the scratch chain with a request; whether all of it is translated."""
        cdef size_t known = misses.count
        if self.scratch is None or is_moving(self.scratch):
            self.scratch = new_chain()
        elif not self.scratch.blank:
            self.scratch.clear()
        self.scratch.head, self.scratch.blank, self.scratch.since = head, False, self.since
        self.walk(self.scratch, misses, lenient)
        # Which request it is was read from the ring: from nothing, if that is gone.
        if met_holes(&holes):
            self.check_areas()
        if misses.count == known:
            return True
        if tracing & REQUESTS:
            self.trace_lacking(head, misses, known)
        return False

    cdef int dispatch(self, Server server, list chains) except -1:
        """Have the request in the scratch chain served, or hand it out; 1 if it was served."""
        cdef Chain chain = self.scratch
        cdef i64 written
        chain.position = self.taken_at
        cdef bint core = server is not None and chain.fault is None
        # Looked at once, for a request that is served as well.
        cdef int traced = tracing & (REQUESTS | BUFFERS | CONTENTS)
        cdef bint noted = False
        if traced:
            if core and traced == REQUESTS and self.turned and self.noted is not NULL:
                self.deferred = True
            elif traced & REQUESTS:
                self.trace_turn(core, chain)
        if core:
            written = server.serve(chain)
            if written != NOT_SERVED:
                if traced & REQUESTS:
                    noted = self.deferred and note_served(self, chain, <u64>written)
                    if not noted:
                        self.trace_served(chain, written)
                self.moved += chain.readable.total + chain.writable.total
                chain.clear()
                chain.written = <u64>written
                self.add_pending(chain, noted)
                if self.pending_count >= RING_PUBLISH_EACH and self.reachable():
                    self.publish_pending()
                return 1
            if self.deferred:
                self.trace_left(chain)
        else:
            # Nothing has looked at it: the last one's is left.
            chain.kind = 0
        chains.append(self.hand_out())
        return 0

    cdef int keep_nothing(self) except -1:
        """Release what was only looked at: a revocation waits for it."""
        if self.scratch is not None:
            if self.deferred:
                # Serving it has raised an error.
                self.trace_left(self.scratch)
            self.scratch.clear()
        return 0

    cdef Chain hand_out(self):
        """Give the scratch chain away; only from now on does it refer to the ring."""
        cdef Chain chain = self.scratch
        chain.ring, self.scratch = self, None
        chain.origin, chain.queue = self.origin, self.queue
        chain.charge = CHAIN_CHARGE + chain.readable.count + chain.writable.count
        self.bytes += chain.readable.total + chain.writable.total
        self.charged += chain.charge
        self.quota.used += chain.charge
        return chain

    cdef int lacking_head(self) except -2:
        """The first descriptor of the request that is taken next, or -1."""
        if not self.reachable():
            return -1
        if self.held_count:
            return self.held[self.held_at]
        return self.head_at(self.next_avail) if self.waiting() else -1

    def lacking(self):
        """What the request that is taken next lacks.

        Returns:
            As the misses of :meth:`pop`; None if there is no such request, or the ring itself
            cannot be reached.
        """
        cdef Misses misses = Misses()
        cdef int head = self.lacking_head()
        if head < 0:
            return None
        try:
            self.look(head, misses, False)
            self.check_areas()
        finally:
            self.keep_nothing()
        return list(misses)

    def pop_faulty(self):
        """Take the next request although some of it cannot be reached.

        Returns:
            A chain with ``fault`` set (unless it can be reached by now), or None if there is none
            or the ring itself cannot be reached.

        Raises:
            QueueError: The driver broke a rule.
        """
        cdef int head = self.lacking_head()
        if head < 0:
            return None
        try:
            self.look(head, Misses(), True)
            self.check_areas()
            if not current(self):
                return None
            if self.held_count:
                self.forget_held()
            else:
                self.advance(head)
            self.scratch.position, self.scratch.kind = self.taken_at, 0
            if tracing & REQUESTS:
                self.trace_head(WHAT_TAKEN, self.scratch, self.taken_at, 0)
            return self.hand_out()
        finally:
            self.keep_nothing()

    cdef int add_buffer(
        self, u64 addr, u32 size, bint writes, Chain chain, u64 *sizes, Misses misses, bint lenient
    ) except -1:
        """Append the memory of a descriptor to a chain; ``sizes`` sums what it reads and writes."""
        cdef IoVector out = chain.writable if writes else chain.readable
        cdef int access = WRITE if writes else READ
        cdef int before = out.count
        cdef size_t known = misses.count
        if not size:
            raise self.wrong(f"a descriptor of 0 bytes in the chain from {chain.head}")
        if addr > <u64>-1 - (size - 1):
            raise self.wrong(f"a buffer at {addr:#x}+{size:#x} passes 2**64")
        if not writes and sizes[1]:
            raise self.wrong("a device-readable descriptor after a device-writable one")
        sizes[writes] += size
        if sizes[0] + sizes[1] > CHAIN_BYTES:
            raise self.wrong(f"the chain from descriptor {chain.head} is longer than 2**32 bytes")
        if not self.space.translate(out, addr, size, access, misses):
            if lenient:
                self.note_refused(chain, misses, known)
                chain.fault = f"no translation of the buffer at {addr:#x}+{size:#x}"
        elif out.stop:
            chain.fault = f"no usable memory behind the buffer at {out.stop_addr:#x}"
            out.stop = 0
        self.work += out.count - before
        if out.count > CHAIN_PIECES:
            raise self.wrong(f"the chain from descriptor {chain.head} is in too many pieces")
        if writes and chain.fault is not None:
            chain.end = self.last_byte(addr + (size - 1))
        return 0

    cdef void note_refused(self, Chain chain, Misses misses, size_t since):
        """Remember what the last failed translation found forbidden."""
        cdef size_t i
        for i in range(since, misses.count):
            if misses.item[i].refused:
                chain.access_fails.append(misses[i])

    cdef IoVector last_byte(self, u64 addr):
        cdef IoVector tail = IoVector()
        tail.access, tail.start = WRITE, addr
        if self.space.translate(tail, addr, 1, WRITE, Misses()) and not tail.stop:
            return tail
        return None

    def complete(self, Chain chain not None, written=None):
        """Give a request back; its driver sees that after :meth:`publish`.

        Args:
            chain: The request. Its memory must not be touched any more.
            written: The number of bytes written to it; None for a request that is finished.

        Returns:
            Whether it was given back. Not while another thread moves its data, which its driver
            would see change: it is finished then (:meth:`Chain.finish`); complete it again later,
            without ``written``.

        Raises:
            ValueError: It was given back before, comes from another ring, or has less room.
        """
        if chain.done:
            raise ValueError(f"request {chain.head} was completed before")
        if chain.ring is not self:
            raise ValueError(f"request {chain.head} was taken from another ring")
        if written is not None:
            chain.finish(written)
        elif not chain.finished:
            raise ValueError(f"request {chain.head} is not finished")
        if is_in_use(chain):
            return False
        # A reference to the request keeps neither the ring nor its memory.
        chain.done, chain.ring = True, None
        self.add_pending(chain, False)
        return True

    # Plain C on the ring's own table, which has room for each entry of the ring: it cannot raise.
    cdef void add_pending(self, Chain chain, bint noted) noexcept:
        """Enter a completed request among those to be published, at its place in the used ring."""
        cdef Completed *completed = &self.pending[place_of(self, chain)]
        completed.element.head = chain.head
        completed.element.written = <u32>min(chain.written, <u64>0xFFFFFFFF)
        completed.done, completed.since = 1 + chain.kind + noted * IS_WHOLE, chain.since
        completed.offset = chain.offset
        discharge(self, chain)
        self.outstanding -= 1
        self.pending_count += 1

    def put_back(self, list chains not None):
        """Have requests taken again later that were handed out and that no device has worked on.

        Only the newest ones can be, as far as no other was served between them, and before the
        next batch is taken.

        Args:
            chains: The last of those that :meth:`pop` or :meth:`run_once` returned, in their order.
                Those that are put back are removed; their memory must not be touched any more.

        Raises:
            ValueError: One was given back before, or comes from another ring.
        """
        cdef Chain chain
        while chains:
            chain = chains[-1]
            if chain.done or chain.ring is not self:
                raise ValueError(f"request {chain.head} was not handed out by this ring")
            if self.next_avail != self.first_new:
                if chain.position != <u16>(self.next_avail - 1):
                    break
                if self.inflight is not None:
                    self.inflight.release(<u16>chain.head)
                self.next_avail -= 1
                self.outstanding -= 1
                self.returned += 1
            elif self.held_at and chain.position == <u16>(self.held_from + self.held_at - 1):
                self.held_at -= 1
                self.held_count += 1
                self.returned += 1
            else:
                break
            chains.pop()
            self.bytes -= chain.readable.total + chain.writable.total
            discharge(self, chain)
            chain.finish(0)
            chain.done, chain.ring = True, None

    def give_back(self):
        """Put back into the ring what was in flight before and was not taken again.

        For a stop: so the index says where to resume, also to a device that is not given the notes.
        What the device before this one had overtaken no index can say: that stays in the notes.
        Nothing is given back while the ring cannot be reached.

        Returns:
            How many.
        """
        cdef int given = 0
        cdef u16 head
        # What was in flight is only known once the ring was reached.
        if self.inflight is None or not self.reachable():
            return given
        while self.held_count:
            head = self.held[self.held_at + self.held_count - 1]
            if self.head_at(self.next_avail - 1) != head:
                break
            self.held_count -= 1
            self.inflight.release(head)
            self.next_avail -= 1
            self.outstanding -= 1
            given += 1
        return given

    @property
    def resume_at(self):
        """Where a successor resumes after a stop; what is not published by then is done again."""
        if self.inflight is not None and not self.ordered:
            return self.next_avail
        return <u16>(self.next_avail - self.outstanding - self.pending_count)

    @property
    def unpublished(self):
        """Completed requests that are not published yet."""
        return self.pending_count

    def publish(self):
        """Make completed requests visible to the driver.

        Returns:
            Whether the driver wants to be notified of them; None if the used ring lacks a
            translation (see :meth:`missing`); nothing was published then.

        Raises:
            QueueError: The ring is broken.
        """
        cdef bint notify
        if self.pending_count and not self.reachable():
            return None
        if self.pending_count:
            self.publish_pending()
        notify = self.notify_due
        if notify:
            self.count_notification()
        return notify

    cdef int publish_pending(self) except -1:
        """Publish completions; the areas are translated. Remembers whether to notify."""
        cdef u32 count = 0
        cdef u64 now
        cdef u16 before = self.next_used
        cdef Completed *completed
        while self.pending_count:
            completed = &self.pending[self.publish_at & (self.size - 1)]
            if completed.done <= 0:
                break
            completed.done = -completed.done
            self.publish_at += 1
            self.pending_count -= 1
            self.put_used(&completed.element)
            self.next_used += 1
            self.published[count] = <u16>completed.element.head
            count += 1
            if self.inflight is not None:
                self.inflight.batch(<u16>completed.element.head)
        if not count:
            return 0
        self.publish_used()
        self.completions += count
        if tracing & (REQUESTS | MEASURE):
            # Not before what was noted, which is right to some ns.
            now = max(ticks_exact(), self.turned)
            if tracing & MEASURE and self.latencies is not None:
                self.measure_published(count, now)
            if tracing & REQUESTS:
                self.trace_published(count, now)
            # What follows in this batch is turned to now.
            self.turned = now if self.since else 0
        if self.inflight is not None:
            self.inflight.published(self.published, count, self.next_used)
        if self.wants_notification(before):
            self.notify_due = True
        return self.check_areas()

    def rebind(self, AddressSpace space not None):
        """Go on in other memory; requests that were taken keep what they have."""
        # The memory of before goes at the end of this, when nothing refers to it any more.
        before = self.scratch
        self.scratch = None
        RingAreas.rebind(self, space)

    def spin(self, seconds, int other):
        """Look for new requests for a while without sleeping, with the GIL held.

        Args:
            seconds: For how long, up to SPIN_MOST.
            other: A descriptor; once it is readable, something else is to be done.

        Returns:
            Whether there are any. False also if the ring lacks a translation.

        Raises:
            ValueError: No such time.
        """
        cdef u64 until = now_ns() + <u64>(1e9 * as_seconds(seconds, "seconds", SPIN_MOST))
        cdef u32 looks = 0
        if not self.reachable():
            return False
        while not self.has_next():
            looks += 1
            if looks % RING_LOOKS == 0 and (now_ns() >= until or readable(other)):
                return False
            relax()
        return True

    def enable_kicks(self):
        """Have the driver kick for the next request.

        Returns:
            Whether requests are available already, for which no kick may come; None if the ring
            lacks a translation.
        """
        if not self.reachable():
            return None
        more = self.more_after_request()
        self.check_areas()
        return more

    # Tracepoints. What they write cannot raise: plain C on the ring's own numbers.

    cdef void count_notification(self) noexcept:
        """Note that the driver is notified now."""
        cdef TraceRecord record
        self.notify_due = False
        self.notifications += 1
        if tracing & REQUESTS:
            record = trace_record(WHAT_INTERRUPT, self.origin)
            record.queue, record.detail = self.queue, self.next_used
            # As what is published: not before what was noted.
            record.time = max(ticks_exact(), self.turned)
            trace(&record)

    cdef void trace_available(self, int count) noexcept:
        """Write that the driver has made so many requests available that were not taken."""
        cdef TraceRecord record = trace_record(WHAT_AVAILABLE, self.origin)
        record.queue, record.length, record.detail = self.queue, <u64>count, self.next_avail
        record.time = self.since
        trace(&record)

    # What traces is plain C and writes to memory of the ring's own: an exception here would lose a
    # request for the sake of its record.

    cdef void trace_turn(self, bint core, Chain chain) noexcept:
        """A request was taken. One that the core may serve is written later.

        With it as little is written as can be: between two requests the time is looked at once, so
        that what is done for one until it is served counts from when the one before it was.
        """
        if not self.turned:
            self.turned = ticks_exact()
        if self.noted is NULL:
            # Only while requests are recorded, and never given back while the ring is there.
            self.noted = <Noted *>calloc(self.size, sizeof(Noted))
        self.deferred = core and self.since and self.noted is not NULL and (
            not tracing & (BUFFERS | CONTENTS)
        )
        if not self.deferred:
            self.spell_out()
            self.trace_head(WHAT_TAKEN, chain, chain.position, self.turned)

    cdef void trace_left(self, Chain chain) noexcept:
        """What was to be written later is written now: the core has not served the request."""
        self.deferred = False
        self.spell_out()
        self.trace_head(WHAT_TAKEN, chain, chain.position, self.turned)
        self.turned = max(ticks_exact(), self.turned)

    cdef void trace_served(self, Chain chain, i64 written) noexcept:
        """A request that is not noted was served, and is about to be added to those completed."""
        cdef u64 now = max(ticks_exact(), self.turned)
        if self.deferred:
            self.trace_left(chain)
        self.trace_head(WHAT_SERVED, chain, written, now)
        if tracing & CONTENTS:
            trace_answer(chain.writable, <u64>written, self.origin, self.queue, <u32>chain.head)
        self.turned = now

    cdef void spell_out(self) noexcept:
        """Write what is noted of requests that are not published yet, before others are taken.

        So records of a queue are written in the order of time.
        """
        cdef u16 i = 0
        cdef Completed *completed
        cdef TraceRecord taken, served
        while self.noted_count:
            completed = &self.pending[<u16>(self.publish_at + i) & (self.size - 1)]
            i += 1
            if completed.done > 0 and (completed.done - 1) & IS_WHOLE:
                completed.done -= IS_WHOLE
                spell(self, completed, completed.done - 1, &taken, &served)
                trace(&taken)
                trace(&served)
                self.noted_count -= 1
            elif i >= self.size:
                # Those that were noted were published while nothing was traced.
                self.noted_count = 0

    cdef void trace_head(self, int what, Chain chain, i64 result, u64 time) noexcept:
        """Write what happens to a request that was taken: what it gives to read and to write."""
        cdef TraceRecord record = trace_record(<u16>what, self.origin)
        record.time, record.queue, record.head = time, self.queue, <u32>chain.head
        record.result, record.since, record.address = result, chain.since, first_address(chain)
        record.length, record.detail = chain.readable.total, chain.writable.total
        if what == WHAT_SERVED:
            record.access = <u16>chain.kind
        trace(&record)
        if what == WHAT_TAKEN and tracing & (BUFFERS | CONTENTS):
            if tracing & BUFFERS:
                self.trace_buffers(chain.readable, record.head)
                self.trace_buffers(chain.writable, record.head)
            if tracing & CONTENTS:
                trace_given(chain.readable, self.origin, self.queue, record.head)

    cdef void trace_buffers(self, IoVector memory, u32 head) noexcept:
        """Write each contiguous piece of a request's memory."""
        cdef TraceRecord record = trace_record(WHAT_BUFFER, self.origin)
        cdef int i
        record.queue, record.head, record.access = self.queue, head, <u16>memory.access
        for i in range(memory.count):
            record.address, record.length, record.detail = memory.addr[i], memory.vec[i].iov_len, i
            record.time = 0
            trace(&record)

    cdef void trace_lacking(self, int head, Misses misses, size_t known) noexcept:
        """Write that a request lacks what was added to the misses: the first of them.

        Plain C on an array that is there: it cannot raise.
        """
        cdef TraceRecord record = trace_record(WHAT_LACKING, self.origin)
        record.queue, record.head, record.detail = self.queue, <u32>head, misses.count - known
        record.address = misses.item[known].first
        record.length = misses.item[known].last - misses.item[known].first + 1
        record.access, record.since = misses.item[known].access, self.since
        trace(&record)

    cdef void trace_stalled(self, Misses misses) noexcept:
        """Write that the requests from the next one on wait for translations: the first of them."""
        cdef TraceRecord record = trace_record(WHAT_STALLED, self.origin)
        record.queue, record.detail = self.queue, misses.count
        record.address = misses.item[0].first
        record.length = misses.item[0].last - misses.item[0].first + 1
        record.access, record.result = misses.item[0].access, self.next_avail
        trace(&record)

    cdef void measure_published(self, u32 count, u64 now) noexcept:
        """Measure what was published just now: the latest entries of the table.

        Those that were found together took equally long, and are counted at once.
        """
        cdef u32 mask = self.size - 1
        cdef u16 at = self.publish_at - <u16>count
        cdef const Completed *completed = &self.pending[at & mask]
        cdef u64 since
        cdef int done
        cdef u32 alike
        while count:
            since, done, alike = completed.since, completed.done, 0
            while True:
                alike += 1
                count -= 1
                at += 1
                completed = &self.pending[at & mask]
                if not count or completed.since != since or completed.done != done:
                    break
            if since:
                add_latencies(self.latencies, (-done - 1) & ~IS_WHOLE, since, now, alike)

    cdef void trace_published(self, u32 count, u64 now) noexcept:
        """Write what was published just now: the latest entries of the table."""
        cdef TraceSlot slots[WRITE_AT_ONCE]
        cdef TraceSlot *slot = slots
        cdef u32 mask = self.size - 1
        cdef u16 at = self.publish_at - <u16>count
        cdef const Completed *completed
        cdef const Noted *noted
        cdef u64 took
        cdef int kind
        while count:
            count -= 1
            if slot > &slots[WRITE_AT_ONCE - 3]:
                trace_all(slots, <u32>(slot - slots))
                slot = slots
            completed = &self.pending[at & mask]
            at += 1
            kind = -completed.done - 1
            took = now - completed.since
            if kind & IS_WHOLE:
                noted = &self.noted[completed - self.pending]
                kind -= IS_WHOLE
                self.noted_count -= 1
                if not took >> 32:
                    slot.whole.time, slot.whole.since = now, <u32>took
                    slot.whole.address, slot.whole.offset = noted.address, completed.offset
                    slot.whole.taken, slot.whole.served = noted.taken, noted.served
                    slot.whole.readable, slot.whole.writable = noted.readable, noted.writable
                    slot.whole.written = completed.element.written
                    slot.whole.position = noted.position
                    slot.whole.head = <u16>completed.element.head
                    slot.whole.what, slot.whole.origin = TRACE_WHOLE, self.origin
                    slot.whole.queue, slot.whole.access = self.queue, <u16>kind
                    slot += 1
                    continue
                spell(self, completed, kind, &slot[0].record, &slot[1].record)
                slot += 2
            complete_record(&slot.record, completed, <u16>kind, self.origin, self.queue)
            slot.record.time = now
            slot += 1
        if slot != slots:
            trace_all(slots, <u32>(slot - slots))

    # Ring format: the seam between this class, which decides what is taken and published and when,
    # and a subclass, which knows the bytes and the barriers between them. A format defines all of
    # the following, and `measure` of RingAreas. The areas are translated when these are called.
    # They raise because Cython has no abstract methods; `SplitRing` is the example.

    cdef u16 used_position(self) except? 65535:
        """Where the driver finds the next used entry, as it was left by the device before."""
        raise NotImplementedError

    cdef int waiting(self) except -1:
        """How many requests are available that were not taken."""
        raise NotImplementedError

    cdef bint has_next(self) except -1:
        """Whether the request at ``next_avail`` is available."""
        raise NotImplementedError

    cdef int head_at(self, u16 position) except -1:
        """The request at a position of the ring, as the driver numbers it."""
        raise NotImplementedError

    cdef int walk(self, Chain chain, Misses misses, bint lenient) except -1:
        """Fill a chain. What is missing is added to the list, or made its fault if lenient."""
        raise NotImplementedError

    cdef int put_used(self, const UsedElem *element) except -1:
        """Write the used entry at ``next_used``, where the driver does not look yet."""
        raise NotImplementedError

    cdef int publish_used(self) except -1:
        """Publish all entries before ``next_used``, with one release store."""
        raise NotImplementedError

    cdef bint wants_notification(self, u16 before) except -1:
        """Whether the driver wants a notification of the entries from ``before`` on."""
        raise NotImplementedError

    cpdef disable_kicks(self):
        """Tell the driver that it need not kick for new requests. Only a hint."""
        raise NotImplementedError

    cdef bint more_after_request(self) except -1:
        """Enable kicks; whether there are requests to be taken already."""
        raise NotImplementedError

    cdef bint more_beyond(self, u16 ahead) except -1:
        """Enable kicks for what follows the next ``ahead`` requests; whether there is any already."""
        raise NotImplementedError


cdef inline bint may_take(Ring ring) noexcept:
    """Whether this batch may look at another request; notes it if only the quota forbids that."""
    if ring.work >= RING_LOOK_WORK or ring.moved >= ring.batch_bytes or not current(ring):
        return False
    # One of the requests that the device holds is completed first.
    ring.crowded = ring.charged and ring.quota.used >= ring.quota.most
    return not ring.crowded


# All of these are plain C on memory that is there: they cannot raise.


cdef inline u32 place_of(Ring ring, Chain chain) noexcept:
    """Where a request that is completed now stands in the tables of those to be published."""
    if ring.ordered:
        return chain.position & (ring.size - 1)
    return <u16>(ring.publish_at + <u16>ring.pending_count) & (ring.size - 1)


cdef inline u64 first_address(Chain chain) noexcept:
    """Where a request's first buffer is."""
    if chain.readable.count:
        return chain.readable.addr[0]
    return chain.writable.addr[0] if chain.writable.count else 0


cdef void complete_record(
    TraceRecord *record, const Completed *completed, u16 kind, u16 origin, u16 queue
) noexcept:
    record[0] = trace_record(WHAT_COMPLETED, origin)
    record.queue, record.head = queue, completed.element.head
    record.length, record.since = completed.element.written, completed.since
    record.access, record.detail = kind, completed.offset


cdef void spell(
    Ring ring, const Completed *completed, int kind, TraceRecord *taken, TraceRecord *served
) noexcept:
    """Make the records of a request's being taken and served, as they would have been written."""
    cdef const Noted *noted = &ring.noted[completed - ring.pending]
    taken[0] = trace_record(WHAT_TAKEN, ring.origin)
    taken.time, taken.since = completed.since + noted.taken, completed.since
    taken.address, taken.length, taken.detail = noted.address, noted.readable, noted.writable
    taken.result, taken.head, taken.queue = noted.position, completed.element.head, ring.queue
    served[0] = taken[0]
    served.what, served.access = WHAT_SERVED, <u16>kind
    served.time, served.result = completed.since + noted.served, completed.element.written


cdef inline bint note_served(Ring ring, Chain chain, u64 written) noexcept:
    """Note what is written of a request once it is published; False if that does not fit."""
    cdef u64 turned = ring.turned, since = ring.since, now = max(ticks_soon(), turned)
    cdef u64 readable = chain.readable.total, writable = chain.writable.total
    cdef Noted *noted
    if (readable | writable | written | now - since) >> 32:
        return False
    noted = &ring.noted[place_of(ring, chain)]
    noted.address, noted.position = first_address(chain), chain.position
    noted.taken, noted.served = <u32>(turned - since), <u32>(now - since)
    noted.readable, noted.writable = <u32>readable, <u32>writable
    ring.noted_count += 1
    ring.deferred, ring.turned = False, now
    return True
