"""A virtio device on PCI in another process, set up as its driver does, for compiled load.

Source: virtio 1.4 section 4.1 "Virtio Over PCI Bus"; linux/virtio_pci.h.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple, Self

from guestio.dma import MSIX, DmaMapRequest
from guestio.errors import DeviceError
from guestio.memory import GuestRegionCollection
from guestio.vfio_user import Client, VfioUserTarget
from guestio.virtio.device import VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1, Status
from guestio.virtio.layout import RingLayout

_VENDOR: Final = 0x1AF4
_CAPABILITIES: Final = 0x34
_MSIX_CAPABILITY: Final = 0x11
_VENDOR_CAPABILITY: Final = 0x09
_MSIX_ENABLE: Final = 0x8000
_COMMON, _NOTIFY, _DEVICE = 1, 2, 4
_MOST_CAPABILITIES: Final = 64
_NO_VECTOR: Final = 0xFFFF

# Registers of `struct virtio_pci_common_cfg`: offset and bytes.
_FEATURE_HALF, _FEATURES = (0x00, 4), (0x04, 4)
_DRIVER_HALF, _DRIVER_FEATURES = (0x08, 4), (0x0C, 4)
_QUEUES, _STATUS, _SELECT = (0x12, 2), (0x14, 1), (0x16, 2)
_SIZE, _VECTOR, _ENABLE, _NOTIFY_OFF = (0x18, 2), (0x1A, 2), (0x1C, 2), (0x1E, 2)
_PARTS: Final = (0x20, 0x28, 0x30)


class _Part(NamedTuple):
    """Where a part of the transport is."""

    bar: int
    offset: int
    length: int


class PciQueue:
    """A queue that was set up, and the eventfd of its interrupts, which it owns.

    Attributes:
        index: Its number.
        kick_fd: Where the device is notified.
        message: What is written there; nothing for an eventfd.
        call_fd: Becomes readable when buffers were used.
    """

    err_fd: None = None

    def __init__(self, index: int, kick_fd: int, message: bytes) -> None:
        self.index = index
        self.kick_fd = kick_fd
        self.message = message
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close the eventfd. To be called once."""
        os.close(self.call_fd)


class PciFrontend:
    """A virtio device on PCI behind a vfio-user server, with what `Load` uses of a `Frontend`.

    For one thread. There is no IOMMU: all memory is mapped at its guest physical address.

    Args:
        path: Where the server listens.
        timeout: Seconds that any one wait for it may take.
        connect_wait: Seconds to go on trying while there is no server yet.
        doorbells: Whether to notify by eventfds where the server offers them (ioeventfds), instead
            of by posted writes.

    Attributes:
        client: The device.
        features: Virtio features negotiated; 0 before.

    Raises:
        DeviceError: There is no server, or its device is none of virtio.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout: float = 10.0,
        connect_wait: float = 0.0,
        doorbells: bool = False,
    ) -> None:
        self.features = 0
        self._queues: list[PciQueue] = []
        self._msix = self._multiplier = 0
        self._parts: dict[int, _Part] = {}
        self.client = Client(path, timeout=timeout, connect_wait=connect_wait)
        try:
            self._target = VfioUserTarget(self.client)
            self._find_parts()
            self._bells = self.client.bar(self._parts[_NOTIFY].bar).doorbells() if doorbells else []
        except BaseException:
            self.client.close()
            raise

    def _find_parts(self) -> None:
        config = self.client.config
        if config.load(0, 2) != _VENDOR:
            raise DeviceError(f"{self.client.address} is no virtio device")
        at = config.load(_CAPABILITIES, 1)
        for _ in range(_MOST_CAPABILITIES):
            if not at:
                break
            number, following = config.read(at, 2)
            if number == _MSIX_CAPABILITY:
                self._msix = at
            elif number == _VENDOR_CAPABILITY:
                kind, bar = config.read(at + 3, 2)
                part = _Part(bar, config.load(at + 8, 4), config.load(at + 12, 4))
                self._parts.setdefault(kind, part)
                if kind == _NOTIFY:
                    self._multiplier = config.load(at + 16, 4)
            at = following
        if not self._msix or not {_COMMON, _NOTIFY, _DEVICE} <= set(self._parts):
            raise DeviceError(f"{self.client.address} lacks parts of virtio's PCI transport")
        self.client.memory_space = self.client.bus_master = True
        control = config.load(self._msix + 2, 2)
        config.store(self._msix + 2, control | _MSIX_ENABLE, 2)

    def _get(self, register: tuple[int, int]) -> int:
        part = self._parts[_COMMON]
        return self.client.bar(part.bar).load(part.offset + register[0], register[1])

    def _set(self, register: tuple[int, int], value: int) -> None:
        part = self._parts[_COMMON]
        self.client.bar(part.bar).store(part.offset + register[0], value, register[1])

    def negotiate(self, wanted: int) -> int:
        """Agree on features: those of ``wanted`` that the device offers.

        Raises:
            DeviceError: The device refuses them, or an IOMMU is wanted.
        """
        if wanted >> VIRTIO_F_ACCESS_PLATFORM & 1:
            raise DeviceError("no IOMMU is made here for a vfio-user device: leave --iommu off")
        self.set_status(0)
        self.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        offered = 0
        for half in (0, 1):
            self._set(_FEATURE_HALF, half)
            offered |= self._get(_FEATURES) << 32 * half
        features = offered & wanted
        if not features >> VIRTIO_F_VERSION_1 & 1:
            raise DeviceError("the device is no virtio 1.x device")
        for half in (0, 1):
            self._set(_DRIVER_HALF, half)
            self._set(_DRIVER_FEATURES, features >> 32 * half & 0xFFFF_FFFF)
        self.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        if not self._get(_STATUS) & Status.FEATURES_OK:
            raise DeviceError(f"the device refuses features {features:#x}")
        self.features = features
        return features

    @property
    def iommu(self) -> bool:
        """Whether an IOMMU is in front of the device: never."""
        return False

    def set_status(self, status: int) -> None:
        """Write the device status; 0 resets the device."""
        self._set(_STATUS, status)

    def queue_count(self) -> int:
        """How many queues the device has."""
        return self._get(_QUEUES)

    def get_config(self, offset: int, size: int) -> bytes:
        """Read the device's own configuration; what it does not have reads as zeroes."""
        part = self._parts[_DEVICE]
        there = max(min(size, part.length - offset), 0)
        data = self.client.bar(part.bar).read(part.offset + offset, there)
        return data.ljust(size, b"\0")

    def set_memory(self, memory: GuestRegionCollection) -> None:
        """Let the device reach memory, at its guest physical addresses.

        Raises:
            DmaError: It cannot be mapped.
        """
        for region in memory:
            self._target.map_dma(
                DmaMapRequest(
                    region.start,
                    region.size,
                    region.host_address(),
                    region.backing.fd,
                    region.backing.file_offset or 0,
                )
            )

    def start_queue(self, index: int, layout: RingLayout) -> PciQueue:
        """Set a queue up, which runs from DRIVER_OK on.

        Raises:
            DeviceError: The device does not take it.
        """
        self._set(_SELECT, index)
        if layout.size > self._get(_SIZE):
            raise DeviceError(f"queue {index} has at most {self._get(_SIZE)} entries")
        notify = self._parts[_NOTIFY]
        region = self.client.bar(notify.bar)
        offset = notify.offset + self._get(_NOTIFY_OFF) * self._multiplier
        bell = next((each for each in self._bells if each.offset == offset), None)
        if bell is not None:
            queue = PciQueue(index, bell.fileno(), b"")
        else:
            message = region.posted(offset, struct.pack("<H", index))
            queue = PciQueue(index, self.client.fileno(), message)
        self._queues.append(queue)
        # Vector 0 would be that of changes of the configuration.
        self.client.enable_interrupts(MSIX, [-1, *(each.call_fd for each in self._queues)])
        self._set(_SIZE, layout.size)
        self._set(_VECTOR, len(self._queues))
        if self._get(_VECTOR) == _NO_VECTOR:
            raise DeviceError(f"queue {index} gets no interrupt")
        for place, address in zip(_PARTS, (layout.desc, layout.avail, layout.used), strict=True):
            self._set((place, 4), address & 0xFFFF_FFFF)
            self._set((place + 4, 4), address >> 32)
        self._set(_ENABLE, 1)
        return queue

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self.client.fileno()

    def close(self) -> None:
        """Hang up. May be called again."""
        self.client.close()
        for bell in self._bells:
            bell.close()
        while self._queues:
            self._queues.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
