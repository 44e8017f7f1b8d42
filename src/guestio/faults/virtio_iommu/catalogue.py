"""The catalogue for virtio-iommu devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from guestio.faults.catalogue import Check, Registry, virtio

if TYPE_CHECKING:
    from guestio.faults.virtio_iommu.trial import IommuTrial

IOMMUS: Final[Registry[IommuTrial]] = Registry()
"""The checks of virtio-iommu devices."""
register = IOMMUS.register
hostile = IOMMUS.hostile


def iommu(section: str) -> str:
    """Name a section of "IOMMU device" in the virtio specification, by what follows ``5.13.``."""
    return virtio(f"5.13.{section}")


def iommu_catalogue() -> tuple[Check, ...]:
    """Every check of virtio-iommu devices, in the order in which they run."""
    import guestio.faults.virtio_iommu.checks  # noqa: F401 - importing them registers them

    return tuple(IOMMUS)
