"""A PCI device assigned to this process by VFIO: registers, memory, interrupts, reset.

Opened by a target (:meth:`VfioType1Target.open_device`, :meth:`IommufdTarget.open_device`), which
decides what memory the device reaches. Sources: ``include/uapi/linux/vfio.h``, and for the
configuration space the PCI Local Bus specification 3.0, section 6.2.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from guestio.addr import check_int, check_range
from guestio.dma import _uapi
from guestio.errors import DeviceError
from guestio.memory.backing import Backing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestio.addr import IovaRange
    from guestio.dma.dirty import DirtyBits

PCI_COMMAND = 0x04
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4

INTX, MSI, MSIX, ERR, REQ = 0, 1, 2, 3, 4
"""Kinds of interrupts, as :meth:`PciFunction.interrupts` takes them (``VFIO_PCI_*_IRQ_INDEX``).
``ERR`` tells of an error of the device, ``REQ`` that its host wants it back."""


class MmapArea(NamedTuple):
    """A part of a device region that can be mapped; in bytes, on page boundaries."""

    offset: int
    size: int


class InterruptInfo(NamedTuple):
    """What a kind of interrupt offers.

    Attributes:
        vectors: How many interrupts there are; 0 if the device has none of this kind.
        eventfd: Whether they can signal an eventfd.
        automasked: Whether each is masked when it fires, until it is unmasked.
    """

    vectors: int
    eventfd: bool
    automasked: bool


class PciRegion(ABC):
    """A BAR, the ROM or the configuration space of a device that this process drives.

    It may be used from any thread as long as the device is open.

    Attributes:
        index: Its number: 0 to 5 the BARs, 6 the ROM, 7 the configuration space.
        size: Bytes; 0 if the device has no such region.
        readable: Whether it can be read.
        writable: Whether it can be written.
        areas: The parts that can be mapped. Whole pages only: a region smaller than a page, and
            the rest of one that does not end on a page, have none.
    """

    index: int
    size: int
    readable: bool
    writable: bool
    areas: tuple[MmapArea, ...]

    @property
    @abstractmethod
    def owner(self) -> str:
        """What the device is called, for messages."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Read from the device.

        A length of 1, 2, 4 or 8 at an offset that is a multiple of it is one access of that
        width.

        Raises:
            ValueError: Outside the region.
            DeviceError: The region cannot be read, or the device does not answer.
        """

    @abstractmethod
    def write(self, offset: int, data: bytes) -> None:
        """Write to the device; access widths as in :meth:`read`.

        Raises:
            ValueError: Outside the region.
            DeviceError: The region cannot be written, or the device does not answer.
        """

    @abstractmethod
    def backing(self, area: int = 0, *, writable: bool = True) -> Backing:
        """Map one of :attr:`areas` into this process.

        It can be given to :meth:`Region.add_mapping` so that other devices reach it, and be used
        like memory.

        Raises:
            ValueError: There is no such area.
            BackingError: It cannot be mapped.
        """

    def load(self, offset: int, width: int) -> int:
        """Read a register of ``width`` bytes, 1, 2, 4 or 8, little-endian.

        Raises:
            TypeError, ValueError: Another width, or as :meth:`read`.
            DeviceError: As :meth:`read`.
        """
        return int.from_bytes(self.read(offset, _check_width(width)), "little")

    def store(self, offset: int, value: int, width: int) -> None:
        """Write a register of ``width`` bytes, 1, 2, 4 or 8, little-endian.

        Raises:
            TypeError, ValueError: Another width, a value that it does not hold, or as
                :meth:`write`.
            DeviceError: As :meth:`write`.
        """
        size = _check_width(width)
        if not 0 <= check_int(value, "value") < 1 << 8 * size:
            raise ValueError(f"value {value:#x} does not fit in {size} unsigned bytes")
        self.write(offset, value.to_bytes(size, "little"))

    def _check(self, offset: int, length: int) -> None:
        first, size = check_range(offset, length, name="offset")
        if first + size > self.size:
            raise ValueError(
                f"{first:#x}+{size:#x} is not inside region {self.index} of {self.owner}, "
                f"which has {self.size:#x} bytes"
            )

    def _area(self, area: int) -> MmapArea:
        if not 0 <= area < len(self.areas):
            raise ValueError(
                f"region {self.index} of {self.owner} has {len(self.areas)} areas that can be "
                f"mapped, no number {area}"
            )
        return self.areas[area]

    def _failed(self, what: str, offset: int, length: int, why: OSError | str) -> DeviceError:
        if isinstance(why, OSError):
            why = why.strerror or str(why)
        return DeviceError(
            f"cannot {what} {offset:#x}+{length:#x} of region {self.index} of {self.owner}: {why}"
        )


def kind_name(kind: int) -> str:
    """What a kind of interrupts is called, for a message; its number if it is none."""
    names = ("INTx", "MSI", "MSI-X", "ERR", "REQ")
    return names[kind] if 0 <= kind < len(names) else str(kind)


def _check_width(width: int) -> int:
    if check_int(width, "width") not in (1, 2, 4, 8):
        raise ValueError(f"width {width} is not 1, 2, 4 or 8 bytes")
    return width


class PciFunction(ABC):
    """A PCI device that this process drives, wherever it is: what its drivers need.

    :class:`VfioDevice` is one that the kernel assigned, `guestio.vfio_user.Client` one in another
    process. A context manager that closes it.

    Attributes:
        address: What it is called: a PCI address, or the path of a socket.
        can_reset: Whether :meth:`reset` is possible.
    """

    address: str
    can_reset: bool

    @abstractmethod
    def region(self, index: int) -> PciRegion:
        """A region by its number.

        Raises:
            ValueError: There is no such number.
        """

    def bar(self, number: int) -> PciRegion:
        """Base address register ``number``, 0 to 5.

        Raises:
            ValueError: There is no such number.
        """
        if not 0 <= number < _uapi.VFIO_PCI_NUM_BARS:
            raise ValueError(f"BAR {number} is not in [0, {_uapi.VFIO_PCI_NUM_BARS})")
        return self.region(number)

    @property
    def rom(self) -> PciRegion:
        """The expansion ROM."""
        return self.region(_uapi.VFIO_PCI_ROM_REGION_INDEX)

    @property
    def config(self) -> PciRegion:
        """The configuration space, as the device's side lets it be seen."""
        return self.region(_uapi.VFIO_PCI_CONFIG_REGION_INDEX)

    @property
    def bus_master(self) -> bool:
        """Whether the device may begin transfers; assign to change it."""
        return self._command(PCI_COMMAND_MASTER)

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self._set_command(PCI_COMMAND_MASTER, on)

    @property
    def memory_space(self) -> bool:
        """Whether the device answers at its BARs; assign to change it.

        While it is off, other devices' accesses to them are lost; through an iommufd the mapping
        is dead from then on and must be made anew.
        """
        return self._command(PCI_COMMAND_MEMORY)

    @memory_space.setter
    def memory_space(self, on: bool) -> None:
        self._set_command(PCI_COMMAND_MEMORY, on)

    @abstractmethod
    def reset(self) -> None:
        """Put the device into the state it has after power-on.

        Raises:
            DeviceError: It cannot be reset alone, or it failed.
        """

    @abstractmethod
    def interrupts(self, kind: int) -> InterruptInfo:
        """What the device offers of a kind of interrupt: ``INTX``, ``MSI``, ``MSIX``, ...

        Raises:
            DeviceError: There is no such kind.
        """

    @abstractmethod
    def enable_interrupts(self, kind: int, eventfds: Sequence[int]) -> None:
        """Let interrupts of a kind signal eventfds, the first one the first, and so on.

        Args:
            kind: ``INTX``, ``MSI``, ``MSIX``, ``ERR`` or ``REQ``.
            eventfds: File descriptors of eventfds; they stay the caller's. -1 skips an interrupt.

        Raises:
            DeviceError: The device does not have so many, or cannot now.
        """

    @abstractmethod
    def disable_interrupts(self, kind: int) -> None:
        """Disable all interrupts of a kind.

        Raises:
            DeviceError: It failed.
        """

    @abstractmethod
    def unmask_interrupt(self, kind: int) -> None:
        """Let the first interrupt of an automasked kind (``INTX``) fire again.

        Raises:
            DeviceError: It failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the device. Calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _command(self, bit: int) -> bool:
        return bool(self.config.load(PCI_COMMAND, 2) & bit)

    def _set_command(self, bit: int, on: bool) -> None:
        value = self.config.load(PCI_COMMAND, 2)
        self.config.store(PCI_COMMAND, value | bit if on else value & ~bit, 2)


class DeviceRegion(PciRegion):
    """A region of an assigned device; see :class:`PciRegion`.

    Attributes:
        offset: Where it begins in the device's file.
    """

    def __init__(self, device: VfioDevice, index: int) -> None:
        info = _uapi.VfioRegionInfo(index=index)
        raw = _uapi.info_with_capabilities(device.fileno(), _uapi.VFIO_DEVICE_GET_REGION_INFO, info)
        info = _uapi.VfioRegionInfo.from_buffer_copy(raw)
        self._device = device
        self.index = index
        self.size = info.size
        self.offset: int = info.offset
        self.readable = bool(info.flags & _uapi.VFIO_REGION_INFO_FLAG_READ)
        self.writable = bool(info.flags & _uapi.VFIO_REGION_INFO_FLAG_WRITE)
        self.areas = _mmap_areas(raw, info)

    def __repr__(self) -> str:
        return f"<DeviceRegion {self.index} of {self._device!r}: {self.size:#x} bytes>"

    @property
    def owner(self) -> str:
        """See :class:`PciRegion`."""
        return self._device.address

    def read(self, offset: int, length: int) -> bytes:
        """Read through the kernel.

        A length of 1, 2, 4 or 8 at an offset that is a multiple of it is one access of that
        width.

        Raises:
            ValueError: Outside the region.
            DeviceError: The region cannot be read, or the device does not answer.
        """
        self._check(offset, length)
        try:
            data = os.pread(self._device.fileno(), length, self.offset + offset)
        except OSError as error:
            raise self._failed("read", offset, length, error) from error
        if len(data) != length:
            raise self._failed("read", offset, length, f"only {len(data)} bytes came")
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write through the kernel; access widths as in :meth:`read`.

        Raises:
            ValueError: Outside the region.
            DeviceError: The region cannot be written, or the device does not answer.
        """
        self._check(offset, len(data))
        try:
            done = os.pwrite(self._device.fileno(), data, self.offset + offset)
        except OSError as error:
            raise self._failed("write", offset, len(data), error) from error
        if done != len(data):
            raise self._failed("write", offset, len(data), f"only {done} bytes went")

    def backing(self, area: int = 0, *, writable: bool = True) -> Backing:
        """Map one of :attr:`areas` into this process.

        It can be given to :meth:`Region.add_mapping` so that other devices reach it, and be used
        like memory. It holds the device open.

        Raises:
            ValueError: There is no such area.
            BackingError: It cannot be mapped.
        """
        place = self._area(area)
        return Backing.from_fd(
            self._device.fileno(), place.size, self.offset + place.offset, writable
        )

    def export(self, offset: int, length: int) -> int:
        """Make a dma-buf of a part, through which an iommufd lets other devices reach it.

        Needs Linux 6.19 or newer with ``CONFIG_VFIO_PCI_DMABUF``, and the device's memory space
        enabled.

        Returns:
            A file descriptor; the caller's to close.

        Raises:
            ValueError: Outside the region.
            DeviceError: The kernel cannot do it.
        """
        self._check(offset, length)
        try:
            return export_dma_buf(self._device.fileno(), self.index, offset, length)
        except OSError as error:
            raise self._failed("export", offset, length, error) from error


class VfioDevice(PciFunction):
    """An open assigned device; a :class:`PciFunction`. A context manager that closes it.

    Interrupts, reset and closing from one thread at a time; regions from any.

    Args:
        fd: The device's file descriptor; from now on owned by this object.
        address: Its PCI address, such as ``0000:00:03.0``.

    Attributes:
        address: Its PCI address.
        can_reset: Whether :meth:`reset` is possible.
    """

    def __init__(self, fd: int, address: str) -> None:
        self._fd = fd
        self.address = address
        try:
            info = _uapi.VfioDeviceInfo()
            _uapi.ioctl(fd, _uapi.VFIO_DEVICE_GET_INFO, info)
            if not info.flags & _uapi.VFIO_DEVICE_FLAGS_PCI:
                raise DeviceError(f"{address} is not a PCI device")
            self.can_reset = bool(info.flags & _uapi.VFIO_DEVICE_FLAGS_RESET)
            self._regions = [DeviceRegion(self, index) for index in range(min(info.num_regions, 8))]
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The device's file descriptor.

        Raises:
            ValueError: The device is closed.
        """
        if self._fd < 0:
            raise ValueError(f"device {self.address} is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._fd < 0

    def region(self, index: int) -> DeviceRegion:
        """See :meth:`PciFunction.region`."""
        if not 0 <= index < len(self._regions):
            raise ValueError(f"{self.address} has {len(self._regions)} regions, no number {index}")
        return self._regions[index]

    def bar(self, number: int) -> DeviceRegion:
        """See :meth:`PciFunction.bar`."""
        if not 0 <= number < _uapi.VFIO_PCI_NUM_BARS:
            raise ValueError(f"BAR {number} is not in [0, {_uapi.VFIO_PCI_NUM_BARS})")
        return self.region(number)

    def reset(self) -> None:
        """Put the device into the state it has after power-on; its interrupts are off then.

        Raises:
            DeviceError: It cannot be reset alone, or it failed.
        """
        if not self.can_reset:
            raise DeviceError(f"{self.address} offers no reset of its own")
        try:
            _uapi.ioctl(self.fileno(), _uapi.VFIO_DEVICE_RESET, bytearray(1))
        except OSError as error:
            raise DeviceError(f"cannot reset {self.address}: {error.strerror}") from error

    def interrupts(self, kind: int) -> InterruptInfo:
        """What the device offers of a kind of interrupt: ``INTX``, ``MSI`` or ``MSIX``."""
        info = _uapi.VfioIrqInfo(index=kind)
        try:
            _uapi.ioctl(self.fileno(), _uapi.VFIO_DEVICE_GET_IRQ_INFO, info)
        except OSError as error:
            raise DeviceError(
                f"{self.address} has no interrupts of kind {kind_name(kind)}: {error.strerror}"
            ) from error
        return InterruptInfo(
            info.count,
            bool(info.flags & _uapi.VFIO_IRQ_INFO_EVENTFD),
            bool(info.flags & _uapi.VFIO_IRQ_INFO_AUTOMASKED),
        )

    def enable_interrupts(self, kind: int, eventfds: Sequence[int]) -> None:
        """Let interrupts of a kind signal eventfds, the first one the first, and so on.

        Args:
            kind: ``INTX``, ``MSI`` or ``MSIX``; only one kind can be enabled at a time.
            eventfds: File descriptors of eventfds; they stay the caller's. -1 skips an interrupt.

        Raises:
            DeviceError: The device does not have so many, or another kind is enabled.
        """
        action = _uapi.VFIO_IRQ_SET_DATA_EVENTFD | _uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        data = b"".join(fd.to_bytes(4, "little", signed=True) for fd in eventfds)
        self._set_interrupts(kind, action, len(eventfds), data)

    def disable_interrupts(self, kind: int) -> None:
        """Disable all interrupts of a kind.

        Raises:
            DeviceError: The kernel refused.
        """
        action = _uapi.VFIO_IRQ_SET_DATA_NONE | _uapi.VFIO_IRQ_SET_ACTION_TRIGGER
        self._set_interrupts(kind, action, 0)

    def unmask_interrupt(self, kind: int) -> None:
        """Let the first interrupt of an automasked kind (``INTX``) fire again.

        Raises:
            DeviceError: The kernel refused.
        """
        action = _uapi.VFIO_IRQ_SET_DATA_NONE | _uapi.VFIO_IRQ_SET_ACTION_UNMASK
        self._set_interrupts(kind, action, 1)

    @property
    def has_dma_log(self) -> bool:
        """Whether the device can keep a log of what it writes by DMA."""
        flags = _uapi.VFIO_DEVICE_FEATURE_PROBE | _uapi.VFIO_DEVICE_FEATURE_SET
        call = _uapi.VfioDeviceFeature(flags=flags | _uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START)
        try:
            _uapi.ioctl(self.fileno(), _uapi.VFIO_DEVICE_FEATURE, call)
        except OSError:
            return False
        return True

    def start_dma_log(self, ranges: Sequence[IovaRange]) -> None:
        """Have the device note what it writes; targets do that, see :mod:`guestio.dma.dirty`.

        Args:
            ranges: Where; a device may take only few.

        Raises:
            DeviceError: It keeps no log, keeps one already, or cannot for so much memory.
        """
        kind = _uapi.VfioDeviceFeatureDmaLoggingRange
        array = (kind * len(ranges))(*(kind(*each) for each in ranges))
        flags = _uapi.VFIO_DEVICE_FEATURE_SET | _uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
        call = _uapi.VfioDeviceFeatureDmaLoggingControl(
            feature_flags=flags,
            page_size=mmap.PAGESIZE,
            num_ranges=len(ranges),
            ranges=ctypes.addressof(array),
        )
        try:
            _uapi.ioctl(self.fileno(), _uapi.VFIO_DEVICE_FEATURE, call)
        except OSError as error:
            places = ", ".join(map(repr, ranges)) or "nothing"
            raise DeviceError(
                f"{self.address} cannot log its writes to {places}: {error.strerror}"
            ) from error

    def stop_dma_log(self) -> None:
        """End the log.

        Raises:
            DeviceError: There is none.
        """
        flags = _uapi.VFIO_DEVICE_FEATURE_SET | _uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
        call = _uapi.VfioDeviceFeature(flags=flags)
        try:
            _uapi.ioctl(self.fileno(), _uapi.VFIO_DEVICE_FEATURE, call)
        except OSError as error:
            reason = f"{self.address} cannot end its log of writes: {error.strerror}"
            raise DeviceError(reason) from error

    def read_dma_log(self, bits: DirtyBits, size: int) -> None:
        """Set the bits of what the log has of a range, which is clean in the log then.

        Args:
            bits: Where the range begins, the page size, and the bits; set ones stay set.
            size: Bytes of the range.

        Raises:
            OSError: The kernel refused; what the device wrote is not known any more.
        """
        flags = _uapi.VFIO_DEVICE_FEATURE_GET | _uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
        call = _uapi.VfioDeviceFeatureDmaLoggingReport(
            feature_flags=flags,
            iova=bits.start,
            length=size,
            page_size=bits.page_size,
            bitmap=bits.words.ctypes.data,
        )
        _uapi.ioctl(self.fileno(), _uapi.VFIO_DEVICE_FEATURE, call)

    def close(self) -> None:
        """Close the device. Its mapped regions stay mapped, and keep it busy, until they go."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        return f"<VfioDevice {self.address}{' closed' if self.closed else ''}>"

    def _set_interrupts(self, kind: int, flags: int, count: int, data: bytes = b"") -> None:
        call = _uapi.VfioIrqSet(flags=flags, index=kind, start=0, count=count)
        call.argsz += len(data)
        try:
            _uapi.ioctl(self.fileno(), _uapi.VFIO_DEVICE_SET_IRQS, bytearray(bytes(call) + data))
        except OSError as error:
            raise DeviceError(
                f"cannot set up {count} interrupts of kind {kind_name(kind)} of {self.address}: "
                f"{error.strerror}"
            ) from error


def _mmap_areas(raw: bytes, info: _uapi.VfioRegionInfo) -> tuple[MmapArea, ...]:
    if not info.flags & _uapi.VFIO_REGION_INFO_FLAG_MMAP:
        return ()
    areas = [MmapArea(0, info.size)]
    if info.flags & _uapi.VFIO_REGION_INFO_FLAG_CAPS:
        for kind, at in _uapi.capabilities(raw, info.cap_offset):
            if kind == _uapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
                head = _uapi.VfioRegionInfoCapSparseMmap.from_buffer_copy(raw, at)
                begin = at + ctypes.sizeof(head)
                found = _uapi.array_of(raw, _uapi.VfioRegionSparseMmapArea, begin, head.nr_areas)
                areas = [MmapArea(area.offset, area.size) for area in found]
    # The rest of a page may belong to another device.
    whole = [MmapArea(a.offset, a.size - a.size % mmap.PAGESIZE) for a in areas]
    return tuple(area for area in whole if area.size and area.offset % mmap.PAGESIZE == 0)


def export_dma_buf(fd: int, index: int, offset: int, length: int) -> int:
    """A dma-buf of a part of region ``index`` of the device behind ``fd``.

    Raises:
        OSError: The kernel refused; ``ENOTTY`` if it knows no such feature.
    """
    call = _uapi.VfioDeviceFeatureDmaBuf(
        feature_flags=_uapi.VFIO_DEVICE_FEATURE_GET | _uapi.VFIO_DEVICE_FEATURE_DMA_BUF,
        region_index=index,
        open_flags=os.O_RDWR | os.O_CLOEXEC,
        nr_ranges=1,
        offset=offset,
        length=length,
    )
    return _uapi.ioctl(fd, _uapi.VFIO_DEVICE_FEATURE, call)


def sysfs_directory(address: str) -> Path:
    """Where sysfs describes a PCI device.

    Raises:
        DeviceError: There is no such device, or ``vfio-pci`` does not drive it.
    """
    path = Path("/sys/bus/pci/devices") / address
    if "/" in address or not path.is_dir():
        raise DeviceError(f"there is no PCI device {address}; addresses look like 0000:00:03.0")
    driver = (path / "driver").resolve().name if (path / "driver").exists() else "no driver"
    if not driver.startswith("vfio") and not (path / "vfio-dev").is_dir():
        raise DeviceError(
            f"{address} is driven by {driver}; bind it to vfio-pci: write vfio-pci to "
            f"{path}/driver_override, unbind it from its driver, and write {address} to "
            "/sys/bus/pci/drivers_probe"
        )
    return path
