"""A queue at a moment, as other threads may see it without waiting for the one that serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from guestio._core.trace.latencies import Latencies
from guestio._core.virtio.ring import Ring


class QueueCounts(NamedTuple):
    """What a queue has done since its device was attached, over all drivers and rings.

    Attributes:
        taken: Requests taken.
        completed: Requests given back to the driver.
        bytes: Bytes that the requests taken gave to read and to write.
        notifications: Notifications that the driver wanted.
    """

    taken: int = 0
    completed: int = 0
    bytes: int = 0
    notifications: int = 0

    def with_ring(self, ring: Ring | None) -> QueueCounts:
        """These, and what a ring has counted by now."""
        if ring is None:
            return self
        return QueueCounts(
            self.taken + ring.progress - ring.returned,
            self.completed + ring.completions,
            self.bytes + ring.bytes,
            self.notifications + ring.notifications,
        )


@dataclass(frozen=True)
class QueueSnapshot:
    """A queue at a moment.

    Attributes:
        index: Its number.
        enabled: Whether the driver wants it served.
        running: Whether it is served: its ring is in use.
        size: Entries of the ring; 0 while there is none.
        next_avail: The ring position that is taken next.
        next_used: The ring position that is published next.
        depth: Requests taken and not given back.
        held: Those of them that the device answers later.
        stalled_since: Since when it waits for translations (monotonic time), or None.
        broken: Why it is not served any more, or None.
        counts: What it has done.
        latencies: How long its requests took, from being found to being given back, while that is
            measured.
    """

    index: int
    enabled: bool
    running: bool
    size: int
    next_avail: int
    next_used: int
    depth: int
    held: int
    stalled_since: float | None
    broken: str | None
    counts: QueueCounts
    latencies: Latencies
