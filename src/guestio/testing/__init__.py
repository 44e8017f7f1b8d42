"""The test kit: what users need to test devices and mapping targets of their own.

The guest without a virtual machine comes from :mod:`guestio.guest`; ``targets`` has DMA targets
that remember and that fail, ``host_iommu`` a host's IOMMU without hardware.
"""

from guestio.guest import BlkConfig, BlkError, IommuMode, Request, ScriptedGuest, Shape
from guestio.testing.host_iommu import DmaFaultError, SimulatedBar, SimulatedHostIommu
from guestio.testing.targets import DmaEvent, FailAfter, RecordingTarget, ReplacingTarget

__all__ = [
    "BlkConfig",
    "BlkError",
    "DmaEvent",
    "DmaFaultError",
    "FailAfter",
    "IommuMode",
    "RecordingTarget",
    "ReplacingTarget",
    "Request",
    "ScriptedGuest",
    "Shape",
    "SimulatedBar",
    "SimulatedHostIommu",
]
