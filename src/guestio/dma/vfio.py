"""VFIO's type1 IOMMU: a container that holds DMA maps for the devices of its groups.

What makes errors of the kernel's answers that say what to do stands on :class:`Type1Calls`, so
that a simulated kernel can take the real one's place.

Sources: ``include/uapi/linux/vfio.h``, ``drivers/vfio/vfio_iommu_type1.c``,
``Documentation/driver-api/vfio.rst``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self
from weakref import WeakSet

from guestio.addr import IovaRange
from guestio.dma import _uapi
from guestio.dma.device import VfioDevice, sysfs_directory
from guestio.dma.dirty import (
    NO_LOG,
    DeviceLogs,
    DirtyBits,
    DirtySupport,
    not_told,
    unsupported,
    words_for,
)
from guestio.dma.target import DmaError
from guestio.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestio.dma.target import DmaMapRequest


class IommuInfo(NamedTuple):
    """What the kernel says about an address space.

    Attributes:
        page_size: What addresses and sizes must be multiples of, in bytes.
        ranges: The addresses that may be mapped, ascending; everything, if empty.
        available: How many more mappings it takes, or None if it does not say.
        tracks: Whether type1 can be asked which pages were written.
    """

    page_size: int
    ranges: tuple[IovaRange, ...]
    available: int | None
    tracks: bool = False


class Type1Calls(Protocol):
    """The kernel's calls for a container."""

    def info(self) -> IommuInfo:
        """What the kernel says about the address space now."""
        ...

    def kernel_map(self, iova: int, size: int, address: int, writable: bool) -> None:
        """``VFIO_IOMMU_MAP_DMA``.

        Raises:
            OSError: The kernel refused.
        """
        ...

    def kernel_unmap(self, iova: int, size: int) -> int:
        """``VFIO_IOMMU_UNMAP_DMA``; returns how many bytes were unmapped.

        Raises:
            OSError: The kernel refused.
        """
        ...

    def kernel_read_dirty(self, bits: DirtyBits, size: int) -> None:
        """``VFIO_IOMMU_DIRTY_PAGES`` with ``GET_BITMAP``.

        Raises:
            OSError: The kernel refused.
        """
        ...

    def kernel_unmap_dirty(self, bits: DirtyBits, size: int) -> int:
        """``VFIO_IOMMU_UNMAP_DMA`` that also says what was written.

        Raises:
            OSError: The kernel refused.
        """
        ...


def map_type1(calls: Type1Calls, request: DmaMapRequest) -> None:
    """Map memory of this process in a container; see :meth:`VfioType1Target.map_dma`."""
    if request.host_address is None:
        raise refused(request, "type1 needs the memory's host address, and there is none")
    info = calls.info()
    check_request(request, info, request.host_address)
    if info.available == 0:
        reason = (
            "the container is full; raise /sys/module/vfio_iommu_type1/parameters/"
            "dma_entry_limit before opening it, or map larger ranges"
        )
        raise refused(request, reason, errno.ENOSPC)
    try:
        calls.kernel_map(request.start, request.size, request.host_address, request.writable)
    except OSError as error:
        raise explain(request, error) from error


def unmap_type1(calls: Type1Calls, start: int, size: int) -> None:
    """Unmap a range of a container; see :meth:`VfioType1Target.unmap_dma`."""
    try:
        calls.kernel_unmap(start, size)
    except OSError as error:
        raise _not_unmapped(start, size, error) from error


def _not_unmapped(start: int, size: int, error: OSError) -> DmaError:
    reason = error.strerror
    if error.errno == errno.EINVAL:
        reason = "the range is not aligned to pages, or it would cut a mapping in two"
    return DmaError("unmap", start, size, str(reason), errno=error.errno)


def read_type1(calls: Type1Calls, start: int, size: int) -> DirtyBits:
    """What was written in a mapping of a container; see :class:`TrackingDmaTarget`."""
    bits = _type1_bits(calls, start, size)
    try:
        calls.kernel_read_dirty(bits, size)
    except OSError as error:
        raise not_told(start, size, error) from error
    return bits


def unmap_dirty_type1(calls: Type1Calls, start: int, size: int) -> DirtyBits:
    """As :func:`unmap_type1`, and what was written before: one call, which forgets nothing."""
    bits = _type1_bits(calls, start, size)
    try:
        calls.kernel_unmap_dirty(bits, size)
    except OSError as error:
        raise _not_unmapped(start, size, error) from error
    return bits


def _type1_bits(calls: Type1Calls, start: int, size: int) -> DirtyBits:
    # It counts in its smallest pages only.
    page_size = calls.info().page_size
    return DirtyBits(start, page_size, words_for(size, page_size))


class VfioType1Target:
    """A VFIO container with the type1v2 IOMMU, and the devices in it.

    Open a device first: without one there is no IOMMU to map in. A context manager that closes
    it. Calls of one target from one thread at a time.

    Args:
        path: The container's device node.

    Raises:
        DeviceError: The kernel has no VFIO, or not type1v2.
    """

    def __init__(self, path: str = "/dev/vfio/vfio") -> None:
        self._groups: dict[int, int] = {}
        self._devices: WeakSet[VfioDevice] = WeakSet()
        self._logs = DeviceLogs()
        # Whether the container itself tracks, and not its devices.
        self._tracks = False
        self._fd = open_node(path, "load the kernel module vfio_iommu_type1")
        try:
            version = _uapi.ioctl(self._fd, _uapi.VFIO_GET_API_VERSION, bytearray(1))
            if version != _uapi.VFIO_API_VERSION:
                raise DeviceError(f"{path} speaks version {version} of VFIO, not 0")
            if not self._extension(_uapi.VFIO_TYPE1V2_IOMMU):
                raise DeviceError(f"{path} has no type1v2 IOMMU: load vfio_iommu_type1")
        except BaseException:
            self.close()
            raise

    def open_device(self, address: str) -> VfioDevice:
        """Open a PCI device; its IOMMU group joins the container.

        Args:
            address: Its PCI address, such as ``0000:00:03.0``; ``vfio-pci`` must drive it.

        Raises:
            DeviceError: There is no such device, its group is in use or not complete, its IOMMU
                does not fit those already in the container, or the devices that are there log
                what they write (see :meth:`start_dirty_tracking`).
        """
        self._logs.check_closed_to(address)
        directory = sysfs_directory(address)
        link = directory / "iommu_group"
        if not link.exists():
            raise DeviceError(f"{address} is behind no IOMMU; boot with one switched on")
        group = self._group(int(link.resolve().name))
        try:
            name = bytearray(address.encode() + b"\0")
            fd = _uapi.ioctl(group, _uapi.VFIO_GROUP_GET_DEVICE_FD, name)
        except OSError as error:
            raise DeviceError(f"cannot open {address}: {error.strerror}") from error
        device = VfioDevice(fd, address)
        self._devices.add(device)
        return device

    def map_dma(self, request: DmaMapRequest) -> None:
        """Let the devices reach memory of this process; it is pinned until it is unmapped.

        Raises:
            DmaError: There is no address, it is not possible, or the kernel refused. ``errno`` is
                the kernel's; checks made before the call use the number it would have used.
        """
        map_type1(self, request)

    def unmap_dma(self, start: int, size: int) -> None:
        """Take a mapping away.

        Success means that nothing is mapped in the range any more; type1 is content if nothing was.

        Raises:
            DmaError: The range is not aligned, or would cut a mapping; nothing was unmapped.
        """
        unmap_type1(self, start, size)

    def dirty_support(self) -> DirtySupport:
        """By the devices' own logs if each has one, else by the container, which is not exact.

        Raises:
            DeviceError: No device was ever open.
        """
        devices = self._open_devices()
        if devices and all(device.has_dma_log for device in devices):
            return DirtySupport({device.address: "device" for device in devices}, "")
        if self.info().tracks:
            return DirtySupport({device.address: "container" for device in devices}, "")
        without = ", ".join(d.address for d in devices if not d.has_dma_log) or "no device is open"
        return DirtySupport(
            {},
            f"{without}: {NO_LOG}, and this type1 tracks no pages "
            "(VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION: Linux 5.8 or newer)",
        )

    def start_dirty_tracking(self, ranges: Sequence[IovaRange]) -> None:
        """See :class:`TrackingDmaTarget`.

        Raises:
            ValueError: It is on.
            DeviceError: The kernel or a device cannot.
        """
        if self._tracks or self._logs.devices:
            raise ValueError(f"{self!r} tracks already what devices write")
        support = self.dirty_support()
        if support.missing:
            raise unsupported(self, support)
        if "device" in support.ways.values():
            self._logs.start(self._open_devices(), ranges)
            return
        try:
            self._track(True)
        except OSError as error:
            reason = f"{self!r} cannot track what devices write: {error.strerror}"
            raise DeviceError(reason) from error
        self._tracks = True

    def stop_dirty_tracking(self) -> None:
        """See :class:`TrackingDmaTarget`."""
        if self._tracks:
            self._tracks = False
            self._track(False)
        self._logs.stop()

    def read_dirty(self, start: int, size: int, page_size: int) -> DirtyBits | None:
        """See :class:`TrackingDmaTarget`."""
        if not self._logs.devices:
            return read_type1(self, start, size)
        bits = DirtyBits(start, page_size, words_for(size, page_size))
        return bits if self._logs.read(bits, size) else None

    def unmap_dirty(self, start: int, size: int, page_size: int) -> DirtyBits | None:
        """See :class:`TrackingDmaTarget`; nothing is forgotten that is written meanwhile."""
        if not self._logs.devices:
            return unmap_dirty_type1(self, start, size)
        unmap_type1(self, start, size)
        bits = DirtyBits(start, page_size, words_for(size, page_size))
        return bits if self._logs.read_last(bits, size) else None

    def info(self) -> IommuInfo:
        """Page size, valid addresses and free entries, as the kernel has them now.

        Raises:
            DeviceError: No device is open.
        """
        self._check_ready()
        raw = _uapi.info_with_capabilities(
            self._fd, _uapi.VFIO_IOMMU_GET_INFO, _uapi.VfioIommuType1Info()
        )
        info = _uapi.VfioIommuType1Info.from_buffer_copy(raw)
        page_size = mmap.PAGESIZE
        if info.flags & _uapi.VFIO_IOMMU_INFO_PGSIZES and info.iova_pgsizes:
            page_size = info.iova_pgsizes & -info.iova_pgsizes
        ranges: tuple[IovaRange, ...] = ()
        available, tracks = None, False
        offset = info.cap_offset if info.flags & _uapi.VFIO_IOMMU_INFO_CAPS else 0
        for kind, at in _uapi.capabilities(raw, offset):
            if kind == _uapi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                head = _uapi.VfioIommuType1InfoCapIovaRange.from_buffer_copy(raw, at)
                begin = at + ctypes.sizeof(head)
                found = _uapi.array_of(raw, _uapi.VfioIovaRange, begin, head.nr_iovas)
                ranges = tuple(IovaRange(r.start, r.end - r.start + 1) for r in found)
            elif kind == _uapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
                available = _uapi.VfioIommuType1InfoDmaAvail.from_buffer_copy(raw, at).avail
            tracks |= kind == _uapi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION
        return IommuInfo(page_size, ranges, available, tracks)

    def kernel_map(self, iova: int, size: int, address: int, writable: bool) -> None:
        """``VFIO_IOMMU_MAP_DMA``; see :meth:`Type1Calls.kernel_map`."""
        self._check_ready()
        flags = _uapi.VFIO_DMA_MAP_FLAG_READ
        if writable:
            flags |= _uapi.VFIO_DMA_MAP_FLAG_WRITE
        call = _uapi.VfioIommuType1DmaMap(flags=flags, vaddr=address, iova=iova, size=size)
        _uapi.ioctl(self._fd, _uapi.VFIO_IOMMU_MAP_DMA, call)

    def kernel_unmap(self, iova: int, size: int) -> int:
        """``VFIO_IOMMU_UNMAP_DMA``; see :meth:`Type1Calls.kernel_unmap`."""
        self._check_ready()
        call = _uapi.VfioIommuType1DmaUnmap(iova=iova, size=size)
        _uapi.ioctl(self._fd, _uapi.VFIO_IOMMU_UNMAP_DMA, call)
        unmapped: int = call.size
        return unmapped

    def kernel_read_dirty(self, bits: DirtyBits, size: int) -> None:
        """``VFIO_IOMMU_DIRTY_PAGES``; see :meth:`Type1Calls.kernel_read_dirty`."""
        self._check_ready()
        call = _uapi.VfioIommuType1DirtyBitmapGet(
            flags=_uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
            iova=bits.start,
            size=size,
            pgsize=bits.page_size,
            bitmap_size=bits.words.nbytes,
            data=bits.words.ctypes.data,
        )
        _uapi.ioctl(self._fd, _uapi.VFIO_IOMMU_DIRTY_PAGES, call)

    def kernel_unmap_dirty(self, bits: DirtyBits, size: int) -> int:
        """``VFIO_IOMMU_UNMAP_DMA``; see :meth:`Type1Calls.kernel_unmap_dirty`."""
        self._check_ready()
        call = _uapi.VfioIommuType1DmaUnmapBitmap(
            flags=_uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
            iova=bits.start,
            size=size,
            pgsize=bits.page_size,
            bitmap_size=bits.words.nbytes,
            data=bits.words.ctypes.data,
        )
        _uapi.ioctl(self._fd, _uapi.VFIO_IOMMU_UNMAP_DMA, call)
        unmapped: int = call.size
        return unmapped

    def fileno(self) -> int:
        """The container's file descriptor, -1 when closed."""
        return self._fd

    def close(self) -> None:
        """Close container and groups; all mappings end once the devices are closed too.

        Remove it from its region manager first.
        """
        # A container loses its mappings with its last group, so groups stay until here.
        while self._groups:
            os.close(self._groups.popitem()[1])
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        groups = ", ".join(map(str, self._groups)) or "none"
        return f"<VfioType1Target {'closed' if self._fd < 0 else f'groups: {groups}'}>"

    def _track(self, on: bool) -> None:
        self._check_ready()
        flags = (
            _uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START
            if on
            else _uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP
        )
        call = _uapi.VfioIommuType1DirtyBitmap(flags=flags)
        _uapi.ioctl(self._fd, _uapi.VFIO_IOMMU_DIRTY_PAGES, call)

    def _open_devices(self) -> list[VfioDevice]:
        return sorted(
            (device for device in self._devices if not device.closed), key=lambda d: d.address
        )

    def _extension(self, number: int) -> bool:
        return fcntl.ioctl(self._fd, _uapi.VFIO_CHECK_EXTENSION, number) > 0

    def _check_ready(self) -> None:
        if self._fd < 0:
            raise ValueError("the container is closed")
        if not self._groups:
            raise DeviceError("the container has no IOMMU yet: open a device in it first")

    def _group(self, number: int) -> int:
        if self._fd < 0:
            raise ValueError("the container is closed")
        if number in self._groups:
            return self._groups[number]
        fd = open_node(f"/dev/vfio/{number}", "vfio-pci must drive a device of that IOMMU group")
        try:
            status = _uapi.VfioGroupStatus()
            _uapi.ioctl(fd, _uapi.VFIO_GROUP_GET_STATUS, status)
            if not status.flags & _uapi.VFIO_GROUP_FLAGS_VIABLE:
                members = sorted(
                    path.name
                    for path in Path(f"/sys/kernel/iommu_groups/{number}/devices").iterdir()
                )
                raise DeviceError(
                    f"IOMMU group {number} is not complete: bind all of {', '.join(members)} to "
                    "vfio-pci, or to no driver"
                )
            self._join(fd, number)
        except BaseException:
            os.close(fd)
            raise
        self._groups[number] = fd
        return fd

    def _join(self, group: int, number: int) -> None:
        try:
            _uapi.ioctl(
                group,
                _uapi.VFIO_GROUP_SET_CONTAINER,
                bytearray(self._fd.to_bytes(4, "little")),
            )
            if not self._groups:
                fcntl.ioctl(self._fd, _uapi.VFIO_SET_IOMMU, _uapi.VFIO_TYPE1V2_IOMMU)
        except OSError as error:
            hint = {
                errno.EPERM: "interrupt remapping is off (or set "
                "vfio_iommu_type1.allow_unsafe_interrupts=1)",
                errno.EINVAL: "it is in another container, or its IOMMU does not fit",
            }.get(error.errno or 0, error.strerror)
            raise DeviceError(f"IOMMU group {number} cannot join the container: {hint}") from error


def open_node(path: str, hint: str) -> int:
    """Open a device node of VFIO.

    Raises:
        DeviceError: It cannot be opened; says ``hint`` if it is not there.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        why = f"there is no such node; {hint}" if missing else error.strerror
        raise DeviceError(f"cannot open {path}: {why}") from error


def check_request(request: DmaMapRequest, info: IommuInfo, place: int) -> None:
    """Refuse what the kernel would refuse with less explanation.

    Args:
        request: What to map.
        info: What the kernel says.
        place: Where the memory is: an address or an offset.

    Raises:
        DmaError: Not aligned, or outside the valid addresses (``EINVAL``).
    """
    number = errno.EINVAL
    if (request.start | request.size | place) % info.page_size:
        reason = f"IOVA, size and memory ({place:#x}) must be multiples of {info.page_size:#x}"
        raise refused(request, reason, number)
    if info.ranges and not any(
        r.base <= request.start and request.end <= r.base + r.length for r in info.ranges
    ):
        valid = ", ".join(f"[{r.base:#x}, {r.base + r.length:#x})" for r in info.ranges)
        raise refused(request, f"the IOMMU can map only {valid}", number)


def explain(request: DmaMapRequest, error: OSError) -> DmaError:
    """The kernel's refusal of a mapping, with what to do about it."""
    reason = error.strerror or str(error)
    match error.errno:
        case errno.EEXIST:
            reason = "a part of the range is mapped already; unmap it first"
        case errno.EFAULT:
            access = "written" if request.writable else "read"
            reason = (
                f"the memory cannot be {access}, or not be pinned: is all of it mapped, is its "
                "file long enough, is it ordinary memory?"
            )
        case errno.ENOMEM:
            reason = _locked_memory_advice(request.size)
        case errno.EINVAL:
            reason = "the kernel finds the range or the memory unfit"
    return refused(request, reason, error.errno)


def _locked_memory_advice(size: int) -> str:
    limit, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return "the host is out of memory"
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    locked = 1024 * max(int(fields.get(name, "0").split()[0]) for name in ("VmLck", "VmPin"))
    return (
        f"{size:#x} more bytes would exceed the limit of locked memory (RLIMIT_MEMLOCK), which is "
        f"{limit} with {locked} in use: raise it to at least {locked + size} "
        f"(`ulimit -l {-(-(locked + size) // 1024)}`)"
    )


def refused(request: DmaMapRequest, reason: str, number: int | None = None) -> DmaError:
    """The error for a mapping that cannot be made."""
    return DmaError("map", request.start, request.size, reason, errno=number)
