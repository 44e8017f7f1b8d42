"""What is counted where it happens, in the core."""

from guestio._core.base.checks cimport u64


cdef class Counters:
    """Counters of a device's queues and of the translations that they need.

    Attributes:
        requests: Requests taken from queues.
        failed_requests: Those of them that could not be served.
        misses: Translations requested from the transport, repeated requests included.
        updates: Translations received.
        invalidations: Translations revoked.

    Each method is one step, whatever other threads do.
    """

    def count_requests(self, u64 count):
        """Add requests."""
        self.requests += count

    def count_failed(self):
        """Add a request that could not be served."""
        self.failed_requests += 1

    def count_misses(self, u64 count):
        """Add translations that were requested."""
        self.misses += count
