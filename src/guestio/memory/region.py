"""Regions of guest physical memory and the immutable collection of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, Self

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.bitmap import AtomicBitmap
from guestio._core.memory.mapping import HostMapping
from guestio._core.memory.slices import VolatileSlice
from guestio._core.memory.vector import IoVector, RegionTable
from guestio.addr import Permissions, check_address, check_int, check_range, checked_add
from guestio.errors import (
    InvalidAddressError,
    MemoryRegionOverlapError,
    NoMemoryRegionError,
    UnsortedMemoryRegionsError,
)
from guestio.memory.access import GuestMemory, HeldSlices, Shortfall, shortfall_of
from guestio.memory.backing import Backing


class FileOffset(NamedTuple):
    """A file and where in it memory begins."""

    fd: int
    start: int


class MmapRegion:
    """A backing at a guest physical address.

    Args:
        start: Guest physical address of the first byte.
        backing: The memory; all of it is placed.
        bitmap: Where writes are marked, by offset in the region; None to track none.
        writable: False to refuse writes although the backing allows them.
        name: For messages and listings.

    Raises:
        ValueError: The region would pass ``2**64``, or the bitmap does not cover all of it.

    The same backing may be placed again elsewhere with a region of its own.
    """

    def __init__(
        self,
        start: int,
        backing: Backing,
        *,
        bitmap: AtomicBitmap | None = None,
        writable: bool = True,
        name: str = "",
    ) -> None:
        if not isinstance(backing, Backing):
            raise TypeError(f"backing must be a Backing, not {type(backing).__name__}")
        if not isinstance(bitmap, AtomicBitmap | None):
            raise TypeError(f"bitmap must be an AtomicBitmap, not {type(bitmap).__name__}")
        first, size = check_range(start, backing.size, name="start", empty=False)
        if bitmap is not None and bitmap.byte_size < size:
            raise ValueError(
                f"a bitmap of {bitmap.byte_size:#x} bytes would miss writes to {size:#x} bytes"
            )
        self.start: Final = first
        self.size: Final = size
        self.backing: Final = backing
        self.bitmap: Final = bitmap
        self.writable: Final = writable and backing.writable
        self.name: Final = name

    @classmethod
    def anonymous(cls, start: int, size: int, *, bitmap: AtomicBitmap | None = None) -> Self:
        """A region of private memory; see :meth:`Backing.anonymous`."""
        check_range(start, size, name="start", empty=False)
        return cls(start, Backing.anonymous(size), bitmap=bitmap)

    @classmethod
    def memfd(cls, start: int, size: int, *, bitmap: AtomicBitmap | None = None) -> Self:
        """A region of memory that can be shared; see :meth:`Backing.memfd`."""
        check_range(start, size, name="start", empty=False)
        return cls(start, Backing.memfd(size), bitmap=bitmap)

    @classmethod
    def from_fd(
        cls,
        start: int,
        fd: int,
        size: int,
        offset: int = 0,
        writable: bool = True,
        *,
        bitmap: AtomicBitmap | None = None,
    ) -> Self:
        """A region of an open file; see :meth:`Backing.from_fd`."""
        check_range(start, size, name="start", empty=False)
        return cls(start, Backing.from_fd(fd, size, offset, writable), bitmap=bitmap)

    @property
    def last_addr(self) -> int:
        """Address of the last byte."""
        return self.start + self.size - 1

    @property
    def file_offset(self) -> FileOffset | None:
        """The file behind the region and where in it the region begins, if there is one."""
        fd, offset = self.backing.fd, self.backing.file_offset
        return None if fd is None or offset is None else FileOffset(fd, offset)

    @property
    def is_hugetlbfs(self) -> bool:
        """Whether the memory is made of huge pages."""
        return self.backing.page_size > 65536

    def to_offset(self, addr: int) -> int | None:
        """Where in the region ``addr`` is, or None if it is not there."""
        offset = check_address(addr) - self.start
        return offset if 0 <= offset < self.size else None

    def fds_overlap(self, other: MmapRegion) -> bool:
        """Whether both show the same bytes of one file; see :meth:`Backing.overlaps`."""
        if not isinstance(other, MmapRegion):
            raise TypeError(f"other must be an MmapRegion, not {type(other).__name__}")
        return self.backing.overlaps(other.backing)

    def describe(self) -> dict[str, object]:
        """What the region knows of itself, for listings and logs.

        Keys: ``name``, ``start``, ``size``, ``last_addr``, ``writable``, ``file`` (a path as
        ``/proc`` shows it, or None), ``file_offset``, ``page_size``, ``is_hugetlbfs``, ``seals``
        (a sorted list), ``shrinkable``, ``vanished`` (an offset or None), ``tracked`` (whether
        writes are marked).
        """
        backing = self.backing
        shown = None
        if backing.fd is not None:
            try:
                shown = str(Path(f"/proc/self/fd/{backing.fd}").readlink())
            except OSError:
                shown = f"fd {backing.fd}"
        return {
            "name": self.name,
            "start": self.start,
            "size": self.size,
            "last_addr": self.last_addr,
            "writable": self.writable,
            "file": shown,
            "file_offset": backing.file_offset,
            "page_size": backing.page_size,
            "is_hugetlbfs": self.is_hugetlbfs,
            "seals": sorted(backing.seals),
            "shrinkable": backing.shrinkable,
            "vanished": backing.vanished,
            "tracked": self.bitmap is not None,
        }

    def host_address(self, offset: int = 0) -> int:
        """Where byte ``offset`` of the region is in this process.

        Raises:
            InvalidAddressError: The offset is outside.
        """
        if check_address(offset, "offset") >= self.size:
            raise InvalidAddressError(offset, 1, None, f"the region is {self.size:#x} bytes long")
        return self.backing.host_address + offset

    def slice(self, offset: int = 0, length: int | None = None) -> VolatileSlice:
        """The memory of a part of the region, or of all that follows ``offset``.

        Raises:
            InvalidAddressError: The part leaves the region.
        """
        wanted = max(self.size - check_address(offset, "offset"), 0) if length is None else length
        access = Permissions.READ_WRITE if self.writable else Permissions.READ
        memory = GuestRegionCollection.from_regions([self])
        return memory.whole_slice(self.start, self.size, access).subslice(offset, wanted)

    def __contains__(self, addr: int) -> bool:
        return self.start <= addr <= self.last_addr

    def __repr__(self) -> str:
        label = f" {self.name!r}" if self.name else ""
        return f"<MmapRegion{label} {self.start:#x}+{self.size:#x}>"


class GuestRegionCollection(GuestMemory):
    """Guest physical memory: regions in ascending order that do not overlap.

    It never changes; inserting or removing a region makes a new collection that shares the
    others. All methods may be called from any thread.

    ``GuestRegionCollection()`` is empty; otherwise use :meth:`from_regions` or
    :meth:`from_ranges`.
    """

    def __init__(self) -> None:
        self._set_regions(())

    def _set_regions(self, regions: Sequence[MmapRegion]) -> None:
        self._regions = tuple(regions)
        self._starts = [region.start for region in regions]
        table: list[tuple[int, HostMapping, int, int, bool, AtomicBitmap | None, object]] = [
            (
                region.start,
                region.backing._mapping,
                region.backing._skip,
                region.size,
                region.writable,
                region.bitmap,
                region,
            )
            for region in regions
        ]
        self._space = self._direct = AddressSpace(RegionTable(table))

    @classmethod
    def from_regions(cls, regions: Iterable[MmapRegion]) -> Self:
        """A collection of regions given in ascending order.

        Raises:
            NoMemoryRegionError: There are none.
            UnsortedMemoryRegionsError: They are not ascending.
            MemoryRegionOverlapError: Two share an address.
        """
        chosen = list(regions)
        if not chosen:
            raise NoMemoryRegionError("a collection needs at least one region")
        for region in chosen:
            _check_region(region)
        for before, after in pairwise(chosen):
            if before.start > after.start:
                raise UnsortedMemoryRegionsError(f"{after} comes after {before}; sort by start")
            if before.last_addr >= after.start:
                raise MemoryRegionOverlapError(f"{before} and {after} overlap")
        made = cls.__new__(cls)
        made._set_regions(chosen)
        return made

    @classmethod
    def from_ranges(cls, ranges: Iterable[tuple[int, int]]) -> Self:
        """A collection of anonymous regions at ``(start, size)``, ascending."""
        return cls.from_regions([MmapRegion.anonymous(start, size) for start, size in ranges])

    def insert_region(self, region: MmapRegion) -> Self:
        """This collection and one more region.

        Raises:
            MemoryRegionOverlapError: It overlaps one that is there.
        """
        _check_region(region)
        return self.from_regions(sorted((*self._regions, region), key=lambda r: r.start))

    def remove_region(self, start: int, size: int) -> tuple[Self, MmapRegion]:
        """This collection without the region that has exactly this start and size, and that region.

        Raises:
            NoMemoryRegionError: There is no such region.
        """
        region = self.find_region(start)
        if check_int(size, "size") < 0:
            raise ValueError(f"size {size} must be >= 0")
        if region is None or (region.start, region.size) != (start, size):
            raise NoMemoryRegionError(f"no region is exactly {start:#x}+{size:#x}")
        made = self.__class__.__new__(self.__class__)
        made._set_regions([other for other in self._regions if other is not region])
        return made, region

    def __repr__(self) -> str:
        size = sum(region.size for region in self._regions)
        return f"<GuestRegionCollection of {len(self._regions)} regions, {size:#x} bytes>"

    def __bool__(self) -> bool:
        """True, also without a region."""
        return True

    def __len__(self) -> int:
        return len(self._regions)

    def __iter__(self) -> Iterator[MmapRegion]:
        return iter(self._regions)

    def __contains__(self, item: object) -> bool:
        """Whether a region holds an address, or whether a region is one of these."""
        if isinstance(item, MmapRegion):
            return any(item is region for region in self._regions)
        return self.address_in_range(check_address(item))  # type: ignore[arg-type]

    def find_region(self, addr: int) -> MmapRegion | None:
        """The region that holds ``addr``, or None. O(log n)."""
        index = bisect_right(self._starts, check_address(addr)) - 1
        if index >= 0 and addr in self._regions[index]:
            return self._regions[index]
        return None

    def regions_in(self, addr: int, length: int) -> tuple[MmapRegion, ...]:
        """The regions that share an address with a range, ascending. O(log n + k)."""
        start, size = check_range(addr, length)
        first = bisect_right(self._starts, start)
        if size and first and self._regions[first - 1].last_addr >= start:
            first -= 1
        return self._regions[first : bisect_left(self._starts, start + size)]

    def to_region_addr(self, addr: int) -> tuple[MmapRegion, int] | None:
        """The region that holds ``addr`` and the offset in it, or None."""
        region = self.find_region(addr)
        return None if region is None else (region, check_int(addr, "addr") - region.start)

    @property
    def last_addr(self) -> int:
        """Greatest address of any region; 0 if there is none."""
        return self._regions[-1].last_addr if self._regions else 0

    def address_in_range(self, addr: int) -> bool:
        """Whether a region holds ``addr``."""
        return self.find_region(addr) is not None

    def check_address(self, addr: int) -> int | None:
        """``addr`` if a region holds it, else None."""
        return check_int(addr, "addr") if self.address_in_range(addr) else None

    def checked_offset(self, base: int, offset: int) -> int | None:
        """``base + offset`` if a region holds that address, else None.

        Only the end point is looked at; use :meth:`check_range` for all that lies between.
        """
        end = checked_add(check_address(base, "base"), check_address(offset, "offset"))
        return None if end is None else self.check_address(end)

    def host_address(self, addr: int) -> int:
        """Where ``addr`` is in this process; see :attr:`Backing.host_address`.

        Raises:
            InvalidAddressError: No region holds it.
        """
        found = self.to_region_addr(addr)
        if found is None:
            raise InvalidAddressError(addr, 1, None, "no memory region is there")
        return found[0].host_address(found[1])

    @property
    def physical_memory(self) -> GuestRegionCollection:
        """This collection: nothing is translated in front of it."""
        return self

    def whole_slice(self, addr: int, length: int, access: Permissions) -> VolatileSlice:
        """The memory of a range as one slice, which keeps the memory alive.

        Raises:
            InvalidAddressError: The range is not inside one region.
            PermissionDeniedError: The region does not allow the access.
        """
        with self.gather(addr, length, access) as vector:
            if vector.count > 1:
                raise InvalidAddressError(
                    addr, length, access, "it is not inside one region; use slices()"
                )
            return vector.slices()[0] if vector.count else VolatileSlice.over(bytearray())

    def check_range(self, addr: int, length: int, access: Permissions = Permissions.NONE) -> bool:
        """Whether every byte of a range is there and allows ``access``; true if it is empty."""
        try:
            with self._space.gather(addr, length, access) as vector:
                return not vector.stop
        except InvalidAddressError:
            return False

    def slices(
        self, addr: int, length: int, access: Permissions = Permissions.READ
    ) -> Iterator[VolatileSlice]:
        """The memory of a range, region by region; see :meth:`GuestMemory.slices`."""
        return HeldSlices(*self._gather(addr, length, access))

    def _gather(
        self, addr: int, length: int, access: Permissions
    ) -> tuple[IoVector, Shortfall | None]:
        vector = self._space.gather(addr, length, access)
        return vector, shortfall_of(vector, addr, length)


def _check_region(region: MmapRegion) -> None:
    if not isinstance(region, MmapRegion):
        raise TypeError(f"a region must be an MmapRegion, not {type(region).__name__}")
