"""Queues of an NVMe controller (NVMe 1.4, sections 4.1 to 4.6 and 6).

The queues are a doorbell: a transport rings them for what a driver wrote, and has them serve what
was rung for. Submission entries are fetched in batches; plain reads and writes are served here,
straight between the image and guest memory, and completed; one interrupt follows a batch. What is
not plain (other commands, bad fields, memory that is not mapped or not shared, data that has to be
waited for, an image that fails) is left to the controller, which finds out what is wrong with it
and completes it.

While the function is not bus master the queues are idle (section 2.1.2, CMD.BME): what is rung is
fetched, and what has completed is posted, once it is again.

A command is fetched only if a completion entry can be kept free for it, so that posting one never
has to wait.

Everything happens in one thread. While Python runs, or while memory that is not shared is asked
for, another doorbell or a reset may arrive in between: `running` and `generation` tell.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.string cimport memcpy

from guestio._core.base.atomics cimport READ, WRITE, store_atomic
from guestio._core.base.capacity cimport GUESTIO_ASSERT, LOOP_REQUESTS
from guestio._core.base.checks cimport as_address, as_size
from guestio._core.base.clock cimport now_ns
from guestio._core.base.syscalls cimport notify
from guestio._core.memory.image cimport MOVED, Move
from guestio._core.trace.tracepoints cimport (
    REQUESTS, TraceRecord, WHAT_COMPLETED, WHAT_FAILED, WHAT_INTERRUPT, WHAT_TAKEN, trace,
    trace_record, tracing,
)

from guestio.errors import AccessError

cdef extern from "<endian.h>" nogil:
    u32 le32toh(u32)
    u64 le64toh(u64)
    u32 htole32(u32)

cdef extern from * nogil:
    """
    enum { NVME_RELEASE = __ATOMIC_RELEASE };
    #define NVME_FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    int NVME_RELEASE
    void NVME_FENCE()

cdef enum:
    OP_FLUSH = 0
    OP_WRITE = 1
    OP_READ = 2
    KIND_OTHER = 0           # as tracepoints number them
    KIND_READ = 1
    KIND_WRITE = 2
    KIND_FLUSH = 3
    TRACED_COMMAND = 1 << 15 # in what is traced of a completion: it was a command of this kind
    FAULTS_KEPT = 16         # wrong doorbells of a turn that are told one by one
    PLAIN_FLAGS = 0x40       # PSDT 0 or 1: PRPs, or an SGL; nothing else
    BIT_FUA = 1 << 30
    SGL_DATA = 0x00
    SGL_LAST = 0x30

INVALID_REGISTER, INVALID_VALUE, BROKEN = range(3)


cdef inline u32 word(const u8 *at) noexcept nogil:
    cdef u32 value
    memcpy(&value, at, 4)
    return le32toh(value)


cdef inline u64 quad(const u8 *at) noexcept nogil:
    cdef u64 value
    memcpy(&value, at, 8)
    return le64toh(value)


@cython.final
cdef class Namespace:
    """What reads and writes of a namespace are served from.

    Args:
        image: The file.
        shift: Bits of a block's size.
        writable: Whether writes are served.
    """

    cdef ImageFile image
    cdef u64 shift
    cdef bint writable

    def __init__(self, ImageFile image not None, int shift, bint writable):
        if not 9 <= shift <= 12:
            raise ValueError(f"blocks of 2**{shift} bytes are neither of 512 nor of 4096")
        self.image, self.shift, self.writable = image, shift, writable


@cython.final
cdef class NvmeQueues(Doorbell):
    """The queues of a controller, and the doorbell for all of them.

    Args:
        memory: What the function reaches by DMA, a `BusMemory`.
        most: Queues of each kind, that of the admin commands included; 2 to 64.
        command: Called with the queue's number and the entry's 64 bytes for each command that is
            not served here. It ends with :meth:`complete` or :meth:`forget`, at once or later.
        interrupt: Called with a vector when completions were posted, if it has no eventfd; see
            :meth:`set_calls`.
        fault: Called with INVALID_REGISTER, INVALID_VALUE or BROKEN and what happened, when a
            doorbell is wrong, or a queue cannot be accessed: then all queues stand still.
        max_transfer: Bytes of a command's data at most.
        turn_bytes: Bytes that are moved in a turn; the last command may exceed it.
        turn_seconds: Seconds that a turn takes, but for the command that is served then.

    Attributes:
        fast: Whether reads and writes are served here at all.
        write_through: Whether writes are left to the controller, which flushes them.
        commands: Commands fetched.
        origin: The server's number in records of tracepoints.
        served: Those of them that were served here.
        reads: Reads served here.
        writes: Writes served here.
        bytes_read: Bytes of them.
        bytes_written: The same of writes.

    Threads: one, that of the event loop.
    """

    def __init__(
        self, memory, *, most, command, interrupt, fault, max_transfer, turn_bytes,
        double turn_seconds,
    ):
        self.memory, self.command, self.interrupt = memory, command, interrupt
        self.fault, self.fast, self.faults, self.held = fault, True, [], []
        if not 2 <= most <= MAX_QUEUES:
            raise ValueError(f"{most} queues are not in 2..{MAX_QUEUES}")
        self.most_queues, self.max_transfer = most, as_size(max_transfer, "max_transfer")
        self.turn_bytes = as_size(turn_bytes, "turn_bytes")
        self.turn_ns = <u64>(turn_seconds * 1e9)
        self.namespaces = []
        self.traced = {}
        self.set_calls(())
        self.scratch, self.data, self.failed = IoVector(), IoVector(), Misses()

    # What the controller does with queues.

    def reset(self):
        """Forget all queues, the shadow doorbells and what is not completed."""
        cdef int i
        for i in range(MAX_QUEUES):
            self.sq[i].live = self.cq[i].live = False
        self.generation += 1
        self.ready = self.due = self.shadow = self.events = 0
        self.broken = self.write_through = False
        self.interrupt_mask = 0
        self.faults.clear()
        self.held.clear()
        self.traced.clear()
        # They refer to the memory that they were last filled from, which may go now.
        self.scratch.close()
        self.data.close()

    def set_namespaces(self, namespaces):
        """Serve reads and writes of these from now on; the first has the number 1."""
        cdef list given = list(namespaces)
        for each in given:
            if not isinstance(each, Namespace):
                raise TypeError(f"{each!r} is no Namespace")
        self.namespaces = given

    def create_completion_queue(self, number, address, size, vector):
        """Make a completion queue; ``vector`` is -1 for none."""
        cdef Completion *cq = &self.cq[self.check_number(number)]
        if cq.live:
            raise ValueError(f"completion queue {number} exists")
        cq.base, cq.size, cq.vector = as_address(address), as_size(size, "size"), vector
        self.check_range(cq.base, cq.size, COMPLETION)
        cq.head = cq.tail = cq.outstanding = cq.users = 0
        cq.blocked, cq.phase, cq.live = 0, 1, True

    def create_submission_queue(self, number, address, size, completions):
        """Make a submission queue, whose commands complete in a queue that exists."""
        cdef u32 other = self.check_number(completions)
        cdef Submission *sq = &self.sq[self.check_number(number)]
        if sq.live or not self.cq[other].live:
            raise ValueError(f"submission queue {number} exists, or its completion queue does not")
        sq.base, sq.size = as_address(address), as_size(size, "size")
        self.check_range(sq.base, sq.size, ENTRY)
        sq.head = sq.tail = sq.outstanding = 0
        sq.completions, sq.live = other, True
        self.cq[other].users += 1
        if number and self.shadow:
            # The driver may ring from the first entry on, or find that it need not.
            self.announce(2 * self.check_number(number), 0)

    def delete_submission_queue(self, number):
        """Take a submission queue away, and the commands in it; none is outstanding any more."""
        cdef u32 index = self.check_number(number)
        cdef Submission *sq = &self.sq[index]
        if sq.live:
            sq.live = False
            self.cq[sq.completions].users -= 1
            self.cq[sq.completions].blocked &= ~(<u64>1 << index)
            self.ready &= ~(<u64>1 << index)
            if self.traced:
                self.traced = {key: was for key, was in self.traced.items() if key >> 16 != index}

    def stop_submission_queue(self, number):
        """Fetch nothing more from a submission queue, which is to be deleted."""
        cdef u32 index = self.check_number(number)
        self.sq[index].tail = self.sq[index].head
        self.cq[self.sq[index].completions].blocked &= ~(<u64>1 << index)
        self.ready &= ~(<u64>1 << index)

    def delete_completion_queue(self, number):
        """Take a completion queue away that no submission queue uses."""
        cdef u32 index = self.check_number(number)
        if self.cq[index].users:
            raise ValueError(f"completion queue {number} is in use")
        self.cq[index].live = False
        self.due &= ~(<u64>1 << index)

    def has_submission_queue(self, number):
        """Whether there is such a queue."""
        return 0 <= number < self.most_queues and self.sq[<u32>number].live

    def has_completion_queue(self, number):
        """Whether there is such a queue."""
        return 0 <= number < self.most_queues and self.cq[<u32>number].live

    def users(self, number):
        """Submission queues that complete in a completion queue."""
        return self.cq[self.check_number(number)].users

    def outstanding(self, number):
        """Commands of a submission queue that are neither completed nor forgotten."""
        return self.sq[self.check_number(number)].outstanding

    def set_shadow(self, doorbells, events):
        """Use shadow doorbells and event indices at these addresses; 0 for none."""
        self.shadow, self.events = as_address(doorbells), as_address(events)

    def mask(self, bits):
        """Raise no interrupts of these vectors, as INTMS wants it."""
        self.interrupt_mask |= <u32>as_address(bits)

    def unmask(self, bits):
        """Undo :meth:`mask`; what was posted meanwhile is interrupted for now."""
        cdef u32 given = <u32>as_address(bits)
        cdef u32 back = given & self.interrupt_mask
        cdef u32 i
        self.interrupt_mask &= ~given
        for i in range(self.most_queues):
            if self.cq[i].live and 0 <= self.cq[i].vector < 32 and back >> self.cq[i].vector & 1:
                if self.cq[i].head != self.cq[i].tail:
                    self.due |= <u64>1 << i
        self.signal()

    def set_calls(self, fds):
        """Signal eventfds for completions of the first vectors, -1 for one that has none.

        They stay the caller's, and are open until others are set.
        """
        cdef int i
        for i in range(MAX_QUEUES):
            self.call[i] = fds[i] if i < len(fds) else -1

    @property
    def masked(self):
        """Bits of the vectors that are masked."""
        return self.interrupt_mask

    cdef u32 check_number(self, number) except? 0xFFFFFFFF:
        if not 0 <= number < self.most_queues:
            raise ValueError(f"there is no queue {number} among {self.most_queues}")
        return number

    cdef int check_range(self, u64 base, u32 size, u64 each) except -1:
        if size < 2 or size > 1 << 16 or base % 4 or base > <u64>-1 - size * each:
            raise ValueError(f"{size} entries at {base:#x} are no queue")
        return 0

    def complete(self, number, cid, status, result=0, *, bint counted=True):
        """Post a completion, and interrupt for it unless a batch is being served.

        Args:
            number: The submission queue.
            cid: The command's identifier.
            status: Status code, and its type from bit 8 on; bit 14 says not to try again.
            result: Dword 0 of the entry.
            counted: Whether the command is outstanding; not one that was forgotten.

        Returns:
            False if there is no free entry, which only happens to one that is not counted.
        """
        cdef u32 index = self.check_number(number)
        if not self.sq[index].live or self.broken:
            return True
        if counted and not self.sq[index].outstanding:
            raise ValueError(f"no command of submission queue {number} is outstanding")
        if not counted:
            if not self.room(self.sq[index].completions):
                return False
            self.sq[index].outstanding += 1
            self.cq[self.sq[index].completions].outstanding += 1
        self.post(index, cid, status, result)
        if not self.running:
            self.signal()
        return True

    def forget(self, number):
        """Stop counting a command that is completed some time, or never: it keeps no entry free."""
        cdef u32 index = self.check_number(number)
        if self.sq[index].live and self.sq[index].outstanding:
            self.sq[index].outstanding -= 1
            self.cq[self.sq[index].completions].outstanding -= 1

    # Doorbells.

    cdef bint ring(self, u64 offset, u64 value, int size) except -1:
        """Note a write to a doorbell (sections 3.1.16 and 3.1.17), ``offset`` from the first one."""
        if size != 4:
            return False
        self.note(offset, value)
        return True

    cdef int note(self, u64 offset, u64 value) except -1:
        cdef u64 place = offset // 8
        cdef u32 number
        cdef bint head = bool(offset & 4)
        if self.broken:
            return 0
        number = <u32>min(place, <u64>MAX_QUEUES)
        if number >= self.most_queues or not (
            self.cq[number].live if head else self.sq[number].live
        ):
            return self.fail(INVALID_REGISTER, f"doorbell at {offset:#x} belongs to no queue")
        GUESTIO_ASSERT(number < MAX_QUEUES)
        if head:
            return self.move_head(number, <u32>min(value, <u64>0xFFFFFFFF))
        if value >= self.sq[number].size:
            return self.fail(
                INVALID_VALUE,
                f"tail {value} of submission queue {number} of {self.sq[number].size} entries",
            )
        self.sq[number].tail = <u32>value
        self.ready |= <u64>1 << number
        return 0

    cdef int fail(self, int kind, str what) except -1:
        """Note a wrong doorbell, for when Python may be called."""
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append((kind, what))
        return 0

    cdef int report_faults(self) except -1:
        faults, self.faults = self.faults, []
        for kind, what in faults:
            self.fault(kind, what)
        return 0

    cdef int move_head(self, u32 number, u32 value) except -1:
        """The driver has consumed completions up to ``value``."""
        cdef Completion *cq = &self.cq[number]
        cdef u32 used = (cq.tail + cq.size - cq.head) % cq.size
        if value >= cq.size or (value + cq.size - cq.head) % cq.size > used:
            return self.fail(
                INVALID_VALUE,
                f"head {value} of completion queue {number}, which holds {used} entries "
                f"from {cq.head} on",
            )
        cq.head = value
        self.ready |= cq.blocked
        cq.blocked = 0
        return 0

    cdef u32 room(self, u32 number) noexcept:
        """Entries of a completion queue that are neither used nor kept free. Plain C: cannot raise."""
        cdef Completion *cq = &self.cq[number]
        cdef u32 used = (cq.tail + cq.size - cq.head) % cq.size + cq.outstanding
        return cq.size - 1 - used if used < cq.size - 1 else 0

    cdef int read_shadow_tail(self, u32 number) except -1:
        """Take over what the driver left in the shadow of a tail doorbell."""
        cdef Submission *sq = &self.sq[number]
        cdef u32 value
        if not self.fetch(self.shadow + 8 * number, <u8 *>&value, 4, True):
            return self.break_down(f"the shadow doorbell of submission queue {number}")
        # Entries are read after the tail that says they are there.
        NVME_FENCE()
        value = le32toh(value)
        if value >= sq.size:
            self.fail(INVALID_VALUE, f"shadow tail {value} of submission queue {number}")
        else:
            sq.tail = value
        return 0

    cdef int read_shadow_head(self, u32 number) except -1:
        cdef u32 value
        if not self.fetch(self.shadow + 8 * number + 4, <u8 *>&value, 4, True):
            return self.break_down(f"the shadow doorbell of completion queue {number}")
        return self.move_head(number, le32toh(value))

    cdef int announce(self, u32 index, u32 value) except -1:
        """Have the driver ring the doorbell when it goes past a value."""
        value = htole32(value)
        if not self.store(self.events + 4 * index, <u8 *>&value, 4, False):
            return self.break_down("an event index")
        # What the driver wrote before it could see this is to be seen now.
        NVME_FENCE()
        return 0

    cdef int break_down(self, str what) except -1:
        """Stand still: a queue is not where the driver said."""
        if not self.broken:
            self.broken = True
            self.ready = 0
            self.fault(BROKEN, f"{what} cannot be accessed")
        return 0

    # Serving.

    cdef bint serve(self) except -1:
        """Serve queues in turn until there is nothing to do, or the budget of a turn is used up.

        Returns:
            Whether there is more to do.
        """
        cdef u64 until
        cdef u32 i, number = 0
        if self.running:
            return False
        self.running, self.moved, until = True, 0, now_ns() + self.turn_ns
        try:
            while self.ready and self.memory._enabled:
                for i in range(<u32>MAX_QUEUES):
                    number = (self.next_queue + i) % MAX_QUEUES
                    if self.ready >> number & 1:
                        break
                GUESTIO_ASSERT(number < self.most_queues)
                self.next_queue = (number + 1) % MAX_QUEUES
                self.serve_queue(number)
                self.signal()
                if self.moved >= self.turn_bytes or now_ns() >= until:
                    break
        finally:
            self.running = False
        if self.faults:
            self.report_faults()
        return self.ready and self.memory._enabled

    def resume(self):
        """Go on where the function was not bus master; whether there is more to do."""
        cdef u64 generation = self.generation
        held, self.held = self.held, []
        for number, addr, entry in held:
            if generation == self.generation and not self.broken:
                self.put(number, addr, <const u8 *>PyBytes_AS_STRING(entry))
        if not self.running:
            self.signal()
        return self.serve()

    cdef int serve_queue(self, u32 number) except -1:
        """Serve the next commands of a submission queue."""
        cdef Submission *sq = &self.sq[number]
        cdef Completion *cq = &self.cq[sq.completions]
        cdef u64 generation = self.generation
        cdef u32 count, free, i, cid
        cdef u64 found = 0
        cdef bint served
        cdef const u8 *entry
        cdef bint shadowed = number and self.shadow
        if shadowed:
            self.read_shadow_tail(number)
        count = (sq.tail + sq.size - sq.head) % sq.size
        if count and not self.room(sq.completions) and shadowed:
            self.announce(2 * sq.completions + 1, cq.head)
            if generation == self.generation and not self.broken:
                self.read_shadow_head(sq.completions)
        if not count and shadowed:
            self.announce(2 * number, sq.tail)
            if generation == self.generation and not self.broken:
                self.read_shadow_tail(number)
                count = (sq.tail + sq.size - sq.head) % sq.size
        if generation != self.generation or self.broken or not sq.live:
            return 0
        free = self.room(sq.completions)
        if not count or not free:
            self.ready &= ~(<u64>1 << number)
            if count:
                cq.blocked |= <u64>1 << number
            return 0
        count = min(min(count, free), min(<u32>LOOP_REQUESTS, sq.size - sq.head))
        GUESTIO_ASSERT(count * ENTRY <= PAGE)
        if not self.fetch(sq.base + sq.head * ENTRY, self.entries, count * ENTRY, True):
            if generation == self.generation and self.memory._enabled:
                self.break_down(f"submission queue {number}")
            return 0
        if tracing & REQUESTS:
            found = now_ns()
        for i in range(count):
            if generation != self.generation or self.broken or not sq.live:
                return 0
            if sq.head == sq.tail:
                # The queue was stopped meanwhile.
                break
            entry = self.entries + i * ENTRY
            if tracing & REQUESTS:
                self.trace_taken(number, entry, sq.head, found)
            sq.head = (sq.head + 1) % sq.size
            sq.outstanding += 1
            cq.outstanding += 1
            self.commands += 1
            served = False
            if number and self.fast:
                try:
                    served = self.serve_entry(entry)
                except MemoryError:
                    self.data.release()
            if served:
                cid = word(entry) >> 16
                self.served += 1
                self.post(number, cid, 0, 0)
            else:
                self.command(number, PyBytes_FromStringAndSize(<char *>entry, ENTRY))
            if self.moved >= self.turn_bytes:
                break
        return 0

    cdef bint serve_entry(self, const u8 *entry) except -1:
        """Serve a plain read or write that goes well; False if it is left to the controller."""
        cdef u8 opcode = entry[0]
        cdef u32 nsid = word(entry + 4), more = word(entry + 48)
        cdef u64 block = quad(entry + 40), blocks = <u64>(more & 0xFFFF) + 1, total
        cdef int outcome
        cdef Namespace space
        cdef AddressSpace memory
        cdef Move move
        if (opcode != OP_READ and opcode != OP_WRITE) or entry[1] & ~PLAIN_FLAGS:
            return False
        if not 0 < nsid <= <u32>len(self.namespaces):
            return False
        space = <Namespace>self.namespaces[nsid - 1]
        total = space.image.size_now >> space.shift
        if block > total or blocks > total - block or blocks << space.shift > self.max_transfer:
            return False
        move.reading = opcode == OP_READ
        if not move.reading and (not space.writable or self.write_through or more & BIT_FUA):
            return False
        memory = self.memory._direct
        if memory is None:
            return False
        move.offset, move.length = block << space.shift, blocks << space.shift
        move.start = move.done = move.error = 0
        if not self.gather(memory, entry, move.length, WRITE if move.reading else READ):
            self.data.release()
            return False
        outcome = space.image.move(self.data, &move, move.length, space.image.waits)
        self.data.release()
        if outcome != MOVED:
            return False
        self.moved += move.length
        if move.reading:
            self.reads += 1
            self.bytes_read += move.length
        else:
            self.writes += 1
            self.bytes_written += move.length
        return True

    # A command's data (sections 4.3 and 4.4).

    cdef bint gather(self, AddressSpace space, const u8 *entry, u64 length, int access) except -1:
        """Collect the memory of a command's data in `data`; False if it is not plain."""
        self.failed.count = 0
        self.run_length = 0
        if entry[1] & PLAIN_FLAGS:
            if not self.gather_sgl(space, entry + 24, length, access):
                return False
        elif not self.gather_prps(space, quad(entry + 24), quad(entry + 32), length, access):
            return False
        return self.flush_run(space, access)

    cdef bint gather_prps(
        self, AddressSpace space, u64 first, u64 second, u64 length, int access
    ) except -1:
        cdef u64 left, at, entry, here, needed
        cdef u32 i, slots
        cdef bint chained
        if first & 3:
            return False
        here = min(length, PAGE - (first & (PAGE - 1)))
        if not self.append(space, first, here, access):
            return False
        left = length - here
        if not left:
            return True
        if left <= PAGE:
            return not second & (PAGE - 1) and self.append(space, second, left, access)
        if second & 7:
            return False
        at = second
        while left:
            slots = <u32>((PAGE - (at & (PAGE - 1))) // 8)
            needed = (left + PAGE - 1) // PAGE
            chained = needed > slots
            slots = <u32>min(<u64>slots, needed)
            GUESTIO_ASSERT(0 < slots <= LIST)
            if not self.fetch(at, <u8 *>self.listed, slots * 8, False):
                return False
            for i in range(slots - chained):
                entry = le64toh(self.listed[i])
                here = min(left, <u64>PAGE)
                if entry & (PAGE - 1) or not self.append(space, entry, here, access):
                    return False
                left -= here
            if chained:
                # A page of a list that goes on holds 511 entries: it ends.
                at = le64toh(self.listed[slots - 1])
                if at & (PAGE - 1):
                    return False
        return True

    cdef bint gather_sgl(
        self, AddressSpace space, const u8 *descriptor, u64 length, int access
    ) except -1:
        cdef u64 addr = quad(descriptor), left = length
        cdef u32 size = word(descriptor + 8), i, here
        cdef const u8 *at
        if descriptor[15] == SGL_DATA:
            return size == length and self.append(space, addr, size, access)
        if descriptor[15] != SGL_LAST or not size or size % 16 or size > PAGE:
            return False
        GUESTIO_ASSERT(size <= sizeof(self.listed))
        if not self.fetch(addr, <u8 *>self.listed, size, False):
            return False
        for i in range(size // 16):
            at = <const u8 *>self.listed + 16 * i
            here = word(at + 8)
            if at[15] != SGL_DATA or here > left:
                return False
            if here and not self.append(space, quad(at), here, access):
                return False
            left -= here
        return not left

    cdef bint append(self, AddressSpace space, u64 addr, u64 length, int access) except -1:
        """Add memory to `data`: with its neighbors, which are often translated together."""
        if addr > <u64>-1 - (length - 1):
            return False
        if self.run_length and addr == self.run_start + self.run_length and addr:
            self.run_length += length
            return True
        if not self.flush_run(space, access):
            return False
        self.run_start, self.run_length = addr, length
        return True

    cdef bint flush_run(self, AddressSpace space, int access) except -1:
        cdef u64 length = self.run_length
        self.run_length = 0
        if not length:
            return True
        if not space.translate(self.data, self.run_start, length, access, self.failed):
            return False
        return not self.data.stop

    # The queues' memory.

    cdef bint fetch(self, u64 addr, u8 *buffer, u64 length, bint may_ask) except -1:
        """Copy memory of the driver; False if that cannot be. The client may be asked for it."""
        cdef AddressSpace space = self.memory._direct
        cdef bint good
        cdef bytes found
        if addr > <u64>-1 - (length - 1):
            return False
        if space is not None:
            self.failed.count = 0
            good = space.translate(self.scratch, addr, length, READ, self.failed)
            if good and not self.scratch.stop:
                self.scratch.transfer(buffer, 0, length, False)
                good = not self.scratch.vanished(0, length)
                self.scratch.release()
                return good
            self.scratch.release()
        if not may_ask or not self.memory._enabled:
            return False
        try:
            found = self.memory.read(addr, length)
        except AccessError:
            return False
        GUESTIO_ASSERT(<u64>len(found) == length)
        memcpy(buffer, PyBytes_AS_STRING(found), length)
        return True

    cdef bint store(self, u64 addr, const u8 *buffer, u64 length, bint in_two) except -1:
        """Write memory of the driver; False if that cannot be.

        With ``in_two`` the last four bytes are stored after all the others, in one piece.
        """
        cdef AddressSpace space = self.memory._direct
        cdef u64 first = length - 4 if in_two else length
        cdef u32 last
        cdef bint good
        if space is not None:
            self.failed.count = 0
            good = space.translate(self.scratch, addr, length, WRITE, self.failed)
            if good and not self.scratch.stop and self.scratch.count == 1:
                self.scratch.transfer(<u8 *>buffer, 0, first, True)
                self.scratch.mark(0, length)
                if in_two:
                    memcpy(&last, buffer + first, 4)
                    store_atomic(<u8 *>self.scratch.vec[0].iov_base + first, last, 4, NVME_RELEASE)
                good = not self.scratch.vanished(0, length)
                self.scratch.release()
                return good
            self.scratch.release()
        elif not self.memory._enabled:
            # It waits until the function is bus master again: no access is made.
            return False
        try:
            self.memory.write(addr, (<const char *>buffer)[:first])
            if in_two:
                self.memory.write(addr + first, (<const char *>buffer + first)[:4])
        except AccessError:
            return False
        return True

    cdef int post(self, u32 number, u32 cid, u32 status, u32 result) except -1:
        """Post the completion of a command that is outstanding."""
        cdef Submission *sq = &self.sq[number]
        cdef Completion *cq = &self.cq[sq.completions]
        cdef u64 addr
        cdef u32 target = sq.completions
        cdef u32 words[4]
        words[0], words[1] = htole32(result), 0
        words[2] = htole32(sq.head | number << 16)
        words[3] = htole32((cid & 0xFFFF) | (status << 1 | cq.phase) << 16)
        addr = cq.base + cq.tail * COMPLETION
        # First: others may be posted while the client is asked.
        cq.tail += 1
        if cq.tail == cq.size:
            cq.tail, cq.phase = 0, cq.phase ^ 1
        sq.outstanding -= 1
        cq.outstanding -= 1
        if tracing & REQUESTS or self.traced:
            self.trace_completed(number, cid & 0xFFFF, status, tracing & REQUESTS)
        return self.put(target, addr, <u8 *>words)

    cdef int trace_taken(self, u32 number, const u8 *entry, u32 position, u64 found) except -1:
        """Trace that a command was fetched, and note what its completion is to say."""
        cdef TraceRecord record = trace_record(WHAT_TAKEN, self.origin)
        cdef u8 opcode = entry[0]
        cdef u32 nsid = word(entry + 4), cid = word(entry) >> 16
        cdef u64 block = quad(entry + 40), length = 0, offset = 0, shift
        cdef int kind = KIND_OTHER
        if number:
            kind = {OP_READ: KIND_READ, OP_WRITE: KIND_WRITE, OP_FLUSH: KIND_FLUSH}.get(
                opcode, KIND_OTHER
            )
        if (kind == KIND_READ or kind == KIND_WRITE) and 0 < nsid <= <u32>len(self.namespaces):
            shift = (<Namespace>self.namespaces[nsid - 1]).shift
            length = (<u64>(word(entry + 48) & 0xFFFF) + 1) << shift
            # One that lies beyond all disks is refused; it has no place.
            offset = block << shift if block <= <u64>-1 >> shift else <u64>-1
        record.queue, record.head, record.since, record.result = number, cid, found, position
        record.address = quad(entry + 24)
        if kind == KIND_WRITE:
            record.length = length
        elif kind == KIND_READ:
            record.detail = length
        self.traced[number << 16 | cid] = (found, kind, offset, length, opcode, nsid)
        trace(&record)
        return 0

    cdef int trace_completed(self, u32 number, u32 cid, u32 status, bint traced) except -1:
        """Trace that a command was completed, if that is wanted; what was noted of it goes."""
        cdef TraceRecord record = trace_record(WHAT_COMPLETED, self.origin)
        known = self.traced.pop(number << 16 | cid, None)
        if not traced:
            return 0
        record.queue, record.head = number, cid
        if known is not None:
            record.since, kind, record.detail, length, opcode, nsid = known
            record.access = kind
            record.length = length if kind == KIND_READ and not status else 0
            record.result = <u64>nsid << 32 | opcode << 16 | TRACED_COMMAND | (status & 0x7FFF)
        if status & 0x7FF:
            record.what = WHAT_FAILED
            trace(&record)
            record.what, record.time = WHAT_COMPLETED, 0
        trace(&record)
        return 0

    cdef int put(self, u32 target, u64 addr, const u8 *entry) except -1:
        """Write an entry of a completion queue to the driver's memory."""
        cdef u64 generation = self.generation
        if self.store(addr, entry, COMPLETION, True):
            if generation == self.generation:
                self.due |= <u64>1 << target
        elif generation == self.generation:
            if self.memory._enabled:
                self.break_down(f"completion queue {target}")
            else:
                # As many as there are entries at most.
                self.held.append(
                    (target, addr, PyBytes_FromStringAndSize(<const char *>entry, COMPLETION))
                )
        return 0

    cdef int trace_interrupt(self, u32 number) except -1:
        cdef TraceRecord record = trace_record(WHAT_INTERRUPT, self.origin)
        record.queue, record.detail = number, self.cq[number].tail
        trace(&record)
        return 0

    cdef int signal(self) except -1:
        """Interrupt for the completions that were posted since the last time."""
        cdef u64 due = self.due
        cdef u32 i
        cdef int vector
        self.due = 0
        for i in range(self.most_queues):
            if not due:
                break
            if due & 1 and self.cq[i].live:
                vector = self.cq[i].vector
                if vector >= 0 and not (vector < 32 and self.interrupt_mask >> vector & 1):
                    if vector < MAX_QUEUES and self.call[vector] >= 0:
                        with nogil:
                            notify(self.call[vector])
                    else:
                        self.interrupt(vector)
                    if tracing & REQUESTS:
                        self.trace_interrupt(i)
            due >>= 1
        return 0


