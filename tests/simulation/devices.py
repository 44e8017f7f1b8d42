"""Disks that are slow, fail, or never answer, for simulations."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from guestio.errors import GuestioError
from guestio.virtio import BlockDevice
from guestio.virtio.blk import T_IN, T_OUT

if TYPE_CHECKING:
    from guestio._core.virtio.chain import Chain
    from guestio.testing.simulation import World


def disk(world: World) -> BlockDevice:
    """The disk as it is shipped."""
    return BlockDevice(world.disk.path, io_threads=2)


class LazyDisk(BlockDevice):
    """Answers half of all reads and writes later, as other programs' disks do."""

    def __init__(self, world: World) -> None:
        self.world = world
        super().__init__(world.disk.path, io_threads=0)

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        """See `Device`."""
        if _kind(chain) not in (T_IN, T_OUT) or self.world.rng.random() < 0.5:
            return self.served(queue, chain)

        def later() -> int:
            answer = self.served(queue, chain)
            return answer if isinstance(answer, int) else answer.result(0)

        return self.world.defer(later)

    def served(self, queue: int, chain: Chain) -> int | Future[int]:
        """What the disk says."""
        return super().process(queue, chain)


class FailingDisk(LazyDisk):
    """Does not serve some writes: it raises, answers nonsense, or cancels, as `way` says."""

    way = "raise"

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        """See `Device`."""
        if _kind(chain) == T_OUT and self.world.rng.random() < 0.1:
            self.world.excuse()
            if self.way == "raise":
                raise RuntimeError("this disk has a defect")
            if self.way == "nonsense":
                return 1 << 40
            future: Future[int] = Future()
            future.cancel()
            return future
        return super().process(queue, chain)


class DeadDisk(LazyDisk):
    """Never answers some writes."""

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        """See `Device`."""
        if _kind(chain) == T_OUT and self.world.rng.random() < 0.1:
            self.world.excuse(hangs=True)
            return Future()
        return super().process(queue, chain)


def _kind(chain: Chain) -> int:
    try:
        return int.from_bytes(chain.readable.read(0, 4), "little")
    except GuestioError:
        return -1
