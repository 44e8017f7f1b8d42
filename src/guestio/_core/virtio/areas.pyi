from typing import Self

from typing_extensions import disjoint_base

from guestio._core.iommu.address_space import AddressSpace
from guestio.addr import IovaRange

@disjoint_base
class RingAreas:
    """Descriptors, what the driver writes for the device, and what the device writes for the driver.

    Attributes:
        broken: What the driver did wrong, or None.
    """
    def __new__(
        cls,
        space: AddressSpace,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        event_idx: bool = False,
        **_: object,
    ) -> Self: ...
    @property
    def space(self) -> AddressSpace: ...
    @property
    def size(self) -> int: ...
    @property
    def desc_addr(self) -> int: ...
    @property
    def avail_addr(self) -> int: ...
    @property
    def used_addr(self) -> int: ...
    @property
    def event_idx(self) -> bool: ...
    @property
    def broken(self) -> str | None: ...
    def missing(self) -> list[tuple[IovaRange, int]]:
        """What of the ring's own areas has no translation now, as in :meth:`pop`."""
    def rebind(self, space: AddressSpace) -> None:
        """Go on in other memory; requests that were taken keep what they have."""
