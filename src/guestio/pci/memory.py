"""What a PCI function reaches by DMA: the memory that its bus maps for it at this moment."""

from __future__ import annotations

from collections.abc import Iterator

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.slices import VolatileSlice
from guestio._core.memory.vector import IoVector
from guestio.addr import Permissions, check_access, check_range
from guestio.errors import (
    AccessError,
    CannotResolveError,
    InvalidAddressError,
    IotlbFails,
    PermissionDeniedError,
)
from guestio.memory import GuestMemory
from guestio.memory.access import HeldSlices, Shortfall, shortfall_of


class BusMemory(GuestMemory):
    """Memory as a bus master sees it: by I/O virtual address, through what is mapped now.

    While the driver has not made the function a bus master every access is refused. An access holds
    its translation: an unmap is answered to the driver once it has ended, so it should end soon.
    It may be used from any thread.
    """

    def __init__(self) -> None:
        self._space: AddressSpace | None = None
        self._enabled = False

    def __repr__(self) -> str:
        if self._space is None:
            return "<BusMemory: not connected>"
        return f"<BusMemory: bus mastering {'on' if self._enabled else 'off'}>"

    def connect(self, space: AddressSpace | None) -> None:
        """Use other translations and memory from now on, or none. For a transport."""
        self._space = space
        self._direct = space if self._enabled else None

    @property
    def enabled(self) -> bool:
        """Whether the function is bus master."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        self._direct = self._space if value else None

    def check_range(self, addr: int, length: int, access: Permissions = Permissions.NONE) -> bool:
        """See :meth:`GuestMemory.check_range`."""
        try:
            vector, stop = self._gather(addr, length, access)
        except AccessError:
            return False
        vector.close()
        return stop is None

    def slices(
        self, addr: int, length: int, access: Permissions = Permissions.READ
    ) -> Iterator[VolatileSlice]:
        """See :meth:`GuestMemory.slices`."""
        return HeldSlices(*self._gather(addr, length, access))

    def _gather(
        self, addr: int, length: int, access: Permissions
    ) -> tuple[IoVector, Shortfall | None]:
        at, size = check_range(addr, length)
        wanted = check_access(access)
        space = self._space
        if not size:
            return IoVector.of_slices([], wanted), None
        if space is None:
            raise InvalidAddressError(at, size, wanted, "no driver is connected")
        if not self._enabled:
            raise PermissionDeniedError(
                at, size, wanted, "the driver has not enabled bus mastering"
            )
        try:
            vector = space.gather(at, size, wanted)
        except IotlbFails as fails:
            missing = bool(fails.misses)
            where = fails.misses[0] if missing else fails.access_fails[0]
            reason = "it is not mapped" if missing else "its mapping does not allow the access"
            raise CannotResolveError(where, wanted, reason) from None
        return vector, shortfall_of(vector, at, size)
