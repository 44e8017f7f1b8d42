from typing import TypeAlias

from typing_extensions import disjoint_base

from guestio._core.iommu.misses import Misses
from guestio._core.vhost_user.iotlb_feed import IotlbUpdater
from guestio._core.vhost_user.miss_table import MissTable
from guestio._core.virtio.chain import Chain, Server
from guestio._core.virtio.ring import SplitRing
from guestio.errors import GuestioError

_Outcome: TypeAlias = tuple[list[Chain], Misses, int, bool]

@disjoint_base
class Attended:
    @property
    def waiter(self) -> int: ...
    def __init__(
        self, ring: SplitRing, server: Server | None, kick: int, call: int, waiter: int
    ) -> None: ...

@disjoint_base
class Intake:
    main: int
    back: int
    acknowledged: bool
    alarm: float
    look_after: float
    def __init__(
        self,
        updater: IotlbUpdater,
        misses: MissTable,
        patience: float,
        *,
        round_bytes: int = ...,
    ) -> None: ...
    def attend(self, queue: Attended) -> None: ...
    def leave(self, waiter: int) -> Attended | None: ...
    def wait(
        self, epfd: int, seconds: float
    ) -> tuple[
        list[int],
        list[int],
        bytes,
        bytes,
        list[tuple[int, _Outcome | GuestioError | None]],
    ]: ...
