"""Block requests as a driver lays them out in memory: chosen, made and judged.

The usual layout is that of Linux's drivers/block/virtio_blk.c: header and status next to each
other, the data on pages of its own. To verify, everything is laid out at random instead: what the
device reads (header, data) and what it writes (data, status) are one extent of bytes each, which
begins anywhere in a page and is cut anywhere into descriptors; and what is written follows from
sector and version, so every sector that is read can be judged.

Source: virtio 1.3 sections 5.2.6 (requests) and 2.7.4.1 (no assumption about framing).
"""

from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from guestio._core.base.checks cimport as_address, as_size
from guestio.guest._load.driver cimport (
    CONTENTS, DESC_BYTES, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, NO_ROOM, OVERRUN, SHORT, STATUS,
    USED_LENGTH, fail, page_addresses,
)
from guestio.guest._load.extents cimport (
    PAGE, PAGE_SHIFT, SECTOR, contents, extent_at, extent_fill, extent_poison, extent_read,
    extent_runs, extent_stray, extent_write, mix,
)

cdef enum:
    HEADER_BYTES = 16
    T_IN = 0
    T_OUT = 1
    READ = 1
    WRITE = 2
    UNTOUCHED = 0xFF
    BEING_WRITTEN = 255
    CHOICES = 256
    UNKNOWN = 0xFFFFFFFFFFFFFFFF

cdef struct Header:
    u32 kind
    u32 reserved
    u64 sector


cdef class RequestMaker:
    """Chooses blocks, lays requests for them out, and judges the answers.

    Made by a :class:`~guestio.guest._load.load.LoadDriver`, whose arguments these are.
    """

    def __cinit__(
        self, block, blocks, IotlbFront iotlb, bint strict, stride, bint separate, bint indirect,
        bint verify, seed,
    ):
        self.block = as_size(block, "block")
        self.blocks = as_address(blocks, "blocks")
        if not self.block or self.block % SECTOR or not self.blocks or block >> 31:
            raise ValueError(f"{blocks} blocks of {block} bytes")
        if strict and iotlb is None:
            raise ValueError("strict needs an IOMMU")
        self.iotlb, self.strict, self.separate = iotlb, strict, separate
        self.indirect, self.verify = indirect, verify
        self.stride_pages = as_size(stride, "stride")
        self.random_state = mix(as_address(seed, "seed") + 1)
        self.stamp = (self.random_state | 1) << 32
        if verify:
            self.versions = <u32 *>calloc(self.blocks, sizeof(u32))
            self.busy = <u8 *>calloc(self.blocks, 1)
            if self.versions == NULL or self.busy == NULL:
                raise MemoryError

    def __dealloc__(self):
        free(self.versions)
        free(self.busy)

    cdef int open_slot(self, Slot *slot, object first, object second, object table) except -1:
        """Set a zeroed slot up.

        Raises:
            ValueError: An extent is too short.
        """
        cdef u32 head = HEADER_BYTES + 1
        _set_extent(&slot.first, first)
        _set_extent(&slot.second, second)
        _set_extent(&slot.table, table)
        if self.verify:
            _need(&slot.first, PAGE - 1 + HEADER_BYTES + self.block)
            _need(&slot.second, PAGE - 1 + self.block + 1)
            _need(&slot.table, PAGE - DESC_BYTES + self.most_descs(slot) * DESC_BYTES)
            return 0
        _need(&slot.first, head)
        _need(&slot.second, self.block)
        _need(&slot.table, self.most_descs(slot) * DESC_BYTES)
        if slot.first.base + head > PAGE:
            raise ValueError("header and status must lie in one page")
        extent_fill(&slot.second, self.block, self.next_random())
        return 0

    cdef u32 most_descs(self, const Slot *slot) noexcept:
        """Descriptors that a request in a slot may take."""
        if self.strict:
            return 2 * (MOST_CUTS + 1) if self.verify else 3
        if self.verify:
            # The data is in one of the extents; in the other are few bytes, on two pages at most.
            return max(extent_runs(&slot.first), extent_runs(&slot.second)) + 2 + 2 * MOST_CUTS
        return extent_runs(&slot.second) + 2

    cdef u64 sector(self, const Slot *slot) noexcept nogil:
        return slot.block * (self.block // SECTOR)

    cdef bint choose(self, Slot *slot) noexcept nogil:
        """Choose a block and what to do with it; False if what there is to choose is in use."""
        cdef u64 block = self.next_random() % self.blocks if self.random else self.cursor
        cdef u32 tries
        slot.write = self.read_percent < 100 and self.next_random() % 100 >= self.read_percent
        if self.verify:
            # Whether a read sees a write that is under way at the same time is not defined.
            for tries in range(CHOICES if self.random else 1):
                if self.busy[block] < (1 if slot.write else BEING_WRITTEN - 1):
                    break
                block = (block + 1) % self.blocks
            else:
                return False
            self.busy[block] = BEING_WRITTEN if slot.write else self.busy[block] + 1
            slot.version = self.versions[block] + slot.write
        if not self.random:
            self.cursor = (block + 1) % self.blocks
        slot.block = block
        return True

    cdef void make(self, Slot *slot, u32 free_descs) noexcept nogil:
        """Lay the chosen request out; its chain is in `chain` then.

        Args:
            slot: With `stride` set.
            free_descs: Descriptors that a chain in the ring may take.
        """
        cdef bint indirect = self.indirect
        slot.stride_used = slot.maps = 0
        slot.may_write = 1 if slot.write else self.block + 1
        self.chain_count = 0
        if self.verify:
            self.lay_out_random(slot)
            if self.chain_count <= free_descs and self.next_random() & 1:
                indirect = False
        else:
            self.lay_out_usual(slot)
        if indirect:
            self.chain[0] = Desc(
                self.write_table(slot), self.chain_count * DESC_BYTES, DESC_INDIRECT, 0
            )
            self.chain_count = 1

    cdef void lay_out_usual(self, Slot *slot) noexcept nogil:
        cdef Header header = Header(T_OUT if slot.write else T_IN, 0, self.sector(slot))
        cdef u16 flags = 0 if slot.write else DESC_WRITE
        cdef u64 start
        slot.status_at, slot.data_at = HEADER_BYTES, 0
        memcpy(extent_at(&slot.first, 0), &header, HEADER_BYTES)
        (<u8 *>extent_at(&slot.first, HEADER_BYTES))[0] = UNTOUCHED
        if not self.strict or self.separate:
            self.add_piece(slot, &slot.first, 0, HEADER_BYTES, 0)
            self.add_piece(slot, &slot.second, 0, self.block, flags)
            self.add_piece(slot, &slot.first, HEADER_BYTES, 1, DESC_WRITE)
            return
        start = self.map(slot, &slot.first, 0, HEADER_BYTES + 1, READ | WRITE)
        self.add_desc(start, HEADER_BYTES, 0)
        self.add_piece(slot, &slot.second, 0, self.block, flags)
        self.add_desc(start + HEADER_BYTES, 1, DESC_WRITE)

    cdef void lay_out_random(self, Slot *slot) noexcept nogil:
        cdef Header header = Header(T_OUT if slot.write else T_IN, 0, self.sector(slot))
        cdef u32 at = self.random_offset(), size = HEADER_BYTES, i
        cdef u64 words[64]
        extent_write(&slot.first, at, &header, HEADER_BYTES)
        if slot.write:
            size += self.block
            for i in range(self.block // SECTOR):
                contents(self.sector(slot) + i, self.stamp | slot.version, words)
                extent_write(&slot.first, at + HEADER_BYTES + i * SECTOR, words, SECTOR)
        self.cut(slot, &slot.first, at, size, 0)
        slot.data_at = self.random_offset()
        slot.status_at = slot.data_at + slot.may_write - 1
        extent_poison(&slot.second)
        self.cut(slot, &slot.second, slot.data_at, slot.may_write, DESC_WRITE)

    cdef u32 random_offset(self) noexcept nogil:
        """Where in a page to begin, at its borders more often than not."""
        cdef u64 choice = self.next_random()
        cdef u32 near = choice >> 8 & 15
        if choice & 1:
            return choice >> 32 & (PAGE - 1)
        return PAGE - 1 - near if choice & 2 else near

    cdef void cut(self, Slot *slot, Extent *extent, u32 at, u32 size, u16 flags) noexcept nogil:
        """Make descriptors of an extent of bytes, cut in up to MOST_CUTS places."""
        cdef u32 cuts[MOST_CUTS + 1]
        cdef u32 favoured[8]
        cdef u32 count = self.next_random() % (MOST_CUTS + 1), i, j, point, start = 0
        cdef u64 choice
        favoured = [1, 8, 15, 16, 17, 511, 512, size - 1]
        for i in range(count):
            choice = self.next_random()
            point = favoured[choice >> 8 & 7] if choice & 1 else (choice >> 16) % size
            j = i
            while j and cuts[j - 1] > point:
                cuts[j] = cuts[j - 1]
                j -= 1
            cuts[j] = point
        cuts[count] = size
        for i in range(count + 1):
            if start < cuts[i] <= size:
                self.add_piece(slot, extent, at + start, cuts[i] - start, flags)
                start = cuts[i]
        if start < size:
            self.add_piece(slot, extent, at + start, size - start, flags)

    cdef void add_piece(
        self, Slot *slot, Extent *extent, u32 at, u32 size, u16 flags,
    ) noexcept nogil:
        """Make the descriptors of bytes that lie in a row for the driver."""
        cdef u64 where
        cdef u32 page, step, run
        if self.strict:
            where = self.map(slot, extent, at, size, WRITE if flags & DESC_WRITE else READ)
            self.add_desc(where, size, flags)
            return
        at += extent.base
        while size:
            page = at >> PAGE_SHIFT
            where = extent.device[page] + (at & (PAGE - 1))
            run = 0
            while True:
                step = min(PAGE - (at & (PAGE - 1)), size)
                run += step
                at += step
                size -= step
                if not size or extent.device[page + 1] != extent.device[page] + PAGE:
                    break
                page += 1
            self.add_desc(where, run, flags)

    cdef void add_desc(self, u64 where, u32 size, u16 flags) noexcept nogil:
        if self.chain_count == MOST_DESCS:
            fail(&self.trouble, NO_ROOM, self.chain_count)
            return
        self.chain[self.chain_count] = Desc(where, size, flags, 0)
        self.chain_count += 1

    cdef u64 map(self, Slot *slot, Extent *extent, u32 at, u32 size, int perm) noexcept nogil:
        """Map bytes of an extent for this request; where they are for the device."""
        cdef u32 first = (extent.base + at) >> PAGE_SHIFT
        cdef u32 count = ((extent.base + at + size - 1) >> PAGE_SHIFT) - first + 1, i
        cdef u64 page = slot.stride + slot.stride_used
        if slot.maps == MOST_MAPS or slot.stride_used + count > self.stride_pages:
            fail(&self.trouble, NO_ROOM, slot.maps, slot.stride_used, count, self.stride_pages)
            return 0
        for i in range(count):
            self.iotlb.put(page + i, extent.host[first + i], perm)
        slot.mapped[slot.maps] = Mapping(page, count)
        slot.maps += 1
        # A page that is never mapped lies between, to catch accesses past the end.
        slot.stride_used += count + 1
        return self.iotlb.base + (page << PAGE_SHIFT) + ((extent.base + at) & (PAGE - 1))

    cdef u64 write_table(self, Slot *slot) noexcept nogil:
        """Write the chain as an indirect table; where it is for the device."""
        cdef Extent *extent = &slot.table
        cdef u32 at = 0, i
        if self.verify:
            at = self.random_offset() & ~<u32>(DESC_BYTES - 1)
        for i in range(self.chain_count):
            if i + 1 < self.chain_count:
                self.chain[i].flags |= DESC_NEXT
                self.chain[i].next = i + 1
            memcpy(extent_at(extent, at + i * DESC_BYTES), &self.chain[i], DESC_BYTES)
        if self.strict:
            return self.map(slot, extent, at, self.chain_count * DESC_BYTES, READ)
        at += extent.base
        return extent.device[at >> PAGE_SHIFT] + (at & (PAGE - 1))

    cdef u64 next_random(self) noexcept nogil:
        self.random_state += <u64>0x9E3779B97F4A7C15
        return mix(self.random_state)

    cdef int judge(self, Slot *slot) noexcept nogil:
        """Whether the device did what it was asked, once it cannot reach the slot any more."""
        cdef Extent *answer = &slot.second if self.verify else &slot.first
        cdef u8 status = (<const u8 *>extent_at(answer, slot.status_at))[0]
        if slot.written > slot.may_write:
            return fail(
                &self.trouble, USED_LENGTH, self.sector(slot), slot.written, slot.may_write
            )
        if status:
            return fail(&self.trouble, STATUS, self.sector(slot), slot.write, status)
        return self.check(slot) if self.verify else 0

    cdef int check(self, Slot *slot) noexcept nogil:
        """Look around the buffer, and compare what was read with what was written last."""
        cdef long stray = extent_stray(&slot.second, slot.data_at, slot.may_write)
        self.busy[slot.block] = 0 if slot.write else self.busy[slot.block] - 1
        if stray >= 0:
            return fail(
                &self.trouble, OVERRUN, self.sector(slot), slot.write, stray, slot.data_at
            )
        if slot.write:
            self.versions[slot.block] = slot.version
            return 0
        if slot.written < self.block:
            return fail(&self.trouble, SHORT, self.sector(slot), slot.written, self.block)
        # What a block holds that was never written is not known.
        return self.compare(slot) if slot.version else 0

    cdef int compare(self, Slot *slot) noexcept nogil:
        cdef u64 wanted[64]
        cdef u64 found[64]
        cdef u64 sector = self.sector(slot)
        cdef u32 i
        for i in range(self.block // SECTOR):
            contents(sector, self.stamp | slot.version, wanted)
            extent_read(&slot.second, slot.data_at + i * SECTOR, found, SECTOR)
            if memcmp(wanted, found, SECTOR):
                contents(found[0], found[1], wanted)
                if found[1] >> 32 == self.stamp >> 32 and not memcmp(wanted, found, SECTOR):
                    return fail(
                        &self.trouble, CONTENTS, sector, slot.version, found[0], <u32>found[1]
                    )
                return fail(&self.trouble, CONTENTS, sector, slot.version, UNKNOWN, found[0])
            sector += 1
        return 0


cdef int _set_extent(Extent *extent, object described) except -1:
    device, host, base = described
    if len(device) != len(host) or not len(host) or not 0 <= base < PAGE:
        raise ValueError(f"an extent of {len(host)} pages from byte {base} on")
    extent.pages, extent.base = len(host), base
    extent.device = page_addresses(device)
    extent.host = page_addresses(host)
    return 0


cdef int _need(const Extent *extent, u32 size) except -1:
    if extent.pages * PAGE - extent.base < size:
        raise ValueError(f"an extent has room for {extent.pages * PAGE - extent.base} bytes of {size}")
    return 0


cdef void close_slot(Slot *slot) noexcept:
    """Free what :meth:`RequestMaker.open_slot` made."""
    cdef Extent *extents[3]
    cdef u32 i
    extents = [&slot.first, &slot.second, &slot.table]
    for i in range(3):
        free(extents[i].device)
        free(extents[i].host)
