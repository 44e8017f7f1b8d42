"""How fast counts grow: they are noted each second, and compared."""

from __future__ import annotations

import time
from collections import deque

from guestio.control.schema import Status
from guestio.control.status import Observed

KEPT = 3
"""Notes that are kept: the rates are those of the last one to two seconds."""

_QUEUE_RATES = (
    ("requests_per_s", "taken"),
    ("bytes_per_s", "bytes"),
    ("notifications_per_s", "notifications"),
)


class Rates:
    """A server's status with its rates.

    Args:
        observed: The server.

    Attributes:
        observed: As given.

    For one thread.
    """

    def __init__(self, observed: Observed) -> None:
        self.observed = observed
        self._notes: deque[Status] = deque(maxlen=KEPT)

    def note(self) -> None:
        """Note the counts. Once a second."""
        self._notes.append(self.observed.status())

    def status(self) -> Status:
        """The status now, with rates since the oldest note."""
        now = self.observed.status()
        before = self._notes[0] if self._notes else now
        seconds = now["time_s"] - before["time_s"]
        if seconds <= 0:
            return now
        for name, count in now["counts"].items():
            now["rates"][name] = max(count - before["counts"].get(name, 0), 0) / seconds
        for queue, earlier in zip(now["queues"], before["queues"], strict=False):
            for rate, count_name in _QUEUE_RATES:
                grown = queue[count_name] - earlier[count_name]  # type: ignore[literal-required]
                queue["rates"][rate] = max(grown, 0) / seconds  # type: ignore[literal-required]
        grown = now["dirty"]["pages"] - before["dirty"]["pages"]
        now["dirty"]["pages_per_s"] = max(grown, 0) / seconds
        return now


def with_rates(observed: Observed, seconds: float) -> Status:
    """A status with the rates of the next moments; waits so long."""
    rates = Rates(observed)
    rates.note()
    time.sleep(seconds)
    return rates.status()
