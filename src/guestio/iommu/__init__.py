"""I/O virtual addresses come in, guest memory comes out.

``iotlb`` is the cache of translations, ``memory`` the contract of an IOMMU and guest memory seen
through one. ``mapper`` holds the mappings of a domain and exports memory to clients, ``exported``
is that memory in a client's hands, ``remote`` the same over a socket, ``events`` what both sides
wait for.
"""

from guestio.iommu.events import Event
from guestio.iommu.exported import ExportedRegion
from guestio.iommu.iotlb import Iotlb, IotlbStats
from guestio.iommu.mapper import (
    AddMapResult,
    BasicMemoryMapper,
    ExportError,
    ExportSession,
    MappingInfo,
    MemoryMapper,
    MemRegion,
    RemoveMapResult,
)
from guestio.iommu.memory import DirtyMode, Iommu, IommuMemory
from guestio.iommu.remote import ExportClient, ExportServer, RemoteMapper

__all__ = [
    "AddMapResult",
    "BasicMemoryMapper",
    "DirtyMode",
    "Event",
    "ExportClient",
    "ExportError",
    "ExportServer",
    "ExportSession",
    "ExportedRegion",
    "Iommu",
    "IommuMemory",
    "Iotlb",
    "IotlbStats",
    "MappingInfo",
    "MemRegion",
    "MemoryMapper",
    "RemoteMapper",
    "RemoveMapResult",
]
