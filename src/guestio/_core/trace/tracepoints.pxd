"""C view of the tracepoints: what a record is, and how one is written.

A tracepoint is one test of :data:`tracing`; only if its group's bit is set, a record is filled in
and given to :func:`trace`.

Most requests are taken, served and published by one thread within microseconds. Such a request is
written once, as a :class:`WholeRequest` in the place of three records, when it is published;
the reader of a ring makes the three of it (:func:`spell_out`).
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #ifndef GUESTIO_TRACE_RECORD
    #define GUESTIO_TRACE_RECORD
    #include <stdint.h>
    /* A cache line. guestio.trace.RECORD describes the same to Python and is compared by a test. */
    typedef struct TraceRecord {
        uint64_t time;
        uint64_t since;
        uint64_t address;
        uint64_t length;
        uint64_t detail;
        int64_t result;
        uint32_t thread;
        uint32_t head;
        uint16_t what;
        uint16_t origin;
        uint16_t queue;
        uint16_t access;
    } TraceRecord;
    _Static_assert(sizeof(TraceRecord) == 64, "a record is a cache line");

    /* A request in place of its records TAKEN, SERVED and COMPLETED. `time`, `thread`, `what` and
       what follows are where a record has them. */
    typedef struct WholeRequest {
        uint64_t time;
        uint64_t address;
        uint64_t offset;
        uint32_t since;
        uint32_t taken;
        uint32_t served;
        uint32_t readable;
        uint32_t writable;
        uint32_t written;
        uint32_t thread;
        uint16_t position;
        uint16_t head;
        uint16_t what;
        uint16_t origin;
        uint16_t queue;
        uint16_t access;
    } WholeRequest;
    _Static_assert(sizeof(WholeRequest) == sizeof(TraceRecord)
                   && __builtin_offsetof(WholeRequest, thread)
                      == __builtin_offsetof(TraceRecord, thread)
                   && __builtin_offsetof(WholeRequest, what) == __builtin_offsetof(TraceRecord, what),
                   "both are written and told apart in the same way");

    /* What a ring holds. */
    typedef union TraceSlot {
        TraceRecord record;
        WholeRequest whole;
    } TraceSlot;

    enum {
        TRACE_NO_QUEUE = 0xFFFF,
        /* Of a WholeRequest; it is no What, as no reader sees it. */
        TRACE_WHOLE = 15
    };
    static const uint32_t TRACE_NO_HEAD = 0xFFFFFFFF;

    /* A record of an event that concerns no queue. */
    static inline TraceRecord trace_record(uint16_t what, uint16_t origin)
    {
        TraceRecord record = {.what = what, .origin = origin, .queue = TRACE_NO_QUEUE,
                              .head = TRACE_NO_HEAD};
        return record;
    }
    #endif
    """
    ctypedef struct TraceRecord:
        uint64_t time        # CLOCK_MONOTONIC, ns; 0 for now
        uint64_t since       # when it began, ns; 0 if that is not known
        uint64_t address
        uint64_t length
        uint64_t detail
        int64_t result
        uint32_t thread
        uint32_t head
        uint16_t what
        uint16_t origin
        uint16_t queue
        uint16_t access
    ctypedef struct WholeRequest:
        uint64_t time        # when it was published
        uint64_t address
        uint64_t offset      # of a read or write in the image
        uint32_t since       # ns from when its batch was found until it was published
        uint32_t taken       # ns from when its batch was found
        uint32_t served      # the same
        uint32_t readable
        uint32_t writable
        uint32_t written
        uint32_t thread
        uint16_t position    # in the available ring
        uint16_t head
        uint16_t what        # TRACE_WHOLE
        uint16_t origin
        uint16_t queue
        uint16_t access      # the kind of its operation
    ctypedef union TraceSlot:
        TraceRecord record
        WholeRequest whole
    enum:
        TRACE_NO_QUEUE
        TRACE_WHOLE
    const uint32_t TRACE_NO_HEAD
    TraceRecord trace_record(uint16_t what, uint16_t origin) noexcept nogil


cdef enum:
    # Bits of `tracing`: groups of events, and whether latencies are measured.
    REQUESTS = 1
    TRANSLATIONS = 2
    LIFE = 4
    MEASURE = 8
    BUFFERS = 16
    CONTENTS = 32
    DATA = 64


cdef enum What:
    # The numbers are those of guestio.trace.What, and never change their meaning.
    WHAT_AVAILABLE = 1
    WHAT_TAKEN = 2
    WHAT_STALLED = 3
    WHAT_SERVED = 4
    WHAT_COMPLETED = 5
    WHAT_INTERRUPT = 6
    WHAT_FAILED = 7
    WHAT_BUFFER = 8
    WHAT_LACKING = 9
    WHAT_CONTENT = 10
    WHAT_DATA = 11
    WHAT_MISS = 16
    WHAT_UPDATE = 17
    WHAT_INVALIDATE = 18
    WHAT_REFUSED = 19
    WHAT_EVICTED = 20
    WHAT_DMA_MAP = 21
    WHAT_DMA_UNMAP = 22
    WHAT_HARVEST = 34


# Which groups are wanted at this moment. 0 nearly always.
cdef int tracing

# With the GIL held: it keeps a ring from being released while it is written.
cdef void trace(TraceRecord *record) noexcept

# The same for several at once, whose times are set.
cdef void trace_all(TraceSlot *slots, uint32_t count) noexcept
