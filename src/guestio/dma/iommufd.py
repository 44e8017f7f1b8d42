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

from guestio.addr import IovaRange
from guestio.dma import _uapi
from guestio.dma.device import VfioDevice, export_dma_buf, sysfs_directory
from guestio.dma.target import DmaError, MappingType
from guestio.dma.vfio import IommuInfo, check_request, explain, open_node, refused
from guestio.errors import DeviceError

if TYPE_CHECKING:
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

    A context manager that closes it. Calls of one target from one thread at a time.

    Args:
        path: iommufd's device node.

    Raises:
        DeviceError: The kernel has no iommufd (``CONFIG_IOMMUFD``; Debian's kernels do not).
    """

    def __init__(self, path: str = "/dev/iommu") -> None:
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
        try:
            _uapi.ioctl(
                fd,
                _uapi.VFIO_DEVICE_BIND_IOMMUFD,
                _uapi.VfioDeviceBindIommufd(iommufd=self.fileno()),
            )
            _uapi.ioctl(
                fd,
                _uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT,
                _uapi.VfioDeviceAttachIommufdPt(pt_id=self._ioas),
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
        return VfioDevice(fd, address)

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
