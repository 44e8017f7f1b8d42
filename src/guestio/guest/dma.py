"""Guest memory as a driver's kernel manages it: scattered pages, and how a device reaches them.

A driver allocates a :class:`GuestBuffer`, which is contiguous for the driver only: its pages come
from a :class:`PageAllocator` in no order. A :class:`DmaSpace` then says what the device must be
told to reach a part of it: physical pieces without an IOMMU, one I/O virtual range with one.

Source: Linux Documentation/core-api/dma-api.rst and drivers/iommu/dma-iommu.c for what a guest does
(page granularity, offset in the page kept, quick reuse of freed addresses, top-down from 4 GiB).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from typing import Final, Literal, TypeAlias

from guestio.addr import Permissions
from guestio.errors import DeviceError
from guestio.memory import GuestRegionCollection, IoVector
from guestio.vhost_user.iotlb_service import IotlbService

PAGE: Final = 4096
"""Bytes of a page, of guest memory and of the IOMMU."""

IommuMode: TypeAlias = Literal["off", "static", "strict"]
"""``off``: physical addresses. ``static``: every buffer is mapped once, for as long as it exists.
``strict``: every request maps what it uses and unmaps it afterwards, as Linux does by default."""

Segment: TypeAlias = tuple[int, int]
"""Address for the device and length, as they go into a descriptor."""

_LOW_TOP: Final = 1 << 32
_HIGH_TOP: Final = 1 << 47


class PageAllocator:
    """Hands out the pages of guest memory in a random order. Safe for several threads.

    Args:
        memory: Whose pages; regions must begin and end on pages.
        seed: Makes the order repeatable.
    """

    def __init__(self, memory: GuestRegionCollection, seed: int) -> None:
        self._order = [
            gpa for region in memory for gpa in range(region.start, region.last_addr, PAGE)
        ]
        random.Random(seed).shuffle(self._order)  # noqa: S311 - must be repeatable
        self._free = set(self._order)
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Pages that can be had."""
        return len(self._free)

    def take(self, count: int, *, contiguous: bool = False) -> list[int]:
        """Return the addresses of ``count`` pages.

        Raises:
            DeviceError: There are not as many, or not in one piece.
        """
        with self._lock:
            pages = self._find_run(count) if contiguous else self._pick(count)
            if pages is None:
                raise DeviceError(
                    f"the guest is out of memory: {count} pages "
                    f"{'in one piece ' if contiguous else ''}wanted, {len(self._free)} free"
                )
            self._free.difference_update(pages)
            return pages

    def give(self, pages: Iterable[int]) -> None:
        """Return pages."""
        with self._lock:
            for gpa in pages:
                self._free.add(gpa)
                self._order.append(gpa)

    def _pick(self, count: int) -> list[int] | None:
        if count > len(self._free):
            return None
        pages: list[int] = []
        while len(pages) < count:
            # Pages that were taken as part of a run are still in the order, perhaps twice.
            gpa = self._order.pop()
            if gpa in self._free and gpa not in pages:
                pages.append(gpa)
        return pages

    def _find_run(self, count: int) -> list[int] | None:
        run: list[int] = []
        for gpa in sorted(self._free):
            if run and gpa != run[-1] + PAGE:
                run = []
            run.append(gpa)
            if len(run) == count:
                return run
        return None


class IovaAllocator:
    """Hands out I/O virtual addresses in pages. Safe for several threads.

    Args:
        reuse: Whether the range freed last is handed out again first, as Linux does: an old
            translation that is still used then reaches the wrong memory. False for addresses never
            used before.
    """

    def __init__(self, *, reuse: bool) -> None:
        self._reuse = reuse
        self._next = _LOW_TOP - PAGE
        self._freed: dict[int, list[int]] = {}
        self._lock = threading.Lock()

    def take(self, count: int) -> int:
        """Return the first address of ``count`` unused pages."""
        with self._lock:
            freed = self._freed.get(count)
            if freed:
                return freed.pop()
            if self._next - count * PAGE < PAGE:
                self._next = _HIGH_TOP
            self._next -= count * PAGE
            return self._next

    def give(self, iova: int, count: int) -> None:
        """Return the addresses of :meth:`take`."""
        if self._reuse:
            with self._lock:
                self._freed.setdefault(count, []).append(iova)


class GuestBuffer:
    """Bytes of guest memory that lie in a row for the driver, on pages from anywhere.

    Attributes:
        pages: Guest physical addresses of its pages, in order.
        offset: Where in the first page it begins.
        length: Bytes.
        memory: Its contents. One thread at a time.
        iova: Where the whole buffer is mapped for as long as it exists, or None.
    """

    def __init__(
        self, memory: GuestRegionCollection, pages: list[int], offset: int, length: int
    ) -> None:
        self.pages = pages
        self.offset = offset
        self.length = length
        self.iova: int | None = None
        self._known: dict[Segment, list[Segment]] = {}
        slices = [
            memory.whole_slice(gpa, size, Permissions.READ_WRITE)
            for gpa, size in self.pieces(0, length)
        ]
        self.memory = IoVector.of_slices(slices, Permissions.READ_WRITE)

    def __repr__(self) -> str:
        where = "not mapped" if self.iova is None else f"at {self.iova:#x}"
        return f"<GuestBuffer of {self.length} bytes on {len(self.pages)} pages, {where}>"

    def pieces(self, at: int, length: int) -> list[Segment]:
        """The physically contiguous pieces of a part of the buffer, in order."""
        known = self._known.get((at, length))
        if known is None:
            known = self._known[at, length] = list(self._find_pieces(at, length))
            if len(self._known) > 64:
                self._known.clear()
        return known

    def _find_pieces(self, at: int, length: int) -> Iterator[Segment]:
        position, end = self.offset + at, self.offset + at + length
        start = size = 0
        while position < end:
            gpa = self.pages[position // PAGE] + position % PAGE
            step = min(PAGE - position % PAGE, end - position)
            if size and gpa == start + size:
                size += step
            else:
                if size:
                    yield start, size
                start, size = gpa, step
            position += step
        if size:
            yield start, size


class DmaSpace:
    """What a device can reach of guest memory, and where. Safe for several threads.

    Args:
        memory: Guest memory.
        pages: Where buffers come from.
        iotlb: The IOMMU in front of the device.
        mode: How it is used.
        reuse: See :class:`IovaAllocator`.

    Attributes:
        mode: As given.
    """

    def __init__(
        self,
        memory: GuestRegionCollection,
        pages: PageAllocator,
        iotlb: IotlbService,
        mode: IommuMode,
        *,
        reuse: bool = True,
    ) -> None:
        self.mode = mode
        self._memory = memory
        self._pages = pages
        self._iotlb = iotlb
        self._iovas = IovaAllocator(reuse=reuse)

    def buffer(self, length: int, *, offset: int = 0, contiguous: bool = False) -> GuestBuffer:
        """Allocate a buffer.

        Args:
            length: Bytes, greater than 0.
            offset: Where in its first page it begins.
            contiguous: Whether its pages must lie in a row physically.

        Raises:
            DeviceError: The guest is out of memory.
        """
        count = -(-(offset % PAGE + length) // PAGE)
        pages = self._pages.take(count, contiguous=contiguous)
        return GuestBuffer(self._memory, pages, offset % PAGE, length)

    def release(self, *buffers: GuestBuffer) -> None:
        """Give buffers back, unmapping those that were mapped as a whole."""
        self.unmap([_pages_of(b.iova, b.length) for b in buffers if b.iova is not None])
        for buffer in buffers:
            buffer.memory.close()
            self._pages.give(buffer.pages)

    def map_whole(self, buffer: GuestBuffer) -> int:
        """The address of a buffer that stays mapped, readable and writable, until released."""
        if buffer.iova is None:
            buffer.iova = self._map(buffer, 0, buffer.length, Permissions.READ_WRITE)
        return buffer.iova

    def map(
        self,
        buffer: GuestBuffer,
        at: int,
        length: int,
        perm: Permissions,
        mapped: list[Segment],
    ) -> list[Segment]:
        """Let the device reach a part of a buffer.

        Args:
            buffer: The buffer.
            at: First byte of the part.
            length: Its bytes, greater than 0.
            perm: What the device may do with it.
            mapped: Is added what must be unmapped after use.

        Returns:
            What to tell the device.
        """
        if self.mode == "off":
            return buffer.pieces(at, length)
        if self.mode == "static":
            return [(self.map_whole(buffer) + at, length)]
        iova = self._map(buffer, at, length, perm)
        mapped.append(_pages_of(iova, length))
        return [(iova, length)]

    def unmap(self, mapped: list[Segment]) -> None:
        """Take mappings away; the device cannot use them any more when this returns."""
        if not mapped:
            return
        self._iotlb.unmap(*mapped)
        for iova, length in mapped:
            self._iovas.give(iova, length // PAGE)

    def _map(self, buffer: GuestBuffer, at: int, length: int, perm: Permissions) -> int:
        skip = (buffer.offset + at) % PAGE
        iova = self._iovas.take(-(-(skip + length) // PAGE)) + skip
        reached = 0
        for gpa, size in buffer.pieces(at, length):
            first = gpa - gpa % PAGE
            whole = -(-(gpa % PAGE + size) // PAGE) * PAGE
            self._iotlb.map(iova - skip + reached, first, whole, perm)
            reached += whole
        return iova


def _pages_of(iova: int, length: int) -> Segment:
    """The whole pages around a range."""
    skip = iova % PAGE
    return iova - skip, -(-(skip + length) // PAGE) * PAGE
