"""What a back end counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from guestio._core.iotlbwire import Traffic


@dataclass
class Statistics:
    """What happened on a back end, over all its front-ends.

    Attributes:
        connections: Front-ends accepted.
        requests: Requests taken from queues.
        failed_requests: Those of them that could not be served.
        queue_errors: Queues that stopped because their driver broke a rule.
        protocol_errors: Front-ends disconnected because they broke the protocol.
        dirty_pages: Pages of guest memory written; counted when a front-end goes, if tracked.
        iotlb_hits: Ranges translated without asking; counted when a front-end goes.
        iotlb_misses: Translations asked for.
        iotlb_refused: Translations asked for in vain.
        iotlb_timeouts: Those of them that the front-end did not answer in time.
        access_fails: Accesses that their translation forbade.
        traffic: Where the core counts what IOTLBs were told.
    """

    connections: int = 0
    requests: int = 0
    failed_requests: int = 0
    queue_errors: int = 0
    protocol_errors: int = 0
    dirty_pages: int = 0
    iotlb_hits: int = 0
    iotlb_misses: int = 0
    iotlb_refused: int = 0
    iotlb_timeouts: int = 0
    access_fails: int = 0
    traffic: Traffic = field(default_factory=Traffic, repr=False)

    @property
    def iotlb_updates(self) -> int:
        """Translations told."""
        return self.traffic.updates

    @property
    def iotlb_invalidations(self) -> int:
        """Translations revoked."""
        return self.traffic.invalidations
