"""The front-end's memory table: its addresses, ours, and the guest's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from guestio._core.iommu.intervals import IntervalMap
from guestio._core.memory.vector import RegionTable
from guestio.addr import Permissions
from guestio.budgets import MAX_GUEST_MEMORY
from guestio.errors import BackingError, InvalidAddressError
from guestio.memory import AtomicBitmap, Backing, DirtyLog, GuestRegionCollection, MmapRegion
from guestio.peer.foreign import check_memory
from guestio.vhost_user.messages import MemoryRegion

MAX_FILE = 1 << 62
"""More bytes than a shared file may have; no process can map as many."""


class SharedMemory:
    """Guest memory that a front-end shares; never changes once made.

    Args:
        regions: As the front-end described them, and as they were mapped.
        track_dirty: Whether regions that are added later keep the pages that are written.
        log: Where they mark them as well; None for nowhere.
        writable: Whether regions that are added later may be written.

    Attributes:
        memory: It by guest physical address.
    """

    def __init__(
        self,
        regions: Sequence[tuple[MemoryRegion, MmapRegion]] = (),
        *,
        track_dirty: bool = False,
        log: DirtyLog | None = None,
        writable: bool = True,
    ) -> None:
        self._track_dirty, self._log, self._writable = track_dirty, log, writable
        self._regions = sorted(regions, key=lambda pair: pair[0].user_addr)
        self._starts = [description.user_addr for description, _ in self._regions]
        placed = sorted((region for _, region in regions), key=lambda region: region.start)
        self.memory = (
            GuestRegionCollection.from_regions(placed) if placed else GuestRegionCollection()
        )

    @property
    def tracks_dirty(self) -> bool:
        """Whether the pages that the device writes are counted."""
        return self._track_dirty

    @property
    def regions(self) -> list[MemoryRegion]:
        """What the front-end shares, by its own addresses."""
        return [description for description, _ in self._regions]

    def user_addresses(self) -> IntervalMap:
        """Where each of the front-end's own addresses is in guest memory; a new map."""
        found = IntervalMap()
        for description, _ in self._regions:
            found.add(
                description.user_addr,
                description.size,
                description.guest_addr,
                Permissions.READ_WRITE,
            )
        return found

    @property
    def table(self) -> RegionTable:
        """The same memory for the compiled core."""
        return self.memory._space.regions

    def replaced(self, regions: Sequence[tuple[MemoryRegion, int]]) -> SharedMemory:
        """A whole new memory table.

        Raises:
            BackingError: A region cannot be mapped; none is then.
        """
        _check_total([description for description, _ in regions])
        return self._with(
            [(description, self._map(description, fd)) for description, fd in regions]
        )

    def adding(self, description: MemoryRegion, fd: int) -> SharedMemory:
        """This memory and one more region.

        Raises:
            BackingError: It cannot be mapped.
        """
        _check_total([description, *(known for known, _ in self._regions)])
        return self._with([*self._regions, (description, self._map(description, fd))])

    def removing(self, description: MemoryRegion) -> SharedMemory:
        """This memory without a region."""
        return self._with([pair for pair in self._regions if pair[0] != description])

    def _with(self, regions: Sequence[tuple[MemoryRegion, MmapRegion]]) -> SharedMemory:
        return SharedMemory(
            regions, track_dirty=self._track_dirty, log=self._log, writable=self._writable
        )

    def _map(self, description: MemoryRegion, fd: int) -> MmapRegion:
        if description.size + description.mmap_offset >= MAX_FILE:
            raise BackingError(
                f"{description.size:#x} bytes at offset {description.mmap_offset:#x} are beyond "
                "the end of any file"
            )
        check_memory(fd)
        backing = Backing.from_fd(
            fd, description.size, description.mmap_offset, writable=self._writable
        )
        bitmap = None
        if self._track_dirty or self._log is not None:
            bitmap = AtomicBitmap(
                description.size,
                log=self._log,
                log_start=description.guest_addr,
                own=self._track_dirty,
            )
        return MmapRegion(description.guest_addr, backing, bitmap=bitmap)

    @property
    def end(self) -> int:
        """The first guest physical address behind all of it; 0 if there is none."""
        return max((region.last_addr + 1 for region in self.memory), default=0)

    def guest_ranges(self, user_addr: int, size: int) -> list[tuple[int, int]]:
        """Guest physical ranges behind a range of the front-end's addresses.

        Raises:
            InvalidAddressError: Some of it is not shared.
        """
        found = []
        while size:
            index = bisect_right(self._starts, user_addr) - 1
            inside = user_addr - self._starts[index] if index >= 0 else 0
            if index < 0 or inside >= self._regions[index][0].size:
                raise InvalidAddressError(
                    user_addr, size, None, "the front-end does not share that address of its own"
                )
            description = self._regions[index][0]
            length = min(size, description.size - inside)
            found.append((description.guest_addr + inside, length))
            user_addr, size = user_addr + length, size - length
        return found

    def guest_address(self, user_addr: int, size: int) -> int:
        """Guest physical address of a range that must be contiguous.

        Raises:
            InvalidAddressError: It is not shared, or not contiguous.
        """
        ranges = self.guest_ranges(user_addr, size)
        start = end = ranges[0][0]
        for base, length in ranges:
            if base != end:
                raise InvalidAddressError(
                    user_addr, size, None, "it is not contiguous for the guest"
                )
            end += length
        return start


def _check_total(regions: Sequence[MemoryRegion]) -> None:
    total = sum(region.size for region in regions)
    if total > MAX_GUEST_MEMORY:
        raise BackingError(
            f"{total:#x} bytes of guest memory in all, at most {MAX_GUEST_MEMORY:#x} are mapped"
        )
