from typing_extensions import disjoint_base

from guestio._core.intervals import IntervalMap
from guestio._core.questions import MissTable

@disjoint_base
class IotlbUpdater:
    users: IntervalMap
    def __init__(self, iotlb: IntervalMap, users: IntervalMap, misses: MissTable) -> None: ...
    @property
    def updates(self) -> int: ...
    @property
    def invalidations(self) -> int: ...
    def receive(self, fd: int) -> tuple[int, bytes, list[int]]: ...
