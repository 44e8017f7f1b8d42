"""The contract of an IOMMU, and guest memory seen through one."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Final, Self

from guestio._core.iommu.address_space import AddressSpace
from guestio._core.memory.bitmap import AtomicBitmap
from guestio._core.memory.slices import VolatileSlice
from guestio._core.memory.vector import IoVector
from guestio.addr import IovaRange, MappedRange, Permissions
from guestio.errors import CannotResolveError, InvalidAddressError, IotlbFails
from guestio.iommu.iotlb import Iotlb
from guestio.memory import GuestMemory, GuestRegionCollection
from guestio.memory.access import HeldSlices, Shortfall, shortfall_of


class Iommu(ABC):
    """Something that translates I/O virtual addresses; it keeps what it knows in an IOTLB.

    A subclass provides :attr:`iotlb` and, unless the IOTLB always holds every mapping,
    :meth:`resolve`, which fills it on a miss. The owner of the full tables must take a mapping
    out of the IOTLB (``invalidate_mapping``) before its removal or restriction takes effect;
    additions need not be pushed.
    """

    @property
    @abstractmethod
    def iotlb(self) -> Iotlb:
        """Where translations are looked up first."""

    def resolve(self, fails: IotlbFails, iova: int, length: int, access: Permissions) -> None:
        """Put what a failed lookup lacks into the IOTLB.

        Args:
            fails: Everything that is missing or forbidden.
            iova: First address of the access.
            length: Its bytes.
            access: What it wants to do.

        Raises:
            CannotResolveError: There is no such mapping. This default always says so.
        """
        failed, reason = (
            (fails.misses[0], "it is not mapped")
            if fails.misses
            else (fails.access_fails[0], "its mapping does not allow the access")
        )
        raise CannotResolveError(failed, access, reason)

    def translate(
        self, iova: int, length: int, access: Permissions
    ) -> AbstractContextManager[list[MappedRange]]:
        """Translate a range for use.

        Returns:
            A context manager; its value lists the targets in order. Until it is left, a
            revocation of the translation does not return, so leave it as soon as the access is
            done, and never wait for a revocation inside.

        Raises:
            CannotResolveError: Some of the range cannot be translated for this access.
            TypeError, ValueError: Bad numbers.
        """
        fails = None
        for _ in range(RESOLVE_ROUNDS):
            try:
                return self.iotlb.guard(iova, length, access)
            except IotlbFails as missing:
                self.resolve(missing, iova, length, access)
                # Without its frames, of which this one refers to it.
                fails = missing.with_traceback(None)
        raise CannotResolveError(
            IovaRange(iova, length), access, f"its translation does not stay: {fails}"
        )


RESOLVE_ROUNDS = 16
"""How often a translation may vanish between being resolved and being used."""


class DirtyMode(enum.Enum):
    """Where a write through an enabled IOMMU is marked."""

    IOVA = "iova"
    """In the memory's own bitmap, by I/O virtual address: the rule of vhost-user. Nowhere if it has
    none."""
    PHYSICAL = "physical"
    """In the bitmap of the region that was written: what migration of a guest needs."""
    BOTH = "both"
    """In both."""


class IommuMemory(GuestMemory):
    """Guest memory whose addresses are translated by an IOMMU. It may be used from any thread.

    Args:
        backend: Physical memory.
        iommu: Translates I/O virtual addresses to addresses of ``backend``.
        enabled: False to use addresses of ``backend`` directly.
        bitmap: Where writes are marked by I/O virtual address while enabled.
        dirty: Which bitmaps writes are marked in while enabled. By default in ``bitmap`` if there
            is one, else in the regions' own, so that no write goes unmarked where marks are kept.
            While disabled it is always the regions' own.

    Translation is all or nothing: if any byte of a range is unmapped or forbidden the access fails
    before anything moves. If a mapping leads to where there is no memory, the bytes before that
    move. Errors name the I/O virtual address and carry the address behind it in ``target``
    where it differs.
    """

    def __init__(
        self,
        backend: GuestRegionCollection,
        iommu: Iommu,
        enabled: bool = True,
        bitmap: AtomicBitmap | None = None,
        *,
        dirty: DirtyMode | None = None,
    ) -> None:
        if dirty is None:
            dirty = DirtyMode.PHYSICAL if bitmap is None else DirtyMode.IOVA
        if not isinstance(backend, GuestRegionCollection):
            raise TypeError(
                f"backend must be a GuestRegionCollection, not {type(backend).__name__}"
            )
        if not isinstance(iommu, Iommu):
            raise TypeError(f"iommu must be an Iommu, not {type(iommu).__name__}")
        if not isinstance(dirty, DirtyMode):
            raise TypeError(f"dirty must be a DirtyMode, not {type(dirty).__name__}")
        self.backend: Final = backend
        self.iommu: Final = iommu
        self.bitmap: Final = bitmap
        self.dirty: Final = dirty
        self._space = AddressSpace(
            backend._space.regions,
            iommu.iotlb._map,
            bitmap if dirty is not DirtyMode.PHYSICAL else None,
            mark_regions=dirty is not DirtyMode.IOVA,
        )
        self.enabled = enabled

    def __repr__(self) -> str:
        state = "" if self._enabled else ", translation off"
        return f"<IommuMemory over {self.backend!r}: {self.iommu!r}{state}>"

    @property
    def enabled(self) -> bool:
        """Whether addresses are translated; a change holds from the next access on."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        self._direct = self._space if self._enabled else self.backend._space

    def with_replaced_backend(self, new: GuestRegionCollection) -> Self:
        """The same view of other physical memory: IOMMU and bitmap are shared, flags copied."""
        return self.__class__(new, self.iommu, self.enabled, self.bitmap, dirty=self.dirty)

    @property
    def physical_memory(self) -> GuestRegionCollection | None:
        """The backend while the IOMMU is disabled, else None."""
        return None if self.enabled else self.backend

    def check_range(self, addr: int, length: int, access: Permissions = Permissions.NONE) -> bool:
        """Whether a range translates for ``access`` and memory is behind all of it."""
        try:
            vector, stop = self._gather(addr, length, access)
        except (CannotResolveError, InvalidAddressError):
            return False
        vector.close()
        return stop is None

    def slices(
        self, addr: int, length: int, access: Permissions = Permissions.READ
    ) -> Iterator[VolatileSlice]:
        """The memory behind a range; see :meth:`GuestMemory.slices`.

        Raises:
            CannotResolveError: Before the first slice, if the range does not translate.
        """
        return HeldSlices(*self._gather(addr, length, access))

    def _gather(
        self, addr: int, length: int, access: Permissions
    ) -> tuple[IoVector, Shortfall | None]:
        if not self._enabled:
            return self.backend._gather(addr, length, access)
        try:
            vector = self._space.gather(addr, length, access)
        except IotlbFails:
            vector = self._gather_resolved(addr, length, access)
        return vector, shortfall_of(vector, addr, length)

    def _gather_resolved(self, addr: int, length: int, access: Permissions) -> IoVector:
        with ExitStack() as held:
            ranges = held.enter_context(self.iommu.translate(addr, length, access))
            vector = self._space.gather_ranges(addr, length, ranges, access)
            vector.hold(held.pop_all())
        return vector
