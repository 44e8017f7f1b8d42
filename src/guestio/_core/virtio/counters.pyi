from typing_extensions import disjoint_base

@disjoint_base
class Counters:
    """Counters of a device's queues and of the translations that they need.

    Attributes:
        requests: Requests taken from queues.
        failed_requests: Those of them that could not be served.
        misses: Translations requested from the transport, repeated requests included.
        updates: Translations received.
        invalidations: Translations revoked.

    Each method is one step, whatever other threads do.
    """

    requests: int
    failed_requests: int
    misses: int
    updates: int
    invalidations: int
    def __init__(self) -> None: ...
    def count_requests(self, count: int) -> None:
        """Add requests."""
    def count_failed(self) -> None:
        """Add a request that could not be served."""
    def count_misses(self, count: int) -> None:
        """Add translations that were requested."""
