from typing_extensions import disjoint_base

from guestio._core.iommu.intervals import IntervalMap
from guestio._core.vhost_user.miss_table import MissTable

@disjoint_base
class Traffic:
    requests: int
    failed_requests: int
    questions: int
    updates: int
    invalidations: int
    def __init__(self) -> None: ...
    def count_requests(self, count: int) -> None: ...
    def count_failed(self) -> None: ...
    def count_questions(self, questions: bytes) -> None: ...

@disjoint_base
class IotlbUpdater:
    users: IntervalMap
    def __init__(
        self, iotlb: IntervalMap, users: IntervalMap, misses: MissTable, traffic: Traffic
    ) -> None: ...
    def receive(self, fd: int) -> tuple[int, bytes, list[int]]: ...
