"""I/O virtual addresses come in, guest memory comes out.

``iotlb`` is the cache of translations, ``memory`` the contract of an IOMMU and guest memory seen
through one.
"""

from guestio.iommu.iotlb import Iotlb
from guestio.iommu.memory import DirtyMode, Iommu, IommuMemory

__all__ = ["DirtyMode", "Iommu", "IommuMemory", "Iotlb"]
