"""C view of a driver's side of a split virtqueue."""

from guestio._core.base.checks cimport u32, u64

ctypedef unsigned short u16


cdef enum:
    DESC_BYTES = 16
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4


cdef struct Desc:
    u64 addr
    u32 size
    u16 flags
    u16 next


# What was found to be wrong first, with numbers that say more.
cdef enum TroubleCode:
    FINE = 0
    USED_INDEX = 1       # used index, collected, outstanding
    USED_ID = 2          # descriptor, collected
    USED_LENGTH = 3      # sector, bytes told, bytes there are
    STATUS = 4           # sector, whether a write, status
    SHORT = 5            # sector, bytes told, bytes wanted
    CONTENTS = 6         # sector, its version, sector and version found; or 2**64-1 and a word
    OVERRUN = 7          # sector, whether a write, byte of the extent, where the buffer begins
    STALLED = 8          # requests in flight, nanoseconds
    GONE = 9
    UNASKED = 10
    RING_ERROR = 11
    IOTLB = 12
    SYSTEM = 13          # errno
    NO_ROOM = 14


cdef struct Trouble:
    int code
    u32 queue
    u64 values[4]


cdef struct Ring:
    u32 size
    bint event_idx
    u64 *desc
    u64 *avail
    u64 *used
    u16 added
    u16 published
    u16 seen
    u16 collected
    u32 outstanding
    u16 free_desc
    u32 free_descs
    u16 *link
    u16 *counts
    u32 *owners
    int kick
    u32 message_bytes      # 0 if it is an eventfd
    unsigned char message[64]
    u64 kicks


cdef int ring_open(
    Ring *ring, u32 size, bint event_idx, object desc, object avail, object used, int kick,
    bytes message=*
) except -1
cdef void ring_close(Ring *ring) noexcept
cdef void ring_add(Ring *ring, Desc *chain, u32 count, u32 token) noexcept nogil
cdef bint ring_publish(Ring *ring) noexcept nogil
cdef int ring_next(Ring *ring, u32 *token, u32 *written, Trouble *trouble) noexcept nogil
cdef bint ring_arm(Ring *ring, u32 count=*) noexcept nogil
cdef bint ring_has(const Ring *ring, u32 count) noexcept nogil
cdef void ring_quieten(Ring *ring) noexcept nogil
cdef int fail(Trouble *trouble, int code, u64 a=*, u64 b=*, u64 c=*, u64 d=*) noexcept nogil
cdef u64 *page_addresses(object addresses) except NULL
