"""Mapping changes go out: what devices may reach follows what the guest's memory is."""

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
    "Journal",
    "MappingType",
    "ReplacingDmaTarget",
]
