"""What passes through a split ring between a driver and a device, both of them others.

A request's descriptors are its driver's until the device gives them back, and free for other
requests afterwards. So what was read of them counts only if the request had not been given back
when that was done; otherwise it is known that there was a request, and nothing of what it said.

Neither the driver nor the device waits for an observer that only reads. One that looks too rarely
loses what the ring has written over; how many requests that were is exact as long as it looks at
least once in 65,536 of them.

An observer that *relays* is waited for: the device has an available and a used ring of the
observer's, and the driver's are filled from there. Then each request is seen before the device has
it, and each answer before the driver does. Descriptors and data stay where they are.
"""

from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport uint8_t

from guestio._core.base.checks cimport as_address, u8, u32, u64
from guestio._core.base.clock cimport now_ns
from guestio._core.base.syscalls cimport notify
from guestio._core.iommu.address_space cimport AddressSpace, IoVector
from guestio._core.trace.latencies cimport Latencies, add_latency
from guestio._core.trace.tracepoints cimport (
    BUFFERS, CONTENTS, MEASURE, REQUESTS, TraceRecord, WHAT_AVAILABLE, WHAT_BUFFER, WHAT_COMPLETED,
    WHAT_INTERRUPT, WHAT_LACKING, WHAT_TAKEN, trace, trace_record, tracing,
)
from guestio._core.iommu.misses cimport Misses
from guestio._core.virtio.areas cimport RingAreas, Sizes, current
from guestio._core.virtio.chain cimport u16
from guestio._core.virtio.contents cimport trace_answer, trace_given
from guestio._core.virtio.loop cimport Feed
from guestio._core.virtio.split cimport Desc

from guestio._core.virtio.split import area_bytes
from guestio.errors import QueueError

cdef extern from * nogil:
    """
    #define acquire_fence() __atomic_thread_fence(__ATOMIC_ACQUIRE)
    #define full_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    void acquire_fence()
    void full_fence()

cdef enum:
    READ = 1
    WRITE = 2
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    CHAIN_LIMIT = 1024     # descriptors of an indirect table in a ring smaller than this
    AHEAD = 0xC000         # a distance of indices beyond this is a step back
    HEADER = 16            # bytes that a block request begins with
    UNKNOWN = -1           # result of TAKEN: nothing is known of the request
    NO_NOTIFICATION = 1    # in the flags of a ring: its writer need not be notified

DRIVER = "driver"
DEVICE = "device"


cdef struct Held:
    u64 since
    u64 room        # bytes that the device may write
    u64 offset      # where in a disk a read or write begins, bytes
    u16 returned    # used entries that name it and that were not looked at yet
    uint8_t kind
    uint8_t headless    # what it begins with could not be read yet
    uint8_t out     # 0: the driver's, 1: the device's, 2: the same, and nothing is known of it
    uint8_t lacks   # a relay has not found out yet what it consists of
    u16 position    # in the available ring


cdef class RingObserver(RingAreas):
    """A split ring that others use.

    Args:
        space, size, desc, avail, used, event_idx: As for :class:`Ring`; nothing is written.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        base: Index of the next available entry that the device takes.
        queue, origin: Its number and that of its server, for records of tracepoints.
        block: Whether requests are those of a disk, whose kind and sector are of interest.
        latencies: Where to count how long requests took, while that is measured.
        own: Where the rings are that the device has, if this relays; None if it only reads.
            Without VIRTIO_F_EVENT_IDX then.
        own_avail, own_used: Their addresses there.

    Attributes:
        next_avail: The ring position that is looked at next.
        next_used: The same of the used ring.
        taken: Requests that the driver made available.
        completed: Requests that the device gave back.
        unseen: Those of the first of which nothing is known: they were looked at too late.
        bytes: Bytes of those that were seen.
        notifications: Notifications of the driver that passed.
        relays: Whether this relays.
        kick_fd, call_fd: The eventfds by which a relay notifies the device and the driver; -1 for
            none.
        to_kick, to_call: Whether a relay has to notify the device, the driver.
        violation: ``(who, what)`` once the driver or the device has broken a rule; nothing is
            looked at any more then. Who is ``"driver"`` or ``"device"``.

    One thread at a time.
    """

    cdef Held *held
    cdef IoVector table
    cdef IoVector scratch
    cdef readonly u16 next_avail
    cdef readonly u16 next_used
    cdef u16 marked          # used entries before this one are counted in `returned`
    cdef u32 headless        # requests in `held` that are
    cdef u32 doubt           # requests that the device has and that are not in `held`
    cdef bint indirect
    cdef bint block
    cdef readonly u64 taken
    cdef readonly u64 completed
    cdef readonly u64 unseen
    cdef readonly u64 bytes
    cdef public u64 notifications
    cdef readonly u16 queue
    cdef readonly u16 origin
    cdef Latencies latencies
    cdef readonly tuple violation
    # Of a relay.
    cdef AddressSpace own
    cdef u64 own_avail_addr
    cdef u64 own_used_addr
    cdef IoVector offered    # the available ring that the device has; its used ring is `used`
    cdef IoVector theirs     # the used ring that the driver has
    cdef u16 behind          # from an index of the one used ring to that of the other
    cdef public int kick_fd
    cdef public int call_fd
    cdef public bint to_kick
    cdef public bint to_call
    # Of the chain that was walked last.
    cdef u64 given
    cdef u64 room
    cdef u64 first
    cdef bint any
    cdef u8 header[HEADER]
    cdef int header_bytes
    cdef bint header_lost
    cdef bint unreached      # its indirect table could not be read
    cdef str fault

    def __cinit__(
        self, space, size, desc, avail, used, *, event_idx=False, bint indirect=False, base=0,
        queue=0, origin=0, bint block=False, Latencies latencies=None, AddressSpace own=None,
        own_avail=0, own_used=0
    ):
        self.indirect, self.block, self.latencies = indirect, block, latencies
        self.next_avail = as_address(base, "base") & 0xFFFF
        self.queue = as_address(queue, "queue") & 0xFFFF
        self.origin = as_address(origin, "origin") & 0xFFFF
        self.table, self.scratch = IoVector(), IoVector()
        self.own, self.kick_fd, self.call_fd = own, -1, -1
        self.own_avail_addr = as_address(own_avail, "own_avail")
        self.own_used_addr = as_address(own_used, "own_used")
        self.offered, self.theirs = IoVector(), IoVector()
        self.next_used = self.marked = self.next_avail
        self.held = <Held *>PyMem_Calloc(self.size, sizeof(Held))
        if self.held is NULL:
            raise MemoryError

    def __dealloc__(self):
        PyMem_Free(self.held)

    cdef int measure(self, Sizes *sizes) except -1:
        desc, avail, used = area_bytes(self.size, self.event_idx)
        sizes[0] = Sizes(desc, avail, used)
        return 0

    cdef bint areas_ready(self, Misses misses) except -1:
        """As for a device, which writes to the used ring; here only a relay does."""
        cdef Sizes sizes
        cdef bint found
        if self.broken is not None:
            raise QueueError(self.broken)
        if self.resolved and current(self):
            return True
        self.measure(&sizes)
        self.resolved = False
        if self.space.iotlb is not None:
            self.generation = self.space.iotlb.at.generation
        found = self.area(self.desc, self.desc_addr, sizes.desc, READ, misses)
        found &= self.area(self.avail, self.avail_addr, sizes.avail, READ, misses)
        if self.own is None:
            found &= self.area(self.used, self.used_addr, sizes.used, READ, misses)
        else:
            found &= self.area(self.theirs, self.used_addr, sizes.used, READ | WRITE, misses)
            self.own_area(self.offered, self.own_avail_addr, sizes.avail)
            self.own_area(self.used, self.own_used_addr, sizes.used)
        if not found:
            return False
        self.resolved = True
        if not self.begun:
            self.begun = True
            self.begin()
        return True

    cdef int begin(self) except -1:
        """Find out what the device has: it was there before."""
        cdef u16 used = self.load16(self.used, 2)
        cdef u16 ahead = self.next_avail - used
        if self.own is not None:
            # It begins with nothing, and with the same index in both of its rings.
            self.behind = self.load16(self.theirs, 2) - self.next_used
            return 0
        self.next_used = used
        if ahead <= self.size:
            self.doubt = ahead
        else:
            # Its memory could not be reached yet when the device began.
            self.next_used = self.next_avail
        self.marked = self.next_used
        return 0

    cdef int own_area(self, IoVector found, u64 addr, u64 size) except -1:
        """Look up an area of a relay's own."""
        found.rewind(0, 0, 0)
        found.access, found.start = READ | WRITE, addr
        self.own.translate(found, addr, size, READ | WRITE, self.ignored)
        if found.stop:
            raise ValueError(f"there is no memory for a ring of {self.size} at {addr:#x}")
        return 0

    @property
    def relays(self):
        return self.own is not None

    @property
    def resolved_areas(self):
        """Whether the memory of the ring can be reached."""
        return self.resolved and current(self)

    @property
    def depth(self):
        """Requests that the device has."""
        return <u16>(self.next_avail - self.next_used)

    @property
    def waits(self):
        """Whether a translation that comes now may tell more."""
        return self.headless > 0 or (not self.resolved and self.violation is None)

    def look(self, list requests=None, list completions=None):
        """Find out what has happened since the last look.

        Args:
            requests: Requests are added to it, each as ``(head, position, known, kind, sector,
                readable bytes, writable bytes, pieces)``; kind and sector are those of a disk, or
                None; pieces are ``(address, bytes, whether the device writes it)``.
            completions: What was given back is added to it, as ``(head, written, since, now)``;
                times in ns, the first 0 if it is not known.

        Returns:
            Whether anything has happened.
        """
        return self.look_into(requests, completions)

    cdef bint look_into(self, list requests, list completions) except -1:
        cdef u16 used, avail, before = self.next_avail, done = self.next_used
        cdef bint changed
        if self.violation is not None or self.broken is not None:
            return False
        self.ignored.count = 0
        try:
            if not self.areas_ready(self.ignored):
                return False
            used = self.load16(self.used, 2)
            avail = self.load16(self.avail, 2)
            changed = used != self.next_used or avail != self.next_avail
            if self.headless:
                self.read_headers(requests)
            if changed:
                self.follow(used, avail, requests, completions)
                self.check_areas()
        except QueueError as error:
            self.blame(DRIVER, str(error))
            return True
        return changed

    cdef int follow(self, u16 used, u16 avail, list requests, list completions) except -1:
        """Look at everything up to two indices, of which the first was read before the other."""
        cdef u64 now = now_ns()
        cdef u16 later, ahead
        cdef TraceRecord record
        acquire_fence()
        later = self.load16(self.used, 2)
        ahead = avail - later
        if self.size < ahead < AHEAD:
            return self.blame(
                DRIVER,
                f"available index {avail} runs ahead of a ring of {self.size} whose used index is "
                f"{later}",
            )
        ahead = self.load16(self.avail, 2) - later
        if ahead >= AHEAD:
            return self.blame(
                DEVICE, f"used index {later} is ahead of the available index {avail}"
            )
        if <u16>(avail - self.next_avail) > self.size or <u16>(later - self.next_used) > self.size:
            return self.skip(later, avail)
        if avail != self.next_avail and tracing & REQUESTS:
            record = trace_record(WHAT_AVAILABLE, self.origin)
            record.queue, record.detail, record.time = self.queue, self.next_avail, now
            record.length = <u16>(avail - self.next_avail)
            trace(&record)
        self.mark(later)
        while self.next_avail != avail and self.violation is None:
            if not self.take(now, requests, completions):
                return 0
        while self.next_used != used and self.violation is None:
            self.give_back(now, completions, requests)
        if self.own is not None:
            self.publish()
        return 0

    cdef int publish(self) except -1:
        """Have the device see what was copied for it, and the driver what was given back."""
        cdef u16 given_back = self.next_used + self.behind
        if self.load16(self.offered, 2) != self.next_avail:
            self.store16(self.offered, 2, self.next_avail)
            full_fence()  # whether the device wants to be told is read behind it
            if not self.load16(self.used, 0) & NO_NOTIFICATION:
                self.to_kick = True
        if self.load16(self.theirs, 2) != given_back:
            self.store16(self.theirs, 2, given_back)
            full_fence()
            if not self.load16(self.avail, 0) & NO_NOTIFICATION:
                self.to_call = True
        return 0

    cdef int skip(self, u16 used, u16 avail) except -1:
        """Go on at two indices: what was before them has been written over."""
        cdef u32 i
        if self.own is not None:
            # Only these two can have written over what a relay has not passed on.
            if <u16>(used - self.next_used) > self.size:
                return self.blame(DEVICE, f"used index {used} runs ahead of what the device has")
            return self.blame(
                DRIVER, f"available index {avail} runs ahead of a ring of {self.size}"
            )
        self.taken += <u16>(avail - self.next_avail)
        self.unseen += <u16>(avail - self.next_avail)
        self.completed += <u16>(used - self.next_used)
        # What was read of the used ring may be further than what was of the available one.
        if <u16>(avail - used) > self.size:
            avail = used
        self.next_avail, self.next_used, self.marked = avail, used, used
        self.doubt = <u16>(avail - used)
        for i in range(self.size):
            self.held[i].out = self.held[i].returned = self.held[i].headless = 0
        self.headless = 0
        return 0

    cdef int read_headers(self, list requests) except -1:
        """Read what requests begin with, as far as it has been translated meanwhile."""
        cdef u32 head
        cdef u16 used
        for head in range(self.size):
            if self.violation is not None:
                return 0
            if self.held[head].lacks:
                self.note_taken(<u16>head, now_ns(), requests, False)
                continue
            if not self.held[head].headless:
                continue
            self.walk(<u16>head, None)
            acquire_fence()
            used = self.load16(self.used, 2)
            if <u16>(used - self.next_used) > self.size:
                return 0
            self.mark(used)
            if self.held[head].returned or self.header_bytes == HEADER:
                self.held[head].headless = 0
                self.headless -= 1
                if not self.held[head].returned:
                    self.held[head].kind = kind_of((<u32 *>self.header)[0])
                    self.held[head].offset = (<u64 *>self.header)[1] << 9
        return 0

    cdef int mark(self, u16 upto) except -1:
        """Count used entries by what they name, as far as they were not."""
        cdef u32 head
        while self.marked != upto:
            self.used.transfer(
                <u8 *>&head, 4 + 8 * <u64>(self.marked % self.size), 4, False
            )
            if head < self.size:
                self.held[head].returned += 1
            self.marked += 1
        return 0

    cdef bint take(self, u64 now, list requests, list completions) except -1:
        """Look at the next available request; False if the rest was written over meanwhile."""
        cdef u16 head = self.load16(self.avail, 4 + 2 * <u64>(self.next_avail % self.size))
        cdef Held *held
        cdef TraceRecord record
        cdef list pieces = None if requests is None else []
        cdef bint known
        cdef u16 used
        cdef u64 sector = 0
        cdef u32 operation = 0
        acquire_fence()
        used = self.load16(self.used, 2)
        if <u16>(used - self.next_used) > self.size:
            self.skip(used, self.load16(self.avail, 2))
            return False
        if head >= self.size:
            self.blame(DRIVER, f"available entry names descriptor {head} of {self.size}")
            return True
        held = &self.held[head]
        self.mark(used)
        while held.out and self.next_used != self.marked and self.violation is None:
            self.give_back(now, completions, requests)
        if self.violation is not None:
            return True
        if held.out:
            self.blame(
                DRIVER, f"descriptor {head} was made available again before it was given back"
            )
            return True
        if self.own is not None:
            now = now_ns()  # what it was before may be given back at this very look
            self.taken += 1
            held.since, held.kind, held.offset, held.room = now, 0, 0, 0
            held.out, held.lacks, held.position = 1, 1, self.next_avail
            self.headless += 1
            self.note_taken(head, now, requests, False)
            if self.violation is None:
                if held.lacks and tracing & REQUESTS:
                    self.trace_lacking(head, now)
                self.store16(self.offered, 4 + 2 * <u64>(self.next_avail % self.size), head)
                self.next_avail += 1
            return True
        self.walk(head, pieces)
        acquire_fence()
        used = self.load16(self.used, 2)
        if <u16>(used - self.next_used) > self.size:
            self.skip(used, self.load16(self.avail, 2))
            return False
        self.mark(used)
        known = not held.returned and not self.unreached
        if known and self.fault is not None:
            self.blame(DRIVER, self.fault)
            return True
        self.taken += 1
        held.since, held.kind, held.offset = now, 0, 0
        if known:
            held.out, held.room = 1, self.room
            self.bytes += self.given + self.room
            if self.block and self.header_bytes == HEADER:
                operation = (<u32 *>self.header)[0]
                sector = (<u64 *>self.header)[1]
                held.kind = kind_of(operation)
                held.offset = sector << 9
            elif self.block and self.header_lost:
                held.headless = 1
                self.headless += 1
        else:
            held.out, held.room = 2, 0
            self.unseen += 1
        if tracing & REQUESTS:
            record = trace_record(WHAT_TAKEN, self.origin)
            record.queue, record.head, record.time, record.since = self.queue, head, now, now
            record.access = held.kind if held.kind < 3 else 0
            if known:
                record.length, record.detail = self.given, self.room
                record.address, record.result = self.first, self.next_avail
            else:
                record.result = UNKNOWN
            trace(&record)
            if known and tracing & BUFFERS:
                # The descriptors are still the device's: they say the same again.
                pieces = [] if pieces is None else pieces
                if not pieces:
                    self.walk(head, pieces)
                self.trace_pieces(head, pieces, now)
        if requests is not None:
            kind = operation if known and self.block and self.header_bytes == HEADER else None
            requests.append((
                head, self.next_avail, known, kind, None if kind is None else sector,
                self.given if known else 0, self.room if known else 0, pieces if known else [],
            ))
        self.next_avail += 1
        return True

    cdef int trace_lacking(self, u16 head, u64 now) except -1:
        """Write that a request consists of memory that has no translation yet."""
        cdef TraceRecord record = trace_record(WHAT_LACKING, self.origin)
        record.queue, record.head, record.time, record.since = self.queue, head, now, now
        record.address, record.detail = self.first, 1
        trace(&record)
        return 0

    cdef int note_taken(self, u16 head, u64 now, list requests, bint last) except -1:
        """Find out what a request consists of that a relay passes on, and that is not known yet.

        Behind an IOMMU that may become known when the device has asked for what it needs; and when
        it gives the request back at the latest (`last`).
        """
        cdef Held *held = &self.held[head]
        cdef list pieces = []
        cdef TraceRecord record
        cdef bint known, content
        cdef u64 sector = 0
        cdef u32 operation = 0
        self.walk(head, pieces)
        if self.fault is not None:
            return self.blame(DRIVER, self.fault)
        known = not self.unreached
        content = known and not self.header_lost
        if content and tracing & CONTENTS:
            content = self.open_pieces(pieces, False)
            if self.space.iotlb is not None and content:
                # What the device is to write as well, so that nothing lacks when it has.
                content = self.open_pieces(pieces, True) and self.open_pieces(pieces, False)
        if not content and not last:
            self.scratch.release()
            return 0
        held.lacks = 0
        self.headless -= 1
        if known:
            held.room = self.room
            self.bytes += self.given + self.room
            if self.block and self.header_bytes == HEADER:
                operation = (<u32 *>self.header)[0]
                sector = (<u64 *>self.header)[1]
                held.kind = kind_of(operation)
                held.offset = sector << 9
        else:
            held.out = 2
            self.unseen += 1
        if tracing & REQUESTS:
            record = trace_record(WHAT_TAKEN, self.origin)
            record.queue, record.head, record.time, record.since = self.queue, head, now, held.since
            record.access = held.kind if held.kind < 3 else 0
            if known:
                record.length, record.detail = self.given, self.room
                record.address, record.result = self.first, held.position
            else:
                record.result = UNKNOWN
            trace(&record)
            if known and tracing & BUFFERS:
                self.trace_pieces(head, pieces, now)
            if content and tracing & CONTENTS:
                trace_given(self.scratch, self.origin, self.queue, head)
        self.scratch.release()
        if requests is not None:
            kind = operation if known and self.block and self.header_bytes == HEADER else None
            requests.append((
                head, held.position, known, kind, None if kind is None else sector,
                self.given if known else 0, self.room if known else 0, pieces if known else [],
            ))
        return 0

    cdef bint open_pieces(self, list pieces, bint writes) except -1:
        """Have `scratch` hold the memory that a request gives to read, or to write; False if it
        cannot be reached."""
        cdef int access = WRITE if writes else READ
        cdef u64 address, length
        self.scratch.release()
        self.scratch.access, self.scratch.start, self.ignored.count = READ, 0, 0
        for address, length, is_written in pieces:
            if is_written != writes or not length:
                continue
            if length - 1 > <u64>-1 - address:
                return False
            if not self.space.translate(self.scratch, address, length, access, self.ignored):
                return False
            if self.scratch.stop:
                return False
        return True

    cdef int note_answer(self, u16 head, u64 written) except -1:
        """Write what the device wrote into a request, before the driver has it back."""
        cdef list pieces = []
        self.walk(head, pieces)
        if self.fault is None and not self.unreached and self.open_pieces(pieces, True):
            trace_answer(self.scratch, written, self.origin, self.queue, head)
        self.scratch.release()
        return 0

    cdef int give_back(self, u64 now, list completions, list requests) except -1:
        """Look at the next used entry, which was counted."""
        cdef u32 element[2]
        cdef Held *held
        cdef TraceRecord record
        cdef u64 since = 0, offset = 0
        cdef int kind = 0
        self.used.transfer(
            <u8 *>element, 4 + 8 * <u64>(self.next_used % self.size), 8, False
        )
        if element[0] >= self.size:
            return self.blame(DEVICE, f"used entry names descriptor {element[0]} of {self.size}")
        held = &self.held[element[0]]
        if held.returned:
            held.returned -= 1
        if held.lacks:
            now = now_ns()
            self.note_taken(<u16>element[0], now, requests, True)
            if self.violation is not None:
                return 0
        if held.out:
            if held.out == 1 and element[1] > held.room:
                return self.blame(
                    DEVICE,
                    f"request {element[0]} was given back with {element[1]} bytes written, and has "
                    f"room for {held.room}",
                )
            since, kind, offset = held.since, held.kind, held.offset
            if self.own is not None and tracing & CONTENTS:
                self.note_answer(<u16>element[0], element[1])
                now = now_ns()  # records of a request are in the order of their times
            self.headless -= held.headless
            held.out = held.headless = 0
        elif self.doubt:
            self.doubt -= 1
        else:
            return self.blame(
                DEVICE, f"request {element[0]} was given back, and the device does not have it"
            )
        if self.own is not None:
            self.theirs.transfer(
                <u8 *>element,
                4 + 8 * <u64>(<u16>(self.next_used + self.behind) % self.size), 8, True,
            )
        self.next_used += 1
        self.completed += 1
        if since and self.latencies is not None and tracing & MEASURE:
            add_latency(self.latencies, kind, since, now)
        if tracing & REQUESTS:
            record = trace_record(WHAT_COMPLETED, self.origin)
            record.queue, record.head, record.time, record.since = (
                self.queue, element[0], now, since
            )
            record.length, record.access = element[1], <u16>(kind if kind < 3 else 0)
            record.detail = offset if kind in (1, 2) else 0
            trace(&record)
        if completions is not None:
            completions.append((element[0], element[1], since, now))
        return 0

    cdef int trace_pieces(self, u16 head, list pieces, u64 now) except -1:
        cdef TraceRecord record = trace_record(WHAT_BUFFER, self.origin)
        record.queue, record.head = self.queue, head
        for number, (address, length, writes) in enumerate(pieces):
            record.address, record.length, record.detail = address, length, number
            record.access, record.time = WRITE if writes else READ, now
            trace(&record)
        return 0

    cdef int walk(self, u16 head, list pieces) except -1:
        """Follow a chain as it is now; what is wrong with it is left in `fault`."""
        self.given = self.room = self.first = 0
        self.any = self.header_lost = self.unreached = False
        self.header_bytes = 0
        self.fault = None
        return self.walk_table(self.desc, self.size, head, head, False, pieces)

    cdef int walk_table(
        self, IoVector table, u64 entries, u16 index, u16 head, bint nested, list pieces
    ) except -1:
        cdef Desc desc
        cdef u64 steps = 0
        while True:
            if index >= entries:
                self.fault = f"descriptor index {index} is outside its table of {entries}"
                return 0
            steps += 1
            if steps > entries:
                self.fault = f"the chain from descriptor {head} has a loop"
                return 0
            table.transfer(<u8 *>&desc, 16 * <u64>index, 16, False)
            if desc.flags & DESC_INDIRECT:
                return self.walk_indirect(&desc, head, nested, pieces)
            if desc.flags & DESC_WRITE:
                self.room += desc.size
            else:
                if self.room:
                    self.fault = (
                        f"descriptor {index} of request {head} is to be read, behind one to write"
                    )
                    return 0
                self.given += desc.size
                if self.block and self.header_bytes < HEADER and not self.header_lost:
                    self.read_header(desc.addr, desc.size)
            if not self.any:
                self.any, self.first = True, desc.addr
            if pieces is not None:
                pieces.append((desc.addr, desc.size, bool(desc.flags & DESC_WRITE)))
            if not desc.flags & DESC_NEXT:
                return 0
            index = desc.next

    cdef int walk_indirect(self, const Desc *desc, u16 head, bint nested, list pieces) except -1:
        cdef u64 entries = desc.size // 16
        if not self.indirect:
            self.fault = "an indirect descriptor, but the feature was not negotiated"
        elif nested:
            self.fault = "an indirect descriptor inside an indirect table"
        elif desc.flags & DESC_NEXT:
            self.fault = "an indirect descriptor that continues"
        elif not desc.size or desc.size % 16 or entries > max(self.size, CHAIN_LIMIT):
            self.fault = f"an indirect table of {desc.size} bytes"
        elif desc.addr > <u64>-1 - (desc.size - 1):
            self.fault = f"an indirect table at {desc.addr:#x} passes 2**64"
        if self.fault is not None:
            return 0
        self.table.release()
        self.table.access, self.table.start = READ, desc.addr
        try:
            # Where it cannot be reached, the device will say so or ask for it.
            self.unreached = not self.reach(self.table, desc.addr, desc.size)
            if not self.unreached:
                self.walk_table(self.table, entries, 0, head, True, pieces)
        finally:
            self.table.release()
        return 0

    cdef bint reach(self, IoVector found, u64 addr, u64 size) except -1:
        """Find memory; False if there is none, or no translation yet."""
        self.ignored.count = 0
        return self.space.translate(found, addr, size, READ, self.ignored) and not found.stop

    cdef int read_header(self, u64 addr, u32 size) except -1:
        """Read more of what a block request begins with."""
        cdef u64 count = min(<u64>(HEADER - self.header_bytes), <u64>size)
        if not count or count - 1 > <u64>-1 - addr:
            return 0
        self.scratch.release()
        self.scratch.access, self.scratch.start = READ, addr
        try:
            if self.reach(self.scratch, addr, count):
                self.scratch.transfer(self.header + self.header_bytes, 0, count, False)
                self.header_bytes += <int>count
            else:
                self.header_lost = True
        finally:
            self.scratch.release()
        return 0

    cdef int blame(self, str who, str what) except -1:
        if self.vanished():
            who, what = DRIVER, "the file behind the ring's memory was truncated by its owner"
        self.violation = who, what
        return 0

    cdef void signal(self) noexcept:
        """Notify the device and the driver as far as that is to be. Plain C: it cannot raise."""
        if self.to_kick:
            self.to_kick = False
            if self.kick_fd >= 0:
                with nogil:
                    notify(self.kick_fd)
        if self.to_call:
            self.to_call = False
            self.interrupt()
            if self.call_fd >= 0:
                with nogil:
                    notify(self.call_fd)

    def note_notification(self):
        """Count that the driver is notified."""
        self.interrupt()

    cdef void interrupt(self) noexcept:
        """As :meth:`note_notification`. Plain C on the ring's own numbers: it cannot raise."""
        cdef TraceRecord record
        self.notifications += 1
        if tracing & REQUESTS:
            record = trace_record(WHAT_INTERRUPT, self.origin)
            record.queue, record.detail = self.queue, self.next_used
            trace(&record)

    def rebind(self, AddressSpace space not None):
        """Go on in other memory."""
        before = self.table, self.scratch, self.offered, self.theirs
        self.table, self.scratch = IoVector(), IoVector()
        self.offered, self.theirs = IoVector(), IoVector()
        RingAreas.rebind(self, space)


cdef inline uint8_t kind_of(u32 operation) noexcept:  # arithmetic
    """An operation of a disk as `Latencies` numbers it (virtio 1.4, section 5.2.6)."""
    if operation == 0:
        return 1
    if operation == 1:
        return 2
    return 3 if operation == 4 else 0


cdef class EventRelay(Feed):
    """An eventfd on its way from a driver to a device, or back; the loop's thread passes it on.

    Args:
        callback: Called once a rule of the ring was broken, and where Python is to pass it on.
        source: The eventfd, which is waited for by its edge and not read.
        observer: Looks at the ring before it is passed on.
        target: The eventfd to notify instead, or -1 where the other side waits for the same one.
        call: Whether it notifies the driver.

    Attributes:
        passed: How often it was signaled, as far as that was seen.
        by_python: Whether Python passes it on: the loop then calls back for its descriptor.
    """

    cdef RingObserver observer
    cdef int target
    cdef bint call
    cdef bint told           # Python knows of a broken rule
    cdef readonly u64 passed
    cdef public bint by_python

    def __init__(
        self, callback, patience, int source, RingObserver observer not None, *, int target=-1,
        bint call=False
    ):
        self.source, self.observer, self.target, self.call = source, observer, target, call

    cdef bint receive(self, list woken) except -1:
        if self.by_python:
            return False
        self.passed += 1
        self.observer.look_into(None, None)
        if self.call and self.observer.own is None:
            self.observer.interrupt()
        if self.observer.violation is not None and not self.told:
            # Python decides whether anything goes on.
            self.told = self.pending = True
        elif self.observer.own is not None:
            self.observer.signal()
        elif self.target >= 0:
            with nogil:
                notify(self.target)
        return True

    def pass_on(self):
        """Notify the other side, from Python."""
        self.passed += 1
        if self.target >= 0:
            with nogil:
                notify(self.target)

    def close(self):
        """Look at the descriptor no more."""
        self.source = self.target = -1

    def settle(self):
        """Learn that Python knows of a broken rule."""
        self.pending = False
