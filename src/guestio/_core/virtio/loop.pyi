from collections.abc import Callable
from typing import Self, TypeAlias

from typing_extensions import disjoint_base

from guestio._core.iommu.misses import Misses
from guestio._core.virtio.chain import Chain, Server
from guestio._core.virtio.counters import Counters
from guestio._core.virtio.ring import Ring
from guestio.errors import GuestioError

_Outcome: TypeAlias = tuple[list[Chain], Misses, int, bool]

@disjoint_base
class Feed:
    """How translations reach the queues of one device without entering Python. Abstract.

    Args:
        callback: Called by the event loop when the feed has something for Python.
        patience: Seconds that a request may wait for translations in all.
    """
    @property
    def callback(self) -> Callable[[], None]: ...
    def __new__(
        cls, callback: Callable[[], None], patience: float, *_: object, **__: object
    ) -> Self: ...
    def take_ready(self) -> list[int]:
        """The waiters that lack nothing any more and are not active in the loop; once."""

@disjoint_base
class ActiveQueue:
    """A queue that the loop serves, as long as nothing is to be decided about it.

    Args:
        ring: Its ring.
        server: Serves its requests.
        kick: The eventfd that announces them, waited for by its edge.
        call: The eventfd to notify the driver with, or -1.
        feed: Requests translations for it; None if its addresses are physical.
        waiter: Its number for the feed.
        counters: Where its requests are counted.
        callback: Called by the event loop with what its ring's ``run_once`` returned or raised, or
            with None if the queue is only very busy. The queue is not active any more then.

    Attributes:
        waits_since: Since when it waits for translations (monotonic time), or 0.
    """
    @property
    def waiter(self) -> int: ...
    @property
    def callback(self) -> Callable[[_Outcome | GuestioError | None], None]: ...
    @property
    def waits_since(self) -> float: ...
    def __init__(
        self,
        ring: Ring,
        server: Server | None,
        kick: int,
        call: int,
        *,
        feed: Feed | None,
        waiter: int,
        counters: Counters,
        callback: Callable[[_Outcome | GuestioError | None], None],
    ) -> None: ...

@disjoint_base
class CoreLoop:
    """Waits for descriptors, and serves the active queues on the way.

    Args:
        round_bytes: Bytes of requests that queues are served between two looks at the descriptors;
            those that are left then are returned as very busy.

    Attributes:
        watch: Seconds to look out for more after a feed or a queue was served, before sleeping.
            That spends a processor's time on waking up sooner.

    For one thread.
    """

    watch: float
    def __init__(self, round_bytes: int = ...) -> None: ...
    def add_feed(self, feed: Feed) -> None:
        """Handle a feed's messages from now on."""
    def remove_feed(self, feed: Feed) -> None:
        """Handle a feed's messages no more; unknown ones are ignored."""
    def add(self, queue: ActiveQueue) -> None:
        """Serve a queue from now on."""
    def remove(self, queue: ActiveQueue) -> None:
        """Serve a queue no more; unknown ones are ignored."""
    def wait(
        self, epfd: int, seconds: float
    ) -> tuple[list[int], list[Feed], list[tuple[ActiveQueue, _Outcome | GuestioError | None]]]:
        """Wait until something is to be done that is not done here.

        Args:
            epfd: Waits for the sources of the feeds and the kicks of the active queues, and for
                all else.
            seconds: How long to wait at most; negative for any time.

        Returns:
            ``(fds, feeds, outcomes)``: descriptors with something else to do, each feed that has
            something for Python, and ``(queue, outcome)`` for each queue that is not active any
            more.

        Raises:
            OSError: ``epfd`` cannot be waited for.
        """
