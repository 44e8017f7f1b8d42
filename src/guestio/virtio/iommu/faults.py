"""Faults on their way to the guest: limited in number and in rate, and none is lost uncounted."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from guestio.iommu.events import Event
from guestio.virtio.iommu.wire import FaultRecord


@dataclass(slots=True)
class FaultStats:
    """What became of an endpoint's faults.

    Attributes:
        total: Faults so far; the sum of the others and of those that still wait.
        reported: Records that were taken for the guest.
        limited: Faults without a record, because the endpoint had too many at once.
        dropped: Faults without a record, because the guest did not make room for those before.
    """

    total: int = 0
    reported: int = 0
    limited: int = 0
    dropped: int = 0


class _Account:
    """One endpoint's faults and how many records it may have now."""

    def __init__(self, burst: float, now: float) -> None:
        self.stats = FaultStats()
        self.credit = burst
        self.at = now


class FaultLog:
    """Records waiting to be reported.

    Args:
        rate: Records a second that one endpoint may cause in the long run.
        burst: Records that it may cause at once.
        capacity: Records that wait at most, of all endpoints.
        clock: Tells the time in seconds.

    Attributes:
        short_buffers: Buffers of the guest's that were too small for a record, or out of reach.

    Everything may be called from any thread.
    """

    def __init__(
        self,
        rate: float,
        burst: int,
        capacity: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if rate < 0 or burst < 1 or capacity < 1:
            raise ValueError("fault rate must be >= 0, burst and capacity at least 1")
        self._rate, self._burst, self._capacity, self._clock = rate, burst, capacity, clock
        self._lock = threading.Lock()
        self._waiting: deque[FaultRecord] = deque()
        self._accounts: dict[int, _Account] = {}
        self._arrival = Event()
        self.short_buffers = 0

    def add(self, record: FaultRecord) -> bool:
        """Have a fault reported, if there is room; whether it will be."""
        now = self._clock()
        with self._lock:
            account = self._accounts.setdefault(record.endpoint, _Account(self._burst, now))
            account.stats.total += 1
            gained = max(now - account.at, 0.0) * self._rate
            account.credit = min(account.credit + gained, self._burst)
            account.at = max(account.at, now)
            if account.credit < 1:
                account.stats.limited += 1
                return False
            if len(self._waiting) >= self._capacity:
                account.stats.dropped += 1
                return False
            account.credit -= 1
            self._waiting.append(record)
            arrival, self._arrival = self._arrival, Event()
        arrival.set()
        return True

    def take(self, limit: int | None = None) -> list[FaultRecord]:
        """Take records that wait, oldest first, at most ``limit``; they count as reported."""
        with self._lock:
            count = len(self._waiting) if limit is None else min(limit, len(self._waiting))
            taken = [self._waiting.popleft() for _ in range(count)]
            for record in taken:
                self._accounts[record.endpoint].stats.reported += 1
            return taken

    @property
    def arrival(self) -> Event:
        """Happens when the next record comes, or has happened if some wait."""
        with self._lock:
            if not self._waiting:
                return self._arrival
        event = Event()
        event.set()
        return event

    def clear(self) -> None:
        """Drop all that wait, as a reset does; they count as dropped."""
        with self._lock:
            for record in self._waiting:
                self._accounts[record.endpoint].stats.dropped += 1
            self._waiting.clear()

    def waiting(self) -> list[FaultRecord]:
        """The records that wait, without taking them."""
        with self._lock:
            return list(self._waiting)

    def stats(self, endpoint: int) -> FaultStats:
        """What became of an endpoint's faults so far."""
        with self._lock:
            account = self._accounts.get(endpoint)
            if account is None:
                return FaultStats()
            known = account.stats
            return FaultStats(known.total, known.reported, known.limited, known.dropped)

    def restore(self, records: list[FaultRecord], stats: dict[int, FaultStats]) -> None:
        """Take over records and counts of another log."""
        now = self._clock()
        with self._lock:
            self._waiting = deque(records)
            for endpoint, known in stats.items():
                self._accounts[endpoint] = _Account(self._burst, now)
                self._accounts[endpoint].stats = known
