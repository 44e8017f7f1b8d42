from collections.abc import Callable

from typing_extensions import disjoint_base

from guestio._core.iommu.intervals import IntervalMap
from guestio._core.vhost_user.miss_table import MissTable
from guestio._core.virtio.counters import Counters
from guestio._core.virtio.loop import Feed

@disjoint_base
class IotlbUpdater:
    user_addresses: IntervalMap
    def __init__(
        self,
        iotlb: IntervalMap,
        user_addresses: IntervalMap,
        misses: MissTable,
        counters: Counters,
    ) -> None: ...
    def receive(self, fd: int) -> tuple[int, bytes, list[int]]: ...

@disjoint_base
class IotlbFeed(Feed):
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
    def take_unsent(self) -> tuple[bytes, bytes]: ...
