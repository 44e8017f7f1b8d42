"""The device's side of a split virtqueue (virtio 1.3, section 2.7).

Everything in a ring was written by a driver that may be hostile and may change it while it is
read: an index is loaded once and judged once, a descriptor is copied before it is looked at. The
ring's own three areas are addressed like any buffer, so behind an IOMMU they may lie in pages that
have nothing to do with each other, and their translation may be revoked at any time; it is looked
up again before the next use. Nothing is accessed while the GIL is not held, which is what makes
that look-up-and-use one step.

Indices are published with one release store each, after everything they cover.
"""

from cpython.exc cimport PyErr_NoMemory
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, realloc

from guestio._core.border cimport as_address
from guestio._core.misses cimport Misses

from guestio.errors import InvalidAddressError, MemoryVanishedError, QueueError

cdef extern from * nogil:
    """
    #define load_acquire16(p) __atomic_load_n((const uint16_t *)(p), __ATOMIC_ACQUIRE)
    #define store_release16(p, v) __atomic_store_n((uint16_t *)(p), (v), __ATOMIC_RELEASE)
    #define full_barrier() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #include <time.h>
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
    static uint64_t now_ns(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    """
    void relax()
    u64 now_ns()
    bint readable(int fd)
    u16 load_acquire16(void *p)
    void store_release16(void *p, u16 v)
    void full_barrier()

cdef str VANISHED = "the file behind the ring's memory was truncated by its owner"

cdef enum:
    READ = 1
    WRITE = 2
    # Descriptor flags, and the flags of the two rings (section 2.7.5 to 2.7.8).
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    AVAIL_NO_INTERRUPT = 1
    USED_NO_NOTIFY = 1
    CHAIN_LIMIT = 1024    # descriptors of an indirect table in a ring smaller than this
    LOOK_AHEAD = 64       # chains that are looked at while an earlier one waits for a translation
    LOOK_AHEAD_WORK = 1 << 16   # descriptors and pieces of memory after which that ends as well
    CHAIN_PIECES = 1 << 21      # more than 4 GiB in pages have
    LOOKS = 64                  # looks at a ring between two looks elsewhere
    PUBLISH_EACH = 8            # requests served in the core that the driver is shown at a time

cdef u64 CHAIN_BYTES = <u64>1 << 32


cdef class Chain:
    """One request of the driver: what it gave to read and what it gave to write.

    No framing may be assumed: what belongs together may be split anywhere (section 2.6.4).

    Attributes:
        head: Identifies the request in its ring.
        readable: Memory that the device reads.
        writable: Memory that the device writes, in order.
        fault: Why the request cannot be served: part of its memory cannot be reached. Then
            ``readable`` and ``writable`` hold only what could be. None if all is well.
        tail: With a fault, the last device-writable byte, if that could be reached.
        access_fails: With a fault, the ranges whose mapping forbids the access.
    """

    def __init__(self):
        raise TypeError("chains come from a ring")

    cdef void clear(self) noexcept:
        """Give its memory back and be ready for another request."""
        self.readable.release()
        self.writable.release()
        self.tail = self.fault = None
        self.done = False
        if self.access_fails:
            self.access_fails = []


cdef Chain new_chain():
    cdef Chain chain = Chain.__new__(Chain)
    chain.readable, chain.writable = IoVector(), IoVector()
    chain.readable.access, chain.writable.access = READ, WRITE
    chain.access_fails = []
    return chain


cdef class Server:
    """Serves the simple requests of a device without leaving the core."""

    cdef i64 serve(self, Chain chain) except -2:
        """Serve a request; the bytes written, or NOT_SERVED if it is left to the device."""
        return NOT_SERVED


cdef class SplitRing:
    """A split virtqueue as its device sees it.

    Args:
        space: Where the addresses of rings, tables and buffers lead.
        size: Entries, a power of two up to 32768.
        desc, avail, used: Addresses of the three areas, aligned to 16, 2 and 4.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        base: Index of the next available entry.

    Attributes:
        next_avail: The ring position that is taken next; where to go on after a stop.
        outstanding: Requests taken and not completed.
        broken: Why the ring stopped, or None.

    One thread at a time.
    """

    def __cinit__(
        self, AddressSpace space not None, size, desc, avail, used, *, bint event_idx=False,
        bint indirect=False, base=0,
    ):
        cdef u64 entries = as_address(size, "size")
        if not entries or entries > 32768 or entries & (entries - 1):
            raise ValueError(f"ring size {entries} is not a power of two up to 32768")
        self.space, self.size = space, entries
        self.desc_addr = as_address(desc, "desc")
        self.avail_addr, self.used_addr = as_address(avail, "avail"), as_address(used, "used")
        if self.desc_addr % 16 or self.avail_addr % 2 or self.used_addr % 4:
            raise QueueError(
                f"ring areas at {self.desc_addr:#x}, {self.avail_addr:#x}, {self.used_addr:#x} "
                "are not aligned to 16, 2 and 4 bytes"
            )
        self.event_idx, self.indirect = event_idx, indirect
        self.next_avail = as_address(base, "base") & 0xFFFF
        self.pending = <UsedElem *>realloc(NULL, entries * sizeof(UsedElem))
        if self.pending is NULL:
            PyErr_NoMemory()
        self.desc, self.avail, self.used = IoVector(), IoVector(), IoVector()
        self.table, self.ignored = IoVector(), Misses()

    def __dealloc__(self):
        free(self.pending)

    cdef object wrong(self, str what):
        if self.vanished():
            # Whatever looks wrong was read from the empty pages that took its place.
            what = VANISHED
        self.broken = what
        return QueueError(what)

    cdef bint vanished(self) noexcept:
        return self.resolved and (
            self.desc.vanished(0, self.desc.total) or self.avail.vanished(0, self.avail.total)
            or self.used.vanished(0, self.used.total)
        )

    cdef bint current(self) noexcept:
        """Whether no translation was taken away since the areas were looked up."""
        return self.space.iotlb is None or self.space.iotlb.generation == self.generation

    cdef bint area(self, IoVector found, u64 addr, u64 size, int access, Misses misses) except -1:
        """Look one of the ring's areas up; False, and what is missing, without a translation."""
        cdef bint stopped
        found.rewind(0, 0, 0)
        found.access, found.start = access, addr
        if size - 1 > <u64>-1 - addr:
            raise self.wrong(f"the ring area {addr:#x}+{size:#x} passes 2**64")
        if not self.space.translate(found, addr, size, access, misses):
            return False
        # The areas are looked up again whenever a translation changes; a lease would only make
        # the revocation wait for ever.
        stopped = found.stop
        found.rewind(found.count, found.total, 0)
        if stopped:
            raise self.wrong(f"no usable memory behind the ring at {found.stop_addr:#x}")
        return True

    cdef bint areas_ready(self, Misses misses) except -1:
        """Make sure that the three areas are translated; adds what is missing."""
        cdef u64 tail = 2 if self.event_idx else 0
        cdef bint found
        if self.broken is not None:
            raise QueueError(self.broken)
        if self.resolved and self.current():
            return True
        self.resolved = False
        if self.space.iotlb is not None:
            self.generation = self.space.iotlb.generation
        found = self.area(self.desc, self.desc_addr, 16 * self.size, READ, misses)
        found &= self.area(self.avail, self.avail_addr, 4 + 2 * self.size + tail, READ, misses)
        found &= self.area(
            self.used, self.used_addr, 4 + 8 * self.size + tail, READ | WRITE, misses
        )
        if not found:
            return False
        self.resolved = True
        if not self.used_known:
            self.next_used = self.load16(self.used, 2)
            self.used_known = True
        return True

    cdef bint reachable(self) except -1:
        """As :meth:`areas_ready`, for those who do not want to know what is missing."""
        self.ignored.count = 0
        return self.areas_ready(self.ignored)

    cdef int check_areas(self) except -1:
        if self.vanished():
            raise self.wrong(VANISHED)
        return 0

    cdef u16 load16(self, IoVector area, u64 offset) except? 65535:
        cdef u16 value
        cdef u8 *at = locate(area, offset, 2)
        if at is NULL or <uintptr_t>at & 1:
            area.transfer(<u8 *>&value, offset, 2, False)
            return value
        return load_acquire16(at)

    cdef int store16(self, IoVector area, u64 offset, u16 value) except -1:
        cdef u8 *at = locate(area, offset, 2)
        if at is NULL or <uintptr_t>at & 1:
            raise self.wrong(
                f"the ring field at {area.start + offset:#x} is split over mappings or misaligned "
                "in the host's memory"
            )
        store_release16(at, value)
        area.mark(offset, 2)
        return 0

    def missing(self):
        """What of the ring's own areas has no translation now, as in :meth:`pop`."""
        cdef Misses misses = Misses()
        self.areas_ready(misses)
        return list(misses)

    def pop(self, int limit=LOOK_AHEAD):
        """Take the available requests, as far as they can be translated.

        Requests are taken in the order in which the driver made them available. One that lacks
        translations ends the list and stays in the ring; those behind it are looked at too, so
        that everything that is missing can be asked for at once.

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

    def serve(self, Server server not None, int limit=LOOK_AHEAD):
        """Take the available requests as :meth:`pop` does, and have served what can be at once.

        What is served is shown to the driver every few requests, the last of it by
        :meth:`publish`.

        Args:
            server: Serves them; what it leaves is returned.
            limit: As for :meth:`pop`.

        Returns:
            ``(chains, misses, served)``: as from :meth:`pop`, but the misses as
            :class:`~guestio._core.misses.Misses`, and how many were served.

        Raises:
            QueueError: As :meth:`pop`.
        """
        cdef list chains = []
        cdef Misses misses = Misses()
        cdef int served
        try:
            served = self.take(limit, server, chains, misses)
        finally:
            self.keep_nothing()
        return chains, misses, served

    cdef int take(self, int limit, Server server, list chains, Misses misses) except -1:
        """Take requests into the lists; the number of those that were served instead."""
        cdef u16 at
        cdef int left, served = 0
        cdef Chain chain
        if not self.areas_ready(misses):
            return served
        left = min(self.waiting(), limit)
        at = self.next_avail
        self.work = 0
        while left > 0 and self.work < LOOK_AHEAD_WORK:
            left -= 1
            chain = self.chain_at(at)
            self.walk(chain, misses, False)
            if not self.current():
                # To report a miss runs Python code, during which others may take the ring's
                # translation away; what it held must not be looked at any more.
                break
            at += 1
            if misses.count:
                continue
            self.next_avail = at
            self.outstanding += 1
            if server is not None and chain.fault is None and self.served(server, chain):
                served += 1
                # Others ran while the data moved.
                if not self.areas_ready(misses):
                    return served
                if served % PUBLISH_EACH == 0:
                    self.show_pending()
            else:
                chains.append(self.hand_out())
        self.check_areas()
        return served

    cdef void keep_nothing(self) noexcept:
        """Let go of what was only looked at: nobody else will, and a revocation waits for it."""
        if self.spare is not None:
            self.spare.clear()

    cdef Chain chain_at(self, u16 position):
        """An empty chain for the request at a ring position; the spare one if it is still ours."""
        if self.spare is None:
            self.spare = new_chain()
        else:
            self.spare.clear()
        self.spare.head = self.load16(self.avail, 4 + 2 * (position % self.size))
        return self.spare

    cdef Chain hand_out(self):
        """Give the spare chain away; only from now on does it refer to the ring."""
        cdef Chain chain = self.spare
        chain.ring, self.spare = self, None
        return chain

    cdef bint served(self, Server server, Chain chain) except -1:
        cdef i64 written = server.serve(chain)
        if written == NOT_SERVED:
            return False
        chain.clear()
        self.finish(chain.head, <u64>written)
        return True

    cdef int waiting(self) except -1:
        """How many requests are available that were not taken."""
        cdef u16 avail = self.load16(self.avail, 2)
        cdef int ahead = <u16>(avail - self.next_avail)
        if ahead + self.outstanding + <int>self.pending_count > <int>self.size:
            raise self.wrong(
                f"available index {avail} runs ahead of a ring of {self.size} whose next entry is "
                f"{self.next_avail}, with {self.outstanding + <int>self.pending_count} requests "
                "not given back"
            )
        return ahead

    def pop_faulty(self):
        """Take the next request although some of it cannot be reached.

        Returns:
            A chain with ``fault`` set (unless it can be reached by now), or None if there is none
            or the ring itself cannot be reached.

        Raises:
            QueueError: The driver broke a rule.
        """
        if not self.reachable() or not self.waiting():
            return None
        try:
            self.walk(self.chain_at(self.next_avail), Misses(), True)
            self.check_areas()
            if not self.current():
                return None
            self.next_avail += 1
            self.outstanding += 1
            return self.hand_out()
        finally:
            self.keep_nothing()

    cdef int walk(self, Chain chain, Misses misses, bint lenient) except -1:
        """Fill a chain. What is missing is added to the list, or made its fault if lenient."""
        cdef u64 sizes[2]
        if chain.head >= <int>self.size:
            raise self.wrong(f"available entry names descriptor {chain.head} of {self.size}")
        sizes[0] = sizes[1] = 0
        return self.walk_table(
            self.desc, self.size, <u16>chain.head, False, chain, sizes, misses, lenient
        )

    cdef int walk_table(
        self, IoVector table, u64 entries, u16 index, bint nested, Chain chain, u64 *sizes,
        Misses misses, bint lenient,
    ) except -1:
        """Follow a chain through a descriptor table, in the ring or indirect."""
        cdef Desc desc
        cdef u64 steps = 0
        while True:
            if index >= entries:
                raise self.wrong(f"descriptor index {index} is outside its table of {entries}")
            steps += 1
            if steps > entries:
                raise self.wrong(f"the chain from descriptor {chain.head} has a loop")
            if not nested and not self.current():
                return 0
            table.transfer(<u8 *>&desc, 16 * <u64>index, 16, False)
            self.work += 1
            if nested and table.vanished(16 * <u64>index, 16):
                chain.fault = "the file behind its indirect table was truncated by its owner"
                return 0
            if desc.flags & DESC_INDIRECT:
                return self.walk_indirect(&desc, nested, chain, sizes, misses, lenient)
            self.add_buffer(&desc, chain, sizes, misses, lenient)
            if not desc.flags & DESC_NEXT:
                return 0
            index = desc.next

    cdef int walk_indirect(
        self, const Desc *desc, bint nested, Chain chain, u64 *sizes, Misses misses, bint lenient
    ) except -1:
        cdef IoVector table = self.table
        cdef u64 entries = desc.size // 16
        cdef size_t known = misses.count
        if not self.indirect:
            raise self.wrong("an indirect descriptor, but the feature was not negotiated")
        if nested:
            raise self.wrong("an indirect descriptor inside an indirect table")
        if desc.flags & DESC_NEXT:
            raise self.wrong("an indirect descriptor that continues")
        if not desc.size or desc.size % 16 or entries > max(self.size, CHAIN_LIMIT):
            raise self.wrong(f"an indirect table of {desc.size} bytes")
        if desc.addr > <u64>-1 - (desc.size - 1):
            raise self.wrong(f"an indirect table at {desc.addr:#x} passes 2**64")
        table.release()
        table.access, table.start = READ, desc.addr
        if not self.space.translate(table, desc.addr, desc.size, READ, misses):
            if lenient:
                self.note_refused(chain, misses, known)
                chain.fault = f"no translation of the indirect table at {desc.addr:#x}"
            return 0
        if table.stop:
            chain.fault = f"no memory behind the indirect table at {table.stop_addr:#x}"
            table.release()
            return 0
        try:
            return self.walk_table(table, entries, 0, True, chain, sizes, misses, lenient)
        finally:
            table.release()

    cdef int add_buffer(
        self, const Desc *desc, Chain chain, u64 *sizes, Misses misses, bint lenient
    ) except -1:
        cdef bint writes = (desc.flags & DESC_WRITE) != 0
        cdef IoVector out = chain.writable if writes else chain.readable
        cdef int access = WRITE if writes else READ
        cdef int before = out.count
        cdef size_t known = misses.count
        if not desc.size:
            raise self.wrong(f"a descriptor of 0 bytes in the chain from {chain.head}")
        if desc.addr > <u64>-1 - (desc.size - 1):
            raise self.wrong(f"a buffer at {desc.addr:#x}+{desc.size:#x} passes 2**64")
        if not writes and sizes[1]:
            raise self.wrong("a device-readable descriptor after a device-writable one")
        sizes[writes] += desc.size
        if sizes[0] + sizes[1] > CHAIN_BYTES:
            raise self.wrong(f"the chain from descriptor {chain.head} is longer than 2**32 bytes")
        if not self.space.translate(out, desc.addr, desc.size, access, misses):
            if lenient:
                self.note_refused(chain, misses, known)
                chain.fault = f"no translation of the buffer at {desc.addr:#x}+{desc.size:#x}"
        elif out.stop:
            chain.fault = f"no usable memory behind the buffer at {out.stop_addr:#x}"
            out.stop = 0
        self.work += out.count - before
        if out.count > CHAIN_PIECES:
            raise self.wrong(f"the chain from descriptor {chain.head} is in too many pieces")
        if writes and chain.fault is not None:
            chain.tail = self.last_byte(desc.addr + (desc.size - 1))
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

    def rebind(self, AddressSpace space not None):
        """Go on in other memory; requests that were taken keep what they have."""
        self.space, self.resolved = space, False

    def complete(self, Chain chain not None, written):
        """Give a request back, with the number of bytes written to it; :meth:`publish` shows it.

        Its memory must not be touched any more.

        Raises:
            ValueError: It was given back before, comes from another ring, or has less room.
        """
        cdef u64 count = as_address(written, "written")
        if chain.ring is not self:
            raise ValueError(f"request {chain.head} was taken from another ring")
        if chain.done:
            raise ValueError(f"request {chain.head} was completed before")
        if count > chain.writable.total:
            raise ValueError(
                f"{count} bytes written to a request with room for {chain.writable.total}"
            )
        chain.done = True
        chain.readable.close()
        chain.writable.close()
        if chain.tail is not None:
            chain.tail.close()
        self.finish(chain.head, count)

    cdef void finish(self, int head, u64 written) noexcept:
        self.outstanding -= 1
        self.pending[self.pending_count].head = head
        self.pending[self.pending_count].written = <u32>min(written, <u64>0xFFFFFFFF)
        self.pending_count += 1

    @property
    def unpublished(self):
        """Completed requests that :meth:`publish` has not shown yet."""
        return self.pending_count

    def publish(self):
        """Show completed requests to the driver.

        Returns:
            Whether the driver wants to be notified of them; None if the used ring lacks a
            translation (see :meth:`missing`); nothing was shown then.

        Raises:
            QueueError: The ring is broken.
        """
        cdef bint notify
        if self.pending_count and not self.reachable():
            return None
        if self.pending_count:
            self.show_pending()
        notify, self.notify_due = self.notify_due, False
        return notify

    cdef int show_pending(self) except -1:
        """Publish completions; the areas are translated. Remembers whether to notify."""
        cdef u32 i
        cdef u64 slot
        cdef u16 before = self.next_used
        for i in range(self.pending_count):
            slot = 4 + 8 * <u64>(self.next_used % self.size)
            self.used.transfer(<u8 *>&self.pending[i], slot, 8, True)
            self.used.mark(slot, 8)
            self.next_used += 1
        self.pending_count = 0
        self.store16(self.used, 2, self.next_used)
        if self.wants_notification(before):
            self.notify_due = True
        return self.check_areas()

    cdef bint wants_notification(self, u16 before) except -1:
        cdef u16 event
        # The driver writes its wish, then looks at the index; we do it the other way round.
        full_barrier()
        if not self.event_idx:
            return not self.load16(self.avail, 0) & AVAIL_NO_INTERRUPT
        event = self.load16(self.avail, 4 + 2 * <u64>self.size)
        if not self.signalled_valid:
            self.signalled_valid = True
            return True
        return <u16>(self.next_used - event - 1) < <u16>(self.next_used - before)

    def disable_kicks(self):
        """Tell the driver that it need not announce new requests. Only a hint."""
        if not self.event_idx and self.reachable():
            self.store16(self.used, 0, USED_NO_NOTIFY)

    def spin(self, double seconds, int other):
        """Look for new requests for a while without sleeping.

        Args:
            seconds: For how long.
            other: A descriptor; once it is readable, something else is to be done.

        Returns:
            Whether there are any. False also if the ring lacks a translation.
        """
        cdef u64 until = now_ns() + <u64>(1e9 * seconds)
        cdef u32 looks = 0
        if not self.reachable():
            return False
        while self.load16(self.avail, 2) == self.next_avail:
            looks += 1
            if looks % LOOKS == 0 and (now_ns() >= until or readable(other)):
                return False
            relax()
        return True

    def enable_kicks(self):
        """Ask the driver to announce the next request.

        Returns:
            Whether requests are available already, so that no announcement may come; None if the
            ring lacks a translation.
        """
        if not self.reachable():
            return None
        if self.event_idx:
            self.store16(self.used, 4 + 8 * <u64>self.size, self.next_avail)
        else:
            self.store16(self.used, 0, 0)
        full_barrier()
        more = self.load16(self.avail, 2) != self.next_avail
        self.check_areas()
        return more


cdef inline u8 *locate(IoVector area, u64 offset, u64 size) noexcept nogil:
    """Where a few bytes of an area are, or NULL if they are not contiguous."""
    cdef int i
    for i in range(area.count):
        if offset < area.vec[i].iov_len:
            if size > area.vec[i].iov_len - offset:
                return NULL
            return <u8 *>area.vec[i].iov_base + offset
        offset -= area.vec[i].iov_len
    return NULL

