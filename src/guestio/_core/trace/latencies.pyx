"""Histograms of times: eight buckets for each doubling, so that a quantile is right to 6 %."""

from guestio._core.base.capacity cimport GUESTIO_ASSERT

cdef extern from *:
    """
    /* Below 8 ns each value has a bucket; from there on each octave has eight. */
    static inline int latency_bucket(uint64_t ns)
    {
        int octave;
        if (ns < 8)
            return (int)ns;
        octave = 63 - __builtin_clzll(ns);
        return 8 * (octave - 2) + (int)(ns >> (octave - 3) & 7);
    }
    static inline uint64_t latency_floor(int bucket)
    {
        if (bucket < 8)
            return (uint64_t)bucket;
        return (uint64_t)(8 + bucket % 8) << (bucket / 8 - 1);
    }
    """
    int latency_bucket(uint64_t ns) nogil
    uint64_t latency_floor(int bucket) nogil


cdef class Latencies:
    """How long things took, by kind: 0 for what is neither, 1 reads, 2 writes, 3 flushes.

    One thread adds; any may read, and sees what was added up to some moment for each bucket.
    """

    # Plain C on the object's own table.
    cdef void add(self, int kind, uint64_t since, uint64_t now) noexcept nogil:
        """Count something that took from one time to another, in ns."""
        cdef uint64_t took = now - since if now > since else 0
        GUESTIO_ASSERT(0 <= kind < LATENCY_KINDS)
        self.bucket[kind][latency_bucket(took)] += 1
        self.sums[kind] += took

    def note(self, int kind, since, now):
        """Count something that took from ``since`` to ``now``, in ns.

        Raises:
            ValueError: There is no such kind.
        """
        if not 0 <= kind < LATENCY_KINDS:
            raise ValueError(f"kind {kind} is not in 0..{LATENCY_KINDS - 1}")
        self.add(kind, since, now)

    def buckets(self, int kind):
        """``(first, end, count)`` of each bucket that is not empty, ascending; times in ns.

        Raises:
            ValueError: There is no such kind.
        """
        cdef int i
        if not 0 <= kind < LATENCY_KINDS:
            raise ValueError(f"kind {kind} is not in 0..{LATENCY_KINDS - 1}")
        return [
            (latency_floor(i), latency_floor(i + 1), self.bucket[kind][i])
            for i in range(LATENCY_BUCKETS - 16) if self.bucket[kind][i]
        ]

    def sum_ns(self, int kind):
        """The sum of all times of a kind, in ns."""
        if not 0 <= kind < LATENCY_KINDS:
            raise ValueError(f"kind {kind} is not in 0..{LATENCY_KINDS - 1}")
        return self.sums[kind]
