"""What requests carry, copied for a recording while their memory is still theirs.

Guest memory changes as soon as a request is given back, so this is done where it is taken and where
it is served. All of it is written to the thread's ring as records like any other: what is too much
is lost and counted like them, and no byte of a guest's can be taken for a record.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from guestio._core.memory.vector cimport IoVector
from guestio._core.trace.tracepoints cimport (
    DATA, TraceRecord, WHAT_CONTENT, WHAT_DATA, trace, trace_record, tracing,
)

from guestio.budgets import RECORD_CONTENT_BYTES

cdef extern from "../trace/xxh64.h" nogil:
    ctypedef struct Xxh64:
        pass
    void xxh64_begin(Xxh64 *hash)
    void xxh64_add(Xxh64 *hash, const uint8_t *data, uint64_t count)
    uint64_t xxh64_end(const Xxh64 *hash, const uint8_t *rest)

cdef enum:
    READ = 1
    WRITE = 2
    HEADER = 64          # bytes of what is given to read, unless all are wanted
    CHUNK = 40           # bytes in a record
    PORTION = 4000       # bytes copied at a time: a multiple of 32, for the hash, and of CHUNK

cdef uint64_t most = RECORD_CONTENT_BYTES
MOST_BYTES = most


# These run where nothing can be raised: plain C on memory that the request holds.
cdef void trace_given(
    IoVector memory, uint16_t origin, uint16_t queue, uint32_t head
) noexcept:
    """Write the first bytes that a request gives to read. Plain C, as `transfer`: no exception."""
    cdef TraceRecord record = trace_record(WHAT_CONTENT, origin)
    if not memory.total:
        return
    record.queue, record.head, record.access = queue, head, READ
    record.length = memory.total
    record.detail = min(memory.total, most if tracing & DATA else <uint64_t>HEADER)
    trace(&record)
    write_data(memory, &record)


cdef void trace_answer(
    IoVector memory, uint64_t written, uint16_t origin, uint16_t queue, uint32_t head
) noexcept:
    """Write what becomes of the memory that a request gives to write: hash, last byte, bytes.

    Plain C, as `transfer`: no exception.
    """
    cdef TraceRecord record = trace_record(WHAT_CONTENT, origin)
    cdef uint8_t last
    written = min(written, memory.total)
    record.queue, record.head, record.access = queue, head, WRITE
    record.length, record.result = written, -1
    record.since = hash_of(memory, min(written, most))
    if memory.total and memory.transfer(&last, memory.total - 1, 1, False):
        record.result = last
    if tracing & DATA:
        record.detail = min(written, most)
    trace(&record)
    write_data(memory, &record)


cdef uint64_t hash_of(IoVector memory, uint64_t count) noexcept:
    """The XXH64 of the first bytes of memory. Plain C, as `transfer`: no exception."""
    cdef uint8_t portion[PORTION]
    cdef uint64_t at = 0, n = 0
    cdef Xxh64 hash
    xxh64_begin(&hash)
    while at < count:
        n = memory.transfer(portion, at, min(count - at, <uint64_t>PORTION), False)
        if not n:
            break
        xxh64_add(&hash, portion, n)
        at += n
    return xxh64_end(&hash, portion + n // 32 * 32)


cdef void write_data(IoVector memory, TraceRecord *about) noexcept:
    """Write the first ``detail`` bytes of memory, CHUNK to a record. As `trace_answer`."""
    cdef uint8_t portion[PORTION]
    cdef TraceRecord record
    cdef uint64_t at = 0, n, i, count = about.detail
    while at < count:
        n = memory.transfer(portion, at, min(count - at, <uint64_t>PORTION), False)
        if not n:
            return
        for i in range(0, n, CHUNK):
            record = about[0]
            record.what, record.time = WHAT_DATA, 0
            memset(&record.since, 0, CHUNK)
            memcpy(&record.since, portion + i, min(<uint64_t>CHUNK, n - i))
            trace(&record)
        at += n


def xxh64(bytes data not None):
    """The XXH64 of bytes, with seed 0."""
    cdef Xxh64 hash
    cdef const uint8_t *at = <const uint8_t *>PyBytes_AS_STRING(data)
    cdef uint64_t count = <uint64_t>PyBytes_GET_SIZE(data)
    xxh64_begin(&hash)
    xxh64_add(&hash, at, count)
    return xxh64_end(&hash, at + count // 32 * 32)
