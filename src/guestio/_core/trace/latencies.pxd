"""C view of histograms of times."""

from libc.stdint cimport uint64_t

cdef enum:
    LATENCY_KINDS = 4        # other requests, reads, writes, flushes
    LATENCY_BUCKETS = 512


cdef class Latencies:
    cdef uint64_t bucket[LATENCY_KINDS][LATENCY_BUCKETS]
    cdef uint64_t sums[LATENCY_KINDS]

    cdef void add(self, int kind, uint64_t since, uint64_t now) noexcept nogil
