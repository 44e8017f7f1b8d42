"""C view of IOTLB traffic in bulk."""

from guestio._core.base.checks cimport Span, u8, u64
from guestio._core.base.capacity cimport READ_AHEAD
from guestio._core.iommu.intervals cimport IntervalMap
from guestio._core.vhost_user.iotlb_message cimport Message
from guestio._core.vhost_user.miss_table cimport MissTable
from guestio._core.virtio.counters cimport Counters


cdef class IotlbUpdater:
    cdef IntervalMap iotlb
    cdef public IntervalMap user_addresses
    cdef MissTable misses
    cdef Counters counters
    cdef bytes unsent
    cdef u8 buffer[READ_AHEAD]

    cdef bytes take_unsent(self)
    cdef size_t receive_plain(self, int fd, list ready) except? 0
    cdef bytes acknowledge(self, int fd, size_t count)
    cdef bint apply_one(self, const u8 *data, list ready) except -1
    cdef bint change(self, const Message *message, list ready) except -1
    cdef bint find_target(self, const Message *message, u64 rest, u64 *target) noexcept
    cdef bint replace(self, Span span, const Message *message, u64 target) noexcept
