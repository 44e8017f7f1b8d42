"""Mapping changes go out: what devices may reach follows what the guest's memory is."""

from guestio.dma.changes import ReentrantCallError
from guestio.dma.device import (
    ERR,
    INTX,
    MSI,
    MSIX,
    REQ,
    DeviceRegion,
    InterruptInfo,
    MmapArea,
    PciFunction,
    PciRegion,
    VfioDevice,
)
from guestio.dma.dirty import DirtyBits, DirtySupport, TrackingDmaTarget
from guestio.dma.iommufd import IommufdTarget
from guestio.dma.ledger import FailedMapping, TargetDiff, TargetStats
from guestio.dma.regions import Region, RegionManager, SubMapping, TargetHandle
from guestio.dma.target import (
    DmaError,
    DmaMapRequest,
    DmaTarget,
    Journal,
    MappingType,
    ReplacingDmaTarget,
)
from guestio.dma.vfio import IommuInfo, VfioType1Target

__all__ = [
    "ERR",
    "INTX",
    "MSI",
    "MSIX",
    "REQ",
    "DeviceRegion",
    "DirtyBits",
    "DirtySupport",
    "DmaError",
    "DmaMapRequest",
    "DmaTarget",
    "FailedMapping",
    "InterruptInfo",
    "IommuInfo",
    "IommufdTarget",
    "Journal",
    "MappingType",
    "MmapArea",
    "PciFunction",
    "PciRegion",
    "ReentrantCallError",
    "Region",
    "RegionManager",
    "ReplacingDmaTarget",
    "SubMapping",
    "TargetDiff",
    "TargetHandle",
    "TargetStats",
    "TrackingDmaTarget",
    "VfioDevice",
    "VfioType1Target",
]
