"""C view of block requests as a driver lays them out in memory."""

from guestio._core.base.checks cimport u8, u32, u64
from guestio.guest._load.driver cimport Desc, Trouble, u16
from guestio.guest._load.iotlb_front cimport IotlbFront
from guestio.guest._load.extents cimport Extent


cdef enum:
    MOST_DESCS = 1024
    MOST_CUTS = 5              # of what a request reads, and of what it writes
    MOST_MAPS = 16             # 2 * (MOST_CUTS + 1) pieces and a table


cdef struct Mapping:
    u32 page
    u32 count


# Memory for one request, and the request that is in it.
cdef struct Slot:
    Extent first
    Extent second
    Extent table
    u64 started
    u64 block
    u64 version
    u64 stride
    u32 stride_used
    u32 may_write
    u32 written
    u32 status_at
    u32 data_at
    u32 acks
    u32 maps
    bint write
    Mapping mapped[MOST_MAPS]


cdef class RequestMaker:
    cdef IotlbFront iotlb
    cdef bint strict
    cdef bint separate
    cdef bint indirect
    cdef bint verify
    cdef u32 block
    cdef u64 blocks
    cdef u64 stamp
    cdef u64 random_state
    cdef u32 stride_pages
    cdef u32 *versions
    cdef u8 *busy
    cdef u64 cursor
    cdef u32 read_percent
    cdef bint random
    # The chain of the request that was made last.
    cdef Desc chain[MOST_DESCS]
    cdef u32 chain_count
    cdef Trouble trouble

    cdef int open_slot(self, Slot *slot, object first, object second, object table) except -1
    cdef u32 most_descs(self, const Slot *slot) noexcept
    cdef u64 sector(self, const Slot *slot) noexcept nogil
    cdef bint choose(self, Slot *slot) noexcept nogil
    cdef void make(self, Slot *slot, u32 free_descs) noexcept nogil
    cdef int judge(self, Slot *slot) noexcept nogil
    cdef void lay_out_usual(self, Slot *slot) noexcept nogil
    cdef void lay_out_random(self, Slot *slot) noexcept nogil
    cdef u32 random_offset(self) noexcept nogil
    cdef void cut(self, Slot *slot, Extent *extent, u32 at, u32 size, u16 flags) noexcept nogil
    cdef void add_piece(
        self, Slot *slot, Extent *extent, u32 at, u32 size, u16 flags,
    ) noexcept nogil
    cdef void add_desc(self, u64 where, u32 size, u16 flags) noexcept nogil
    cdef u64 map(self, Slot *slot, Extent *extent, u32 at, u32 size, int perm) noexcept nogil
    cdef u64 write_table(self, Slot *slot) noexcept nogil
    cdef u64 next_random(self) noexcept nogil
    cdef int check(self, Slot *slot) noexcept nogil
    cdef int compare(self, Slot *slot) noexcept nogil


cdef void close_slot(Slot *slot) noexcept
