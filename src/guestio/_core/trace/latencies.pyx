"""Histograms of times: eight buckets for each doubling, so that a quantile is right to 6 %."""

cdef extern from *:
    """
    static inline uint64_t latency_floor(int bucket)
    {
        if (bucket < 8)
            return (uint64_t)bucket;
        return (uint64_t)(8 + bucket % 8) << (bucket / 8 - 1);
    }
    """
    uint64_t latency_floor(int bucket) nogil


cdef class Latencies:
    """How long things took, by kind: 0 for what is neither, 1 reads, 2 writes, 3 flushes.

    One thread adds; any may read, and sees what was added up to some moment for each bucket.
    """

    def note(self, int kind, since, now):
        """Count something that took from ``since`` to ``now``, in ns.

        Raises:
            ValueError: There is no such kind.
        """
        if not 0 <= kind < LATENCY_KINDS:
            raise ValueError(f"kind {kind} is not in 0..{LATENCY_KINDS - 1}")
        add_latency(self, kind, since, now)

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
