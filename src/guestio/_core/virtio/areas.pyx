"""Where a virtqueue is: three areas in guest memory (virtio 1.4, sections 2.7 and 2.8).

They are addressed like any buffer, so behind an IOMMU they may lie in pages that have nothing to do
with each other, and their translation may be revoked at any time; it is looked up again before the
next use. Nothing is accessed while the GIL is not held, which is what makes that look-up-and-use one
step.
"""

from libc.stdint cimport uintptr_t

from guestio._core.base.checks cimport as_address
from guestio._core.iommu.misses cimport Misses

from guestio.errors import InvalidAddressError, MemoryVanishedError, QueueError

cdef extern from * nogil:
    """
    #define load_acquire16(p) __atomic_load_n((const uint16_t *)(p), __ATOMIC_ACQUIRE)
    #define store_release16(p, v) __atomic_store_n((uint16_t *)(p), (v), __ATOMIC_RELEASE)
    """
    u16 load_acquire16(void *p)
    void store_release16(void *p, u16 v)

cdef str VANISHED = "the file behind the ring's memory was truncated by its owner"

cdef enum:
    READ = 1
    WRITE = 2


cdef class RingAreas:
    """Descriptors, what the driver writes for the device, and what the device writes for the driver.

    Attributes:
        broken: What the driver did wrong, or None.
    """

    def __cinit__(
        self, AddressSpace space not None, size, desc, avail, used, *, bint event_idx=False, **_
    ):
        cdef u64 entries = as_address(size, "size")
        if not entries or entries > 32768 or entries & (entries - 1):
            raise ValueError(f"ring size {entries} is not a power of two up to 32768")
        self.space, self.size, self.event_idx = space, entries, event_idx
        self.desc_addr = as_address(desc, "desc")
        self.avail_addr, self.used_addr = as_address(avail, "avail"), as_address(used, "used")
        if self.desc_addr % 16 or self.avail_addr % 2 or self.used_addr % 4:
            raise QueueError(
                f"ring areas at {self.desc_addr:#x}, {self.avail_addr:#x}, {self.used_addr:#x} "
                "are not aligned to 16, 2 and 4 bytes"
            )
        self.desc, self.avail, self.used = IoVector(), IoVector(), IoVector()
        self.ignored = Misses()

    cdef object wrong(self, str what):
        if self.vanished():
            # Whatever looks wrong was read from the empty pages that took its place.
            what = VANISHED
        self.broken = what
        return QueueError(what)

    cdef bint vanished(self) noexcept:  # plain C on the areas, which are never None
        return self.resolved and (
            self.desc.vanished(0, self.desc.total) or self.avail.vanished(0, self.avail.total)
            or self.used.vanished(0, self.used.total)
        )

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
        found &= self.area(
            self.used, self.used_addr, sizes.used, READ | WRITE, misses
        )
        if not found:
            return False
        self.resolved = True
        if not self.begun:
            self.begun = True
            self.begin()
        return True

    cdef int measure(self, Sizes *sizes) except -1:
        """Set the bytes of the areas. A format provides it, see :class:`Ring`."""
        raise NotImplementedError

    cdef int begin(self) except -1:
        """Called when the areas can be reached for the first time."""
        return 0

    cdef bint reachable(self) except -1:
        """As :meth:`areas_ready`, without collecting what is missing."""
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

    def rebind(self, AddressSpace space not None):
        """Go on in other memory; requests that were taken keep what they have."""
        # The memory of before goes at the end of this, when nothing refers to it any more.
        before = self.space, self.desc, self.avail, self.used
        self.space, self.resolved = space, False
        self.desc, self.avail, self.used = IoVector(), IoVector(), IoVector()


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

