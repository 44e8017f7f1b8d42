from typing_extensions import disjoint_base

from guestio._core.intervals import IntervalMap
from guestio._core.questions import MissTable

@disjoint_base
class Traffic:
    updates: int
    invalidations: int
    def __init__(self) -> None: ...

@disjoint_base
class IotlbUpdater:
    users: IntervalMap
    def __init__(
        self, iotlb: IntervalMap, users: IntervalMap, misses: MissTable, traffic: Traffic
    ) -> None: ...
    def receive(self, fd: int) -> tuple[int, bytes, list[int]]: ...

@disjoint_base
class Intake:
    main: int
    def __init__(self, updater: IotlbUpdater) -> None: ...
    def wait(self, epfd: int, seconds: float) -> tuple[list[int], list[int], bytes]: ...
