"""A queue of a guest's driver: its ring, its notifications, and the memory of what is in flight.

A :class:`GuestQueue` is what all drivers here have in common; a :class:`Shape` says how a request
lies in memory.

Source: virtio 1.4 section 2.7.4.1 (no assumption about framing).
"""

from __future__ import annotations

import contextlib
import random
import select
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Generic, Protocol, Self, TypeAlias, TypeVar

from guestio.addr import Permissions
from guestio.errors import DeviceError, GuestioError, QueueError
from guestio.guest.dma import PAGE, DmaSpace, GuestBuffer, Segment
from guestio.memory import IoVector
from guestio.vhost_user.channel import PeerGoneError
from guestio.vhost_user.frontend import Frontend, FrontendQueue, NoAnswerError
from guestio.virtio.device import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC
from guestio.virtio.driver import DriverQueue
from guestio.virtio.layout import RingLayout

if TYPE_CHECKING:
    from guestio.memory import GuestMemory

_SPINS: Final = 256

Table: TypeAlias = tuple[int, IoVector]
"""Address of an indirect table for the device, and its memory for the driver."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a request lies in memory; every choice here is legal for a driver (section 2.7.4.1).

    What the device reads and what it writes are one row of bytes each, cut anywhere into
    descriptors.

    Attributes:
        readable: Lengths of the descriptors of what is read; the last one takes what remains.
        writable: The same for what is written. ``()`` puts all of it into one.
        readable_offset: Where in a page the first row begins.
        writable_offset: Where in a page the second row begins.
        indirect: Whether to use an indirect table; None for wherever that was negotiated.
        table_offset: Where in a page that begins, a multiple of 16.
    """

    readable: Sequence[int] = ()
    writable: Sequence[int] = ()
    readable_offset: int = 0
    writable_offset: int = 0
    indirect: bool | None = None
    table_offset: int = 0

    @classmethod
    def random(cls, rng: random.Random, readable: int, writable: int, most: int = 6) -> Self:
        """A shape for so many bytes, of up to ``most`` descriptors for each row.

        Cuts and offsets prefer the borders of pages, and those of a block request: after its header
        of 16 bytes, and before its status byte.
        """

        def cuts(length: int, favoured: Sequence[int]) -> tuple[int, ...]:
            points = {
                rng.choice([rng.randrange(1, length), *(f for f in favoured if 0 < f < length)])
                for _ in range(rng.randrange(most))
                if length > 1
            }
            ordered = [0, *sorted(points)]
            return tuple(b - a for a, b in pairwise(ordered))

        def offset() -> int:
            return rng.choice([0, 1, 15, PAGE - 16, PAGE - 8, PAGE - 1, rng.randrange(PAGE)])

        return cls(
            cuts(readable, (1, 8, 15, 16, 17)),
            cuts(writable, (1, 511, 512, writable - 1)),
            offset(),
            offset(),
            rng.choice([None, False]),
            rng.choice([0, PAGE - 16, 16 * rng.randrange(256)]),
        )


class Placement:
    """Where one request lies, until it is finished.

    Attributes:
        readable: What the device is told to read.
        writable: What it is told to write.
        mapped: What to unmap afterwards.
        buffers: The buffers to give back.
        answer: Where the device writes, or None.
    """

    __slots__ = ("answer", "buffers", "mapped", "readable", "writable")

    def __init__(self) -> None:
        self.readable: list[Segment] = []
        self.writable: list[Segment] = []
        self.mapped: list[Segment] = []
        self.buffers: list[GuestBuffer] = []
        self.answer: GuestBuffer | None = None


class Placed(Protocol):
    """A request in flight, as a queue knows it."""

    done: bool
    written: int

    @property
    def placement(self) -> Placement | None:
        """Where it lies, until it is finished."""
        ...


_T = TypeVar("_T", bound=Placed)


class GuestQueue(Generic[_T]):
    """One queue of a guest's driver. For one thread at a time.

    Args:
        frontend: The connection.
        dma: Where memory for requests comes from.
        index: Number of the queue.
        size: Entries.
        view: Memory as the ring's addresses have it.
        polling: Whether completions are polled for.
        contiguous: Whether data buffers lie in one piece physically.
        timeout: Seconds, for error messages.

    Attributes:
        ring: The driver's side of the ring.
        layout: Where it is.
    """

    def __init__(
        self,
        frontend: Frontend,
        dma: DmaSpace,
        index: int,
        size: int,
        view: GuestMemory,
        *,
        polling: bool,
        contiguous: bool,
        timeout: float,
    ) -> None:
        self._frontend = frontend
        self._dma = dma
        self._contiguous = contiguous
        self._index = index
        self._polling = polling
        self._timeout = timeout
        self._handle: FrontendQueue | None = None
        self._base = 0
        physical = self._dma.mode == "off"
        self._rings = self._dma.buffer(RingLayout.contiguous_bytes(size), contiguous=physical)
        base = self._rings.pages[0] if physical else self._dma.map_whole(self._rings)
        self.layout = RingLayout.contiguous(base, size)
        features = self._frontend.features
        self.ring = DriverQueue(
            view,
            self.layout,
            event_idx=bool(features >> VIRTIO_F_EVENT_IDX & 1),
            indirect=bool(features >> VIRTIO_F_INDIRECT_DESC & 1),
        )
        self.start()

    @property
    def started(self) -> bool:
        """Whether the device serves it."""
        return self._handle is not None

    def start(self) -> None:
        """Start it where it stopped last."""
        # A polling driver has a call eventfd as well: QEMU's back-ends die without one.
        self._handle = self._frontend.start_queue(self._index, self.layout, base=self._base)
        if self._polling:
            self.ring.disable_interrupts()
        if self._frontend.iommu:
            # As QEMU does, so that the device need not ask for the page it will surely write.
            self._frontend.iotlb.push(self.layout.used)
        self._poller = select.poll()
        self._poller.register(self._frontend.fileno(), 0)
        for fd in (self._handle.call_fd, self._handle.err_fd):
            if fd is not None:
                self._poller.register(fd, select.POLLIN)
        self._served_here = self._frontend.iommu and self._frontend.iotlb.answer == "caller"
        if self._served_here:
            self._poller.register(self._frontend.iotlb.fileno(), select.POLLIN)
        # What was published while the device was stopped is announced again.
        if self.ring.outstanding:
            self._handle.kick()

    def stop(self) -> None:
        """Stop it; what the device has taken is finished first, but not collected."""
        self._base = self._frontend.stop_queue(self._index)
        self._handle = None

    def close(self) -> None:
        """Give its memory up; the device must have stopped."""
        with contextlib.suppress(GuestioError):
            self.collect()
        for request in self.ring.tokens:
            self.give_up(request.placement)
        self.ring.close()
        self._dma.release(self._rings)

    def abandon(self) -> None:
        """Let its memory and that of what is in flight go; the connection is gone."""
        for request in self.ring.tokens:
            for buffer in request.placement.buffers:
                buffer.memory.close()
        self.ring.close()

    def lay_out(
        self, placement: Placement, source: bytes, room: int, shape: Shape, fill: int
    ) -> Table | None:
        """Put a request into memory of its own.

        Args:
            placement: Is told where; what it has must be given back, also after an error.
            source: What the device reads.
            room: Bytes that it writes.
            shape: How they lie in memory.
            fill: What is in those bytes before.

        Returns:
            Its indirect table, if it is to have one.

        Raises:
            DeviceError: The guest is out of memory.
        """
        dma, mapped, contiguous = self._dma, placement.mapped, self._contiguous
        if source:
            read = dma.buffer(len(source), offset=shape.readable_offset, contiguous=contiguous)
            placement.buffers.append(read)
            read.memory.write(source)
            for at, length in _cut(len(source), shape.readable):
                placement.readable += dma.map(read, at, length, Permissions.READ, mapped)
        if room:
            answer = dma.buffer(room, offset=shape.writable_offset, contiguous=contiguous)
            placement.buffers.append(answer)
            placement.answer = answer
            answer.memory.fill(fill)
            for at, length in _cut(room, shape.writable):
                placement.writable += dma.map(answer, at, length, Permissions.WRITE, mapped)
        if not (self.ring.indirect if shape.indirect is None else shape.indirect):
            return None
        count = len(placement.readable) + len(placement.writable)
        table = dma.buffer(16 * count, offset=shape.table_offset, contiguous=dma.mode == "off")
        placement.buffers.append(table)
        return self.table(table, count, mapped)

    def table(self, table: GuestBuffer, count: int, mapped: list[Segment]) -> Table:
        """An indirect table of so many descriptors in a buffer."""
        ((address, _),) = self._dma.map(table, 0, 16 * count, Permissions.READ, mapped)
        return address, table.memory

    def give_up(self, placement: Placement) -> None:
        """Take back what the device was not given after all."""
        self._dma.unmap(placement.mapped)
        self._recycle(placement)

    def publish(self) -> None:
        """Make the requests visible and notify the device if it wants that."""
        if self.ring.publish() and self._handle is not None:
            self._handle.kick()

    def collect(self) -> list[_T]:
        """Take over what the device finished."""
        finished: list[tuple[_T, Placement]] = []
        mapped: list[Segment] = []
        for request, written in self.ring.collect():
            request.written = written
            mapped += request.placement.mapped
            finished.append((request, request.placement))
        self._dma.unmap(mapped)
        for request, placement in finished:
            self._finish(request, placement)
            self._recycle(placement)
            request.done = True
        return [request for request, _ in finished]

    def _finish(self, request: _T, placement: Placement) -> None:
        """Take the answer over, before the memory is given back."""

    def _recycle(self, placement: Placement) -> None:
        """Give the memory of a request back."""
        if placement.buffers:
            self._dma.release(*placement.buffers)

    def progress(self, deadline: float, timeout: float | None = None) -> list[_T]:
        """Collect what is finished, or wait for something to happen and return nothing.

        Args:
            deadline: When to give up (monotonic time).
            timeout: The seconds until then, for the error message.

        Raises:
            NoAnswerError: The deadline has passed.
            PeerGoneError: The back-end went away.
            QueueError: Device or driver found the queue broken.
        """
        finished = self.collect()
        if finished or (not self._polling and self.ring.enable_interrupts()):
            return finished
        if time.monotonic() >= deadline:
            waited = self._timeout if timeout is None else timeout
            raise NoAnswerError(
                f"queue {self._index}: the device did not finish any of "
                f"{self.ring.outstanding} requests for {waited:g} s"
            )
        if self._polling:
            return self._spin()
        self._watch(max(deadline - time.monotonic(), 0))
        return finished

    def _spin(self) -> list[_T]:
        for _ in range(_SPINS):
            finished = self.collect()
            if finished:
                return finished
            if self._served_here:
                self._frontend.iotlb.service()
            # The device may be a thread of this process, which needs the interpreter.
            time.sleep(0)
        self._watch(0)
        return []

    def _watch(self, timeout: float) -> None:
        """Wait for a notification, a miss of the back-end, or a failure."""
        handle = self._handle
        if handle is None:
            raise DeviceError(f"queue {self._index} is stopped")
        for fd, _ in self._poller.poll(timeout * 1000):
            if fd == handle.call_fd:
                handle.clear_call()
            elif fd == handle.err_fd:
                raise QueueError(f"the device reports that queue {self._index} is broken")
            elif fd == self._frontend.fileno():
                raise self._frontend.failure or PeerGoneError("the back-end went away")
            else:
                self._frontend.iotlb.service()
        if self._frontend.failure is not None:
            raise self._frontend.failure


def _cut(length: int, cuts: Sequence[int]) -> Iterator[Segment]:
    """Cut a row of bytes into pieces of the given lengths and the rest."""
    at = 0
    for size in cuts:
        piece = min(size, length - at)
        if piece > 0:
            yield at, piece
            at += piece
    if at < length:
        yield at, length - at
