"""Memory that a client has mapped for DMA: by I/O virtual address, in files that are mapped once.

An address leads to a place in a space of our own, in which each file of the client has a window.
Mappings come and go with every request of a driver behind an IOMMU; files stay.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from typing import Final, TypeAlias

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.iommu.intervals import IntervalMap, users_of
from guestio.addr import ADDRESS_SPACE, Permissions
from guestio.budgets import DMA_FILES, DMA_IDLE_FILES, DMA_MAPPINGS, MAX_GUEST_MEMORY
from guestio.errors import BackingError
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.peer.foreign import check_memory
from guestio.vfio_user.messages import RefusalError

PAGE: Final = 4096
"""Bytes; mappings begin and end at multiples of them."""

WINDOW: Final = 48
"""Each file has a window of 2**48 bytes. The first one is of memory without a file."""

Piece: TypeAlias = tuple[int, int, int, Permissions]
"""A mapping: address, bytes, where it leads to, what is allowed."""


@dataclass
class _File:
    """A file of the client that is mapped here.

    Attributes:
        key: Which file it is, and whether it may be written.
        region: All of it, in its window.
        mappings: How many lead to it.
    """

    key: tuple[int, int, bool]
    region: MmapRegion
    mappings: int = 0


class DmaSpace:
    """What a client has mapped for DMA. For one thread; lookups may come from any.

    Attributes:
        space: The addresses of the device; another one after :meth:`map` or :meth:`cut_off`
            returned True.
    """

    def __init__(self) -> None:
        self._iotlb = IntervalMap(merge=False)
        self._files: dict[int, _File] = {}
        self.space = AddressSpace(GuestRegionCollection()._space.regions, self._iotlb)

    def __len__(self) -> int:
        """How many mappings there are."""
        return len(self._iotlb)

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
        if len(self._iotlb) >= DMA_MAPPINGS:
            raise RefusalError(errno.ENOSPC, f"more than {DMA_MAPPINGS} mappings")
        if fd is None:
            if size > 1 << WINDOW - 1:
                raise RefusalError(errno.EINVAL, f"{size:#x} bytes without a file are too many")
            self._iotlb.add(address, size, address % (1 << WINDOW - 1), perm)
            return False
        if offset % PAGE:
            raise RefusalError(errno.EINVAL, f"offset {offset:#x} in the file is not a page's")
        window, changed = self._window(fd, offset + size, Permissions.WRITE in perm)
        self._iotlb.add(address, size, (window << WINDOW) + offset, perm)
        self._files[window].mappings += 1
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
        for window, file in self._files.items():
            if file.key == key and end <= file.region.size:
                return window, False
            if file.key == key:
                self._replace(window, self._open(window, fd, status.st_size, key[2]))
                return window, True
        self._let_go_of_idle(DMA_IDLE_FILES)
        if len(self._files) >= DMA_FILES:
            self._let_go_of_idle(0)
        if len(self._files) >= DMA_FILES:
            raise RefusalError(errno.ENOSPC, f"mappings of more than {DMA_FILES} files")
        window = next(n for n in range(1, DMA_FILES + 1) if n not in self._files)
        region = self._open(window, fd, status.st_size, key[2])
        self._files[window] = _File(key, region)
        self._renew()
        return window, True

    def _open(self, window: int, fd: int, size: int, writable: bool) -> MmapRegion:
        if size + sum(file.region.size for file in self._files.values()) > MAX_GUEST_MEMORY:
            raise RefusalError(errno.ENOMEM, f"more than {MAX_GUEST_MEMORY:#x} bytes of memory")
        try:
            return MmapRegion(window << WINDOW, Backing.from_fd(fd, size, writable=writable))
        except BackingError as error:
            raise RefusalError(errno.ENOMEM, str(error)) from None

    def _let_go_of_idle(self, keep: int) -> None:
        """Let go of files that no mapping leads to, but for the latest."""
        idle = [window for window, file in self._files.items() if not file.mappings]
        for window in idle[: max(len(idle) - keep, 0)]:
            del self._files[window]

    def _replace(self, window: int, region: MmapRegion) -> None:
        self._files[window].region = region
        self._renew()

    def _renew(self) -> None:
        regions = [self._files[window].region for window in sorted(self._files)]
        memory = GuestRegionCollection.from_regions(regions) if regions else GuestRegionCollection()
        self.space = AddressSpace(memory._space.regions, self._iotlb)

    def unmap(self, address: int, size: int) -> list[Piece]:
        """Remove all mappings of a range; accesses that began before may still be under way.

        Returns:
            What was removed, which may be nothing. Cost: O((k + 1) log n) for k mappings removed.

        Raises:
            RefusalError: The range would cut a mapping; nothing changed.
        """
        check_pages(address, size)
        taken = self._iotlb.take(address, size)
        if taken is None:
            raise RefusalError(errno.EINVAL, f"{address:#x}+{size:#x} would cut a mapping")
        for _, _, target, _ in taken:
            if target >> WINDOW:
                self._files[target >> WINDOW].mappings -= 1
        return taken

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
            removed: What that returned.

        Returns:
            Whether :attr:`space` is another one now.

        Raises:
            BackingError: The host does not allow it.
        """
        condemned = [(target, length) for _, length, target, _ in removed]
        for first, last in self._iotlb.leases.abandon(address, size):
            for start, length, target, _ in self._iotlb.overlapping(first, last - first + 1):
                begin, end = max(start, first), min(start + length, last + 1)
                condemned.append((target + begin - start, end - begin))
        old: dict[int, MmapRegion] = {}
        for target, _ in condemned:
            window = target >> WINDOW
            if window in self._files and window not in old:
                old[window] = self._files[window].region
        for window, region in old.items():
            backing = region.backing
            assert backing.fd is not None
            fresh = Backing.from_fd(backing.fd, backing.size, writable=backing.writable)
            self._files[window].region = MmapRegion(region.start, fresh)
        self._renew()
        for target, length in condemned:
            if target >> WINDOW in old:
                region = old[target >> WINDOW]
                region.backing.cut_off(target - region.start, length)
        return bool(old)

    def close(self) -> None:
        """Take everything away from every access."""
        removed = self.unmap(0, ADDRESS_SPACE)
        if self.in_use(0, ADDRESS_SPACE):
            self.cut_off(0, ADDRESS_SPACE, removed)
        self._files.clear()
        self._renew()


def check_pages(address: int, size: int) -> None:
    """Refuse a range that is no range of whole pages.

    Raises:
        RefusalError: It is none, or leaves the address space.
    """
    if address % PAGE or size % PAGE or not size:
        raise RefusalError(errno.EINVAL, f"{address:#x}+{size:#x} is no range of whole pages")
    if address + size > ADDRESS_SPACE:
        raise RefusalError(errno.EINVAL, f"{address:#x}+{size:#x} leaves the address space")
