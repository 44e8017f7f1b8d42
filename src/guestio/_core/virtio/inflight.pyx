"""One queue's part of the region that tracks requests in flight.

The region is shared memory that outlives the back-end: the front-end keeps it and gives it to the
next one, which learns from it what was taken and not given back. So every store counts as soon as
it is made, and their order is what makes any point a good one to be killed at: a request is in
flight from the moment its flag is set, and is not any more from the moment the used index that
covers it is stored, because the list of the last batch, which was complete before, says so.

The front-end may write whatever it likes here, at any time, or truncate the file. A value that is
read is bounded before it is used, and once more it is only the front-end's own guest that suffers
from a wrong one.

Source: QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking", split virtqueue.
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Malloc

from guestio._core.base.checks cimport as_size

from guestio.errors import QueueError

cdef extern from * nogil:
    """
    #define put_u8(p, v) __atomic_store_n((uint8_t *)(p), (v), __ATOMIC_RELEASE)
    #define put_u16(p, v) __atomic_store_n((uint16_t *)(p), (v), __ATOMIC_RELEASE)
    #define put_u64(p, v) __atomic_store_n((uint64_t *)(p), (v), __ATOMIC_RELEASE)
    #define get_u8(p) __atomic_load_n((const uint8_t *)(p), __ATOMIC_RELAXED)
    #define get_u16(p) __atomic_load_n((const uint16_t *)(p), __ATOMIC_RELAXED)
    #define get_u64(p) __atomic_load_n((const uint64_t *)(p), __ATOMIC_RELAXED)
    /* What was stored before stays before what is stored next. */
    #define order_stores() __atomic_thread_fence(__ATOMIC_RELEASE)
    """
    void put_u8(void *p, u8 v)
    void put_u16(void *p, u16 v)
    void put_u64(void *p, u64 v)
    u8 get_u8(void *p)
    u16 get_u16(void *p)
    u64 get_u64(void *p)
    void order_stores()

cdef enum:
    VERSION = 1
    ALIGNMENT = 64        # of every part, as in libvhost-user (INFLIGHT_ALIGNMENT)
    MOST_ENTRIES = 32768


def part_size(size):
    """Bytes of the region that a queue takes, a multiple of 64.

    Args:
        size: Entries of the queue, 1 to 32768.

    Raises:
        ValueError: Another number of entries.
    """
    cdef size_t entries = as_size(size, "queue size")
    if not 1 <= entries <= MOST_ENTRIES:
        raise ValueError(f"queue size {size} is not in [1, {MOST_ENTRIES}]")
    entries = sizeof(QueueRegion) + entries * sizeof(DescState)
    return (entries + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


# The mapping must still be there when it is given back.
@cython.no_gc_clear
@cython.final
cdef class InflightQueue:
    """Which requests of one split virtqueue were taken and not given back.

    Begin with :meth:`recover`. Then call :meth:`take` for every request that comes from the
    available ring, :meth:`batch` for every one that was written to the used ring, in order, and
    :meth:`publish` once the used index covers them. The next batch begins after that.

    Args:
        mapping: Where the region is, writable; it cannot be closed as long as this object exists.
        offset: Where this queue's part begins in it, a multiple of 8.
        size: Entries, 1 to 32768; a queue that uses it may be smaller.

    Attributes:
        size: Entries.

    Raises:
        ValueError: The part does not fit the mapping, is misaligned, or has no such size.

    One thread at a time.
    """

    def __cinit__(self, HostMapping mapping not None, offset, size):
        cdef size_t start = as_size(offset, "offset"), length = part_size(size)
        if mapping.ptr is NULL or not mapping.writable:
            raise ValueError("the mapping is closed or cannot be written")
        if start > mapping.size or length > mapping.size - start:
            raise ValueError(
                f"a part of {length:#x} bytes at {start:#x} does not fit {mapping.size:#x} bytes"
            )
        if (<size_t>mapping.ptr + start) % sizeof(u64):
            raise ValueError(f"a part at {start:#x} is not aligned to {sizeof(u64)} bytes")
        self.region = <QueueRegion *>(mapping.ptr + start)
        self.desc = <DescState *>(self.region + 1)
        self.size = size
        self.mapping = mapping
        mapping.tables += 1

    def __dealloc__(self):
        if self.region is not NULL:
            self.mapping.tables -= 1

    cpdef void take(self, u16 head) noexcept:
        """Note that a request was taken from the available ring."""
        if head >= self.size:
            return
        put_u64(&self.desc[head].counter, self.counter)
        self.counter += 1
        put_u8(&self.desc[head].inflight, 1)

    cdef void release(self, u16 head) noexcept:
        """Note that a request is back in the available ring, where it was not taken from."""
        if head < self.size:
            put_u8(&self.desc[head].inflight, 0)

    cpdef void batch(self, u16 head) noexcept:
        """Note that a request is in the used ring, which the used index does not cover yet."""
        if head >= self.size:
            return
        put_u16(&self.desc[head].next, get_u16(&self.region.last_batch_head))
        put_u16(&self.region.last_batch_head, head)

    # Stores to a mapping that stays, under the GIL, and nothing else: it cannot raise.
    cdef void published(self, const u16 *heads, u32 count, u16 used_idx) noexcept:
        """Note that the used index was stored, with the heads that it began to cover."""
        cdef u32 i
        order_stores()
        for i in range(count):
            if heads[i] < self.size:
                put_u8(&self.desc[heads[i]].inflight, 0)
        put_u16(&self.region.used_idx, used_idx)

    def publish(self, heads, used_idx):
        """Note that the used index was stored, with the heads that it began to cover.

        Args:
            heads: Those that were given to :meth:`batch` since this was last called.
            used_idx: The used index.
        """
        cdef u32 i, count = len(heads)
        cdef u16 *list_ = <u16 *>PyMem_Malloc(max(count, 1) * sizeof(u16))
        if list_ is NULL:
            raise MemoryError
        try:
            for i in range(count):
                list_[i] = heads[i]
            self.published(list_, count, used_idx)
        finally:
            PyMem_Free(list_)

    cpdef list recover(self, u16 used_idx):
        """Find out what was in flight when the region was last used; again after every stop.

        A part that was never used begins here. So does one that cannot be this ring's, because
        its used index and the ring's are further apart than one batch can bring them.

        Args:
            used_idx: The used index in the ring. The available ring goes on that many entries,
                and as many as are in flight, from its beginning.

        Returns:
            The heads of requests in flight, in the order in which they were taken. They are in
            flight already: :meth:`take` is not for them.

        Raises:
            QueueError: The part cannot be followed: another version, another size, a batch that
                leads out of it, or its file was truncated.
        """
        cdef u16 version = get_u16(&self.region.version)
        cdef u16 entries = get_u16(&self.region.desc_num)
        cdef u64 features = get_u64(&self.region.features)
        cdef list heads
        self.check_there()
        if version == 0:
            self.begin(used_idx)
        elif version != VERSION:
            raise self.wrong(f"has version {version}, only {VERSION} is known")
        elif features:
            raise self.wrong(f"has feature flags {features:#x}, none is known")
        elif entries != self.size:
            raise self.wrong(f"has {entries} entries, the front-end said {self.size}")
        elif <u16>(used_idx - get_u16(&self.region.used_idx)) > self.size:
            self.begin(used_idx)
        else:
            self.finish_batch(used_idx)
        heads = self.in_order()
        self.check_there()
        return heads

    cpdef void forget(self) noexcept:
        """Forget everything, as when the device is reset; :meth:`recover` comes next."""
        put_u16(&self.region.version, 0)

    @property
    def vanished(self):
        """Whether the file was found to be truncated, so that nothing is tracked any more."""
        if self.mapping.spot is NULL:
            return False
        return self.mapping.spot.vanished < <size_t>(self.desc + self.size)

    cdef void begin(self, u16 used_idx) noexcept:
        """Make the part one of a ring that has nothing in flight."""
        cdef u32 i
        # A successor of a process that is killed in here must begin anew.
        put_u16(&self.region.version, 0)
        for i in range(self.size):
            if get_u8(&self.desc[i].inflight):
                put_u8(&self.desc[i].inflight, 0)
        put_u64(&self.region.features, 0)
        put_u16(&self.region.desc_num, <u16>self.size)
        put_u16(&self.region.last_batch_head, 0)
        put_u16(&self.region.used_idx, used_idx)
        put_u16(&self.region.version, VERSION)

    cdef int finish_batch(self, u16 used_idx) except -1:
        """Do what is left of the last batch, if the used index was stored and no more was done."""
        cdef u16 left = used_idx - get_u16(&self.region.used_idx)
        cdef u16 head = get_u16(&self.region.last_batch_head)
        while left:
            if head >= self.size:
                raise self.wrong(f"has a batch with descriptor {head} of {self.size} in it")
            put_u8(&self.desc[head].inflight, 0)
            head = get_u16(&self.desc[head].next)
            left -= 1
        put_u16(&self.region.used_idx, used_idx)
        return 0

    cdef list in_order(self):
        """The heads in flight, oldest first; whatever is taken next comes after them."""
        cdef u32 i
        cdef list found = []
        for i in range(self.size):
            if get_u8(&self.desc[i].inflight):
                found.append((get_u64(&self.desc[i].counter), i))
        found.sort()
        self.counter = <u64>found[-1][0] + 1 if found else 0
        return [head for _, head in found]

    cdef int check_there(self) except -1:
        if self.vanished:
            raise self.wrong("is gone: its owner truncated the file")
        return 0

    cdef object wrong(self, str what):
        return QueueError(f"the region that tracks requests in flight {what}")
