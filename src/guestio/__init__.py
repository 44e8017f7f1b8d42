"""Virtual devices and the memory side of virtual machines.

Packages, each importing only from those before it: ``errors``, ``addr``, ``_core`` (compiled),
``trace`` (what its tracepoints write), ``memory`` (what memory the guest has), ``dma`` (mapping
changes go out), ``iommu`` (which of it a device may touch), ``virtio`` (queues and devices),
``pci`` (PCI functions), ``peer`` (processes at the other end of a socket), ``control`` (a server,
watched from outside), ``vhost_user`` and ``vfio_user`` (transports), ``serving`` (a device, served
until a signal), ``guest`` (a guest without a VM), ``observe`` (recordings), ``cli``. ``testing`` is
a kit for users' own tests. This module only re-exports; the packages are its attributes, imported
when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from guestio.addr import IovaRange, MappedRange, Ordering, Permissions
from guestio.dma import (
    DmaError,
    DmaMapRequest,
    DmaTarget,
    IommufdTarget,
    MappingType,
    RegionManager,
    VfioType1Target,
)
from guestio.errors import (
    AccessError,
    BackingError,
    CannotResolveError,
    DeviceError,
    GuestioError,
    InvalidAddressError,
    IotlbFails,
    MemoryRegionOverlapError,
    MemoryVanishedError,
    MisalignedError,
    NoMemoryRegionError,
    PartialAccessError,
    PermissionDeniedError,
    ProtocolError,
    QueueError,
    RegionError,
    UnsortedMemoryRegionsError,
)
from guestio.iommu import (
    AddMapResult,
    BasicMemoryMapper,
    DirtyMode,
    ExportError,
    Iommu,
    IommuMemory,
    Iotlb,
    IotlbStats,
    MappingInfo,
    MemoryMapper,
    MemRegion,
    RemoveMapResult,
)
from guestio.memory import (
    AtomicBitmap,
    Backing,
    BitmapSlice,
    FileOffset,
    GuestMemory,
    GuestMemoryAtomic,
    GuestRegionCollection,
    IoVector,
    MmapRegion,
    SliceMemory,
    VolatileSlice,
)

if TYPE_CHECKING:
    from guestio.serving import serve

__version__ = "0.1.0"

_PACKAGES = frozenset(
    {
        "cli",
        "control",
        "dma",
        "faults",
        "guest",
        "iommu",
        "memory",
        "observe",
        "pci",
        "testing",
        "trace",
        "vfio_user",
        "vhost_user",
        "virtio",
    }
)

__all__ = [
    "AccessError",
    "AddMapResult",
    "AtomicBitmap",
    "Backing",
    "BackingError",
    "BasicMemoryMapper",
    "BitmapSlice",
    "CannotResolveError",
    "DeviceError",
    "DirtyMode",
    "DmaError",
    "DmaMapRequest",
    "DmaTarget",
    "ExportError",
    "FileOffset",
    "GuestMemory",
    "GuestMemoryAtomic",
    "GuestRegionCollection",
    "GuestioError",
    "InvalidAddressError",
    "IoVector",
    "Iommu",
    "IommuMemory",
    "IommufdTarget",
    "Iotlb",
    "IotlbFails",
    "IotlbStats",
    "IovaRange",
    "MappedRange",
    "MappingInfo",
    "MappingType",
    "MemRegion",
    "MemoryMapper",
    "MemoryRegionOverlapError",
    "MemoryVanishedError",
    "MisalignedError",
    "MmapRegion",
    "NoMemoryRegionError",
    "Ordering",
    "PartialAccessError",
    "PermissionDeniedError",
    "Permissions",
    "ProtocolError",
    "QueueError",
    "RegionError",
    "RegionManager",
    "RemoveMapResult",
    "SliceMemory",
    "UnsortedMemoryRegionsError",
    "VfioType1Target",
    "VolatileSlice",
    "serve",
]


def __getattr__(name: str) -> object:
    # Packages, and what needs them, are imported when they are first used.
    if name in _PACKAGES:
        return importlib.import_module(f"guestio.{name}")
    if name == "serve":
        from guestio.serving import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, "serve"})
