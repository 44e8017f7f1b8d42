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
    """What a device can reach: physical memory, seen directly or through an IOTLB.

    Args:
        regions: Physical memory.
        iotlb: The map of the translation in front of it, or None if addresses are physical.
        bitmap: Where writes are marked by the address that was used, or None.
        mark_regions: Whether writes are marked in the regions' own bitmaps.
    """
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
    def read(self, addr: int, length: int) -> bytes | None:
        """A copy of a whole range, or None if any of it cannot be read as things are.

        The way for accesses that just work; :meth:`gather` finds out about the others.

        Raises:
            MemoryVanishedError: The file behind the memory is gone.
            TypeError, ValueError: Bad numbers.
        """
    def readinto(self, addr: int, buffer: Buffer) -> bool:
        """Fill a buffer; False if nothing was done, otherwise as :meth:`read`."""
    def write(self, addr: int, data: Buffer) -> bool:
        """Write all of ``data``; False if nothing was done, otherwise as :meth:`read`."""
    def gather(self, addr: int, length: int, access: Permissions) -> IoVector:
        """Open a range of memory.

        Returns:
            An :class:`IoVector`. Translation is all or nothing; if the memory behind it ends, the
            vector holds what comes before.

        Raises:
            IotlbFails: Some of the range is not mapped, or not for this access.
            TypeError, ValueError: Bad numbers.
        """
    def gather_ranges(
        self, addr: int, length: int, ranges: list[MappedRange], access: Permissions
    ) -> IoVector:
        """As :meth:`gather`, for targets that were translated elsewhere.

        Raises:
            RuntimeError: The targets do not sum to ``length``.
        """
