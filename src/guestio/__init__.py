"""The memory side of virtual machines.

Rooms, each importing only from those before it: ``errors``, ``addr``, ``_core`` (compiled),
``memory`` (what memory the guest has), ``dma`` (who must be told when that changes), ``iommu``
(which of it a device may touch), ``virtio`` (queues and devices), ``vhost_user`` (the wire),
``guest`` (a guest without a VM), ``cli``. ``testing`` is a kit for users' own tests. This module only re-exports.
"""

from guestio.addr import IovaRange, MappedRange, Ordering, Permissions
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
from guestio.iommu import DirtyMode, Iommu, IommuMemory, Iotlb, IotlbStats
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

__version__ = "0.1.0"

__all__ = [
    "AccessError",
    "AtomicBitmap",
    "Backing",
    "BackingError",
    "BitmapSlice",
    "CannotResolveError",
    "DeviceError",
    "DirtyMode",
    "FileOffset",
    "GuestMemory",
    "GuestMemoryAtomic",
    "GuestRegionCollection",
    "GuestioError",
    "InvalidAddressError",
    "IoVector",
    "Iommu",
    "IommuMemory",
    "Iotlb",
    "IotlbFails",
    "IotlbStats",
    "IovaRange",
    "MappedRange",
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
    "SliceMemory",
    "UnsortedMemoryRegionsError",
    "VolatileSlice",
]
