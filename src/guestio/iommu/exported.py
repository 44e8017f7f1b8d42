"""Exported memory in the hands of a client: accessed by I/O virtual address while it is held."""

from __future__ import annotations

import threading
from typing import Protocol, Self

from guestio.addr import ADDRESS_SPACE, Permissions, check_range
from guestio.errors import InvalidAddressError
from guestio.iommu.events import Event
from guestio.iommu.iotlb import Iotlb
from guestio.iommu.mapper import MemRegion
from guestio.iommu.memory import Iommu, IommuMemory
from guestio.memory import GuestRegionCollection


class Exporter(Protocol):
    """Exports memory: a session, or one on the other side of a socket."""

    @property
    def revoked(self) -> Event:
        """Happens when what is held is taken away by force."""
        ...

    def export(self, iova: int, size: int) -> list[MemRegion]:
        """Learn where the memory of a range is, and hold it."""
        ...

    def release(self, iova: int, size: int) -> None:
        """Give it back."""
        ...


class _Held(Iommu):
    """Translates only what the region holds."""

    def __init__(self) -> None:
        self._iotlb = Iotlb()

    @property
    def iotlb(self) -> Iotlb:
        return self._iotlb


class ExportedRegion:
    """A range of I/O virtual addresses that a client holds and may access until it is closed.

    A context manager. :attr:`memory` is addressed by I/O virtual address and lets through what the
    mappings allow; outside of the range nothing is mapped. Once the region is closed or revoked,
    every access fails; both wait for accesses that are under way.

    Args:
        exporter: Where the memory comes from; the range is exported here and released by
            :meth:`close`.
        iova: First I/O virtual address.
        size: Bytes, greater than 0.
        physical: Guest physical memory.

    Attributes:
        segments: Where the memory is, as the exporter told it.
        memory: The memory.

    Raises:
        InvalidAddressError: Some of it is not in ``physical``. Nothing is held.
        ExportError, CannotResolveError: As :meth:`ExportSession.export`.
    """

    def __init__(
        self, exporter: Exporter, iova: int, size: int, physical: GuestRegionCollection
    ) -> None:
        if not isinstance(physical, GuestRegionCollection):
            raise TypeError(
                f"physical must be a GuestRegionCollection, not {type(physical).__name__}"
            )
        iova, size = check_range(iova, size, name="iova", length_name="size", empty=False)
        self._exporter = exporter
        self._range = iova, size
        self._lock = threading.Lock()
        self._open = True
        self.segments = exporter.export(iova, size)
        try:
            iommu = _Held()
            at = iova
            for gpa, length, prot in self.segments:
                if not physical.check_range(gpa, length, Permissions.NONE):
                    raise InvalidAddressError(
                        at, length, None, "exported memory is not guest memory", target=gpa
                    )
                iommu.iotlb.set_mapping(at, gpa, length, prot)
                at += length
        except BaseException:
            exporter.release(iova, size)
            raise
        self._iotlb = iommu.iotlb
        self.memory = IommuMemory(physical, iommu)
        exporter.revoked.add_callback(self._take_away)

    def __repr__(self) -> str:
        iova, size = self._range
        return f"<ExportedRegion {iova:#x}+{size:#x}: {'open' if self._open else 'released'}>"

    @property
    def valid(self) -> bool:
        """Whether the memory may still be accessed."""
        return self._open and not self._exporter.revoked.is_set

    def close(self) -> None:
        """Stop accessing the memory and release it. Calling it again does nothing.

        Raises:
            RuntimeError: This thread itself holds some of it, as an iterator of slices does.
                Nothing changed.
        """
        self._iotlb.check_drain(0, ADDRESS_SPACE)
        with self._lock:
            was_open, self._open = self._open, False
        if not was_open:
            return
        self._exporter.revoked.remove_callback(self._take_away)
        self._take_away()
        self._exporter.release(*self._range)

    def _take_away(self) -> None:
        self._iotlb.invalidate_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
