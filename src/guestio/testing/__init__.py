"""The test kit: what users need to test devices and mapping targets of their own.

The guest without a virtual machine comes from :mod:`guestio.guest`, with a driver for any virtio
device and one for disks; ``pci_driver`` drives a PCI function; ``server`` serves a device for as
long as a test lasts; ``recordings`` repeats what was recorded of one; ``targets`` has DMA targets
that remember and that fail, ``host_iommu`` a host's IOMMU without hardware; ``simulation`` has a
device survive everything that may happen around it, in an order that a seed decides.
"""

from guestio.guest import (
    BlkConfig,
    BlkError,
    Driver,
    DriverBuffer,
    IommuMode,
    Request,
    ScriptedGuest,
    Shape,
)
from guestio.testing.host_iommu import DmaFaultError, SimulatedBar, SimulatedHostIommu
from guestio.testing.pci_driver import DmaBuffer, PciDriver
from guestio.testing.recordings import replay
from guestio.testing.server import serving
from guestio.testing.simulation import InvariantError, simulate
from guestio.testing.targets import DmaEvent, FailAfter, RecordingTarget, ReplacingTarget

__all__ = [
    "BlkConfig",
    "BlkError",
    "DmaBuffer",
    "DmaEvent",
    "DmaFaultError",
    "Driver",
    "DriverBuffer",
    "FailAfter",
    "InvariantError",
    "IommuMode",
    "PciDriver",
    "RecordingTarget",
    "ReplacingTarget",
    "Request",
    "ScriptedGuest",
    "Shape",
    "SimulatedBar",
    "SimulatedHostIommu",
    "replay",
    "serving",
    "simulate",
]
