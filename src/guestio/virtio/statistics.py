"""What is counted of a device and its queues, and rate-limited reports about them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from guestio._core.virtio.counters import Counters
from guestio.ratelog import LOG

log = logging.getLogger("guestio.virtio")


@dataclass
class Statistics:
    """What happened on a back-end, over all its front-ends.

    Attributes:
        connections: Front-ends accepted.
        queue_errors: Queues that stopped because their driver broke a rule.
        protocol_errors: Front-ends disconnected because they broke the protocol.
        dirty_pages: Pages of guest memory written; counted when a front-end goes, if tracked.
        iotlb_hits: Ranges translated without asking; counted when a front-end goes.
        iotlb_refused: Translations asked for in vain.
        iotlb_timeouts: Those of them that the front-end did not answer in time.
        access_fails: Accesses that their translation forbade.
        config_changes: Times that a front-end was told of a changed configuration space.
        counters: What the core counts.
        device_failures: Tells how many requests the device answered with an error by itself.
        device_holds: Tells how many requests the device has and has not answered.
    """

    connections: int = 0
    queue_errors: int = 0
    protocol_errors: int = 0
    dirty_pages: int = 0
    iotlb_hits: int = 0
    iotlb_refused: int = 0
    iotlb_timeouts: int = 0
    access_fails: int = 0
    config_changes: int = 0
    counters: Counters = field(default_factory=Counters, repr=False)
    device_failures: Callable[[], int] = field(default=lambda: 0, repr=False)
    device_holds: Callable[[], int] = field(default=lambda: 0, repr=False)

    def __str__(self) -> str:
        """All counters, for people."""
        counts = self.counts() | {"outstanding": self.outstanding}
        return " ".join(f"{name}={count}" for name, count in counts.items())

    def counts(self) -> dict[str, int]:
        """All counters by name; not ``outstanding``, which is none. From any thread."""
        hidden = ("counters", "device_failures", "device_holds", "outstanding")
        names = [name for name in vars(self) if name not in hidden]
        names += [
            name
            for name, value in vars(type(self)).items()
            if isinstance(value, property) and name not in hidden
        ]
        return {name: getattr(self, name) for name in names}

    def __getstate__(self) -> dict[str, object]:
        """A snapshot for another process: what the device counts is counted up to now."""
        return vars(self) | {
            name: functools.partial(int, getattr(self, name)())
            for name in ("device_failures", "device_holds")
        }

    @property
    def requests(self) -> int:
        """Requests taken from queues."""
        return self.counters.requests

    @property
    def failed_requests(self) -> int:
        """Those of them that could not be served."""
        return self.counters.failed_requests + self.device_failures()

    @property
    def outstanding(self) -> int:
        """Requests that the device holds at this moment: it answers them later."""
        return self.device_holds()

    @property
    def iotlb_misses(self) -> int:
        """Translations asked for."""
        return self.counters.misses

    @property
    def iotlb_updates(self) -> int:
        """Translations told."""
        return self.counters.updates

    @property
    def iotlb_invalidations(self) -> int:
        """Translations revoked."""
        return self.counters.invalidations


class RateLimitedLog:
    """Logs what a guest may cause any number of times, within the limit of the process.

    From any thread.
    """

    def report(self, message: str, *args: object, trace: bool | BaseException = False) -> None:
        """Log a warning, or only count it."""
        LOG.report(log, logging.WARNING, message, *args, trace=trace)
