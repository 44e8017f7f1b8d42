from collections.abc import Callable

from typing_extensions import disjoint_base

from guestio._core.iommu.intervals import IntervalMap
from guestio._core.vhost_user.miss_table import MissTable
from guestio._core.virtio.counters import Counters
from guestio._core.virtio.loop import Feed

@disjoint_base
class IotlbUpdater:
    """Applies UPDATE and INVALIDATE messages to an IOTLB.

    Args:
        iotlb: The map of the IOTLB, which is changed.
        user_addresses: Where the front-end's own addresses are in guest memory.
        misses: The pending misses that updates answer.
        counters: Where to count.
    """

    user_addresses: IntervalMap
    def __init__(
        self,
        iotlb: IntervalMap,
        user_addresses: IntervalMap,
        misses: MissTable,
        counters: Counters,
    ) -> None: ...
    def receive(self, fd: int) -> tuple[int, bytes, list[int]]:
        """Apply the messages at the start of what has arrived at a socket, as long as they are plain.

        Plain is an UPDATE that lies in one piece of shared memory and an INVALIDATE, both of
        ranges that are not in use at the moment. They are taken from the socket and acknowledged.

        Args:
            fd: The socket; no message on it may be taken in part.

        Returns:
            ``(taken, unsent, ready)``: how many messages were applied, the acknowledgements that
            could not be sent without waiting, and the waiters that miss nothing any more.

        Cost: O(log n) a message, and three system calls.
        """

@disjoint_base
class IotlbFeed(Feed):
    """Plain IOTLB messages and misses of one front-end, for the event loop.

    Args:
        callback: As for :class:`~guestio._core.virtio.loop.Feed`.
        patience: Seconds that a request may wait for translations in all.
        updater: Applies what arrives on the main channel.
        misses: The pending misses.
        counters: Where misses are counted.

    Attributes:
        main: The main channel's socket, or -1 while it is not to be read here.
        back: The back-end channel's socket, or -1 while it is not to be written here.
        acknowledged: Whether the front-end acknowledges misses on request.
        alarm: When the pending misses will be looked at (monotonic time).
        look_after: Seconds within which a new miss wants to be looked at.

    For the thread of the event loop.
    """

    main: int
    back: int
    acknowledged: bool
    alarm: float
    look_after: float
    def __init__(
        self,
        callback: Callable[[], None],
        patience: float,
        updater: IotlbUpdater,
        misses: MissTable,
        counters: Counters,
    ) -> None: ...
    def take_unsent(self) -> tuple[bytes, bytes]:
        """What could not be sent without waiting: acknowledgements for the main channel, and
        misses for the back-end channel; once.
        """
