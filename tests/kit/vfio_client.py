"""A vfio-user client by hand, which may send anything, and a server in a thread for it."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from guestio.errors import AccessError
from guestio.pci import Bar, PciDevice, PciHost
from guestio.vfio_user import Server
from guestio.vfio_user.messages import Command, HeaderFlag, IrqSet
from tests.kit.serving import WAIT

PAGE = 4096
READ, WRITE = 1, 2
MASTER = b"\x06\x00"


class Reply(NamedTuple):
    """An answer: its errno (0 for success), payload and descriptors."""

    error: int
    payload: bytes
    fds: tuple[int, ...] = ()


class IoFds(NamedTuple):
    """What a region has of descriptors: bytes needed, offset, size, index, type, flags, value."""

    argsz: int
    entries: list[tuple[int, ...]]
    fds: tuple[int, ...]


class Client:
    """A client whose messages are put together by hand."""

    def __init__(self, path: str | Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(WAIT)
        self.socket.connect(str(path))
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> int:
        self._number = (self._number + 1) % 2**16
        head = struct.pack("<HHIII", self._number, command, 16 + len(payload), flags, 0)
        socket.send_fds(self.socket, [head + payload], list(fds))
        return self._number

    def receive(self) -> tuple[int, int, Reply]:
        """The next answer: its number, its command and the rest."""
        number, command, flags, reply = self.receive_any()
        assert flags & HeaderFlag.REPLY
        assert bool(flags & HeaderFlag.ERROR) == bool(reply.error)
        assert not reply.error or not reply.payload
        return number, command, reply

    def asked(self) -> tuple[int, int, bytes]:
        """The next message if the server asks for something: number, command and payload."""
        number, command, flags, message = self.receive_any()
        assert flags == 0
        return number, command, message.payload

    def answer(self, number: int, command: int, payload: bytes = b"", error: int = 0) -> None:
        flags = HeaderFlag.REPLY | (HeaderFlag.ERROR if error else 0)
        head = struct.pack("<HHIII", number, command, 16 + len(payload), flags, error)
        self.socket.sendall(head + payload)

    def receive_any(self) -> tuple[int, int, int, Reply]:
        """The next message: its number, command, flags and the rest."""
        head, fds, _, _ = socket.recv_fds(self.socket, 16, 16)
        if not head:
            raise ConnectionResetError
        assert len(head) == 16
        number, command, size, flags, error = struct.unpack("<HHIII", head)
        payload = self.socket.recv(size - 16, socket.MSG_WAITALL) if size > 16 else b""
        return number, command, flags, Reply(error, payload, tuple(fds))

    def request(
        self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> Reply:
        sent = self.send(command, payload, fds, flags)
        number, answered, reply = self.receive()
        assert (number, answered) == (sent, command)
        return reply

    def version(self, minor: int = 0, data: bytes | None = None) -> Reply:
        if data is None:
            data = b'{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576}}'.ljust(214)
        return self.request(Command.VERSION, struct.pack("<HH", 0, minor) + data + b"\0")

    def map(self, address: int, size: int, fd: int | None, offset: int = 0, flags: int = 3) -> int:
        payload = struct.pack("<IIQQQ", 32, flags, offset, address, size)
        return self.request(Command.DMA_MAP, payload, [] if fd is None else [fd]).error

    def unmap_payload(self, address: int, size: int, flags: int = 0) -> bytes:
        return struct.pack("<IIQQ", 24, flags, address, size)

    def unmap(self, address: int, size: int, flags: int = 0) -> int:
        return self.request(Command.DMA_UNMAP, self.unmap_payload(address, size, flags)).error

    def read(self, region: int, offset: int, count: int) -> bytes:
        asked = struct.pack("<QII", offset, region, count)
        reply = self.request(Command.REGION_READ, asked)
        assert not reply.error, os.strerror(reply.error)
        assert reply.payload[:16] == asked
        return reply.payload[16:]

    def write(self, region: int, offset: int, data: bytes) -> int:
        payload = struct.pack("<QII", offset, region, len(data)) + data
        return self.request(Command.REGION_WRITE, payload).error

    def post(self, region: int, offset: int, data: bytes) -> None:
        payload = struct.pack("<QII", offset, region, len(data)) + data
        self.send(Command.REGION_WRITE, payload, flags=HeaderFlag.NO_REPLY)

    def io_fds(self, region: int, argsz: int = 1 << 12) -> IoFds:
        """Ask for the descriptors of a region; they are the caller's."""
        asked = struct.pack("<IIII", argsz, 0, region, 0)
        reply = self.request(Command.DEVICE_GET_REGION_IO_FDS, asked)
        assert not reply.error, os.strerror(reply.error)
        needed, flags, index, count = struct.unpack_from("<IIII", reply.payload)
        assert (flags, index) == (0, region)
        entries = [
            (*values, value)
            for *values, padding, value in struct.iter_unpack("<QQIIIIQ", reply.payload[16:])
            if not padding
        ]
        assert len(entries) == count
        return IoFds(needed, entries, reply.fds)

    def set_irqs(
        self,
        flags: int,
        index: int,
        start: int,
        count: int,
        data: bytes = b"",
        fds: Sequence[int] = (),
    ) -> int:
        payload = struct.pack("<IIIII", 20 + len(data), flags, index, start, count) + data
        return self.request(Command.DEVICE_SET_IRQS, payload, fds).error

    def triggers(self, index: int, start: int, fds: Sequence[int]) -> int:
        return self.set_irqs(IrqSet.DATA_EVENTFD | IrqSet.TRIGGER, index, start, len(fds), fds=fds)

    def master(self) -> None:
        assert self.write(7, 4, MASTER) == 0

    def begin(self) -> Self:
        """Negotiate, and make the device bus master."""
        assert not self.version().error
        self.master()
        return self


class Toy(PciDevice):
    """Notes what it is asked; register 0 reads a byte of memory, register 4 writes one.

    Register 8 is an address, 16 the byte. Register 0x20 takes a lease on a page at the address,
    0x24 gives it back. 0x28 copies as many bytes as are written there, 0x2c writes as many.
    """

    vendor_id, device_id = 0x1234, 0x5678
    bars = {0: Bar(PAGE, width=8)}  # noqa: RUF012 - never changed
    interrupts = 4

    def __init__(self) -> None:
        self.host: PciHost
        self.seen: list[tuple[Any, ...]] = []
        self.resets = 0
        self.held: Any = None
        self.copied: bytes | AccessError | None = None
        self.registers: dict[int, int] = {}

    def attached(self, host: PciHost) -> None:
        self.host = host

    def reset(self) -> None:
        self.resets += 1
        self.registers.clear()

    def read(self, bar: int, offset: int, size: int) -> int:
        self.seen.append(("read", bar, offset, size))
        if offset == 0:
            return self.host.memory.read(self.registers[8], 1)[0]
        if offset == 0x80:
            raise RuntimeError("a mistake")
        if offset == 0x88:
            return "no number"  # type: ignore[return-value]
        return self.registers.get(offset, 0)

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", bar, offset, size, value))
        self.registers[offset] = value
        if offset == 4:
            self.host.memory.write(self.registers[8], bytes([value]))
        elif offset == 0x20:
            self.held = self.host.memory.gather(self.registers[8], PAGE, WRITE)
        elif offset == 0x24:
            self.held.close()
        elif offset == 0x28:
            try:
                self.copied = self.host.memory.read(self.registers[8], value)
            except AccessError as error:
                self.copied = error
        elif offset == 0x2C:
            self.host.memory.write(self.registers[8], bytes(n % 251 for n in range(value)))
        elif offset == 0x30:
            self.host.interrupt(value)
        elif offset == 0x80:
            raise RuntimeError("a mistake")


class ServingPci:
    """A server in a thread."""

    def __init__(self, device: PciDevice, path: Path, **options: Any) -> None:
        self.server = Server(device, path, **options)
        self.stats = self.server.statistics
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="serving")

    def _run(self) -> None:
        try:
            self.server.serve()
        except BaseException as error:
            self.error = error

    @property
    def serving(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self._thread.join(WAIT)
        assert not self._thread.is_alive(), "the server does not stop"
        self.server.close()
        assert self.error is None, self.error

    def connect(self) -> Client:
        return Client(self.server.path)


def number(value: int, size: int = 8) -> bytes:
    """A register's value as it is written."""
    return value.to_bytes(size, "little")


def memory_file(size: int = 1 << 20) -> int:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    return fd
