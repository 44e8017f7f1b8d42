"""A vhost-user back-end as a DMA target: its memory table follows the guest's memory.

Registered with a :class:`~guestio.dma.RegionManager`, each back-end is told of memory that comes
and goes (ADD_MEM_REG and REM_MEM_REG where negotiated, else SET_MEM_TABLE with the whole table),
acknowledged before the operation goes on.

Source: QEMU docs/interop/vhost-user.rst, "Memory region description" and the requests named.
"""

from __future__ import annotations

import contextlib
import errno

from guestio.dma import DmaError, DmaMapRequest, MappingType
from guestio.errors import GuestioError
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user.frontend import Frontend
from guestio.vhost_user.messages import ProtocolFeature


class MemoryTableTarget:
    """Shares a guest's RAM with one back-end; add it with ``needs_fd=True``.

    Only RAM is shared. Device memory (a BAR) is refused, which a region manager records and goes
    on. The memory table knows no permissions, so memory that devices may not write is not shared
    either: that is no error, but the back-end does not see it (QEMU does the same with ROMs).

    Calls from one thread at a time; :meth:`Frontend.set_memory` must not be called beside it.

    Args:
        frontend: A front-end that has negotiated.
    """

    def __init__(self, frontend: Frontend) -> None:
        if not isinstance(frontend, Frontend):
            raise TypeError(f"frontend must be a Frontend, not {type(frontend).__name__}")
        self._frontend = frontend
        self._shared: dict[int, MmapRegion] = {}
        self._unshared: dict[int, DmaMapRequest] = {}
        self._limit = frontend.max_memory_slots()

    @property
    def shared(self) -> tuple[MmapRegion, ...]:
        """What the back-end sees, ascending."""
        return tuple(self._shared[start] for start in sorted(self._shared))

    @property
    def unshared(self) -> tuple[DmaMapRequest, ...]:
        """Read-only memory that the back-end does not see, ascending."""
        return tuple(self._unshared[start] for start in sorted(self._unshared))

    def map_dma(self, request: DmaMapRequest) -> None:
        """Share memory.

        Raises:
            DmaError: It is device memory, has no file, is one region more than the back-end
                takes, or the back-end refused it.
        """
        if request.kind is MappingType.DEVICE:
            reason = "device memory is never shared with another process"
            raise DmaError("map", request.start, request.size, reason)
        if not request.writable:
            self._unshared[request.start] = request
            return
        if request.fd is None:
            reason = "memory without a file cannot be shared: use a memfd"
            raise DmaError("map", request.start, request.size, reason)
        if len(self._shared) >= self._limit:
            reason = f"the back-end takes {self._limit} memory regions: use fewer and larger ones"
            raise DmaError("map", request.start, request.size, reason, errno=errno.ENOSPC)
        try:
            backing = Backing.from_fd(request.fd, request.size, request.file_offset)
            region = MmapRegion(request.start, backing, name="shared")
            self._tell({**self._shared, request.start: region})
        except (GuestioError, OSError) as error:
            raise DmaError("map", request.start, request.size, str(error)) from error
        self._shared[request.start] = region

    def unmap_dma(self, start: int, size: int) -> None:
        """Stop sharing memory; the back-end has confirmed that when it returns.

        Raises:
            DmaError: It was not shared so, or the back-end did not confirm.
        """
        unshared = self._unshared.get(start)
        if unshared is not None and unshared.size == size:
            del self._unshared[start]
            return
        region = self._shared.get(start)
        if region is None or region.size != size:
            raise DmaError("unmap", start, size, "no memory is shared exactly there")
        try:
            self._tell({place: r for place, r in self._shared.items() if place != start})
        except (GuestioError, OSError) as error:
            raise DmaError("unmap", start, size, str(error)) from error
        del self._shared[start]
        # References on our side keep the memory mapped.
        with contextlib.suppress(BufferError):
            region.backing.close()

    def close(self) -> None:
        """Let go of all memory on our side, when the back-end is gone and the target forgotten."""
        regions, self._shared = list(self._shared.values()), {}
        for region in regions:
            with contextlib.suppress(BufferError):
                region.backing.close()

    def _tell(self, regions: dict[int, MmapRegion]) -> None:
        ordered = [regions[start] for start in sorted(regions)]
        memory = GuestRegionCollection.from_regions(ordered) if ordered else GuestRegionCollection()
        self._frontend.set_memory(memory)
        if not self._frontend.protocol_features & ProtocolFeature.REPLY_ACK:
            # Nothing was acknowledged; a request with a reply comes after all that was sent.
            self._frontend.sync()
