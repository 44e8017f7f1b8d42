from typing import Self

from typing_extensions import disjoint_base

from guestio._core.iommu.intervals import IntervalMap
from guestio.addr import Permissions

@disjoint_base
class DmaTable:
    """The mappings of a client, and its files.

    Args:
        map: Where addresses lead to. It does not merge.
        files: Files at most.
        most: Mappings at most.

    Attributes:
        map: That map.

    For the thread of the event loop, with the GIL; lookups in the map may come from any.
    """
    def __new__(cls, map: IntervalMap, files: int, most: int) -> Self: ...
    @property
    def map(self) -> IntervalMap: ...
    def check_cut(self, address: int, size: int) -> bool:
        """Whether an unmap of a range would cut a mapping. O(log n)."""
    def forget(
        self, address: int, size: int, most: int
    ) -> tuple[int, int, list[tuple[int, int, int, Permissions]]]:
        """Remove up to ``most`` mappings of a range that cuts none.

        Returns:
            ``(count, end, used)``: how many were removed; the address up to which nothing is mapped
            now, which is the range's end once all are removed; and those of the removed mappings
            that accesses under way may lead through, as ``(address, size, target, permissions)``,
            some perhaps twice.

        Raises:
            ValueError: A mapping would be cut; nothing changed.

        Cost: O((k + 1) log n) for k mappings removed, and O(leases).
        """
    def add(self, address: int, size: int, target: int, perm: int) -> bool:
        """Map a range that leads to a target, in whichever window.

        Returns:
            False if something overlaps; nothing changed then.

        Cost: O(log n).
        """
    def know(self, number: int, device: int, inode: int, writable: bool, size: int) -> None:
        """Take note of a file that is mapped here, or that it is mapped with another size.

        Args:
            number: Its window's, from 1.
            device, inode: Which file it is.
            writable: Whether it may be written.
            size: Bytes that are mapped.
        """
    def forget_file(self, number: int) -> None:
        """Free the number of a file that no mapping leads to."""
    def file(self, device: int, inode: int, writable: bool) -> int:
        """The number of a file that is known, or 0. Cost: O(files)."""
    def mappings(self, number: int) -> int:
        """How many mappings lead to a file."""
