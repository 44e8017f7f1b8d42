"""A simulated guest: its rings, the requests it has in flight, and its IOMMU's tables."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from guestio.errors import QueueError
from guestio.testing.simulation.memory import GONE, PAGE, USER, Memory
from guestio.testing.simulation.workload import InvariantError, Job, Workload
from guestio.virtio.device import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC
from guestio.virtio.driver import DriverQueue
from guestio.virtio.layout import RingLayout

SIZE: Final = 16
"""Entries of a ring."""

MOST: Final = 6
"""Requests in flight on a ring."""

READ, WRITE = 1, 2
_WINDOW: Final = 4
# Few, so that addresses are used again soon; one is the end of the address space.
_WINDOWS: Final = [2**64 - _WINDOW * PAGE, *(0x10_0000 + at * _WINDOW * PAGE for at in range(23))]


class Entry(NamedTuple):
    """What an I/O virtual page translates to.

    Attributes:
        page: Of the memory.
        access: READ, WRITE or both.
        refused: Whether the IOMMU says that there is nothing, on purpose.
    """

    page: int
    access: int
    refused: bool = False


class Tables:
    """The I/O page tables.

    Attributes:
        mapped: What is mapped now, by I/O virtual page.
        going: What was, and the device was not yet told or has not answered.
    """

    def __init__(self) -> None:
        self.mapped: dict[int, Entry] = {}
        self.going: dict[int, Entry] = {}
        self._free = list(_WINDOWS)
        self._ring_windows = 0

    def window(self, rng: random.Random) -> int | None:
        """An address with room for a buffer, or None if there is none."""
        return self._free.pop(rng.randrange(len(self._free))) if self._free else None

    def ring_window(self) -> int:
        """An address for a ring, which no ring had before."""
        self._ring_windows += 1
        return 0x4000_0000 + self._ring_windows * _WINDOW * PAGE

    def map(self, iova: int, pages: list[int], access: int, *, refused: bool = False) -> None:
        """Map pages in a row."""
        for at, page in enumerate(pages):
            self.mapped[iova // PAGE + at] = Entry(page, access, refused)

    def begin_unmap(self, iova: int, count: int) -> None:
        """No longer translate pages, which the device may still do."""
        for at in range(iova // PAGE, iova // PAGE + count):
            self.going[at] = self.mapped.pop(at)

    def forget(self, iova: int, count: int) -> None:
        """The device does not either."""
        for at in range(iova // PAGE, iova // PAGE + count):
            self.going.pop(at, None)

    def end_unmap(self, iova: int, count: int = 0) -> None:
        """The device does not either; the address may be used again."""
        self.forget(iova, count)
        if iova in _WINDOWS:
            self._free.append(iova)

    def check(self, known: Sequence[tuple[int, int, int, int]]) -> None:
        """Compare with what the device knows: address, length, guest address, access.

        Raises:
            InvariantError: It knows what is not so, and was told.
        """
        for iova, length, target, access in known:
            for at in range(0, length, PAGE):
                entry = self.mapped.get((iova + at) // PAGE) or self.going.get((iova + at) // PAGE)
                if entry is None:
                    raise InvariantError(
                        "L1",
                        f"the back-end still translates {iova + at:#x}, which the guest has "
                        "unmapped and it has acknowledged",
                    )
                leads = Memory.guest_address(entry.page)
                if leads != target + at or int(access) & ~entry.access:
                    raise InvariantError(
                        "L6",
                        f"the back-end translates {iova + at:#x} to {target + at:#x} with access "
                        f"{int(access)}; the guest has mapped {leads:#x} with {entry.access}",
                    )


class Snatched(NamedTuple):
    """Memory of a job in flight that is unmapped: its address and its pages."""

    iova: int
    pages: list[int]


class Piece(NamedTuple):
    """Bytes in one page."""

    page: int
    offset: int
    length: int


@dataclass(eq=False)
class Placed:
    """A job in memory.

    Attributes:
        job: It.
        pages: What it uses.
        writable: Where the device writes, in order.
        mapped: What is mapped for it: address and pages.
        readable: Pages that it reads, the first of what is mapped.
        head: Its first descriptor.
        snatched: An address that was mapped for it, and is used for nothing else before its end.
    """

    job: Job
    pages: list[int] = field(default_factory=list)
    writable: list[Piece] = field(default_factory=list)
    mapped: list[tuple[int, int]] = field(default_factory=list)
    readable: list[int] = field(default_factory=list)
    head: int = -1
    snatched: int | None = None


class Ring:
    """A queue of the driver's.

    Attributes:
        index: Its number.
        queue: The driver's side of the ring.
        running: Whether the device may serve it.
        base: Where it goes on.
        recovered: What the back-end before had not given back.
        kick, call, err: Its eventfds.
    """

    def __init__(self, guest: Guest, index: int) -> None:
        self.index = index
        memory = guest.memory
        pages = memory.take(guest.rng, 3)
        assert pages is not None
        self.pages: list[int] = pages
        for page in pages:
            memory.fill(page, 0, bytes(PAGE))
        desc, avail, used = map(memory.guest_address, pages)
        features = guest.features
        self.queue = DriverQueue(
            memory.guest,
            RingLayout(SIZE, desc, avail, used),
            event_idx=bool(features >> VIRTIO_F_EVENT_IDX & 1),
            indirect=bool(features >> VIRTIO_F_INDIRECT_DESC & 1),
        )
        self.window = 0
        if guest.translating:
            self.window = guest.tables.ring_window()
            guest.tables.map(self.window, pages, READ | WRITE)
        self.running = False
        self.base = 0
        self.kick_owed = False
        self.recovered: set[Placed] = set()
        self.kick, self.call, self.err = (
            os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(3)
        )

    @property
    def parts(self) -> tuple[int, int, int]:
        """Where descriptors, the available and the used ring are, as the front-end says it."""
        if self.window:
            return self.window, self.window + PAGE, self.window + 2 * PAGE
        desc, avail, used = (USER + page * PAGE for page in self.pages)
        return desc, avail, used

    @property
    def used_idx(self) -> int:
        """The used index as the device has left it."""
        return self.queue._used_idx.load(2)

    def announce(self) -> None:
        """Kick the device."""
        self.kick_owed = False
        os.eventfd_write(self.kick, 1)

    def close(self) -> None:
        """Give it up."""
        self.queue.close()
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


def take_event(fd: int) -> int:
    """Read an eventfd; 0 if it is not readable."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class Guest:
    """A driver and its memory, from its start to its end.

    Args:
        rng: Of the choice of pages.
        workload: What it does.
        queues: How many queues it uses.
        translating: Whether an IOMMU is in front of the device.
        polling: Whether it looks for completions without being interrupted.

    Attributes:
        memory, tables, rings: Its own.
        features: What was negotiated.
        completed: How many jobs were given back.
    """

    def __init__(
        self,
        rng: random.Random,
        workload: Workload,
        queues: int,
        *,
        translating: bool,
        polling: bool,
    ) -> None:
        self.rng = rng
        self.workload = workload
        self.translating = translating
        self.polling = polling
        self.queues = queues
        self.memory = Memory()
        self.tables = Tables()
        self.features = 0
        self.rings: list[Ring] = []
        self.completed = 0
        self.refusing = False
        # Buffers that are given back, and not yet unmapped.
        self.unmapping: list[Placed] = []
        self._next: Job | None = None

    def make_rings(self, features: int) -> None:
        """Begin, or begin anew, with rings in other pages."""
        self.forget_rings()
        self.features = features
        self.rings = [Ring(self, index) for index in range(self.queues)]
        self.grant()

    def forget_rings(self) -> None:
        """Take all back without a word to the device, which has stopped."""
        self.lose()
        while self.rings:
            ring = self.rings.pop()
            ring.close()
            if ring.window:
                self.tables.begin_unmap(ring.window, 3)
                self.tables.end_unmap(ring.window, 3)
            self.memory.give(ring.pages)
        self.memory.granted[:] = False

    def lose(self) -> None:
        """Forget what is in flight."""
        jobs = []
        for ring in self.rings:
            for placed in ring.queue.tokens:
                jobs.append(placed.job)
                self._begin_unmap(placed)
                self.released(placed)
            ring.queue.reset()
            ring.base, ring.kick_owed = 0, False
            ring.recovered.clear()
        if self._next is not None:
            jobs.append(self._next)
            self._next = None
        self.workload.died(jobs)

    @property
    def jobs(self) -> list[Job]:
        """What is in flight."""
        return [placed.job for ring in self.rings for placed in ring.queue.tokens]

    @property
    def in_flight(self) -> int:
        """Jobs that the device has not given back."""
        return sum(ring.queue.outstanding for ring in self.rings)

    @property
    def may_submit(self) -> bool:
        """Whether there is room in some ring."""
        return any(ring.queue.outstanding < MOST for ring in self.rings)

    def submit(self, rng: random.Random) -> str:
        """Give the device a job; what became of that."""
        job = self._next or self.workload.next(rng)
        self._next = job
        if job is None:
            return "none"
        ring = self.rings[job.queue]
        placed = self._place(ring, job, rng) if ring.queue.outstanding < MOST else None
        if placed is None:
            return "no room"
        self._next = None
        if ring.running:
            self._grant(placed)
        if ring.queue.publish():
            ring.kick_owed = True
            if rng.random() < 0.8:
                ring.announce()
        return f"{ring.index} {len(job.data)} {job.room}"

    def _place(self, ring: Ring, job: Job, rng: random.Random) -> Placed | None:
        placed = Placed(job)
        readable, writable = (
            self._buffer(placed, rng, size, access)
            for size, access in ((len(job.data), READ), (job.room, WRITE))
        )
        wanted = (len(readable[1]) if readable else 0) + (len(writable[1]) if writable else 0)
        if readable is None or writable is None or ring.queue.free < wanted:
            self._begin_unmap(placed)
            self.released(placed)
            return None
        at = 0
        for piece in readable[0]:
            self.memory.fill(piece.page, piece.offset, job.data[at : at + piece.length])
            at += piece.length
        placed.readable = [piece.page for piece in readable[0]]
        placed.writable = writable[0]
        for piece in writable[0]:
            self.memory.blank(*piece)
        placed.head = ring.queue.add(readable[1], writable[1], placed)
        return placed

    def _buffer(
        self, placed: Placed, rng: random.Random, size: int, access: int
    ) -> tuple[list[Piece], list[tuple[int, int]]] | None:
        """Memory for a part of a job: where it is, and what the device is told."""
        if not size:
            return [], []
        offset = rng.choice((0, 1, PAGE - 16, PAGE - 1, rng.randrange(PAGE)))
        pages = self.memory.take(rng, -(-(offset + size) // PAGE))
        if pages is None:
            return None
        placed.pages += pages
        pieces, left, start = [], size, offset
        for page in pages:
            length = min(PAGE - start, left)
            pieces.append(Piece(page, start, length))
            left, start = left - length, 0
        if not self.translating:
            return pieces, [(self.memory.guest_address(p) + o, n) for p, o, n in pieces]
        iova = self.tables.window(rng)
        if iova is None:
            return None
        refused = self.refusing and rng.random() < 0.03
        placed.job.may_fail |= refused
        # A ring may not be served any more if the place of a status is refused.
        self.tables.map(iova, pages, access, refused=False)
        if refused and size > 1 and len(pages) > 1:
            first = iova // PAGE
            self.tables.mapped[first] = self.tables.mapped[first]._replace(refused=True)
        placed.mapped.append((iova, len(pages)))
        cut = rng.randrange(1, size) if size > 1 and rng.random() < 0.4 else size
        told = [(iova + offset, cut)]
        if cut < size:
            told.append((iova + offset + cut, size - cut))
        return pieces, told

    def _grant(self, placed: Placed) -> None:
        for page, offset, length in placed.writable:
            self.memory.granted[page * PAGE + offset : page * PAGE + offset + length] = True

    def grant(self) -> None:
        """Note anew which bytes the device may write: those of rings that run."""
        self.memory.granted[:] = False
        for ring in self.rings:
            if ring.running:
                at = ring.pages[2] * PAGE
                self.memory.granted[at : at + RingLayout.used_bytes(SIZE)] = True
                for placed in ring.queue.tokens:
                    self._grant(placed)

    def may_collect(self, ring: Ring) -> bool:
        """Whether the driver would look at a ring now."""
        if self.polling:
            return bool(ring.queue._ready())
        return _readable(ring.call)

    def collect(self, ring: Ring) -> int:
        """Take what the device has given back; how many.

        Raises:
            InvariantError: It gave back what it did not have, or what it says cannot be right.
        """
        take_event(ring.call)
        count = 0
        while True:
            try:
                found = ring.queue.collect()
            except QueueError as error:
                raise InvariantError("L14", str(error)) from None
            for placed, written in found:
                self._done(placed, written)
            count += len(found)
            if self.polling or (not ring.queue.enable_interrupts() and not found):
                break
        self.completed += count
        return count

    def _done(self, placed: Placed, written: int) -> None:
        answer = b"".join(self.memory.read(*piece) for piece in placed.writable)
        for page, offset, length in placed.writable:
            self.memory.granted[page * PAGE + offset : page * PAGE + offset + length] = False
        self._begin_unmap(placed)
        self.unmapping.append(placed)
        self.workload.done(placed.job, written, answer)

    def _begin_unmap(self, placed: Placed) -> None:
        for iova, count in placed.mapped:
            self.tables.begin_unmap(iova, count)

    def released(self, placed: Placed) -> None:
        """The device has acknowledged that a job's memory is the guest's again."""
        for iova, count in placed.mapped:
            self.tables.end_unmap(iova, count)
        placed.mapped.clear()
        if placed.snatched is not None:
            self.tables.end_unmap(placed.snatched)
            placed.snatched = None
        self.memory.give(placed.pages)
        placed.pages = []

    def snatch(self, rng: random.Random, held: Collection[tuple[int, int]]) -> Snatched | None:
        """Unmap what a job in flight has the device read, if there is such a job.

        Args:
            rng: Chooses.
            held: Queue and head of the requests that the device has: for others a driver that does
                so breaks its queue.
        """
        # What the device writes is not taken: it has the status, without which a ring is broken.
        found = [
            placed
            for ring in self.rings
            for placed in ring.queue.tokens
            if placed.readable and len(placed.mapped) == 2 and (ring.index, placed.head) in held
        ]
        if not found:
            return None
        placed = rng.choice(found)
        placed.job.may_fail = True
        iova, count = placed.mapped.pop(0)
        self.tables.begin_unmap(iova, count)
        placed.snatched = iova
        pages, placed.readable = placed.readable, []
        return Snatched(iova, pages)

    def snatched(self, what: Snatched) -> None:
        """The device has acknowledged that; the pages are used for something else now."""
        self.tables.forget(what.iova, len(what.pages))
        for page in what.pages:
            self.memory.fill(page, 0, bytes([GONE]) * PAGE)

    def all_released(self) -> None:
        """No device knows anything any more."""
        while self.unmapping:
            self.released(self.unmapping.pop())

    def close(self) -> None:
        """Give everything back to the host."""
        for ring in self.rings:
            ring.close()
        self.rings.clear()
        self.memory.close()


def _readable(fd: int) -> bool:
    # An eventfd that is read must be written again: a look must not change it.
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(fd, os.eventfd_read(fd))
        return True
    return False
