from typing import Self

from typing_extensions import Buffer, disjoint_base

from guestio._core.iommu.intervals import IntervalMap
from guestio._core.memory.bitmap import AtomicBitmap
from guestio._core.memory.slices import VolatileSlice as VolatileSlice
from guestio._core.memory.vector import IoVector as IoVector
from guestio._core.memory.vector import RegionTable as RegionTable
from guestio.addr import MappedRange, Permissions

@disjoint_base
class AddressSpace:
    def __new__(
        cls,
        regions: RegionTable,
        iotlb: IntervalMap | None = None,
        bitmap: AtomicBitmap | None = None,
        *,
        mark_regions: bool = True,
    ) -> Self: ...
    @property
    def regions(self) -> RegionTable: ...
    @property
    def _map(self) -> IntervalMap | None: ...
    @property
    def bitmap(self) -> AtomicBitmap | None: ...
    @property
    def mark_regions(self) -> bool: ...
    def read(self, addr: int, length: int) -> bytes | None: ...
    def readinto(self, addr: int, buffer: Buffer) -> bool: ...
    def write(self, addr: int, data: Buffer) -> bool: ...
    def gather(self, addr: int, length: int, access: Permissions) -> IoVector: ...
    def gather_ranges(
        self, addr: int, length: int, ranges: list[MappedRange], access: Permissions
    ) -> IoVector: ...
