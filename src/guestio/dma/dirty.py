"""Which pages assigned devices have written, as targets that can tell report it.

While a guest migrates, everything that may have changed must be copied again. What guestio itself
writes it marks; what a device writes by DMA, only its IOMMU or the device can tell. There are
three ways, and a target takes the best one for each device:

``iommu``: the IOMMU notes writes in its page tables (iommufd's dirty tracking). Exact.
``device``: the device itself keeps a log (``VFIO_DEVICE_FEATURE_DMA_LOGGING``). As exact as the
device.
``container``: type1 counts everything that a device can write as written, each time. Never wrong,
but nothing is ever clean.

Sources: ``include/uapi/linux/iommufd.h``, ``include/uapi/linux/vfio.h``, and QEMU's
``hw/vfio/container.c`` and ``hw/vfio/listener.c`` for how a VMM uses them.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np

from guestio.addr import IovaRange
from guestio.dma.target import DmaError, DmaMapRequest, DmaTarget, MappingType
from guestio.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from guestio.dma.device import VfioDevice
    from guestio.memory import AtomicBitmap

    Words: TypeAlias = npt.NDArray[np.uint64]

DirtyWay = Literal["iommu", "device", "container"]

# A device's log is told of what lies below this and of what lies above, as QEMU does it: devices
# log few ranges, and guests have memory on both sides of the window for devices.
_LOW = 1 << 32

NO_LOG = (
    "the device has no log of its writes (VFIO_DEVICE_FEATURE_DMA_LOGGING: a driver for migration "
    "such as mlx5-vfio-pci)"
)
NO_IOMMU_TRACKING = (
    "its IOMMU does not note writes (IOMMU_HW_CAP_DIRTY_TRACKING: Linux 6.7 with Intel VT-d's "
    "second-stage dirty bits or AMD-Vi's host dirty support, Linux 6.11 with Arm SMMUv3 HTTU)"
)


class DirtySupport(NamedTuple):
    """How a target can tell what devices write.

    Attributes:
        ways: For each device, by its address, how.
        missing: For which devices it cannot, why, and what would be needed; empty if it can.
    """

    ways: dict[str, DirtyWay]
    missing: str

    @property
    def exact(self) -> bool:
        """Whether only what was written is reported, and the rest can be clean."""
        return not self.missing and "container" not in self.ways.values()


class DirtyBits(NamedTuple):
    """Pages that devices wrote in a range.

    Attributes:
        start: The first I/O virtual address.
        page_size: Bytes to a bit.
        words: ``uint64``; bit ``i`` of word ``w`` is the page at
            ``start + (64 * w + i) * page_size``.
    """

    start: int
    page_size: int
    words: Words


@runtime_checkable
class TrackingDmaTarget(DmaTarget, Protocol):
    """A target that can tell which pages devices have written.

    Only memory that devices may write is asked for, one mapping at a time. While tracking is on,
    mappings are not exchanged (``replace_dma``) but unmapped and mapped.
    """

    def dirty_support(self) -> DirtySupport:
        """What the kernel and the devices can do, as far as is known now."""
        ...

    def start_dirty_tracking(self, ranges: Sequence[IovaRange]) -> None:
        """Note from now on what devices write.

        Args:
            ranges: What is mapped, or will be next. Other memory may be mapped later.

        Raises:
            DeviceError: It cannot; nothing is tracked.
        """
        ...

    def stop_dirty_tracking(self) -> None:
        """Note nothing any more; what was not read is forgotten."""
        ...

    def read_dirty(self, start: int, size: int, page_size: int) -> DirtyBits | None:
        """What was written in one mapping since it was last read; it is clean then.

        Args:
            start: As in ``map_dma``.
            size: As in ``map_dma``.
            page_size: How fine, if the target can; a power of two.

        Returns:
            The pages; None if that is not known, so that all of it may have been written.

        Raises:
            DmaError: It is not known and will not be, until tracking is started again.
        """
        ...

    def unmap_dirty(self, start: int, size: int, page_size: int) -> DirtyBits | None:
        """As ``unmap_dma``; and what was written before it, as :meth:`read_dirty` says it."""
        ...


def words_for(size: int, page_size: int) -> Words:
    """Clean bits for a range, a multiple of 64."""
    pages = -(-size // page_size)
    return np.zeros(-(-pages // 64), np.uint64)


def finest(request: DmaMapRequest, wanted: int) -> int:
    """The page size to ask for: ``wanted`` where the mapping consists of such pages."""
    plain = wanted > mmap.PAGESIZE and not wanted & (wanted - 1)
    if plain and not (request.start | request.size) % wanted:
        return wanted
    return mmap.PAGESIZE


def is_tracked(request: DmaMapRequest) -> bool:
    """Whether devices' writes to a mapping matter: it is memory, and they may write it."""
    return request.writable and request.kind is MappingType.RAM


class DirtyMarks:
    """Where what targets report is marked.

    Args:
        bitmap: Covers guest physical addresses from 0 on.
    """

    def __init__(self, bitmap: AtomicBitmap) -> None:
        self.bitmap = bitmap

    def check(self, requests: Iterable[DmaMapRequest]) -> None:
        """Refuse memory that the bitmap does not cover: its marks would be lost.

        Raises:
            DmaError: There is some.
        """
        covered = self.bitmap.byte_size
        for request in requests:
            if is_tracked(request) and request.end > covered:
                reason = (
                    f"the bitmap for what devices write covers only {covered:#x} bytes; enlarge() "
                    "it, or stop tracking, before memory is mapped there"
                )
                raise DmaError("track", request.start, request.size, reason)

    def take(self, request: DmaMapRequest, bits: DirtyBits | None) -> int:
        """Mark what was reported of a mapping, all of it for None; returns how many pages."""
        if bits is not None:
            return self.bitmap.merge(bits.start, bits.words, bits.page_size)
        self.bitmap.set_range(request.start, request.size)
        return -(-request.size // self.bitmap.page_size)


class DeviceLogs:
    """The logs that devices themselves keep; a part of a target.

    Attributes:
        devices: Those whose log is on.
    """

    def __init__(self) -> None:
        self.devices: list[VfioDevice] = []
        self._ranges: tuple[IovaRange, ...] = ()

    def start(self, devices: Iterable[VfioDevice], ranges: Sequence[IovaRange]) -> None:
        """Switch the logs of devices on, of all or none.

        Raises:
            DeviceError: One cannot.
        """
        self._ranges = _few(ranges)
        try:
            for device in devices:
                device.start_dma_log(self._ranges)
                self.devices.append(device)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Switch them off; those of closed devices ended with them."""
        while self.devices:
            device = self.devices.pop()
            if not device.closed:
                device.stop_dma_log()
        self._ranges = ()

    def check_closed_to(self, address: str) -> None:
        """Refuse another device while logs are on: what it writes would be in none.

        Raises:
            DeviceError: They are on.
        """
        if self.devices:
            raise DeviceError(
                f"{address} cannot join while the devices here log what they write: stop dirty "
                "tracking first"
            )

    def read(self, bits: DirtyBits, size: int) -> bool:
        """Add to some bits what the logs hold of their range, and clear it there.

        Returns:
            False if that is not known: the range was no memory when the logs were switched on.

        Raises:
            DmaError: A log is gone.
        """
        if not self.devices:
            return True
        for device in self.devices:
            if device.closed:
                reason = f"device {device.address} was closed, and its log of writes with it"
            else:
                try:
                    device.read_dma_log(bits, size)
                except OSError as error:
                    reason = f"device {device.address} lost its log of writes: {error.strerror}"
                else:
                    continue
            raise DmaError("track", bits.start, size, f"{reason}; start tracking again")
        end = bits.start + size
        return any(r.base <= bits.start and end <= r.base + r.length for r in self._ranges)

    def read_last(self, bits: DirtyBits, size: int) -> bool:
        """As :meth:`read`, of a range that is unmapped already: False also if a log is gone."""
        try:
            return self.read(bits, size)
        except DmaError:
            # The next harvest says it.
            return False


def not_told(start: int, size: int, error: OSError) -> DmaError:
    """The error for a kernel that does not say what was written."""
    reason = f"the kernel does not say what was written there: {error.strerror}"
    return DmaError("track", start, size, reason, errno=error.errno)


def unsupported(target: object, support: DirtySupport) -> DeviceError:
    """The error for a target that cannot tell what devices write."""
    return DeviceError(f"{target!r} cannot tell what devices write: {support.missing}")


def _few(ranges: Sequence[IovaRange]) -> tuple[IovaRange, ...]:
    """At most two ranges around some: of those that begin below 4 GiB, and of the others."""
    found = []
    for inside in (
        [r for r in ranges if r.base < _LOW],
        [r for r in ranges if r.base >= _LOW],
    ):
        if inside:
            first = min(r.base for r in inside)
            end = max(r.base + r.length for r in inside)
            found.append(IovaRange(first, end - first))
    return tuple(found)
