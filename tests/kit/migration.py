"""A guest that migrates without a virtual machine: its memory is copied as a dirty log tells."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Protocol, Self

from guestio.guest.blkqueue import Request
from guestio.guest.disk import ScriptedGuest
from guestio.guest.dma import PAGE, GuestBuffer
from guestio.memory import AtomicBitmap, GuestRegionCollection, MmapRegion
from guestio.virtio.blk import T_IN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from guestio.guest.dma import Segment
    from guestio.vhost_user import Frontend


class TrackedGuest(ScriptedGuest):
    """A guest whose driver's own writes are known, as those of a guest's processors are."""

    def _make_memory(self, size: int) -> None:
        super()._make_memory(size)
        self.memory = GuestRegionCollection.from_regions(
            MmapRegion(each.start, each.backing, bitmap=AtomicBitmap(each.size), name=each.name)
            for each in self.memory
        )


def pages_of(pieces: Iterable[Segment]) -> set[int]:
    """The numbers of the pages that physical ranges touch."""
    return {
        number
        for start, length in pieces
        for number in range(start // PAGE, (start + length - 1) // PAGE + 1)
    }


def used_pages(guest: ScriptedGuest) -> set[int]:
    """The pages of the used rings: flags and index, entries, and the event index."""
    found: set[int] = set()
    for queue in guest._queues:
        layout, rings = queue.layout, queue._rings
        at = layout.used - layout.desc
        found |= pages_of(rings.pieces(at, 6 + 8 * layout.size))
    return found


class WrittenPages:
    """The pages that the device must have written, by what the driver asked it for."""

    def __init__(self) -> None:
        self.pages: set[int] = set()

    def expect(self, request: Request, length: int) -> None:
        """Note a request that was submitted with a shape and is answered with success.

        Args:
            request: It, while it is in flight.
            length: Bytes of its answer before the status.
        """
        assert request.placement is not None
        answer = request.placement.answer
        assert isinstance(answer, GuestBuffer)
        if request.kind == T_IN:
            self.pages |= pages_of(answer.pieces(0, length + 1))
        else:
            self.pages |= pages_of(answer.pieces(length, 1))


class Tracked(Protocol):
    """A guest whose memory has bitmaps of what its driver writes."""

    memory: GuestRegionCollection
    frontend: Frontend


class Migration:
    """Copies a guest's memory as QEMU does: all of it once, then what was written since.

    Attributes:
        logged: Every page that the back-end's log told.
        passes: How often the log was harvested.
    """

    def __init__(self, guest: Tracked) -> None:
        self._guest = guest
        for region in guest.memory:
            assert region.bitmap is not None
            region.bitmap.reset()
        self.log = guest.frontend.start_logging()
        self.logged: set[int] = set()
        self.passes = 0
        self._copy = {page: self._read(page) for page in self._every_page()}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def _every_page(self) -> Iterator[int]:
        for region in self._guest.memory:
            yield from range(region.start // PAGE, (region.last_addr + 1) // PAGE)

    def _read(self, page: int) -> bytes:
        for region in self._guest.memory:
            if page * PAGE in region:
                place = region.file_offset
                assert place is not None
                return os.pread(place.fd, PAGE, place.start + page * PAGE - region.start)
        raise ValueError(f"there is no page {page:#x}")

    def harvest(self) -> None:
        """One pass: take what is dirty, then copy it."""
        told = set(self.log.take().tolist())
        self.logged |= told
        for region in self._guest.memory:
            assert region.bitmap is not None
            first = region.start // PAGE
            told |= {first + page for page in region.bitmap.dirty_pages(clear=True).tolist()}
        # A log may tell of pages that are no memory, if it is wrong.
        for page in told & self._copy.keys():
            self._copy[page] = self._read(page)
        self.passes += 1

    def different(self) -> list[int]:
        """The pages that the destination has other contents of."""
        return [page for page, copied in self._copy.items() if self._read(page) != copied]

    def _harvest_always(self) -> None:
        try:
            while not self._over.is_set():
                self.harvest()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        """Harvest all the time, in a thread."""
        self._thread = threading.Thread(target=self._harvest_always, name="migration")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        assert self._thread is not None
        self._thread.join(30)
        assert self._error is None, self._error
