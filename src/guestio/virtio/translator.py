"""How a queue learns the translations that it lacks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, TypeAlias

from guestio._core.virtio.loop import Feed
from guestio.addr import IovaRange
from guestio.iommu import Iotlb

Page: TypeAlias = tuple[int, int]
"""Address of a page, and the access that is wanted."""

Miss: TypeAlias = tuple[IovaRange, int]
"""A range without a translation for an access, and the access."""


class Translator(Protocol):
    """Requests translations for the queues of one device; a transport provides it.

    A waiter is the index of a queue. Each method but :meth:`request` may be called from any thread;
    that one in the loop's thread, or from any where each queue has a thread of its own.
    """

    @property
    def iotlb(self) -> Iotlb | None:
        """Where translations are looked up; None if addresses are physical."""
        ...

    @property
    def patience(self) -> float:
        """Seconds that a request may wait for translations in all."""
        ...

    @property
    def feed(self) -> Feed | None:
        """Requests misses for queues that the core's loop serves; None if Python must."""
        ...

    def request(self, waiter: int, missing: Iterable[Miss]) -> None:
        """Request ranges, except for pages that were refused; answers wake the queue."""
        ...

    def refused(self, waiter: int) -> set[Page]:
        """The pages that were requested in vain; the caller removes those it has dealt with."""
        ...

    def under_way(self, where: IovaRange, access: int) -> bool:
        """Whether an answer about the last page of a range is still to come."""
        ...

    def forget(self, waiter: int) -> None:
        """Forget what a stopped queue waits for and what it was refused."""
        ...

    def report_failed(self, lacking: list[Miss], forbidden: list[Miss]) -> None:
        """Report what a failed access lacks, in the thread that serves the queue.

        Args:
            lacking: Ranges of a request that fails, or of a ring, without a translation for the
                access.
            forbidden: Those of them that have one which forbids the access; empty for a ring.

        Raises:
            QueueError: A ring is gone for good: its queue is broken by that. Without it the queue
                looks for its ring again at the next kick.
        """
        ...


class PhysicalTranslator:
    """The translator of a device without an IOMMU: what is not there stays so."""

    iotlb = None
    feed = None
    patience = math.inf

    def __init__(self) -> None:
        self._refused: dict[int, set[Page]] = {}

    def request(self, waiter: int, missing: Iterable[Miss]) -> None:
        """Do nothing: no physical address has a translation."""

    def refused(self, waiter: int) -> set[Page]:
        """Nothing is refused."""
        return self._refused.setdefault(waiter, set())

    def under_way(self, where: IovaRange, access: int) -> bool:
        """No answer is to come."""
        return False

    def forget(self, waiter: int) -> None:
        """Do nothing."""

    def report_failed(self, lacking: list[Miss], forbidden: list[Miss]) -> None:
        """Do nothing: there is no IOMMU to report to."""
