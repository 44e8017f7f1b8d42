"""Block requests in a guest's queue: where they lie in memory, and their way to the device.

A :class:`BlkQueue` is one request queue of a :class:`~guestio.guest.disk.ScriptedGuest`.

Source: virtio 1.4 section 5.2.6 (requests); the usual layout after Linux's
drivers/block/virtio_blk.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

from guestio.addr import Permissions
from guestio.errors import GuestioError
from guestio.guest.dma import PAGE, DmaSpace, GuestBuffer, Segment
from guestio.guest.queue import GuestQueue, Placement, Shape, Table
from guestio.virtio.blk import S_OK

if TYPE_CHECKING:
    from collections.abc import Sequence

UNTOUCHED: Final = 0xFF
"""What the status byte holds before the device writes it."""

_HEADER: Final = struct.Struct("<IIQ")
_STATUS_AT: Final = _HEADER.size
_TABLE_ENTRIES: Final = PAGE // 16


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
    placement: _Placement | None = field(default=None, repr=False)

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


class _Placement(Placement):
    """Where one block request lies.

    Attributes:
        slot: The slot to give back, if it has the usual shape.
        reply: Bytes of the answer before the status.
        keep: Whether they are wanted.
    """

    __slots__ = ("keep", "reply", "slot")

    def __init__(self, reply: int, *, keep: bool) -> None:
        super().__init__()
        self.slot: _Slot | None = None
        self.reply = reply
        self.keep = keep


class BlkQueue(GuestQueue[Request]):
    """One request queue of a disk's driver; see :class:`GuestQueue` for the arguments."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._slots: list[_Slot] = []
        super().__init__(*args, **options)

    def close(self) -> None:
        """Give its memory up; the device must have stopped."""
        super().close()
        for slot in self._slots:
            slot.release(self._dma)
        self._slots.clear()

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
                table = self.lay_out(placement, header + payload, reply + 1, shape, UNTOUCHED)
            request.placement = placement
            self.ring.add(placement.readable, placement.writable, request, table=table)
        except BaseException:
            self.give_up(placement)
            raise

    def submit_at(
        self,
        request: Request,
        header: bytes,
        readable: Sequence[Segment],
        writable: Sequence[Segment],
    ) -> None:
        """Put a request into the ring whose data is at addresses of the caller's choice.

        Header and status are at valid addresses; the data may not be, which is not checked.

        Raises:
            QueueError: The ring is full.
        """
        placement, dma = _Placement(0, keep=False), self._dma
        slot = placement.slot = self._slots.pop() if self._slots else _Slot(dma)
        slot.head.memory.write(header + b"\xff")
        mapped = placement.mapped
        request.placement = placement
        try:
            placement.readable += dma.map(slot.head, 0, _HEADER.size, Permissions.READ, mapped)
            placement.readable += readable
            placement.writable += writable
            placement.writable += dma.map(slot.head, _STATUS_AT, 1, Permissions.WRITE, mapped)
            self.ring.add(placement.readable, placement.writable, request)
        except BaseException:
            self.give_up(placement)
            raise

    def _place_usual(self, placement: _Placement, header: bytes, payload: bytes) -> Table | None:
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
            data = placement.answer = slot.data_for(
                dma, placement.reply, contiguous=self._contiguous
            )
            writable += dma.map(data, 0, placement.reply, Permissions.WRITE, mapped)
        writable += dma.map(slot.head, _STATUS_AT, 1, Permissions.WRITE, mapped)
        count = len(readable) + len(writable)
        if not self.ring.indirect or count > _TABLE_ENTRIES:
            return None
        return self.table(slot.table, count, mapped)

    def _finish(self, request: Request, placement: Placement) -> None:
        assert isinstance(placement, _Placement)
        request.placement = None
        answer = placement.answer
        if placement.slot is not None:
            request.status = placement.slot.head.memory.read(_STATUS_AT, 1)[0]
        elif answer is not None:
            request.status = answer.memory.read(placement.reply, 1)[0]
        if placement.keep and placement.reply and answer is not None:
            request.data = answer.memory.read(0, placement.reply)

    def _recycle(self, placement: Placement) -> None:
        assert isinstance(placement, _Placement)
        if placement.slot is not None:
            self._slots.append(placement.slot)
        super()._recycle(placement)
