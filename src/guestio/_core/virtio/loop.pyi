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
    @property
    def callback(self) -> Callable[[], None]: ...
    def __new__(
        cls, callback: Callable[[], None], patience: float, *_: object, **__: object
    ) -> Self: ...
    def take_ready(self) -> list[int]: ...

@disjoint_base
class ActiveQueue:
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
    watch: float
    def __init__(self, round_bytes: int = ...) -> None: ...
    def add_feed(self, feed: Feed) -> None: ...
    def remove_feed(self, feed: Feed) -> None: ...
    def add(self, queue: ActiveQueue) -> None: ...
    def remove(self, queue: ActiveQueue) -> None: ...
    def wait(
        self, epfd: int, seconds: float
    ) -> tuple[list[int], list[Feed], list[tuple[ActiveQueue, _Outcome | GuestioError | None]]]: ...
