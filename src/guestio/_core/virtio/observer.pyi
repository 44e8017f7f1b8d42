from collections.abc import Callable
from typing import Self, TypeAlias

from typing_extensions import disjoint_base

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.trace.latencies import Latencies
from guestio._core.virtio.areas import RingAreas
from guestio._core.virtio.loop import Feed

_Piece: TypeAlias = tuple[int, int, bool]
_Request: TypeAlias = tuple[int, int, bool, int | None, int | None, int, int, list[_Piece]]
_Completion: TypeAlias = tuple[int, int, int, int]

DRIVER: str
DEVICE: str

@disjoint_base
class RingObserver(RingAreas):
    notifications: int
    kick_fd: int
    call_fd: int
    to_kick: bool
    to_call: bool
    @property
    def next_avail(self) -> int: ...
    @property
    def next_used(self) -> int: ...
    @property
    def taken(self) -> int: ...
    @property
    def completed(self) -> int: ...
    @property
    def unseen(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def queue(self) -> int: ...
    @property
    def origin(self) -> int: ...
    @property
    def violation(self) -> tuple[str, str] | None: ...
    @property
    def waits(self) -> bool: ...
    @property
    def depth(self) -> int: ...
    @property
    def relays(self) -> bool: ...
    @property
    def resolved_areas(self) -> bool: ...
    def __new__(
        cls,
        space: AddressSpace,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        event_idx: bool = ...,
        indirect: bool = ...,
        base: int = ...,
        queue: int = ...,
        origin: int = ...,
        block: bool = ...,
        latencies: Latencies | None = ...,
        own: AddressSpace | None = ...,
        own_avail: int = ...,
        own_used: int = ...,
    ) -> Self: ...
    def look(
        self, requests: list[_Request] | None = ..., completions: list[_Completion] | None = ...
    ) -> bool: ...
    def note_notification(self) -> None: ...
    def rebind(self, space: AddressSpace) -> None: ...

@disjoint_base
class EventRelay(Feed):
    by_python: bool
    @property
    def passed(self) -> int: ...
    def __init__(
        self,
        callback: Callable[[], None],
        patience: float,
        source: int,
        observer: RingObserver,
        *,
        target: int = ...,
        call: bool = ...,
    ) -> None: ...
    def pass_on(self) -> None: ...
    def close(self) -> None: ...
    def settle(self) -> None: ...
