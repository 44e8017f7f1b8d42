"""Events written to a ring buffer for each thread, which a reader empties without stopping a writer.

A ring is shared memory (a memfd): a page that describes it, then the records. Its one writer writes
a record over the oldest one, whether that was read or not. Two numbers tell a reader what it has:

* ``claimed`` is raised before record number ``claimed - 1`` is written, ``written`` after it.
* A reader takes ``written``, copies what it has not read yet, and then takes ``claimed``: record
  number i was whole while it was copied exactly if ``i + capacity >= claimed``. All others of those
  that it has not read are lost, so each record is read or counted as lost, once.

The memory of a thread that has ended is given to the next new one, which goes on counting.

A request may be written as one :class:`WholeRequest`; :func:`spell_out` makes of it what it stands
for. Where records are counted, as read or as lost, it is one.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from guestio._core.base.capacity cimport TRACE_RECORDS
from guestio._core.base.checks cimport as_address, as_size
from guestio._core.base.clock cimport now_ns

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <pthread.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    enum { TRACE_VERSION = 2, TRACE_PAGE = 4096, TRACE_RINGS = 512, TRACE_MOST = 1 << 24 };

    /* The first page of a ring. The numbers that change are in a line of their own. */
    typedef struct TraceHead {
        char magic[8];
        uint32_t version;
        uint32_t record_bytes;
        uint64_t capacity;
        uint32_t process;
        uint32_t number;
        char unused[32];
        uint64_t claimed;
        uint64_t written;
    } TraceHead;

    typedef struct TraceRing {
        TraceHead *head;
        TraceSlot *slots;
        uint64_t capacity;
        uint64_t next;
        uint64_t at;            /* next % capacity */
        size_t bytes;
        int fd;
        uint32_t thread;
        uint32_t number;
        int ended;              /* its thread has; under the mutex */
        struct TraceRing *following;
    } TraceRing;

    static pthread_mutex_t trace_mutex = PTHREAD_MUTEX_INITIALIZER;
    static TraceRing *trace_rings;
    static uint32_t trace_count, trace_made;
    static uint64_t trace_capacity, trace_normal, trace_unheld;
    static pthread_key_t trace_key;
    /* Raised when all rings are released, or are to be larger: threads look for one again. */
    static uint32_t trace_era = 1;
    static __thread uint32_t trace_my_era;
    static __thread TraceRing *trace_mine;
    static __thread int trace_refused;

    static void trace_unmap(TraceRing *ring)
    {
        munmap(ring->head, ring->bytes);
        close(ring->fd);
        free(ring);
    }

    static TraceRing *trace_make(uint64_t capacity, uint32_t number)
    {
        TraceRing *ring = calloc(1, sizeof(TraceRing));
        void *memory = MAP_FAILED;
        if (!ring)
            return NULL;
        ring->bytes = TRACE_PAGE + capacity * sizeof(TraceSlot);
        ring->fd = memfd_create("guestio-trace", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (ring->fd >= 0 && !ftruncate(ring->fd, (off_t)ring->bytes)
            && !fcntl(ring->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
            memory = mmap(NULL, ring->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, 0);
        if (memory == MAP_FAILED) {
            if (ring->fd >= 0)
                close(ring->fd);
            free(ring);
            return NULL;
        }
        ring->head = memory;
        ring->slots = (TraceSlot *)((char *)memory + TRACE_PAGE);
        ring->capacity = ring->head->capacity = capacity;
        ring->number = ring->head->number = number;
        ring->head->process = (uint32_t)getpid();
        ring->head->version = TRACE_VERSION;
        ring->head->record_bytes = sizeof(TraceRecord);
        memcpy(ring->head->magic, "GIOTRACE", 8);
        return ring;
    }

    /* A ring for this thread: that of one that has ended, or a new one; NULL if none can be had. */
    static TraceRing *trace_adopt(void)
    {
        TraceRing *ring, **link;
        pthread_mutex_lock(&trace_mutex);
        for (link = &trace_rings; (ring = *link); link = &ring->following)
            if (ring->ended && ring->capacity == trace_capacity)
                break;
        if (!ring && trace_count >= TRACE_RINGS) {
            /* One of another size, which nothing writes any more, makes room. */
            for (link = &trace_rings; (ring = *link); link = &ring->following)
                if (ring->ended) {
                    *link = ring->following;
                    trace_count--;
                    trace_unmap(ring);
                    break;
                }
            ring = NULL;
        }
        if (!ring && trace_count < TRACE_RINGS) {
            ring = trace_make(trace_capacity, trace_made);
            if (ring) {
                trace_made++;
                trace_count++;
                ring->following = trace_rings;
                trace_rings = ring;
            }
        }
        if (ring) {
            ring->ended = 0;
            ring->thread = (uint32_t)syscall(SYS_gettid);
            /* Has the key's destructor called when the thread ends. */
            if (pthread_setspecific(trace_key, ring)) {
                ring->ended = 1;
                ring = NULL;
            }
        }
        pthread_mutex_unlock(&trace_mutex);
        return ring;
    }

    static void trace_thread_ends(void *ring)
    {
        uint32_t thread = (uint32_t)syscall(SYS_gettid);
        pthread_mutex_lock(&trace_mutex);
        /* It may have been released, and its memory given to another thread's. */
        for (TraceRing *each = trace_rings; each; each = each->following)
            if (each == ring && each->thread == thread)
                each->ended = 1;
        pthread_mutex_unlock(&trace_mutex);
        trace_mine = NULL;
        trace_refused = 1;
    }

    static void trace_drop_all(void)
    {
        while (trace_rings) {
            TraceRing *ring = trace_rings;
            trace_rings = ring->following;
            trace_unmap(ring);
        }
        trace_count = 0;
        trace_era++;
    }

    static void trace_release(void)
    {
        pthread_mutex_lock(&trace_mutex);
        trace_drop_all();
        trace_capacity = trace_normal;
        pthread_mutex_unlock(&trace_mutex);
    }

    /* All threads go on in rings of so many records at least; what they wrote stays to be read. */
    static void trace_enlarge(uint64_t capacity)
    {
        pthread_mutex_lock(&trace_mutex);
        if (capacity > trace_capacity) {
            trace_capacity = capacity;
            for (TraceRing *ring = trace_rings; ring; ring = ring->following)
                if (ring->capacity < capacity)
                    ring->ended = 1;
            trace_era++;
        }
        pthread_mutex_unlock(&trace_mutex);
    }

    static void trace_before_fork(void) { pthread_mutex_lock(&trace_mutex); }
    static void trace_in_parent(void) { pthread_mutex_unlock(&trace_mutex); }

    /* The rings are the parent's: nothing of a child's may be written there. */
    static int *trace_switch;
    static void trace_in_child(void)
    {
        *trace_switch = 0;
        trace_drop_all();
        trace_mine = NULL;
        trace_unheld = 0;
        pthread_setspecific(trace_key, NULL);
        pthread_mutex_unlock(&trace_mutex);
    }

    static int trace_begin(int *on, uint64_t capacity)
    {
        trace_switch = on;
        trace_capacity = trace_normal = capacity;
        if (pthread_key_create(&trace_key, trace_thread_ends))
            return -1;
        return pthread_atfork(trace_before_fork, trace_in_parent, trace_in_child);
    }

    /* A ring for this thread where it has none, or another one is due; NULL if there is none. */
    static __attribute__((noinline)) TraceRing *trace_change(uint32_t count)
    {
        TraceRing *ring = trace_mine;
        if (trace_my_era != trace_era) {
            trace_my_era = trace_era;
            trace_refused = 0;
            ring = trace_mine = NULL;
        }
        if (!trace_refused)
            ring = trace_mine = trace_adopt();
        if (!ring) {
            /* Not again at each event. */
            trace_refused = 1;
            __atomic_fetch_add(&trace_unheld, count, __ATOMIC_RELAXED);
            return NULL;
        }
        ring->next = ring->head->written;
        ring->at = ring->next % ring->capacity;
        return ring;
    }

    static void trace_put(TraceSlot *slots, uint32_t count)
    {
        TraceRing *ring = trace_mine;
        if (__builtin_expect(!ring || trace_my_era != trace_era, 0) && !(ring = trace_change(count)))
            return;
        uint64_t at = ring->at, end = ring->next += count;
        __atomic_store_n(&ring->head->claimed, end, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_RELEASE);
        for (uint32_t i = 0; i < count; i++) {
            slots[i].record.thread = ring->thread;
            ring->slots[at] = slots[i];
            if (++at == ring->capacity)
                at = 0;
        }
        ring->at = at;
        __atomic_store_n(&ring->head->written, end, __ATOMIC_RELEASE);
    }

    /* As `What` has them. */
    enum { TRACE_TAKEN = 2, TRACE_SERVED = 4, TRACE_COMPLETED = 5 };

    /* How many records a run of slots stands for. */
    static uint64_t trace_spelled(const TraceSlot *slots, uint64_t count)
    {
        uint64_t more = 0;
        for (uint64_t i = 0; i < count; i++)
            more += slots[i].record.what == TRACE_WHOLE;
        return count + 2 * more;
    }

    /* The records that they stand for, in the order of time if slots are. */
    static void trace_spell(const TraceSlot *slots, uint64_t count, TraceRecord *to)
    {
        for (uint64_t i = 0, end; i < count; i = end) {
            end = i + 1;
            if (slots[i].record.what != TRACE_WHOLE) {
                *to++ = slots[i].record;
                continue;
            }
            /* Those that were published together were all served before. */
            while (end < count && slots[end].record.what == TRACE_WHOLE
                   && slots[end].whole.time == slots[i].whole.time)
                end++;
            TraceRecord *done = to + 2 * (end - i);
            for (uint64_t k = i; k < end; k++) {
                const WholeRequest *whole = &slots[k].whole;
                uint64_t since = whole->time - whole->since;
                TraceRecord record = {
                    .time = since + whole->taken, .since = since, .address = whole->address,
                    .length = whole->readable, .detail = whole->writable,
                    .result = whole->position, .thread = whole->thread, .head = whole->head,
                    .what = TRACE_TAKEN, .origin = whole->origin, .queue = whole->queue,
                };
                *to++ = record;
                record.time = since + whole->served;
                record.what = TRACE_SERVED;
                record.access = whole->access;
                record.result = whole->written;
                *to++ = record;
                record.time = whole->time;
                record.what = TRACE_COMPLETED;
                record.address = 0;
                record.length = whole->written;
                record.detail = whole->offset;
                record.result = 0;
                *done++ = record;
            }
            to = done;
        }
    }

    /* The descriptors of up to `most` rings, duplicated, newest first; how many, or -1. */
    static int trace_list(int *fds, uint32_t *numbers, int most)
    {
        int count = 0;
        pthread_mutex_lock(&trace_mutex);
        for (TraceRing *ring = trace_rings; ring && count < most; ring = ring->following) {
            int fd = fcntl(ring->fd, F_DUPFD_CLOEXEC, 3);
            if (fd < 0)
                break;
            numbers[count] = ring->number;
            fds[count++] = fd;
        }
        pthread_mutex_unlock(&trace_mutex);
        return count;
    }

    static int trace_numbers(uint32_t *numbers, int *fds, int most)
    {
        int count = 0;
        pthread_mutex_lock(&trace_mutex);
        for (TraceRing *ring = trace_rings; ring && count < most; ring = ring->following) {
            fds[count] = ring->fd;
            numbers[count++] = ring->number;
        }
        pthread_mutex_unlock(&trace_mutex);
        return count;
    }

    static uint64_t trace_load(const uint64_t *at)
    {
        return __atomic_load_n(at, __ATOMIC_ACQUIRE);
    }

    static uint64_t trace_load_after(const uint64_t *at)
    {
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        return __atomic_load_n(at, __ATOMIC_RELAXED);
    }

    static void trace_copy(const TraceHead *head, uint64_t capacity, uint64_t first,
                           uint64_t count, TraceSlot *to)
    {
        const TraceSlot *slots = (const TraceSlot *)((const char *)head + TRACE_PAGE);
        uint64_t at = first % capacity, part = count < capacity - at ? count : capacity - at;
        memcpy(to, slots + at, part * sizeof(TraceSlot));
        memcpy(to + part, slots, (count - part) * sizeof(TraceSlot));
    }

    /* Maps a ring for reading; NULL with errno, EPROTO if it is none. */
    static TraceHead *trace_open(int fd, size_t *bytes)
    {
        struct stat status;
        TraceHead *head;
        if (fstat(fd, &status))
            return NULL;
        if (status.st_size < TRACE_PAGE + (off_t)sizeof(TraceRecord)
            || status.st_size > TRACE_PAGE + (off_t)TRACE_MOST * (off_t)sizeof(TraceRecord)) {
            errno = EPROTO;
            return NULL;
        }
        /* What could be truncated would kill its reader. */
        int seals = fcntl(fd, F_GET_SEALS);
        if (seals < 0 || !(seals & F_SEAL_SHRINK)) {
            errno = EPROTO;
            return NULL;
        }
        *bytes = (size_t)status.st_size;
        head = mmap(NULL, *bytes, PROT_READ, MAP_SHARED, fd, 0);
        if (head == MAP_FAILED)
            return NULL;
        if (memcmp(head->magic, "GIOTRACE", 8) || head->version != TRACE_VERSION
            || head->record_bytes != sizeof(TraceRecord)
            || TRACE_PAGE + head->capacity * sizeof(TraceRecord) != *bytes) {
            munmap(head, *bytes);
            errno = EPROTO;
            return NULL;
        }
        return head;
    }
    static void trace_close(TraceHead *head, size_t bytes) { munmap(head, bytes); }
    """
    enum:
        TRACE_VERSION
        TRACE_RINGS
        TRACE_MOST
    ctypedef struct TraceHead:
        uint64_t capacity
        uint32_t process
        uint32_t number
        uint64_t claimed
        uint64_t written
    uint64_t trace_capacity, trace_normal, trace_unheld
    int trace_begin(int *on, uint64_t capacity) nogil
    void trace_release()
    void trace_enlarge(uint64_t capacity)
    void trace_put(TraceSlot *slots, uint32_t count) nogil
    uint64_t trace_spelled(const TraceSlot *slots, uint64_t count) nogil
    void trace_spell(const TraceSlot *slots, uint64_t count, TraceRecord *to) nogil
    int trace_list(int *fds, uint32_t *numbers, int most) nogil
    int trace_numbers(uint32_t *numbers, int *fds, int most) nogil
    uint64_t trace_load(const uint64_t *at) nogil
    uint64_t trace_load_after(const uint64_t *at) nogil
    void trace_copy(
        const TraceHead *head, uint64_t capacity, uint64_t first, uint64_t count, TraceSlot *to
    ) nogil
    TraceHead *trace_open(int fd, size_t *bytes) nogil
    void trace_close(TraceHead *head, size_t bytes) nogil

VERSION = TRACE_VERSION
RECORD_BYTES = sizeof(TraceRecord)
MOST_RINGS = TRACE_RINGS
NORMAL_CAPACITY = TRACE_RECORDS
NO_QUEUE = TRACE_NO_QUEUE
NO_HEAD = TRACE_NO_HEAD
GROUPS = {
    "requests": REQUESTS, "translations": TRANSLATIONS, "life": LIFE, "measure": MEASURE,
    "buffers": BUFFERS, "contents": CONTENTS, "data": DATA,
}
CORE_WHAT = {
    "available": WHAT_AVAILABLE, "taken": WHAT_TAKEN, "stalled": WHAT_STALLED,
    "served": WHAT_SERVED, "completed": WHAT_COMPLETED, "interrupt": WHAT_INTERRUPT,
    "failed": WHAT_FAILED, "buffer": WHAT_BUFFER,
    "lacking": WHAT_LACKING, "content": WHAT_CONTENT, "data": WHAT_DATA, "miss": WHAT_MISS, "update": WHAT_UPDATE,
    "invalidate": WHAT_INVALIDATE, "refused": WHAT_REFUSED, "evicted": WHAT_EVICTED,
    "dma_map": WHAT_DMA_MAP, "dma_unmap": WHAT_DMA_UNMAP, "harvest": WHAT_HARVEST,
}

if trace_begin(&tracing, TRACE_RECORDS):
    raise MemoryError("no room for a thread's trace")


# It is called where nothing can be raised: what cannot be written is counted.
cdef void trace(TraceRecord *record) noexcept:
    if not record.time:
        record.time = now_ns()
    trace_put(<TraceSlot *>record, 1)


# Plain C on memory that is there, as `trace`: it cannot raise.
cdef void trace_all(TraceSlot *slots, uint32_t count) noexcept:
    trace_put(slots, count)


def wanted():
    """The groups that are written at this moment: bits of ``GROUPS``."""
    return tracing


def want(groups):
    """Have these groups written from now on, and no others."""
    global tracing
    cdef uint64_t bits = as_address(groups, "groups")
    if bits > 127:
        raise ValueError(f"groups {groups:#x} has unknown bits")
    tracing = <int>bits


def set_capacity(records):
    """Have the rings of threads that write their first record from now on hold so many.

    Raises:
        ValueError: Not in 1..2**24.
    """
    global trace_capacity, trace_normal
    trace_capacity = trace_normal = as_capacity(records)


def enlarge(records):
    """Have all threads go on in rings that hold so many at least, until all rings are released.

    The GIL keeps every thread from writing at this moment.

    Raises:
        ValueError: Not in 1..2**24.
    """
    trace_enlarge(as_capacity(records))


cdef uint64_t as_capacity(records) except 0:
    cdef uint64_t count = as_size(records, "records")
    if not 1 <= count <= TRACE_MOST:
        raise ValueError(f"records {records} is not in 1..{TRACE_MOST}")
    return count


def unheld():
    """Records that were lost because their thread has no ring: there were too many, or no memory."""
    return trace_unheld


cdef uint64_t put_count


def told():
    """How many records :func:`put` has written: events of Python code, which are rare."""
    return put_count


def put(
    what, *, origin=0, queue=TRACE_NO_QUEUE, head=TRACE_NO_HEAD, address=0, length=0, detail=0,
    access=0, result=0, since=0, time=0,
):
    """Write a record in the calling thread's ring, whatever groups are wanted.

    Raises:
        OverflowError: A value does not fit its field.
    """
    global put_count
    cdef TraceRecord record
    memset(&record, 0, sizeof(record))
    record.what, record.origin, record.queue, record.head = what, origin, queue, head
    record.address, record.length, record.detail = address, length, detail
    record.access, record.result, record.since, record.time = access, result, since, time
    trace(&record)
    put_count += 1


def put_whole(
    *, time, since, taken, served, address, offset, readable, writable, written, position, head,
    origin, queue, access,
):
    """Write a request in place of its records TAKEN, SERVED and COMPLETED, as rings of queues do.

    Raises:
        OverflowError: A value does not fit its field.
    """
    cdef TraceSlot slot
    slot.whole.time, slot.whole.since, slot.whole.taken = time, since, taken
    slot.whole.served, slot.whole.address, slot.whole.offset = served, address, offset
    slot.whole.readable, slot.whole.writable, slot.whole.written = readable, writable, written
    slot.whole.position, slot.whole.head, slot.whole.what = position, head, TRACE_WHOLE
    slot.whole.origin, slot.whole.queue, slot.whole.access = origin, queue, access
    trace_put(&slot, 1)


def spell_out(const unsigned char[::1] found not None):
    """The records that what was read from a ring stands for.

    Args:
        found: What :meth:`RingReader.read` returned, or several of them one after the other.

    Returns:
        Bytes of 64 for each, in the order of time if that is the order of what was given.

    Raises:
        ValueError: It is no whole number of records.

    Cost: two passes; the GIL is released.
    """
    cdef uint64_t count = <uint64_t>found.shape[0] // sizeof(TraceSlot), spelled
    cdef const TraceSlot *slots
    cdef TraceRecord *to
    cdef bytes made
    if <uint64_t>found.shape[0] % sizeof(TraceSlot):
        raise ValueError(f"{found.shape[0]} bytes are no whole number of records")
    if not count:
        return b""
    slots = <const TraceSlot *>&found[0]
    with nogil:
        spelled = trace_spelled(slots, count)
    made = PyBytes_FromStringAndSize(NULL, spelled * sizeof(TraceRecord))
    to = <TraceRecord *>PyBytes_AS_STRING(made)
    with nogil:
        trace_spell(slots, count, to)
    return made


def release():
    """Give the memory of all rings back. Readers keep what they have; threads that write get others.

    The GIL keeps every thread from writing at this moment.
    """
    trace_release()


def rings():
    """``(number, fd)`` of each ring of this process, the newest first. The descriptors stay its."""
    cdef int fds[TRACE_RINGS]
    cdef uint32_t numbers[TRACE_RINGS]
    cdef int i, count = trace_numbers(numbers, fds, TRACE_RINGS)
    return [(numbers[i], fds[i]) for i in range(count)]


def open_rings(known=()):
    """A :class:`RingReader` of each ring of this process whose number is not among ``known``."""
    cdef int fds[TRACE_RINGS]
    cdef uint32_t numbers[TRACE_RINGS]
    cdef int i, count = trace_list(fds, numbers, TRACE_RINGS)
    cdef list found = []
    import os
    try:
        for i in range(count):
            if numbers[i] not in known:
                found.append(RingReader(fds[i]))
    finally:
        for i in range(count):
            os.close(fds[i])
    return found


cdef class RingReader:
    """Reads one ring, of this process or another, from the oldest record that is there.

    Args:
        fd: The ring's descriptor; it is not kept.

    Attributes:
        number: Of the ring in its process.
        process: The process that writes it.
        capacity: Records that it holds.
        lost: Records that were written over before they were read, so far.
        position: Number of the record that is read next; so many were read or lost.

    Raises:
        OSError: It cannot be mapped; EPROTO if it is no ring of this version.

    One thread at a time. The writer is never stopped.
    """

    cdef TraceHead *head
    cdef size_t bytes
    cdef readonly uint32_t number
    cdef readonly uint32_t process
    cdef readonly uint64_t capacity
    cdef readonly uint64_t lost
    cdef readonly uint64_t position

    def __cinit__(self, int fd):
        self.head = trace_open(fd, &self.bytes)
        if self.head is NULL:
            PyErr_SetFromErrno(OSError)
        # Once: what another process writes there later is not believed.
        self.number, self.process = self.head.number, self.head.process
        self.capacity = (self.bytes - 4096) // sizeof(TraceRecord)

    def __dealloc__(self):
        if self.head is not NULL:
            trace_close(self.head, self.bytes)

    @property
    def written(self):
        """Records written to the ring so far."""
        return trace_load(&self.head.written)

    def skip(self):
        """Read from what is written next; what was written before counts as neither."""
        self.position = trace_load(&self.head.written)

    def read(self, most=1 << 24):
        """The records that were not read yet, oldest first, as bytes of 64 each; see `spell_out`.

        Args:
            most: Records at most.

        Cost: a copy; the GIL is released.
        """
        cdef uint64_t limit = as_size(most, "most"), end = trace_load(&self.head.written)
        cdef uint64_t first = self.position, oldest, claimed, count
        cdef bytes found
        cdef TraceSlot *to
        if end < first or not limit:
            # A ring's count never falls: this is another process's mistake.
            return b""
        if end - first > self.capacity:
            first = end - self.capacity
        count = min(end - first, limit)
        found = PyBytes_FromStringAndSize(NULL, count * sizeof(TraceSlot))
        to = <TraceSlot *>PyBytes_AS_STRING(found)
        with nogil:
            trace_copy(self.head, self.capacity, first, count, to)
            claimed = trace_load_after(&self.head.claimed)
        # Those that the writer may have written over meanwhile.
        oldest = claimed - self.capacity if claimed > self.capacity else 0
        oldest = min(max(oldest, first), first + count)
        self.lost += oldest - self.position
        self.position = first + count
        return found[(oldest - first) * sizeof(TraceRecord):] if oldest > first else found
