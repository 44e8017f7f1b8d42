"""The split format of a virtqueue (virtio 1.4, section 2.7): where its bytes are, and their order.

An index is loaded once and judged once, a descriptor is copied before it is looked at. Indices are
published with one release store each, after everything they cover.
"""

from guestio._core.base.naming cimport publish_type
from guestio._core.base.checks cimport u8
from guestio._core.iommu.address_space cimport AddressSpace, IoVector
from guestio._core.iommu.misses cimport Misses
from guestio._core.virtio.areas cimport RingAreas, Sizes, current
from guestio._core.virtio.chain cimport Chain, u16
from guestio._core.virtio.ring cimport Ring, UsedElem

cdef extern from * nogil:
    """
    #define full_barrier() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    """
    void full_barrier()

cdef enum:
    READ = 1
    # Descriptor flags, and the flags of the two rings (section 2.7.5 to 2.7.8).
    DESC_NEXT = 1
    DESC_INDIRECT = 4
    DESC_WRITE = 2
    AVAIL_NO_INTERRUPT = 1
    USED_NO_NOTIFY = 1
    CHAIN_LIMIT = 1024    # descriptors of an indirect table in a ring smaller than this


cdef inline Sizes sizes_of(u64 size, bint event_idx) noexcept:  # arithmetic
    """Bytes of the three areas (sections 2.7.5, 2.7.6 and 2.7.8)."""
    cdef u64 event = 2 if event_idx else 0
    return Sizes(16 * size, 4 + 2 * size + event, 4 + 8 * size + event)


def area_bytes(u64 size, bint event_idx):
    """Bytes of the descriptor table, the available ring and the used ring."""
    cdef Sizes sizes = sizes_of(size, event_idx)
    return sizes.desc, sizes.avail, sizes.used


cdef class SplitRing(Ring):
    """A split virtqueue as its device sees it; see :class:`~guestio._core.virtio.ring.Ring`."""

    def __cinit__(self, *_, **__):
        self.table = IoVector()

    cdef int measure(self, Sizes *sizes) except -1:
        sizes[0] = sizes_of(self.size, self.event_idx)
        return 0

    cdef u16 used_position(self) except? 65535:
        return self.load16(self.used, 2)

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

    cdef bint has_next(self) except -1:
        return self.load16(self.avail, 2) != self.next_avail

    cdef int head_at(self, u16 position) except -1:
        return self.load16(self.avail, 4 + 2 * (position % self.size))

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
            if not nested and not current(self):
                return 0
            table.transfer(<u8 *>&desc, 16 * <u64>index, 16, False)
            self.work += 1
            if nested and table.vanished(16 * <u64>index, 16):
                chain.fault = "the file behind its indirect table was truncated by its owner"
                return 0
            if desc.flags & DESC_INDIRECT:
                return self.walk_indirect(&desc, nested, chain, sizes, misses, lenient)
            self.add_buffer(
                desc.addr, desc.size, (desc.flags & DESC_WRITE) != 0, chain, sizes, misses, lenient
            )
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

    cdef int put_used(self, const UsedElem *element) except -1:
        cdef u64 slot = 4 + 8 * <u64>(self.next_used % self.size)
        self.used.transfer(<u8 *>element, slot, 8, True)
        self.unmarked += 1
        return 0

    cdef int publish_used(self) except -1:
        cdef u64 count = min(<u64>self.unmarked, <u64>self.size)
        cdef u64 first = <u16>(self.next_used - <u16>count) % self.size
        cdef u64 straight = min(count, <u64>self.size - first)
        cdef u64 end = 4 + 8 * (first + straight)
        # All at once, as they lie in few pages; the index makes them visible. Where one page has
        # all of it they come and go with the index, whose mark is theirs.
        if not self.used.is_marked_with(2, end - 1):
            self.used.mark(4 + 8 * first, 8 * straight)
            if straight < count:
                self.used.mark(4, 8 * (count - straight))
        self.unmarked = 0
        return self.store16(self.used, 2, self.next_used)

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

    cpdef disable_kicks(self):
        """Tell the driver that it need not announce new requests. Only a hint."""
        if not self.event_idx and self.reachable():
            self.store16(self.used, 0, USED_NO_NOTIFY)

    cdef bint more_after_request(self) except -1:
        """Enable kicks; whether there are requests to be taken already."""
        return self.more_beyond(0) and not self.crowded

    cdef bint more_beyond(self, u16 ahead) except -1:
        cdef u16 position = self.next_avail + ahead
        if self.event_idx:
            self.store16(self.used, 4 + 8 * <u64>self.size, position)
        else:
            self.store16(self.used, 0, 0)
        full_barrier()
        return self.load16(self.avail, 2) != position

    def rebind(self, AddressSpace space not None):
        """Go on in other memory; requests that were taken keep what they have."""
        before = self.table
        self.table = IoVector()
        Ring.rebind(self, space)


publish_type(
    SplitRing, "guestio.virtio.SplitRing",
    "SplitRing(space, size, desc, avail, used, *, event_idx=False, indirect=False, base=0, "
    "ordered=False, inflight=None, batch_bytes=4611686018427387904, quota=None)\n--\n\n",
)
