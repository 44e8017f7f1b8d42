"""Mapping changes go out: what devices may reach follows what the guest's memory is."""

from guestio.dma.changes import ReentrantCallError
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

__all__ = [
    "DmaError",
    "DmaMapRequest",
    "DmaTarget",
    "FailedMapping",
    "Journal",
    "MappingType",
    "ReentrantCallError",
    "Region",
    "RegionManager",
    "ReplacingDmaTarget",
    "SubMapping",
    "TargetDiff",
    "TargetHandle",
    "TargetStats",
]
