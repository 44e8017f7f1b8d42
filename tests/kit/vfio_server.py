"""A vfio-user server by hand, which may answer anything, for a client of a socket pair."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self, TypeAlias

from guestio.vfio_user import Client
from guestio.vfio_user.messages import Command, HeaderFlag
from tests.kit.serving import WAIT
from tests.kit.vfio_client import PAGE

HEADER = struct.Struct("<HHIII")
CAPABILITIES = {"max_msg_fds": 16, "max_data_xfer_size": 65536, "pgsizes": PAGE}


class Asked(NamedTuple):
    """A message of the client."""

    number: int
    command: int
    flags: int
    payload: bytes
    fds: list[int]


class Answer(NamedTuple):
    """What is answered: payload, errno, descriptors."""

    payload: bytes = b""
    error: int = 0
    fds: Sequence[int] = ()


Answering: TypeAlias = "Callable[[HandServer, Asked], Answer | bytes | None]"
"""Makes an answer: bytes are a payload, None for none."""


def version(data: object = None, major: int = 0, minor: int = 1) -> bytes:
    """The payload of an answer to VERSION."""
    said = {"capabilities": CAPABILITIES} if data is None else data
    text = said if isinstance(said, bytes) else json.dumps(said).encode() + b"\0"
    return struct.pack("<HH", major, minor) + text


def region_info(
    index: int, size: int = 0, flags: int = 3, argsz: int = 32, at: int = 0, offset: int = 0
) -> bytes:
    """The payload of an answer about a region, without capabilities."""
    return struct.pack("<IIIIQQ", argsz, flags, index, at, size, offset)


class HandServer:
    """Answers as a small device does, except where it is told otherwise. In a thread.

    Args:
        special: Answers by command, in place of the usual ones.

    Attributes:
        sock: Its end of the connection.
        seen: Messages that came.
    """

    def __init__(self, special: dict[int, Answering] | None = None) -> None:
        self.special = special or {}
        self.seen: list[Asked] = []
        self.sock, self.other = socket.socketpair()
        self.answers: dict[int, tuple[int, bytes]] = {}
        self.answered = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="by-hand")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        self.sock.close()
        for asked in self.seen:
            for fd in asked.fds:
                os.close(fd)

    def client(self, timeout: float = WAIT) -> Client:
        """A client of this server."""
        return Client(self.other, timeout=timeout)

    def hang_up(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send any bytes."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self.sock, [data], list(fds))

    def answer(self, asked: Asked, answer: Answer | bytes) -> None:
        """Answer a message."""
        said = Answer(answer) if isinstance(answer, bytes) else answer
        flags = HeaderFlag.REPLY | (HeaderFlag.ERROR if said.error else 0)
        size = 16 + len(said.payload)
        head = HEADER.pack(asked.number, asked.command, size, flags, said.error)
        self.send(head + said.payload, said.fds)

    def ask(self, command: int, payload: bytes, number: int = 7, flags: int = 0) -> None:
        """Ask the client for something."""
        self.send(HEADER.pack(number, command, 16 + len(payload), flags, 0) + payload)

    def result(self, number: int = 7) -> tuple[int, bytes]:
        """The client's answer to what was asked: errno and payload."""
        with self.answered:
            assert self.answered.wait_for(lambda: number in self.answers, WAIT)
            return self.answers.pop(number)

    def _run(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            while (head := self._receive(16)) is not None:
                number, command, size, flags, error = HEADER.unpack(head[0])
                payload = self.sock.recv(size - 16, socket.MSG_WAITALL) if size > 16 else b""
                if flags & HeaderFlag.REPLY:
                    with self.answered:
                        self.answers[number] = error, payload
                        self.answered.notify_all()
                    continue
                asked = Asked(number, command, flags, payload, head[1])
                self.seen.append(asked)
                made = self.special.get(command, usual)(self, asked)
                if made is not None and not flags & HeaderFlag.NO_REPLY:
                    self.answer(asked, made)

    def _receive(self, size: int) -> tuple[bytes, list[int]] | None:
        data, fds, _, _ = socket.recv_fds(self.sock, size, 16)
        return (data, fds) if len(data) == size else None


def usual(server: HandServer, asked: Asked) -> Answer | bytes:
    """What a device with a BAR of a page and four MSI-X vectors answers."""
    index = struct.unpack_from("<I", asked.payload, 8)[0] if len(asked.payload) >= 12 else 0
    match asked.command:
        case Command.VERSION:
            return version()
        case Command.DEVICE_GET_INFO:
            return struct.pack("<IIII", 16, 3, 9, 5)
        case Command.DEVICE_GET_REGION_INFO:
            return region_info(index, {0: PAGE, 7: 256}.get(index, 0))
        case Command.DEVICE_GET_IRQ_INFO:
            return struct.pack("<IIII", 16, 3, index, 4 if index == 2 else 0)
        case Command.REGION_READ:
            (count,) = struct.unpack_from("<I", asked.payload, 12)
            return asked.payload + bytes(count)
        case Command.REGION_WRITE:
            return asked.payload[:16]
    return b""
