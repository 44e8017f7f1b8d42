"""The devices that a judge offers: small, whole, and without a rule of their own but to judge.

Each serves buffers as :class:`~guestio.faults.frontend.ring.Taken` has them. They read and write
guest memory by physical addresses, piece by piece.

Source: virtio 1.4 chapter 5, by type.
"""

from __future__ import annotations

import os
import struct
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from guestio.budgets import ENTROPY_BYTES, JUDGE_PIECE
from guestio.errors import DeviceError
from guestio.virtio.blk import (
    F_DISCARD,
    F_FLUSH,
    F_SEG_MAX,
    F_WRITE_ZEROES,
    ID_BYTES,
    MAX_TRIM_SECTORS,
    MAX_TRIM_SEGMENTS,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    SEG_MAX,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    BlockDevice,
)
from guestio.virtio.image import SECTOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestio.faults.frontend.demands import Book
    from guestio.faults.frontend.reach import Piece
    from guestio.faults.frontend.ring import Taken
    from guestio.memory import GuestMemory

SCRATCH: Final = 64 << 20
"""Bytes of a disk without an image."""
_HEADER: Final = struct.Struct("<IIQ")
_TRIM: Final = struct.Struct("<QII")
_UNMAP: Final = 1
_WRITEBACK: Final = 32
"""Where in a disk's configuration space the cache mode is."""
_F_CONFIG_WCE: Final = 1 << 11
_F_MAC: Final = 1 << 5


class JudgedDevice(ABC):
    """A device whose driver is judged.

    Attributes:
        name: Its type, as it is named to the command.
        queues: How many it has.
        features: Those of its type that it offers.
        accepted: Features that were negotiated.
    """

    name: str
    queues: int
    features: int = 0
    accepted: int = 0

    @abstractmethod
    def config(self) -> bytes:
        """The configuration space."""

    def judge_config_write(self, book: Book, offset: int, data: bytes) -> None:
        """Judge what the driver wrote to the configuration space."""

    @abstractmethod
    def serve(self, queue: int, taken: Taken, memory: GuestMemory, book: Book) -> int | None:
        """Serve a buffer.

        Returns:
            Bytes that were written, or None to keep it until the queue stops.
        """

    def close(self) -> None:
        """Give everything back."""


class JudgedDisk(JudgedDevice):
    """A disk on an image, or on a scratch file of 64 MiB.

    Args:
        image: The image; None for a scratch file.
        queues: Request queues.

    Raises:
        DeviceError: The image cannot be opened.
    """

    name = "blk"

    def __init__(self, image: str | os.PathLike[str] | None = None, queues: int = 1) -> None:
        self.queues = queues
        self._scratch = None
        if image is None:
            self._scratch = tempfile.NamedTemporaryFile(prefix="guestio-check-")  # noqa: SIM115 - closed by close()
            self._scratch.truncate(SCRATCH)
            image = self._scratch.name
        self._device = BlockDevice(image, num_queues=queues, serial="guestio-check")
        try:
            self._fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self._device.close()
            raise DeviceError(f"cannot open {os.fspath(image)}: {error.strerror}") from error
        self.features = self._device.features

    def config(self) -> bytes:
        """See :class:`JudgedDevice`."""
        return self._device.config()

    def judge_config_write(self, book: Book, offset: int, data: bytes) -> None:
        """See :class:`JudgedDevice`; the cache mode is not offered to be written."""
        book.judge(
            "config.writable",
            (offset, len(data)) == (_WRITEBACK, 1) and self.accepted & _F_CONFIG_WCE,
            f"{len(data)} bytes at {offset} were written",
        )

    def close(self) -> None:
        """See :class:`JudgedDevice`."""
        os.close(self._fd)
        self._device.close()
        if self._scratch is not None:
            self._scratch.close()

    def serve(self, queue: int, taken: Taken, memory: GuestMemory, book: Book) -> int | None:
        """Serve a request; one that breaks a rule is answered with an error."""
        judge = book.judge
        readable = sum(length for _, length in taken.readable)
        writable = sum(length for _, length in taken.writable)
        where = f"ring {queue}, request at descriptor {taken.head}"
        if taken.fault:
            return self._finish(taken, memory, S_IOERR, 0)
        if not judge("blk.header", readable >= _HEADER.size, f"{where}: {readable} bytes to read"):
            return self._finish(taken, memory, S_IOERR, 0)
        if not judge("blk.status", writable >= 1, f"{where}: nothing to write"):
            return 0
        head, data = _split(taken.readable, _HEADER.size)
        kind, _, sector = _HEADER.unpack(_gather(memory, head))
        room, _ = _split(taken.writable, writable - 1)
        where = f"{where}, type {kind}, sector {sector}"
        needed = {
            T_IN: 0,
            T_OUT: 0,
            T_FLUSH: F_FLUSH,
            T_GET_ID: 0,
            T_DISCARD: F_DISCARD,
            T_WRITE_ZEROES: F_WRITE_ZEROES,
        }.get(kind)
        if not judge(
            "blk.type",
            needed is not None and needed & self.accepted == needed,
            f"{where}: no such type, or not negotiated",
        ):
            return self._finish(taken, memory, S_UNSUPP, 0)
        sizes = readable - _HEADER.size, writable - 1
        if kind in (T_IN, T_OUT):
            return self._move(taken, memory, book, kind, sector, data, room, sizes, where)
        if kind == T_FLUSH:
            judge("blk.flush-sector", not sector, where)
            judge("blk.flush-data", sizes == (0, 0), f"{where}: {sizes} bytes")
            os.fdatasync(self._fd)
            return self._finish(taken, memory, S_OK, 0)
        if kind == T_GET_ID:
            judge("blk.direction", not sizes[0], f"{where}: {sizes[0]} bytes to read")
            judge("blk.id-length", sizes[1] == ID_BYTES, f"{where}: {sizes[1]} bytes to write")
            written = _scatter(memory, room, self._device.serial)
            return self._finish(taken, memory, S_OK, written)
        return self._trim(taken, memory, book, kind, data, sizes, where)

    def _move(
        self,
        taken: Taken,
        memory: GuestMemory,
        book: Book,
        kind: int,
        sector: int,
        data: list[Piece],
        room: list[Piece],
        sizes: tuple[int, int],
        where: str,
    ) -> int:
        judge = book.judge
        wrong, length = sizes if kind == T_IN else (sizes[1], sizes[0])
        judge("blk.direction", not wrong, f"{where}: {wrong} bytes in the other direction")
        judge("blk.multiple", not length % SECTOR, f"{where}: {length} bytes")
        if self.accepted & F_SEG_MAX:
            segments = taken.segments[kind == T_IN]
            # The header and the status may share a descriptor with the data, or have their own.
            judge(
                "blk.segments",
                segments <= SEG_MAX + 1,
                f"{where}: {segments} descriptors, at most {SEG_MAX} are for data",
            )
        if not judge(
            "blk.capacity",
            sector * SECTOR + length <= self._device.size,
            f"{where}: {length} bytes, the disk has {self._device.capacity} sectors",
        ):
            return self._finish(taken, memory, S_IOERR, 0)
        at = sector * SECTOR
        for gpa, size in _steps(room if kind == T_IN else data):
            if kind == T_IN:
                memory.write(gpa, os.pread(self._fd, size, at).ljust(size, b"\0"))
            else:
                os.pwrite(self._fd, memory.read(gpa, size), at)
            at += size
        return self._finish(taken, memory, S_OK, length if kind == T_IN else 0)

    def _trim(
        self,
        taken: Taken,
        memory: GuestMemory,
        book: Book,
        kind: int,
        data: list[Piece],
        sizes: tuple[int, int],
        where: str,
    ) -> int:
        judge = book.judge
        length, wrong = sizes
        judge("blk.direction", not wrong, f"{where}: {wrong} bytes to write beside the status")
        if not judge(
            "blk.trim-length",
            not length % _TRIM.size and 0 < length <= MAX_TRIM_SEGMENTS * _TRIM.size,
            f"{where}: {length} bytes of ranges",
        ):
            return self._finish(taken, memory, S_IOERR, 0)
        allowed = 0 if kind == T_DISCARD else _UNMAP
        status = S_OK
        for first, count, flags in _TRIM.iter_unpack(_gather(memory, data)):
            judge("blk.trim-flags", not flags & ~allowed, f"{where}: flags {flags:#x}")
            inside = judge(
                "blk.trim-range",
                first + count <= self._device.capacity and count <= MAX_TRIM_SECTORS,
                f"{where}: sectors {first}+{count}",
            )
            if not inside:
                status = S_IOERR
            elif kind == T_WRITE_ZEROES:
                at, end = first * SECTOR, (first + count) * SECTOR
                while at < end:
                    at += os.pwrite(self._fd, bytes(min(end - at, JUDGE_PIECE)), at)
        return self._finish(taken, memory, status, 0)

    @staticmethod
    def _finish(taken: Taken, memory: GuestMemory, status: int, written: int) -> int:
        """Write the status into the last byte that may be written; bytes written in all."""
        if not taken.writable:
            return 0
        gpa, length = taken.writable[-1]
        memory.write(gpa + length - 1, bytes([status]))
        return written + 1


class JudgedEntropy(JudgedDevice):
    """An entropy device."""

    name = "rng"
    queues = 1

    def config(self) -> bytes:
        """See :class:`JudgedDevice`."""
        return b""

    def serve(self, queue: int, taken: Taken, memory: GuestMemory, book: Book) -> int | None:
        """See :class:`JudgedDevice`."""
        written = 0
        for gpa, size in _steps(taken.writable):
            wanted = min(size, ENTROPY_BYTES - written)
            memory.write(gpa, os.urandom(wanted))
            written += wanted
        return written


class JudgedPair(JudgedDevice):
    """A device with a silent queue to receive from, and one that takes all it is given.

    Args:
        name: Its type.
        features: Those that it offers.
        config: Its configuration space.
    """

    queues = 2

    def __init__(self, name: str, features: int, config: bytes) -> None:
        self.name, self.features, self._config = name, features, config

    def config(self) -> bytes:
        """See :class:`JudgedDevice`."""
        return self._config

    def serve(self, queue: int, taken: Taken, memory: GuestMemory, book: Book) -> int | None:
        """See :class:`JudgedDevice`."""
        return None if queue == 0 else 0


DEVICES: Final = ("blk", "net", "console", "rng")
"""The types of devices that a front-end can be judged with."""


def make_device(
    name: str, *, image: str | os.PathLike[str] | None = None, queues: int = 1
) -> JudgedDevice:
    """A device of a type.

    Args:
        name: One of `DEVICES`.
        image: What is on the disk; None for a scratch file.
        queues: Request queues of a disk.

    Raises:
        ValueError: There is no such type, or an image for what is no disk.
        DeviceError: The image cannot be opened.
    """
    if name not in DEVICES:
        raise ValueError(
            f"there is no device of type {name!r} to judge a front-end with; say one of "
            f"{', '.join(DEVICES)}"
        )
    if name == "blk":
        return JudgedDisk(image, queues)
    if image is not None:
        raise ValueError(f"an image is for a disk, not for a device of type {name!r}")
    if name == "rng":
        return JudgedEntropy()
    if name == "net":
        return JudgedPair(name, _F_MAC, b"\x02guest"[:6] + bytes(18))
    return JudgedPair(name, 0, bytes(12))


def _split(pieces: Sequence[Piece], at: int) -> tuple[list[Piece], list[Piece]]:
    """Cut a row of bytes in two."""
    first: list[Piece] = []
    second: list[Piece] = []
    for gpa, length in pieces:
        before = min(length, at)
        if before:
            first.append((gpa, before))
        if before < length:
            second.append((gpa + before, length - before))
        at -= before
    return first, second


def _steps(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The same bytes in pieces of at most `JUDGE_PIECE`."""
    for gpa, length in pieces:
        for at in range(0, length, JUDGE_PIECE):
            yield gpa + at, min(JUDGE_PIECE, length - at)


def _gather(memory: GuestMemory, pieces: Sequence[Piece]) -> bytes:
    return b"".join(memory.read(gpa, length) for gpa, length in pieces)


def _scatter(memory: GuestMemory, pieces: Sequence[Piece], data: bytes) -> int:
    """Write bytes into a row of pieces, as many as there is room for; how many."""
    at = 0
    for gpa, length in pieces:
        part = data[at : at + length]
        memory.write(gpa, part)
        at += len(part)
    return at
