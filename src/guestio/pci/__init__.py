"""PCI functions: what a device is to its driver, whatever wire leads there.

``device`` says what a PCI device is, ``registers`` are its registers as a table, ``host`` is what a
transport drives and a device uses. ``config`` is the configuration space, ``capabilities`` are what
may be in it, ``interrupts`` says where an interrupt goes, and ``memory`` is what the device reaches
by DMA. ``virtio_pci`` makes a virtio device one; ``nvme`` is an NVMe controller.
"""

from guestio._core.pci.doorbell import CallbackDoorbell, Doorbell, EventfdDoorbell
from guestio.pci.capabilities import (
    BarWindow,
    Capability,
    Layout,
    Msi,
    MsiX,
    PciExpress,
    PowerManagement,
    SerialNumber,
    VendorSpecific,
)
from guestio.pci.device import Bar, PciDevice
from guestio.pci.host import PciHost
from guestio.pci.nvme import NvmeController
from guestio.pci.registers import Access, Field, Register, RegisterFile
from guestio.pci.virtio_pci import VirtioPci

__all__ = [
    "Access",
    "Bar",
    "BarWindow",
    "CallbackDoorbell",
    "Capability",
    "Doorbell",
    "EventfdDoorbell",
    "Field",
    "Layout",
    "Msi",
    "MsiX",
    "NvmeController",
    "PciDevice",
    "PciExpress",
    "PciHost",
    "PowerManagement",
    "Register",
    "RegisterFile",
    "SerialNumber",
    "VendorSpecific",
    "VirtioPci",
]
