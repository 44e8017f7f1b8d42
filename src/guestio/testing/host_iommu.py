"""A host IOMMU without hardware: VFIO's type1 or iommufd, as the kernel really behaves.

:class:`SimulatedHostIommu` is a DMA target with the kernel's rules and error numbers: alignment,
reserved windows, overlaps, ranges that must not be cut, holes, limits on entries and locked
memory, BARs and their revocation. A device's accesses go through it with :meth:`read` and
:meth:`write`, so a test can see what a real device would reach. Any call can be made to fail.

It stands on the same code as the real targets, from the kernel's calls upwards. The rules are
those of ``drivers/vfio/vfio_iommu_type1.c`` and ``drivers/iommu/iommufd`` and were compared, call
by call, with Linux 6.12 (type1) and 7.2 and 7.3 (both); where kernels differ, ``linux`` chooses.
The machine that simulates needs Linux 5.14 or newer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import threading
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from guestio.addr import ADDRESS_SPACE, IovaRange, Permissions, check_int, check_range
from guestio.dma.dirty import NO_IOMMU_TRACKING, NO_LOG, DirtyBits, DirtySupport, unsupported
from guestio.dma.iommufd import map_ioas, read_ioas, unmap_dirty_ioas, unmap_ioas
from guestio.dma.vfio import IommuInfo, map_type1, read_type1, unmap_dirty_type1, unmap_type1
from guestio.errors import AccessError, DeviceError
from guestio.memory import Backing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from guestio.dma import DmaMapRequest
    from guestio.dma.dirty import DirtyWay

Interface = Literal["type1", "iommufd"]
KernelCall = Literal["map", "map_file", "unmap", "export", "track", "read_dirty"]

# An Intel IOMMU with 48 bits; between the two ranges lies the window for interrupts.
X86_RANGES = (IovaRange(0, 0xFEE00000), IovaRange(0xFEF00000, (1 << 48) - 0xFEF00000))
ENTRY_LIMIT = 65535
_ULONG_MAX = ADDRESS_SPACE - 1


class DmaFaultError(AccessError):
    """A device's access that the IOMMU refused; ``addr`` is the I/O virtual address."""


class SimulatedBar:
    """Memory of a device, as other devices would reach it.

    Made by :meth:`SimulatedHostIommu.new_bar`. Its backing stands for the mapped BAR: the
    simulated kernel knows it by its address and its file.

    Attributes:
        backing: The memory, for :meth:`~guestio.dma.Region.add_mapping`.
    """

    def __init__(self, owner: SimulatedHostIommu, size: int) -> None:
        self._owner = owner
        self._memory_space = True
        self.backing = Backing.memfd(size, "simulated-bar")
        assert self.backing.fd is not None
        self._inode = os.fstat(self.backing.fd).st_ino

    def __repr__(self) -> str:
        return f"<SimulatedBar of {self.backing!r}>"

    @property
    def memory_space(self) -> bool:
        """Whether the device answers at its BAR.

        While it is off, type1 loses accesses without a fault; iommufd revokes its mappings for
        good: they fault, also once it is on again, but keep their place until they are unmapped.
        """
        return self._memory_space

    @memory_space.setter
    def memory_space(self, on: bool) -> None:
        self._memory_space = on
        if not on:
            self._owner._revoke(self)

    def close(self) -> None:
        """Release the memory; refused while it is mapped anywhere."""
        self.backing.close()


@dataclass(slots=True)
class _Address:
    """Memory of this process, by its address."""

    start: int

    def read(self, offset: int, length: int) -> bytes | None:
        return _peek(self.start + offset, length)

    def write(self, offset: int, data: bytes) -> bool:
        try:
            with _own_memory(os.O_WRONLY) as fd:
                return os.pwrite(fd, data, self.start + offset) == len(data)
        except OSError:
            return False

    def release(self) -> None:
        pass


@dataclass(slots=True)
class _File:
    """Memory of a file, by its own descriptor."""

    fd: int
    start: int

    def read(self, offset: int, length: int) -> bytes | None:
        data = os.pread(self.fd, length, self.start + offset)
        return data if len(data) == length else None

    def write(self, offset: int, data: bytes) -> bool:
        # By another opening of the file: the kernel, too, does not look at how this one was made.
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            return os.pwrite(fd, data, self.start + offset) == len(data)
        finally:
            os.close(fd)

    def release(self) -> None:
        os.close(self.fd)


@dataclass(slots=True)
class _Bar:
    """Memory of a device."""

    bar: SimulatedBar
    start: int
    revoked: bool = False

    def read(self, offset: int, length: int) -> bytes | None:
        if self.revoked:
            return None
        if not self.bar.memory_space:
            return b"\xff" * length
        assert self.bar.backing.fd is not None
        return os.pread(self.bar.backing.fd, length, self.start + offset)

    def write(self, offset: int, data: bytes) -> bool:
        if self.revoked:
            return False
        if self.bar.memory_space:
            assert self.bar.backing.fd is not None
            os.pwrite(self.bar.backing.fd, data, self.start + offset)
        return True

    def release(self) -> None:
        pass


_Source: TypeAlias = _Address | _File | _Bar


@dataclass(slots=True)
class _Map:
    iova: int
    size: int
    writable: bool
    source: _Source
    locked: int
    # Pages that were written, as the IOMMU's page table has them.
    dirty: set[int] = field(default_factory=set)

    @property
    def end(self) -> int:
        return self.iova + self.size


class SimulatedHostIommu:
    """A DMA target that behaves like the kernel's.

    Its methods may be called from any thread.

    Args:
        interface: ``"type1"`` or ``"iommufd"``.
        page_size: Smallest page of the IOMMU, in bytes.
        ranges: The addresses that can be mapped, ascending; the rest is reserved.
        entries: How many mappings fit; only type1 has a limit.
        locked_limit: RLIMIT_MEMLOCK in bytes for a process without CAP_IPC_LOCK; None for no
            limit.
        linux: The kernel's version; before 6.19 it exports no BARs.
        tracks: Whether it can tell what devices write. Type1 then counts everything as written
            that is mapped, as Linux does; iommufd tells exactly what was.

    Attributes:
        calls: The kernel's calls so far, those that failed included.
    """

    def __init__(
        self,
        interface: Interface = "type1",
        *,
        page_size: int = mmap.PAGESIZE,
        ranges: Collection[IovaRange] = X86_RANGES,
        entries: int = ENTRY_LIMIT,
        locked_limit: int | None = None,
        linux: tuple[int, int] = (7, 2),
        tracks: bool = True,
    ) -> None:
        if interface not in ("type1", "iommufd"):
            raise ValueError(f"interface {interface!r} is neither 'type1' nor 'iommufd'")
        page = check_int(page_size, "page_size")
        if not 0 < page < ADDRESS_SPACE or page & (page - 1):
            raise ValueError(f"page_size {page} is not a power of two of 64 bits")
        if check_int(entries, "entries") < 0:
            raise ValueError(f"entries {entries} must be >= 0")
        if locked_limit is not None and check_int(locked_limit, "locked_limit") < 0:
            raise ValueError(f"locked_limit {locked_limit} must be >= 0")
        self.interface = interface
        self.calls = 0
        self._page = page_size
        self._ranges = tuple(IovaRange(*r) for r in ranges)
        self._entries = entries
        self._limit = locked_limit
        self._linux = linux
        self._can_track = tracks
        self._tracks = False
        self._maps: dict[int, _Map] = {}
        self._starts: list[int] = []
        self._locked = 0
        self._bars: list[SimulatedBar] = []
        self._exports: dict[int, tuple[SimulatedBar, int, int]] = {}
        self._fuse: tuple[int, int, frozenset[str]] | None = None
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return (
            f"<SimulatedHostIommu ({self.interface}): {len(self._maps)} mappings, "
            f"{self.calls} calls>"
        )

    # What a DMA target does; see the real ones.

    def map_dma(self, request: DmaMapRequest) -> None:
        """Let devices reach memory; see :class:`~guestio.dma.VfioType1Target`.

        Raises:
            DmaError: As the real target would.
        """
        if self.interface == "type1":
            map_type1(self, request)
        else:
            map_ioas(self, request)

    def unmap_dma(self, start: int, size: int) -> None:
        """Take a mapping away; see :class:`~guestio.dma.VfioType1Target`.

        Raises:
            DmaError: As the real target would.
        """
        if self.interface == "type1":
            unmap_type1(self, start, size)
        else:
            unmap_ioas(self, start, size)

    def info(self) -> IommuInfo:
        """Page size, valid addresses and free entries."""
        if self.interface == "iommufd":
            return IommuInfo(self._page, self._ranges, None)
        left = self._entries - len(self._maps)
        return IommuInfo(self._page, self._ranges, left, self._can_track)

    def dirty_support(self) -> DirtySupport:
        """As the real target, of one device."""
        if not self._can_track:
            reason = NO_IOMMU_TRACKING if self.interface == "iommufd" else "type1 does not track"
            return DirtySupport({}, f"simulated: {reason}, and {NO_LOG}")
        way: DirtyWay = "iommu" if self.interface == "iommufd" else "container"
        return DirtySupport({"simulated": way}, "")

    def start_dirty_tracking(self, ranges: Sequence[IovaRange]) -> None:
        """As the real target.

        Raises:
            ValueError: It is on.
            DeviceError: It cannot.
        """
        del ranges  # only devices' own logs need them
        if self._tracks:
            raise ValueError(f"{self!r} tracks already what devices write")
        support = self.dirty_support()
        if support.missing:
            raise unsupported(self, support)
        try:
            self.kernel_track(True)
        except OSError as error:
            reason = f"{self!r} cannot track what devices write: {error.strerror}"
            raise DeviceError(reason) from error

    def stop_dirty_tracking(self) -> None:
        """As the real target."""
        self.kernel_track(False)

    def read_dirty(self, start: int, size: int, page_size: int) -> DirtyBits | None:
        """As the real target."""
        if self.interface == "type1":
            return read_type1(self, start, size)
        return read_ioas(self, start, size, page_size)

    def unmap_dirty(self, start: int, size: int, page_size: int) -> DirtyBits | None:
        """As the real target."""
        if self.interface == "type1":
            return unmap_dirty_type1(self, start, size)
        return unmap_dirty_ioas(self, start, size, page_size)

    # What a device does.

    def read(self, iova: int, length: int) -> bytes:
        """A device reads memory.

        Raises:
            DmaFaultError: Something there is not mapped.
        """
        check_range(iova, length, name="iova")
        with self._lock:
            pieces = []
            for found, at, size in self._pieces(iova, length, Permissions.READ):
                data = found.source.read(at - found.iova, size)
                if data is None:
                    raise _gone(at, size, Permissions.READ, found)
                pieces.append(data)
            return b"".join(pieces)

    def write(self, iova: int, data: bytes) -> None:
        """A device writes memory.

        Raises:
            DmaFaultError: Something there is not mapped, or read-only; what lies before it has
                been written.
        """
        check_range(iova, len(data), name="iova")
        with self._lock:
            for found, at, size in self._pieces(iova, len(data), Permissions.WRITE):
                part = data[at - iova : at - iova + size]
                if not found.source.write(at - found.iova, part):
                    raise _gone(at, size, Permissions.WRITE, found)
                if self._tracks:
                    found.dirty.update(range(at // self._page, (at + size - 1) // self._page + 1))

    # What a test does.

    def new_bar(self, size: int) -> SimulatedBar:
        """Make memory of a device that other devices can be given access to."""
        bar = SimulatedBar(self, size)
        self._bars.append(bar)
        return bar

    def mappings(self) -> list[tuple[int, int, bool]]:
        """What is mapped: start, size, and whether devices may write; ascending."""
        with self._lock:
            maps = [self._maps[start] for start in self._starts]
            return [(item.iova, item.size, item.writable) for item in maps]

    def fail_after(
        self,
        n: int,
        number: int = errno.ENOMEM,
        calls: Collection[KernelCall] = ("map", "map_file", "unmap", "export"),
    ) -> None:
        """Let one call of the kernel fail, without effect.

        Args:
            n: How many of the chosen calls still succeed first.
            number: The error number.
            calls: Which calls count.
        """
        self._fuse = (n, number, frozenset(calls))

    # The kernel's calls.

    def kernel_map(self, iova: int, size: int, address: int, writable: bool) -> None:
        """``VFIO_IOMMU_MAP_DMA`` or ``IOMMU_IOAS_MAP`` of memory at an address.

        Raises:
            OSError: As the kernel would.
        """
        with self._lock:
            self._enter("map")
            if self.interface == "type1":
                self._check_type1(iova, size, address)
            else:
                self._check_ioas(iova, size, address)
            bar = self._bar_at(address, size)
            if bar is not None and self.interface == "iommufd":
                # Device memory has no pages that could be pinned.
                raise _error(errno.EFAULT)
            if bar is not None:
                source = _Bar(bar, address - bar.backing.host_address)
                self._insert(_Map(iova, size, writable, source, 0))
                return
            if self._limit is not None and self._locked + size > self._limit:
                raise _error(errno.ENOMEM)
            if not _pinnable(address, size, writable):
                raise _error(errno.EFAULT)
            self._insert(_Map(iova, size, writable, _Address(address), size))

    def kernel_map_file(self, iova: int, size: int, fd: int, start: int, writable: bool) -> None:
        """``IOMMU_IOAS_MAP_FILE`` of a memfd or a dma-buf.

        Raises:
            OSError: As the kernel would.
        """
        with self._lock:
            self._enter("map_file")
            if iova >= _ULONG_MAX or size >= _ULONG_MAX:
                raise _error(errno.EOVERFLOW)
            if not size:
                raise _error(errno.EINVAL)
            status = os.fstat(fd)
            exported = self._exports.get(status.st_ino)
            if exported is not None:
                bar, offset, length = exported
                if start + size > length:
                    raise _error(errno.EINVAL)
                if not bar.memory_space:
                    raise _error(errno.ENODEV)
                self._check_ioas(iova, size, start)
                self._insert(_Map(iova, size, writable, _Bar(bar, offset + start), 0))
                return
            self._check_ioas(iova, size, start)
            # Only memory file systems can pin pages by a descriptor; they know seals.
            if not stat.S_ISREG(status.st_mode) or not _is_memfd(fd):
                raise _error(errno.EINVAL)
            if start + size > status.st_size:
                raise _error(errno.EINVAL)
            if self._limit is not None and self._locked + size > self._limit:
                raise _error(errno.ENOMEM)
            self._insert(_Map(iova, size, writable, _File(os.dup(fd), start), size))

    def kernel_unmap(self, iova: int, size: int) -> int:
        """``VFIO_IOMMU_UNMAP_DMA`` or ``IOMMU_IOAS_UNMAP``; returns how many bytes went.

        Raises:
            OSError: As the kernel would.
        """
        with self._lock:
            self._enter("unmap")
            if self.interface == "type1":
                return self._unmap_type1(iova, size)
            return self._unmap_ioas(iova, size)

    def kernel_export(self, fd: int, start: int, size: int) -> int | None:
        """``VFIO_DEVICE_FEATURE_DMA_BUF``; None if the file is no device's.

        Raises:
            OSError: As the kernel would.
        """
        with self._lock:
            self._enter("export")
            inode = os.fstat(fd).st_ino
            bar = next((bar for bar in self._bars if bar._inode == inode), None)
            if bar is None:
                return None
            if self._linux < (6, 19):
                raise _error(errno.ENOTTY)
            if start % self._page or size % self._page or start + size > bar.backing.size:
                raise _error(errno.EINVAL)
            made = os.memfd_create("simulated-dma-buf", os.MFD_CLOEXEC)
            self._exports[os.fstat(made).st_ino] = (bar, start, size)
            return made

    def kernel_track(self, on: bool) -> None:
        """``VFIO_IOMMU_DIRTY_PAGES`` or ``IOMMU_HWPT_SET_DIRTY_TRACKING``.

        Raises:
            OSError: As the kernel would.
        """
        with self._lock:
            self._enter("track")
            if on and not self._can_track:
                raise _error(errno.EOPNOTSUPP)
            if on and not self._tracks:
                # A clean start: iopt_set_dirty_tracking().
                for item in self._maps.values():
                    item.dirty.clear()
            self._tracks = on

    def kernel_read_dirty(self, bits: DirtyBits, size: int, *, clear: bool = True) -> None:
        """``VFIO_IOMMU_DIRTY_PAGES`` or ``IOMMU_HWPT_GET_DIRTY_BITMAP``.

        Raises:
            OSError: As the kernel would.
        """
        with self._lock:
            self._enter("read_dirty")
            if self.interface == "type1":
                self._read_type1(bits, size)
            else:
                self._read_ioas(bits, size, clear=clear)

    def kernel_unmap_dirty(self, bits: DirtyBits, size: int) -> int:
        """``VFIO_IOMMU_UNMAP_DMA`` that also says what was written.

        Raises:
            OSError: As the kernel would.
        """
        with self._lock:
            self._enter("unmap")
            if not self._tracks or bits.page_size != self._page:
                raise _error(errno.EINVAL)
            gone = self._overlapping(bits.start, size)
            unmapped = self._unmap_type1(bits.start, size)
            for item in gone:
                _set(bits, item.iova, item.size)
            return unmapped

    def _read_type1(self, bits: DirtyBits, size: int) -> None:
        # vfio_iova_dirty_bitmap(): whole mappings only, and all of each.
        start, end = bits.start, bits.start + size
        if not size or bits.page_size != self._page or (start | size) % self._page:
            raise _error(errno.EINVAL)
        found = self._overlapping(start, size)
        if not self._tracks or any(item.iova < start or item.end > end for item in found):
            raise _error(errno.EINVAL)
        for item in found:
            _set(bits, item.iova, item.size)

    def _read_ioas(self, bits: DirtyBits, size: int, *, clear: bool) -> None:
        # iopt_read_and_clear_dirty_data(), whose failures past its checks are not told.
        start, end = bits.start, bits.start + size
        if not size or (start | end) % max(self._page, bits.page_size):
            raise _error(errno.EINVAL)
        at = start
        for item in self._overlapping(start, size):
            if not self._tracks or item.iova > at:
                return
            at = item.end
            for page in sorted(item.dirty):
                if start <= page * self._page < end:
                    _set(bits, page * self._page, self._page)
                    if clear:
                        item.dirty.discard(page)

    def _enter(self, call: KernelCall) -> None:
        self.calls += 1
        if self._fuse is None or call not in self._fuse[2]:
            return
        n, number, calls = self._fuse
        if n:
            self._fuse = (n - 1, number, calls)
            return
        self._fuse = None
        raise _error(number)

    def _check_type1(self, iova: int, size: int, address: int) -> None:
        # vfio_dma_do_map(); since 6.18 it tells overflow from other nonsense.
        wraps = iova + size > ADDRESS_SPACE or address + size > ADDRESS_SPACE
        if not size:
            raise _error(errno.EINVAL)
        if wraps and self._linux >= (6, 18):
            raise _error(errno.EOVERFLOW)
        if (iova | size | address) % self._page or wraps:
            raise _error(errno.EINVAL)
        if self._overlapping(iova, size):
            raise _error(errno.EEXIST)
        if len(self._maps) >= self._entries:
            raise _error(errno.ENOSPC)
        if not self._is_valid(iova, size):
            raise _error(errno.EINVAL)

    def _check_ioas(self, iova: int, size: int, place: int) -> None:
        # iommufd_ioas_map(), iopt_alloc_area_pages(), iopt_check_iova().
        if iova >= _ULONG_MAX or size >= _ULONG_MAX or place + size > ADDRESS_SPACE:
            raise _error(errno.EOVERFLOW)
        if not size or size % self._page or iova % self._page:
            raise _error(errno.EINVAL)
        if iova + size > ADDRESS_SPACE:
            raise _error(errno.EOVERFLOW)
        if not self._is_valid(iova, size):
            raise _error(errno.EINVAL)
        if self._overlapping(iova, size):
            raise _error(errno.EEXIST)
        if place % self._page:
            raise _error(errno.EINVAL)

    def _unmap_type1(self, iova: int, size: int) -> int:
        # vfio_dma_do_unmap(), version 2: look first, then unmap all or nothing.
        if iova % self._page or not size or size % self._page:
            raise _error(errno.EINVAL)
        if iova + size > ADDRESS_SPACE:
            raise _error(errno.EOVERFLOW if self._linux >= (6, 18) else errno.EINVAL)
        found = self._overlapping(iova, size)
        if any(item.iova < iova or item.end > iova + size for item in found):
            raise _error(errno.EINVAL)
        for item in found:
            self._remove(item)
        return sum(item.size for item in found)

    def _unmap_ioas(self, iova: int, size: int) -> int:
        # iopt_unmap_iova_range(): one by one, so that those before a cut one are gone.
        if (iova, size) == (0, _ULONG_MAX):
            size = ADDRESS_SPACE
        elif iova >= _ULONG_MAX or size >= _ULONG_MAX or iova + size > ADDRESS_SPACE:
            raise _error(errno.EOVERFLOW)
        if not size:
            raise _error(errno.EINVAL)
        unmapped = 0
        for item in self._overlapping(iova, size):
            if item.iova < iova or item.end > iova + size:
                raise _error(errno.ENOENT)
            self._remove(item)
            unmapped += item.size
        if not unmapped and size != ADDRESS_SPACE:
            raise _error(errno.ENOENT)
        return unmapped

    def _is_valid(self, iova: int, size: int) -> bool:
        return any(r.base <= iova and iova + size <= r.base + r.length for r in self._ranges)

    def _overlapping(self, iova: int, size: int) -> list[_Map]:
        first = bisect_left(self._starts, iova)
        if first and self._maps[self._starts[first - 1]].end > iova:
            first -= 1
        return [self._maps[s] for s in self._starts[first : bisect_left(self._starts, iova + size)]]

    def _insert(self, item: _Map) -> None:
        self._maps[item.iova] = item
        self._locked += item.locked
        insort(self._starts, item.iova)

    def _remove(self, item: _Map) -> None:
        del self._maps[item.iova]
        self._locked -= item.locked
        del self._starts[bisect_left(self._starts, item.iova)]
        item.source.release()

    def _bar_at(self, address: int, size: int) -> SimulatedBar | None:
        for bar in self._bars:
            if bar.backing.closed:
                continue
            start = bar.backing.host_address
            if start <= address and address + size <= start + bar.backing.size:
                return bar
        return None

    def _revoke(self, bar: SimulatedBar) -> None:
        with self._lock:
            for item in self._maps.values():
                if isinstance(item.source, _Bar) and item.source.bar is bar:
                    item.source.revoked |= self.interface == "iommufd"

    def _pieces(
        self, iova: int, length: int, access: Permissions
    ) -> Iterator[tuple[_Map, int, int]]:
        """The mappings of a range, and the address and length of each one's part."""
        at, end = iova, iova + length
        while at < end:
            found = next(iter(self._overlapping(at, 1)), None)
            if found is None:
                raise DmaFaultError(at, end - at, access, "nothing is mapped there")
            if access is Permissions.WRITE and not found.writable:
                raise DmaFaultError(at, end - at, access, "it is mapped for reading only")
            size = min(end, found.end) - at
            yield found, at, size
            at += size


# linux/mman.h, since Linux 5.14; the second faults pages in as a write does, without writing.
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _set(bits: DirtyBits, start: int, size: int) -> None:
    first = (start - bits.start) // bits.page_size
    last = (start + size - 1 - bits.start) // bits.page_size
    for page in range(first, last + 1):
        bits.words[page // 64] |= np.uint64(1 << page % 64)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _gone(at: int, size: int, access: Permissions, found: _Map) -> DmaFaultError:
    if isinstance(found.source, _Bar):
        return DmaFaultError(at, size, access, "the device's memory was revoked")
    return DmaFaultError(
        at,
        size,
        access,
        "the memory behind the mapping is gone; it was unmapped or truncated while mapped for DMA",
    )


def _is_memfd(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _own_memory(mode: int) -> Iterator[int]:
    """This process's memory as a file: where there is none, reading fails instead of crashing."""
    fd = os.open("/proc/self/mem", mode | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _peek(address: int, length: int) -> bytes | None:
    try:
        with _own_memory(os.O_RDONLY) as fd:
            data = os.pread(fd, length, address)
    except OSError:
        return None
    return data if len(data) == length else None


def _pinnable(address: int, size: int, writable: bool) -> bool:
    """Whether every page of a range can be reached, and written if devices are to.

    Pins nothing, but faults the pages in as the kernel does when it pins them.
    """
    if address + size > 1 << 63:
        return False
    first = address & -mmap.PAGESIZE
    advice = _MADV_POPULATE_WRITE if writable else _MADV_POPULATE_READ
    status: int = _madvise(first, address + size - first, advice)
    return status == 0
