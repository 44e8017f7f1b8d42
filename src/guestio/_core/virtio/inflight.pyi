from collections.abc import Sequence
from typing import Self, final

from guestio._core.memory.mapping import HostMapping

@final
class InflightQueue:
    """Which requests of one split virtqueue were taken and not given back.

    Begin with :meth:`recover`. Then call :meth:`take` for every request that comes from the
    available ring, :meth:`batch` for every one that was written to the used ring, in order, and
    :meth:`publish` once the used index covers them. The next batch begins after that.

    Args:
        mapping: Where the region is, writable; it cannot be closed as long as this object exists.
        offset: Where this queue's part begins in it, a multiple of 8.
        size: Entries, 1 to 32768; a queue that uses it may be smaller.

    Attributes:
        size: Entries.

    Raises:
        ValueError: The part does not fit the mapping, is misaligned, or has no such size.

    One thread at a time.
    """
    def __new__(cls, mapping: HostMapping, offset: int, size: int) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def vanished(self) -> bool:
        """Whether the file was found to be truncated, so that nothing is tracked any more."""
    def take(self, head: int) -> None:
        """Note that a request was taken from the available ring."""
    def batch(self, head: int) -> None:
        """Note that a request is in the used ring, which the used index does not cover yet."""
    def publish(self, heads: Sequence[int], used_idx: int) -> None:
        """Note that the used index was stored, with the heads that it began to cover.

        Args:
            heads: Those that were given to :meth:`batch` since this was last called.
            used_idx: The used index.
        """
    def recover(self, used_idx: int) -> list[int]:
        """Find out what was in flight when the region was last used; again after every stop.

        A part that was never used begins here. So does one that cannot be this ring's, because
        its used index and the ring's are further apart than one batch can bring them.

        Args:
            used_idx: The used index in the ring. The available ring goes on that many entries,
                and as many as are in flight, from its beginning.

        Returns:
            The heads of requests in flight, in the order in which they were taken. They are in
            flight already: :meth:`take` is not for them.

        Raises:
            QueueError: The part cannot be followed: another version, another size, a batch that
                leads out of it, or its file was truncated.
        """
    def forget(self) -> None:
        """Forget everything, as when the device is reset; :meth:`recover` comes next."""

def part_size(size: int) -> int:
    """Bytes of the region that a queue takes, a multiple of 64.

    Args:
        size: Entries of the queue, 1 to 32768.

    Raises:
        ValueError: Another number of entries.
    """
