"""iommufd: an I/O address space (IOAS) that holds DMA maps for the devices attached to it.

What chooses how a mapping is made and explains refusals stands on :class:`IoasCalls`, so that a
simulated kernel can take the real one's place.

Sources: ``include/uapi/linux/iommufd.h``, ``include/uapi/linux/vfio.h``,
``Documentation/userspace-api/iommufd.rst``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from typing import TYPE_CHECKING, Protocol, Self
from weakref import WeakKeyDictionary

from guestio.addr import IovaRange
from guestio.dma import _uapi
from guestio.dma.device import VfioDevice, export_dma_buf, sysfs_directory
from guestio.dma.dirty import (
    NO_IOMMU_TRACKING,
    NO_LOG,
    DeviceLogs,
    DirtyBits,
    DirtySupport,
    DirtyWay,
    not_told,
    unsupported,
    words_for,
)
from guestio.dma.target import DmaError, MappingType
from guestio.dma.vfio import IommuInfo, check_request, explain, open_node, refused
from guestio.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guestio.dma.target import DmaMapRequest

# What says that a file is of a kind that cannot be mapped by its descriptor, or that the kernel
# has no such call (before Linux 6.13); the address may do then.
_NOT_BY_FILE = {errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV}


class IoasCalls(Protocol):
    """The kernel's calls for an I/O address space."""

    def info(self) -> IommuInfo:
        """What the kernel says about the address space now."""
        ...

    def kernel_map(self, iova: int, size: int, address: int, writable: bool) -> None:
        """``IOMMU_IOAS_MAP`` at a fixed IOVA.

        Raises:
            OSError: The kernel refused.
        """
        ...

    def kernel_map_file(self, iova: int, size: int, fd: int, start: int, writable: bool) -> None:
        """``IOMMU_IOAS_MAP_FILE`` at a fixed IOVA.

        Raises:
            OSError: The kernel refused.
        """
        ...

    def kernel_unmap(self, iova: int, size: int) -> int:
        """``IOMMU_IOAS_UNMAP``; returns how many bytes were unmapped.

        Raises:
            OSError: The kernel refused.
        """
        ...

    def kernel_read_dirty(self, bits: DirtyBits, size: int, *, clear: bool = True) -> None:
        """``IOMMU_HWPT_GET_DIRTY_BITMAP`` of every page table that notes writes.

        Raises:
            OSError: The kernel refused.
        """
        ...

    def kernel_export(self, fd: int, start: int, size: int) -> int | None:
        """``VFIO_DEVICE_FEATURE_DMA_BUF``: a dma-buf of a part of a BAR.

        Args:
            fd: A file that may be a VFIO device.
            start: Where the part begins in that file.
            size: Bytes.

        Returns:
            A descriptor to be closed, or None if ``fd`` is no VFIO device.

        Raises:
            OSError: The kernel cannot export it.
        """
        ...


def map_ioas(calls: IoasCalls, request: DmaMapRequest) -> None:
    """Map memory in an I/O address space; see :meth:`IommufdTarget.map_dma`."""
    place = request.file_offset if request.fd is not None else request.host_address
    if place is None:
        raise refused(request, "the memory has neither a file nor a host address")
    check_request(request, calls.info(), place)
    try:
        if request.fd is None:
            calls.kernel_map(request.start, request.size, place, request.writable)
        elif request.kind is not MappingType.DEVICE or not _map_bar(calls, request, request.fd):
            _map_file(calls, request, request.fd)
    except OSError as error:
        raise explain(request, error) from error


def unmap_ioas(calls: IoasCalls, start: int, size: int) -> None:
    """Unmap a range of an I/O address space; see :meth:`IommufdTarget.unmap_dma`."""
    try:
        calls.kernel_unmap(start, size)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ENOENT:
            reason = "nothing is mapped there, or a mapping would be cut in two"
        raise DmaError("unmap", start, size, str(reason), errno=error.errno) from error


def read_ioas(calls: IoasCalls, start: int, size: int, page_size: int) -> DirtyBits:
    """What was written in a mapping of an address space; see :class:`TrackingDmaTarget`."""
    bits = DirtyBits(start, page_size, words_for(size, page_size))
    try:
        # Never of more than one mapping: at a hole Linux (7.3) stops, and reports success.
        calls.kernel_read_dirty(bits, size)
    except OSError as error:
        raise not_told(start, size, error) from error
    return bits


def unmap_dirty_ioas(calls: IoasCalls, start: int, size: int, page_size: int) -> DirtyBits | None:
    """As :func:`unmap_ioas`, and what was written before.

    The kernel has no call for both: what a device writes between the two is not told. A guest
    does not take memory away that it has devices write.
    """
    bits = DirtyBits(start, page_size, words_for(size, page_size))
    known = True
    try:
        calls.kernel_read_dirty(bits, size, clear=False)
    except OSError:
        known = False
    unmap_ioas(calls, start, size)
    return bits if known else None


def _map_file(calls: IoasCalls, request: DmaMapRequest, fd: int) -> None:
    # The kernel does not look at how the file was opened.
    if request.writable and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        reason = "devices are to write, but the file is open for reading only"
        raise refused(request, reason, errno.EACCES)
    try:
        calls.kernel_map_file(
            request.start, request.size, fd, request.file_offset, request.writable
        )
    except OSError as error:
        if error.errno not in _NOT_BY_FILE or request.host_address is None:
            raise
        calls.kernel_map(request.start, request.size, request.host_address, request.writable)


def _map_bar(calls: IoasCalls, request: DmaMapRequest, device: int) -> bool:
    """Map a BAR; False if the file is not a VFIO device's."""
    try:
        fd = calls.kernel_export(device, request.file_offset, request.size)
    except OSError as error:
        reason = (
            f"the kernel exports no dma-buf of this BAR ({error.strerror}); that needs Linux "
            "6.19 with CONFIG_VFIO_PCI_DMABUF, a device that can do peer-to-peer, and its "
            "memory space enabled"
        )
        raise refused(request, reason, error.errno) from error
    if fd is None:
        return False
    try:
        calls.kernel_map_file(request.start, request.size, fd, 0, request.writable)
    finally:
        # The mapping holds the dma-buf by itself.
        os.close(fd)
    return True


class IommufdTarget:
    """An I/O address space of its own iommufd, and the devices attached to it.

    Devices whose IOMMU can note what they write are attached through a page table that does so
    once :meth:`start_dirty_tracking` says it. A context manager that closes it. Calls of one
    target from one thread at a time.

    Args:
        path: iommufd's device node.

    Raises:
        DeviceError: The kernel has no iommufd (``CONFIG_IOMMUFD``; Debian's kernels do not).
    """

    def __init__(self, path: str = "/dev/iommu") -> None:
        # Each open device, and the page table that notes its writes.
        self._devices: WeakKeyDictionary[VfioDevice, int | None] = WeakKeyDictionary()
        self._tables: list[int] = []
        self._logs = DeviceLogs()
        self._tracks = False
        self._fd = open_node(path, "the kernel needs CONFIG_IOMMUFD")
        try:
            call = _uapi.IommuIoasAlloc()
            _uapi.ioctl(self._fd, _uapi.IOMMU_IOAS_ALLOC, call)
        except OSError as error:
            self.close()
            raise DeviceError(f"{path} gives no address space: {error.strerror}") from error
        self._ioas: int = call.out_ioas_id

    def open_device(self, address: str) -> VfioDevice:
        """Open a PCI device and attach it to the address space.

        Args:
            address: Its PCI address, such as ``0000:00:03.0``; ``vfio-pci`` must drive it.

        Raises:
            DeviceError: There is no such device, it is in use, or its IOMMU refuses: mappings
                outside what it can reach are a reason.
        """
        nodes = sorted((sysfs_directory(address) / "vfio-dev").glob("vfio*"))
        if not nodes:
            raise DeviceError(f"{address} has no device node: CONFIG_VFIO_DEVICE_CDEV is needed")
        fd = open_node(f"/dev/vfio/devices/{nodes[0].name}", "is /dev complete?")

        def attach(table: int) -> None:
            call = _uapi.VfioDeviceAttachIommufdPt(pt_id=table)
            _uapi.ioctl(fd, _uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, call)

        try:
            bind = _uapi.VfioDeviceBindIommufd(iommufd=self.fileno())
            _uapi.ioctl(fd, _uapi.VFIO_DEVICE_BIND_IOMMUFD, bind)
            table = self._attach(bind.out_devid, attach)
            if table is None and self._tracks:
                raise DeviceError(
                    f"{address} cannot join while it is tracked what devices write: "
                    f"{NO_IOMMU_TRACKING}; stop dirty tracking first"
                )
        except OSError as error:
            os.close(fd)
            hint = {
                errno.EPERM: "interrupt remapping is off (or set "
                "iommufd.allow_unsafe_interrupts=1)",
                errno.EBUSY: "it is in use elsewhere",
                errno.EADDRINUSE: "something is mapped where it can reach no memory",
            }.get(error.errno or 0, error.strerror)
            raise DeviceError(f"{address} cannot join the address space: {hint}") from error
        except BaseException:
            os.close(fd)
            raise
        device = VfioDevice(fd, address)
        self._devices[device] = table
        return device

    def _attach(self, device_id: int, attach: Callable[[int], None]) -> int | None:
        """Attach a bound device where its writes can be noted, if its IOMMU can.

        Args:
            device_id: The kernel's number of it in this iommufd.
            attach: Attaches it to a page table or address space of that number.

        Returns:
            The page table that notes its writes, or None.

        Raises:
            OSError: The kernel refused.
        """
        if not self._can_note(device_id):
            attach(self._ioas)
            return None
        for table in self._tables:
            try:
                attach(table)
            except OSError as error:
                # Behind another IOMMU, to which this page table means nothing.
                if error.errno != errno.EINVAL:
                    raise
            else:
                return table
        call = _uapi.IommuHwptAlloc(
            flags=_uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING, dev_id=device_id, pt_id=self._ioas
        )
        _uapi.ioctl(self.fileno(), _uapi.IOMMU_HWPT_ALLOC, call)
        made: int = call.out_hwpt_id
        try:
            if self._tracks:
                self._note(made, True)
            attach(made)
        except BaseException:
            _uapi.ioctl(self.fileno(), _uapi.IOMMU_DESTROY, _uapi.IommuDestroy(id=made))
            raise
        self._tables.append(made)
        return made

    def _can_note(self, device_id: int) -> bool:
        call = _uapi.IommuHwInfo(dev_id=device_id)
        try:
            _uapi.ioctl(self.fileno(), _uapi.IOMMU_GET_HW_INFO, call)
        except OSError:
            return False  # before Linux 6.6, or an IOMMU that says nothing of itself
        return bool(call.out_capabilities & _uapi.IOMMU_HW_CAP_DIRTY_TRACKING)

    def _note(self, table: int, on: bool) -> None:
        flags = _uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE if on else 0
        call = _uapi.IommuHwptSetDirtyTracking(flags=flags, hwpt_id=table)
        _uapi.ioctl(self.fileno(), _uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, call)

    def map_dma(self, request: DmaMapRequest) -> None:
        """Let the devices reach memory.

        Memory with a file is mapped by its descriptor, or by its address where its file does not
        allow that; a BAR of a VFIO device through a dma-buf.

        Raises:
            DmaError: It is not possible, or the kernel refused. ``errno`` is the kernel's; checks
                made before the call use the number it would have used.
        """
        map_ioas(self, request)

    def unmap_dma(self, start: int, size: int) -> None:
        """Take a mapping away.

        Raises:
            DmaError: Nothing is mapped there, or a mapping would be cut (both ``ENOENT``).
        """
        unmap_ioas(self, start, size)

    def dirty_support(self) -> DirtySupport:
        """By the IOMMU for each device behind one that can, by the device's own log for others."""
        ways: dict[str, DirtyWay] = {}
        missing = []
        for device, table in self._open_devices():
            if table is not None:
                ways[device.address] = "iommu"
            elif device.has_dma_log:
                ways[device.address] = "device"
            else:
                missing.append(f"{device.address}: {NO_IOMMU_TRACKING}, and {NO_LOG}")
        return DirtySupport(ways, "; ".join(missing))

    def start_dirty_tracking(self, ranges: Sequence[IovaRange]) -> None:
        """See :class:`TrackingDmaTarget`.

        Raises:
            ValueError: It is on.
            DeviceError: The IOMMU or a device cannot.
        """
        if self._tracks:
            raise ValueError(f"{self!r} tracks already what devices write")
        support = self.dirty_support()
        if support.missing:
            raise unsupported(self, support)
        noting = []
        try:
            for table in self._tables:
                self._note(table, True)
                noting.append(table)
            self._logs.start([d for d, table in self._open_devices() if table is None], ranges)
        except BaseException as error:
            for table in reversed(noting):
                self._note(table, False)
            if not isinstance(error, OSError):
                raise
            reason = f"{self!r} cannot track what devices write: {error.strerror}"
            raise DeviceError(reason) from error
        self._tracks = True

    def stop_dirty_tracking(self) -> None:
        """See :class:`TrackingDmaTarget`."""
        if self._tracks:
            self._tracks = False
            for table in self._tables:
                self._note(table, False)
        self._logs.stop()

    def read_dirty(self, start: int, size: int, page_size: int) -> DirtyBits | None:
        """See :class:`TrackingDmaTarget`."""
        bits = read_ioas(self, start, size, page_size)
        return bits if self._logs.read(bits, size) else None

    def unmap_dirty(self, start: int, size: int, page_size: int) -> DirtyBits | None:
        """See :class:`TrackingDmaTarget`.

        What a device writes between the last look and the unmapping may be forgotten, unless the
        device has a log of its own.
        """
        bits = unmap_dirty_ioas(self, start, size, page_size)
        return bits if bits is not None and self._logs.read_last(bits, size) else None

    def info(self) -> IommuInfo:
        """Alignment and valid addresses; both depend on the devices that are attached."""
        call = _uapi.IommuIoasIovaRanges(ioas_id=self._ioas)
        count = 0
        while True:
            array = (_uapi.IommuIovaRange * count)()
            call.num_iovas, call.allowed_iovas = count, ctypes.addressof(array)
            try:
                _uapi.ioctl(self.fileno(), _uapi.IOMMU_IOAS_IOVA_RANGES, call)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                count = call.num_iovas
                continue
            ranges = tuple(
                IovaRange(r.start, r.last - r.start + 1) for r in array[: call.num_iovas]
            )
            return IommuInfo(call.out_iova_alignment, ranges, None)

    def kernel_map(self, iova: int, size: int, address: int, writable: bool) -> None:
        """``IOMMU_IOAS_MAP``; see :meth:`IoasCalls.kernel_map`."""
        call = _uapi.IommuIoasMap(
            flags=_flags(writable), ioas_id=self._ioas, user_va=address, length=size, iova=iova
        )
        _uapi.ioctl(self.fileno(), _uapi.IOMMU_IOAS_MAP, call)

    def kernel_map_file(self, iova: int, size: int, fd: int, start: int, writable: bool) -> None:
        """``IOMMU_IOAS_MAP_FILE``; see :meth:`IoasCalls.kernel_map_file`."""
        call = _uapi.IommuIoasMapFile(
            flags=_flags(writable), ioas_id=self._ioas, fd=fd, start=start, length=size, iova=iova
        )
        _uapi.ioctl(self.fileno(), _uapi.IOMMU_IOAS_MAP_FILE, call)

    def kernel_unmap(self, iova: int, size: int) -> int:
        """``IOMMU_IOAS_UNMAP``; see :meth:`IoasCalls.kernel_unmap`."""
        call = _uapi.IommuIoasUnmap(ioas_id=self._ioas, iova=iova, length=size)
        _uapi.ioctl(self.fileno(), _uapi.IOMMU_IOAS_UNMAP, call)
        unmapped: int = call.length
        return unmapped

    def kernel_read_dirty(self, bits: DirtyBits, size: int, *, clear: bool = True) -> None:
        """``IOMMU_HWPT_GET_DIRTY_BITMAP``; see :meth:`IoasCalls.kernel_read_dirty`."""
        for table in self._tables:
            call = _uapi.IommuHwptGetDirtyBitmap(
                hwpt_id=table,
                flags=0 if clear else _uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
                iova=bits.start,
                length=size,
                page_size=bits.page_size,
                data=bits.words.ctypes.data,
            )
            _uapi.ioctl(self.fileno(), _uapi.IOMMU_HWPT_GET_DIRTY_BITMAP, call)

    def kernel_export(self, fd: int, start: int, size: int) -> int | None:
        """``VFIO_DEVICE_FEATURE_DMA_BUF``; see :meth:`IoasCalls.kernel_export`."""
        for index in range(_uapi.VFIO_PCI_NUM_BARS):
            info = _uapi.VfioRegionInfo(index=index)
            try:
                _uapi.ioctl(fd, _uapi.VFIO_DEVICE_GET_REGION_INFO, info)
            except OSError as error:
                if index == 0 and error.errno == errno.ENOTTY:
                    return None  # not a device
                raise
            if info.offset <= start and start + size <= info.offset + info.size:
                return export_dma_buf(fd, index, start - info.offset, size)
        raise OSError(errno.EINVAL, "no BAR is there")

    def fileno(self) -> int:
        """The iommufd.

        Raises:
            ValueError: It is closed.
        """
        if self._fd < 0:
            raise ValueError("the iommufd is closed")
        return self._fd

    def close(self) -> None:
        """Close the iommufd; all mappings end once the devices are closed too.

        Remove it from its region manager first.
        """
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open_devices(self) -> list[tuple[VfioDevice, int | None]]:
        return sorted(
            ((device, table) for device, table in self._devices.items() if not device.closed),
            key=lambda item: item[0].address,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"<IommufdTarget {'closed' if self._fd < 0 else f'IOAS {self._ioas}'}>"


def _flags(writable: bool) -> int:
    flags = _uapi.IOMMU_IOAS_MAP_FIXED_IOVA | _uapi.IOMMU_IOAS_MAP_READABLE
    return flags | _uapi.IOMMU_IOAS_MAP_WRITEABLE if writable else flags
