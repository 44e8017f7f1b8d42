"""The catalogue for vfio-user servers, and how its sources are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from guestio.faults.catalogue import Check, Registry

if TYPE_CHECKING:
    from guestio.faults.vfio_user.trial import VfioTrial

SERVERS: Final[Registry[VfioTrial]] = Registry()
"""The checks of vfio-user servers."""
register = SERVERS.register
hostile = SERVERS.hostile

DEVICES: Final = ("any", "nvme", "virtio")
"""The types of devices that can be named."""


def vfio(title: str) -> str:
    """Name a command or a section of the vfio-user specification (QEMU docs/interop)."""
    return f"vfio-user {title}"


def pci(section: str) -> str:
    """Name a section of the PCI Local Bus Specification 3.0."""
    return f"PCI 3.0 section {section}"


def nvme(section: str) -> str:
    """Name a section of NVM Express 1.4."""
    return f"NVMe 1.4 section {section}"


def server_catalogue(device: str | None = None) -> tuple[Check, ...]:
    """Every check of vfio-user servers, or those that apply to a type of device, in their order."""
    import guestio.faults.vfio_user.checks  # noqa: F401 - importing them registers them

    return tuple(each for each in SERVERS if device is None or each.applies_to(device))
