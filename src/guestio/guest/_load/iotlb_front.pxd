"""C view of the answering of IOTLB misses."""

from guestio._core.base.checks cimport u8, u32, u64


cdef enum FrontTrouble:
    FRONT_FINE = 0
    FRONT_GONE = 1          # the back-end closed a connection
    FRONT_PROTOCOL = 2      # it sent a message of no known kind; `detail` is the request's code
    FRONT_REFUSED = 3       # it refused to forget a translation
    FRONT_SYSTEM = 4        # a system call failed; `detail` is errno


cdef struct Expected:
    u32 kind
    u32 tag


cdef struct Stream:
    int fd
    u8 *received
    u32 received_end
    u8 *unsent
    size_t unsent_start
    size_t unsent_end
    size_t room


cdef class IotlbFront:
    # By page of the window: where the page is in this process, and in the low bits what the device
    # may do there; 0 where nothing is mapped.
    cdef u64 *table
    cdef readonly u64 base
    cdef readonly u64 pages
    cdef bint whole
    cdef bint each
    cdef size_t sending    # bytes left of a message that is sent by itself
    cdef bint awaited      # all of it was sent, and it is not acknowledged
    cdef Stream front
    cdef Stream back
    cdef Expected *expected
    cdef u32 mask
    cdef u32 first
    cdef u32 next
    cdef u32 answers       # of those expected: what goes back to the back-end
    cdef u32 *finished
    cdef u32 finished_first
    cdef u32 finished_next
    cdef int trouble
    cdef u64 detail
    cdef readonly u64 misses
    cdef readonly u64 updates
    cdef readonly u64 invalidations
    cdef readonly u64 refused
    cdef readonly u64 access_fails
    cdef u64 invalidations_due
    cdef u64 invalidations_room

    cdef void put(self, u64 page, u64 host, int perm) noexcept nogil
    cdef int forget(self, u64 page, u64 count, u32 tag) noexcept nogil
    cdef int tell(self, u64 page, u32 kind) noexcept nogil
    cdef int flush(self) noexcept nogil
    cdef bint waiting_to_send(self) noexcept nogil
    cdef bint idle(self) noexcept nogil
    cdef int take_acks(self) noexcept nogil
    cdef int take_requests(self) noexcept nogil
    cdef bint full(self) noexcept nogil
    cdef int answer(self, u32 request, u32 flags, const u8 *payload, u32 size) noexcept nogil
    cdef void expect(self, u32 kind, u32 tag) noexcept nogil
    cdef void take_acknowledgement(self, u64 status) noexcept nogil
    cdef void reply_to_covered(self) noexcept nogil
    cdef void reply(self, u32 kind, u64 status) noexcept nogil
    cdef int fail(self, int trouble, u64 detail) noexcept nogil
    cdef int send(self, Stream *stream) noexcept nogil
    cdef int receive(self, Stream *stream) noexcept nogil
