"""Block requests in a guest's queue: where they lie in memory, and their way to the device.

A :class:`GuestQueue` is one request queue of a :class:`~guestio.guest.disk.ScriptedGuest`: ring,
notifications, and the memory of the requests in flight. A :class:`Shape` says how a request lies in
memory.

Source: virtio 1.3 section 5.2.6 (requests) and 2.7.4.1 (no assumption about framing); the usual
layout after Linux's drivers/block/virtio_blk.c.
"""

from __future__ import annotations

import contextlib
import random
import select
import struct
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from guestio.addr import Permissions
from guestio.errors import DeviceError, GuestioError, QueueError
from guestio.guest.dma import PAGE, DmaSpace, GuestBuffer, Segment
from guestio.memory import IoVector
from guestio.vhost_user.channel import PeerGoneError
from guestio.vhost_user.frontend import Frontend, FrontendQueue, NoAnswerError
from guestio.virtio.blk import S_OK
from guestio.virtio.device import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC
from guestio.virtio.driver import DriverQueue
from guestio.virtio.layout import RingLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from guestio.memory import GuestMemory

UNTOUCHED: Final = 0xFF
"""What the status byte holds before the device writes it."""

_HEADER: Final = struct.Struct("<IIQ")
_STATUS_AT: Final = _HEADER.size
_TABLE_ENTRIES: Final = PAGE // 16
_SPINS: Final = 256


_Table: TypeAlias = tuple[int, IoVector]


class BlkError(GuestioError):
    """The device answered a block request with a failure.

    Attributes:
        status: What it answered; 0xff if it did not write a status at all.
    """

    def __init__(self, kind: int, sector: int, status: int) -> None:
        self.status = status
        names = {1: "VIRTIO_BLK_S_IOERR", 2: "VIRTIO_BLK_S_UNSUPP", UNTOUCHED: "no status"}
        super().__init__(
            f"request of type {kind} at sector {sector}: {names.get(status, hex(status))}"
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """How a request lies in memory; every choice here is legal for a driver (section 2.7.4.1).

    What the device reads (header, then data) and what it writes (data, then status) are one row of
    bytes each, cut anywhere into descriptors.

    Attributes:
        readable: Lengths of the descriptors of what is read; the last one takes what remains.
        writable: The same for what is written. ``()`` puts data and status into one.
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

        Cuts and offsets prefer the borders of pages, and the header and the status byte.
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


@dataclass(slots=True, eq=False)
class Request:
    """A block request on its way.

    Attributes:
        kind: Type of the request, ``T_IN`` and so on.
        sector: Where on the disk.
        queue: Which queue it is on.
        done: Whether the device has finished with it.
        status: What the device answered, once it is done.
        written: Bytes that the device says it wrote.
        data: What a read returned, once it is done, unless that was not wanted.
    """

    kind: int
    sector: int
    queue: int
    done: bool = False
    status: int = UNTOUCHED
    written: int = 0
    data: bytes = b""
    _placement: _Placement | None = field(default=None, repr=False)

    def check(self) -> Self:
        """Return the request itself, if it succeeded.

        Raises:
            BlkError: It did not.
        """
        if self.status != S_OK:
            raise BlkError(self.kind, self.sector, self.status)
        return self


class _Slot:
    """Memory for one request of the usual shape, used again and again.

    Header and status lie next to each other, as in Linux's struct virtblk_req; the data is on pages
    of its own.
    """

    def __init__(self, dma: DmaSpace) -> None:
        self.head = dma.buffer(_STATUS_AT + 1)
        self.table = dma.buffer(PAGE)
        self.data: GuestBuffer | None = None

    def data_for(self, dma: DmaSpace, length: int, *, contiguous: bool) -> GuestBuffer:
        if self.data is None or self.data.length < length:
            if self.data is not None:
                dma.release(self.data)
                self.data = None
            size = -(-length // PAGE) * PAGE
            self.data = dma.buffer(size, contiguous=contiguous)
        return self.data

    def release(self, dma: DmaSpace) -> None:
        dma.release(*[b for b in (self.head, self.table, self.data) if b is not None])


class _Placement:
    """Where one request lies, until it is finished.

    Attributes:
        readable: What the device is told to read.
        writable: What it is told to write.
        mapped: What to unmap afterwards.
        slot: The slot to give back, if it has the usual shape.
        buffers: The buffers to give back, if not.
    """

    __slots__ = ("buffers", "keep", "mapped", "readable", "reply", "slot", "source", "writable")

    def __init__(self, reply: int, *, keep: bool) -> None:
        self.readable: list[Segment] = []
        self.writable: list[Segment] = []
        self.mapped: list[Segment] = []
        self.slot: _Slot | None = None
        self.buffers: list[GuestBuffer] = []
        self.source: GuestBuffer | None = None
        self.reply = reply
        self.keep = keep

    def finish(self, request: Request) -> None:
        """Take the answer over, before the memory is given back."""
        if self.slot is not None:
            request.status = self.slot.head.memory.read(_STATUS_AT, 1)[0]
        elif self.source is not None:
            request.status = self.source.memory.read(self.reply, 1)[0]
        if self.keep and self.reply and self.source is not None:
            request.data = self.source.memory.read(0, self.reply)


class GuestQueue:
    """One queue of the guest's driver. For one thread at a time.

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
        self._slots: list[_Slot] = []
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
        self.ring.close()
        for slot in self._slots:
            slot.release(self._dma)
        self._slots.clear()
        self._dma.release(self._rings)

    def submit(
        self,
        request: Request,
        header: bytes,
        payload: bytes,
        reply: int,
        shape: Shape | None,
        *,
        keep: bool,
    ) -> None:
        """Put a request into the ring.

        Args:
            request: What is told about the answer.
            header: The request's header.
            payload: What the device reads after it.
            reply: Bytes that it writes before the status.
            shape: How it lies in memory; None for as Linux does it.
            keep: Whether the reply is wanted.

        Raises:
            QueueError: The ring is full.
        """
        placement = _Placement(reply, keep=keep)
        try:
            if shape is None:
                table = self._place_usual(placement, header, payload)
            else:
                table = self._place(placement, header + payload, shape)
            request._placement = placement
            self.ring.add(placement.readable, placement.writable, request, table=table)
        except BaseException:
            self._dma.unmap(placement.mapped)
            self._recycle(placement)
            raise

    def submit_at(
        self,
        request: Request,
        header: bytes,
        readable: Sequence[Segment],
        writable: Sequence[Segment],
    ) -> None:
        """Put a request into the ring whose data is at addresses of the caller's choice.

        Header and status are where they may be; nobody checks whether the data is.

        Raises:
            QueueError: The ring is full.
        """
        placement, dma = _Placement(0, keep=False), self._dma
        slot = placement.slot = self._slots.pop() if self._slots else _Slot(dma)
        slot.head.memory.write(header + b"\xff")
        mapped = placement.mapped
        request._placement = placement
        try:
            placement.readable += dma.map(slot.head, 0, _HEADER.size, Permissions.READ, mapped)
            placement.readable += readable
            placement.writable += writable
            placement.writable += dma.map(slot.head, _STATUS_AT, 1, Permissions.WRITE, mapped)
            self.ring.add(placement.readable, placement.writable, request)
        except BaseException:
            dma.unmap(mapped)
            self._recycle(placement)
            raise

    def _place_usual(self, placement: _Placement, header: bytes, payload: bytes) -> _Table | None:
        dma, mapped = self._dma, placement.mapped
        slot = placement.slot = self._slots.pop() if self._slots else _Slot(dma)
        readable, writable = placement.readable, placement.writable
        slot.head.memory.write(header + b"\xff")
        readable += dma.map(slot.head, 0, _HEADER.size, Permissions.READ, mapped)
        if payload:
            data = slot.data_for(dma, len(payload), contiguous=self._contiguous)
            data.memory.write(payload)
            readable += dma.map(data, 0, len(payload), Permissions.READ, mapped)
        if placement.reply:
            data = placement.source = slot.data_for(
                dma, placement.reply, contiguous=self._contiguous
            )
            writable += dma.map(data, 0, placement.reply, Permissions.WRITE, mapped)
        writable += dma.map(slot.head, _STATUS_AT, 1, Permissions.WRITE, mapped)
        count = len(readable) + len(writable)
        if not self.ring.indirect or count > _TABLE_ENTRIES:
            return None
        return self._table(slot.table, count, mapped)

    def _place(self, placement: _Placement, readable: bytes, shape: Shape) -> _Table | None:
        dma, mapped = self._dma, placement.mapped
        source = dma.buffer(len(readable), offset=shape.readable_offset)
        placement.buffers.append(source)
        source.memory.write(readable)
        for at, length in _cut(len(readable), shape.readable):
            placement.readable += dma.map(source, at, length, Permissions.READ, mapped)
        answer = placement.source = dma.buffer(placement.reply + 1, offset=shape.writable_offset)
        placement.buffers.append(answer)
        answer.memory.fill(UNTOUCHED)
        for at, length in _cut(answer.length, shape.writable):
            placement.writable += dma.map(answer, at, length, Permissions.WRITE, mapped)
        wanted = self.ring.indirect if shape.indirect is None else shape.indirect
        if not wanted:
            return None
        count = len(placement.readable) + len(placement.writable)
        table = dma.buffer(16 * count, offset=shape.table_offset, contiguous=dma.mode == "off")
        placement.buffers.append(table)
        return self._table(table, count, mapped)

    def _table(self, table: GuestBuffer, count: int, mapped: list[Segment]) -> _Table:
        ((address, _),) = self._dma.map(table, 0, 16 * count, Permissions.READ, mapped)
        return address, table.memory

    def publish(self) -> None:
        """Make the requests visible and notify the device if it wants that."""
        if self.ring.publish() and self._handle is not None:
            self._handle.kick()

    def collect(self) -> list[Request]:
        """Take over what the device finished."""
        finished: list[Request] = []
        mapped: list[Segment] = []
        for request, written in self.ring.collect():
            request.written = written
            mapped += request._placement.mapped
            finished.append(request)
        self._dma.unmap(mapped)
        for request in finished:
            placement, request._placement = request._placement, None
            assert placement is not None
            placement.finish(request)
            self._recycle(placement)
            request.done = True
        return finished

    def _recycle(self, placement: _Placement) -> None:
        if placement.slot is not None:
            self._slots.append(placement.slot)
        if placement.buffers:
            self._dma.release(*placement.buffers)

    def progress(self, deadline: float) -> list[Request]:
        """Collect what is finished, or wait for something to happen and return nothing."""
        finished = self.collect()
        if finished or (not self._polling and self.ring.enable_interrupts()):
            return finished
        if time.monotonic() >= deadline:
            raise NoAnswerError(
                f"queue {self._index}: the device did not finish any of "
                f"{self.ring.outstanding} requests for {self._timeout} s"
            )
        if self._polling:
            return self._spin()
        self._watch(max(deadline - time.monotonic(), 0))
        return finished

    def _spin(self) -> list[Request]:
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
        """Wait for a notification, a question of the back-end, or bad news."""
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
