"""C view of histograms of times."""

from guestio._core.base.capacity cimport GUESTIO_ASSERT
from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #ifndef GUESTIO_LATENCIES
    #define GUESTIO_LATENCIES
    #include <stdint.h>
    /* Below 8 ns each value has a bucket; from there on each octave has eight. */
    static inline int latency_bucket(uint64_t ns)
    {
        int octave;
        if (ns < 8)
            return (int)ns;
        octave = 63 - __builtin_clzll(ns);
        return 8 * (octave - 2) + (int)(ns >> (octave - 3) & 7);
    }
    #endif
    """
    int latency_bucket(uint64_t ns) nogil

cdef enum:
    LATENCY_KINDS = 4        # other requests, reads, writes, flushes
    LATENCY_BUCKETS = 512


cdef class Latencies:
    cdef uint64_t bucket[LATENCY_KINDS][LATENCY_BUCKETS]
    cdef uint64_t sums[LATENCY_KINDS]


cdef inline void add_latencies(
    Latencies to, int kind, uint64_t since, uint64_t now, uint64_t count
) noexcept:
    """Count things that took from one time to another, in ns.

    Plain C on the object's own table, which is there: it cannot raise.
    """
    cdef uint64_t took = now - since if now > since else 0
    GUESTIO_ASSERT(0 <= kind < LATENCY_KINDS)
    to.bucket[kind][latency_bucket(took)] += count
    to.sums[kind] += count * took


cdef inline void add_latency(Latencies to, int kind, uint64_t since, uint64_t now) noexcept:
    """The same of one. Plain C: it cannot raise."""
    add_latencies(to, kind, since, now, 1)
