"""The data of a command: from its PRPs or SGLs to pieces of the driver's memory.

The core does the same for plain reads and writes; here is every case, with the status for each
that is wrong (NVMe 1.4, sections 4.3 and 4.4).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from guestio.budgets import NVME_SGL_DESCRIPTORS
from guestio.errors import AccessError
from guestio.memory import GuestMemory
from guestio.pci.nvme.spec import PAGE, Command, Failed, Status

_PSDT: Final = 6
_DATA, _BIT_BUCKET, _SEGMENT, _LAST_SEGMENT = 0, 1, 2, 3
_DESCRIPTOR: Final = struct.Struct("<QI3xB")


@dataclass(frozen=True)
class Piece:
    """Part of a command's data.

    Attributes:
        address: Where it is; None where what is read is thrown away.
        length: Its bytes.
    """

    address: int | None
    length: int


class Data:
    """The memory of a command's data.

    Args:
        memory: The driver's.
        command: Says where.
        length: Bytes that the command moves.
        to_driver: Whether they are written to memory.

    Raises:
        Failed: The pointers are wrong, or lead to memory that cannot be read.
    """

    def __init__(
        self, memory: GuestMemory, command: Command, length: int, *, to_driver: bool
    ) -> None:
        self._memory = memory
        self._to_driver = to_driver
        kind = command.flags >> _PSDT
        if kind == 3 or (kind and not command.queue):
            raise Failed(Status.INVALID_FIELD, 1)
        self.pieces = list(self._sgl(command, length) if kind else self._prps(command, length))

    def write(self, data: bytes) -> None:
        """Give the driver data, of the length.

        Raises:
            Failed: Some of its memory cannot be written.
        """
        at = 0
        view = memoryview(data)
        for piece in self.pieces:
            if piece.address is not None:
                try:
                    self._memory.write(piece.address, view[at : at + piece.length])
                except AccessError:
                    raise Failed(Status.TRANSFER_ERROR) from None
            at += piece.length

    def read(self) -> bytes:
        """The driver's data.

        Raises:
            Failed: Some of its memory cannot be read.
        """
        return b"".join(
            self._fetch(piece.address, piece.length)
            for piece in self.pieces
            if piece.address is not None
        )

    def _fetch(self, address: int, length: int) -> bytes:
        try:
            return self._memory.read(address, length)
        except (AccessError, ValueError):
            # ValueError: the range passes the end of the address space.
            raise Failed(Status.TRANSFER_ERROR) from None

    def _prps(self, command: Command, length: int) -> Iterator[Piece]:
        first, second = command.quad(6), command.quad(8)
        if first % 4:
            raise Failed(Status.PRP_OFFSET, 24)
        here = min(length, PAGE - first % PAGE)
        yield Piece(first, here)
        left = length - here
        if not left:
            return
        if left <= PAGE:
            if second % PAGE:
                raise Failed(Status.PRP_OFFSET, 32)
            yield Piece(second, left)
            return
        if second % 8:
            raise Failed(Status.PRP_OFFSET, 32)
        yield from self._prp_lists(second, left)

    def _prp_lists(self, at: int, left: int) -> Iterator[Piece]:
        while left:
            slots, needed = (PAGE - at % PAGE) // 8, (left + PAGE - 1) // PAGE
            chained = needed > slots
            found = self._fetch(at, 8 * min(slots, needed))
            entries = [entry for (entry,) in struct.iter_unpack("<Q", found)]
            if any(entry % PAGE for entry in entries):
                raise Failed(Status.PRP_OFFSET, 32)
            # A page of a list that goes on holds 511 entries: one that leads to itself ends, too.
            at = entries.pop() if chained else 0
            for entry in entries:
                here = min(left, PAGE)
                yield Piece(entry, here)
                left -= here

    def _sgl(self, command: Command, length: int) -> Iterator[Piece]:
        waiting = command.data[24:40]
        # The descriptor in the command itself is not among those that are limited.
        count, last = -1, True
        left = length
        while waiting:
            count += len(waiting) // 16
            if count > NVME_SGL_DESCRIPTORS:
                raise Failed(Status.INVALID_SGL_COUNT, 24)
            descriptors = list(_DESCRIPTOR.iter_unpack(waiting))
            waiting = b""
            for number, (address, size, identifier) in enumerate(descriptors):
                kind = identifier >> 4
                if identifier & 15:
                    raise Failed(Status.SGL_TYPE, 24)
                if kind in (_SEGMENT, _LAST_SEGMENT):
                    # Only where a list goes on: at the end of one that is not the last.
                    if number + 1 < len(descriptors) or (last and count > 0):
                        raise Failed(Status.INVALID_SGL_SEGMENT, 24)
                    waiting = self._segment(address, size)
                    last = kind == _LAST_SEGMENT
                elif kind not in (_DATA, _BIT_BUCKET) or (kind == _BIT_BUCKET and not count):
                    raise Failed(Status.SGL_TYPE, 24)
                elif kind == _BIT_BUCKET and not self._to_driver:
                    continue  # it has no meaning where the driver gives data
                elif size > left:
                    raise Failed(Status.SGL_LENGTH, 24)
                elif size:
                    yield Piece(address if kind == _DATA else None, size)
                    left -= size
            if not waiting and not last:
                raise Failed(Status.INVALID_SGL_SEGMENT, 24)
        if left:
            raise Failed(Status.SGL_LENGTH, 24)

    def _segment(self, address: int, size: int) -> bytes:
        if not size or size % 16:
            raise Failed(Status.INVALID_SGL_SEGMENT, 24)
        if size > 16 * NVME_SGL_DESCRIPTORS:
            raise Failed(Status.INVALID_SGL_COUNT, 24)
        return self._fetch(address, size)
