"""Memory that a client has mapped for DMA: by I/O virtual address, in files that are mapped once.

An address leads to a place in a space of our own, in which each file of the client has a window.
Mappings come and go with every request of a driver behind an IOMMU; files stay.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final, TypeAlias

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.iommu.intervals import IntervalMap, users_of
from guestio._core.vfio_user.dma_table import DmaTable
from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.budgets import (
    DMA_FILES,
    DMA_IDLE_FILES,
    DMA_MAPPINGS,
    DMA_UNMAP_STEP,
    MAX_GUEST_MEMORY,
)
from guestio.errors import BackingError
from guestio.iommu import Iotlb
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.peer.foreign import check_memory
from guestio.vfio_user.messages import RefusalError

PAGE: Final = 4096
"""Bytes; mappings begin and end at multiples of them."""

WINDOW: Final = 48
"""Each file has a window of 2**48 bytes. The first one is of memory without a file."""

Piece: TypeAlias = tuple[int, int, int, Permissions]
"""A mapping: address, bytes, where it leads to, what is allowed."""


class DmaSpace:
    """What a client has mapped for DMA. For one thread; lookups may come from any.

    Args:
        origin: The server's number in records of tracepoints.

    Attributes:
        table: The mappings, and the files that they lead to.
        space: The addresses of the device; another one after :meth:`map` or :meth:`cut_off`
            returned True.
    """

    def __init__(self, origin: int = 0) -> None:
        self._iotlb = IntervalMap(merge=False)
        self._iotlb.origin = origin
        self.table = DmaTable(self._iotlb, DMA_FILES, DMA_MAPPINGS)
        self._limits = DMA_FILES, DMA_MAPPINGS
        self._regions: dict[int, MmapRegion] = {}
        self.space = AddressSpace(GuestRegionCollection()._space.regions, self._iotlb)

    def __len__(self) -> int:
        """How many mappings there are."""
        return len(self._iotlb)

    @property
    def iotlb(self) -> Iotlb:
        """The mappings, to be looked at. From any thread."""
        return Iotlb._of(self._iotlb)

    def files(self) -> list[tuple[int, int]]:
        """Where each file is in the space that mappings lead to, and its size. From any thread."""
        return [(window << WINDOW, region.size) for window, region in list(self._regions.items())]

    def map(self, address: int, size: int, perm: Permissions, fd: int | None, offset: int) -> bool:
        """Map memory.

        Args:
            address: I/O virtual address.
            size: Bytes.
            perm: What the device may do.
            fd: The file, which stays the caller's; None for memory that is not shared.
            offset: Where in the file.

        Returns:
            Whether :attr:`space` is another one now.

        Raises:
            RefusalError: It cannot be mapped; nothing changed.
        """
        check_pages(address, size)
        if not perm:
            raise RefusalError(errno.EINVAL, "a mapping that allows nothing")
        if self._iotlb.overlapping(address, size):
            raise RefusalError(errno.EEXIST, f"{address:#x}+{size:#x} overlaps what is mapped")
        if len(self._iotlb) >= self._limits[1]:
            raise RefusalError(errno.ENOSPC, f"more than {self._limits[1]} mappings")
        if fd is None:
            if size > 1 << WINDOW - 1:
                raise RefusalError(errno.EINVAL, f"{size:#x} bytes without a file are too many")
            self.table.add(address, size, address % (1 << WINDOW - 1), perm)
            return False
        if offset % PAGE:
            raise RefusalError(errno.EINVAL, f"offset {offset:#x} in the file is not a page's")
        window, changed = self._window(fd, offset + size, Permissions.WRITE in perm)
        self.table.add(address, size, (window << WINDOW) + offset, perm)
        return changed

    def _window(self, fd: int, end: int, write: bool) -> tuple[int, bool]:
        """The window of a file, mapped up to ``end`` at least; whether it is a new one."""
        try:
            check_memory(fd)
        except BackingError as error:
            raise RefusalError(errno.EINVAL, str(error)) from None
        status = os.fstat(fd)
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == os.O_WRONLY or (write and mode != os.O_RDWR):
            raise RefusalError(errno.EACCES, "the descriptor does not allow what the mapping does")
        if end > status.st_size:
            raise RefusalError(
                errno.EINVAL, f"a file of {status.st_size:#x} bytes ends before {end:#x}"
            )
        key = status.st_dev, status.st_ino, mode == os.O_RDWR
        window = self.table.file(*key)
        if window and end <= self._regions[window].size:
            return window, False
        if not window:
            window = self._free_window()
        # The file is new, or has grown.
        self._regions[window] = self._open(window, fd, status.st_size, key[2])
        self.table.know(window, *key, status.st_size)
        self._renew()
        return window, True

    def _free_window(self) -> int:
        self._let_go_of_idle(DMA_IDLE_FILES)
        if len(self._regions) >= self._limits[0]:
            self._let_go_of_idle(0)
        if len(self._regions) >= self._limits[0]:
            raise RefusalError(errno.ENOSPC, f"mappings of more than {self._limits[0]} files")
        return next(n for n in range(1, self._limits[0] + 1) if n not in self._regions)

    def _open(self, window: int, fd: int, size: int, writable: bool) -> MmapRegion:
        if size + sum(region.size for region in self._regions.values()) > MAX_GUEST_MEMORY:
            raise RefusalError(errno.ENOMEM, f"more than {MAX_GUEST_MEMORY:#x} bytes of memory")
        try:
            return MmapRegion(window << WINDOW, Backing.from_fd(fd, size, writable=writable))
        except BackingError as error:
            raise RefusalError(errno.ENOMEM, str(error)) from None

    def _let_go_of_idle(self, keep: int) -> None:
        """Let go of files that no mapping leads to, but for the latest."""
        idle = [window for window in self._regions if not self.table.mappings(window)]
        for window in idle[: max(len(idle) - keep, 0)]:
            self.table.forget_file(window)
            del self._regions[window]

    def _renew(self) -> None:
        regions = [self._regions[window] for window in sorted(self._regions)]
        memory = GuestRegionCollection.from_regions(regions) if regions else GuestRegionCollection()
        self.space = AddressSpace(memory._space.regions, self._iotlb)

    def unmap(self, address: int, size: int) -> Unmapping:
        """Begin to remove all mappings of a range; accesses that began before may be under way.

        Returns:
            What is to be done: :meth:`Unmapping.proceed` until that is True, for which nothing else
            may be mapped or unmapped. Nothing is removed before.

        Raises:
            RefusalError: The range would cut a mapping; nothing changed.
        """
        check_pages(address, size)
        if self.table.check_cut(address, size):
            raise RefusalError(errno.EINVAL, f"{address:#x}+{size:#x} would cut a mapping")
        return Unmapping(self.table, address, size)

    def in_use(self, address: int, size: int) -> bool:
        """Whether an access to a range is under way that has not been cut off."""
        return bool(users_of({0: self._iotlb}, address, size))

    def cut_off(self, address: int, size: int, removed: list[Piece]) -> bool:
        """Take memory away from accesses to a range which are still under way.

        They read zeroes from there on, and write to nowhere; so do they in other ranges that they
        extend to. What is accessed from now on is not affected. A system call that has the memory
        already is not stopped.

        Args:
            address: The range, which :meth:`unmap` has emptied.
            size: Its bytes.
            removed: What was mapped there: :attr:`Unmapping.used`.

        Returns:
            Whether :attr:`space` is another one now.

        Raises:
            BackingError: A file cannot be mapped anew. All of its memory was taken away, from every
                access: the client must be disconnected.
        """
        condemned = self._condemned(address, size, removed)
        old = {window: self._regions[window] for window in condemned}
        try:
            for window in condemned:
                self._map_anew(window)
        except BackingError:
            for region in old.values():
                region.backing.cut_off(0, region.size)
            raise
        self._renew()
        for window, pieces in condemned.items():
            _take_away(old[window], pieces)
        return bool(old)

    def _condemned(
        self, address: int, size: int, removed: list[Piece]
    ) -> dict[int, list[tuple[int, int]]]:
        """What accesses to a range reach in each file, which nothing waits for from here on."""
        found = [(target, length) for _, length, target, _ in removed]
        for first, last in self._iotlb.leases.abandon(address, size):
            for start, length, target, _ in self._iotlb.overlapping(first, last - first + 1):
                begin, end = max(start, first), min(start + length, last + 1)
                found.append((target + begin - start, end - begin))
        pieces: dict[int, list[tuple[int, int]]] = {}
        for target, length in found:
            window = target >> WINDOW
            if window in self._regions:
                pieces.setdefault(window, []).append((target - (window << WINDOW), length))
        return pieces

    def _map_anew(self, window: int) -> None:
        """Map a file a second time: what is left of it, if it was cut."""
        region = self._regions[window]
        backing = region.backing
        assert backing.fd is not None
        status = os.fstat(backing.fd)
        size = min(backing.size, status.st_size - status.st_size % PAGE)
        if not size:
            raise BackingError("the file has no memory any more")
        fresh = Backing.from_fd(backing.fd, size, writable=backing.writable)
        self._regions[window] = MmapRegion(region.start, fresh)
        self.table.know(window, status.st_dev, status.st_ino, backing.writable, size)

    def close(self) -> None:
        """Take everything away from every access."""
        unmapping = self.unmap(0, ADDRESS_SPACE)
        unmapping.finish()
        if self.in_use(0, ADDRESS_SPACE):
            for window, pieces in self._condemned(0, ADDRESS_SPACE, unmapping.used).items():
                _take_away(self._regions[window], pieces)
        for window in list(self._regions):
            self.table.forget_file(window)
        self._regions.clear()
        self._renew()


def _take_away(region: MmapRegion, pieces: list[tuple[int, int]]) -> None:
    """Put empty pages in place of pieces of a file's memory, or of all of it.

    Raises:
        BackingError: The host does not allow it.
    """
    try:
        for at, length in pieces:
            region.backing.cut_off(at, length)
    except BackingError:
        # Each piece makes mappings more, of which a process has some ten thousand; all is one.
        region.backing.cut_off(0, region.size)


class Unmapping:
    """The removal of all mappings of a range, of which there may be a million, step by step.

    Attributes:
        address: The range.
        size: Its bytes.
        used: Those removed so far that an access under way led through.
        removed: How many mappings were removed.
    """

    def __init__(self, table: DmaTable, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.used: list[Piece] = []
        self.removed = 0
        self._table, self._at = table, address

    def proceed(self) -> bool:
        """Remove up to DMA_UNMAP_STEP mappings; whether all are removed.

        Cost: O((k + 1) log n) for k mappings removed.
        """
        end = self.address + self.size
        if self._at < end:
            count, self._at, used = self._table.forget(self._at, end - self._at, DMA_UNMAP_STEP)
            self.removed += count
            self.used += used
        return self._at == end

    def finish(self) -> int:
        """Remove all that is left; how many were removed altogether. Cost: as :meth:`proceed`."""
        while not self.proceed():
            pass
        return self.removed


def check_pages(address: int, size: int) -> None:
    """Refuse a range that is no range of whole pages.

    Raises:
        RefusalError: It is none, or leaves the address space.
    """
    if address % PAGE or size % PAGE or not size:
        raise RefusalError(errno.EINVAL, f"{address:#x}+{size:#x} is no range of whole pages")
    if address + size > ADDRESS_SPACE:
        raise RefusalError(errno.EINVAL, f"{address:#x}+{size:#x} leaves the address space")
