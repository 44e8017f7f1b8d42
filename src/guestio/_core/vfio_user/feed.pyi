from collections.abc import Callable

from typing_extensions import disjoint_base

from guestio._core.pci.doorbell import Doorbells
from guestio._core.vfio_user.dma_table import DmaTable
from guestio._core.vfio_user.inbox import Inbox
from guestio._core.virtio.loop import Feed

@disjoint_base
class DmaCounters:
    dma_maps: int
    dma_unmaps: int
    region_reads: int
    region_writes: int
    plain: int

@disjoint_base
class ClientFeed(Feed):
    main: int
    unmaps: bool
    def __init__(
        self,
        callback: Callable[[], None],
        turn: float,
        *,
        inbox: Inbox,
        table: DmaTable,
        doorbells: Doorbells,
        counters: DmaCounters,
    ) -> None: ...
    def take_unsent(self) -> bytes: ...
    def run(self, fd: int) -> tuple[bytes, bool, bool]: ...
