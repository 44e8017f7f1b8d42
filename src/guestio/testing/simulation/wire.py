"""The simulated connection between a front-end and a back-end: messages, held until delivered.

What the front-end sends waits here until the scheduler has it delivered, whole or in part. What the
back-end sends is read at once: whether it is acted on at once is the scheduler's choice as well.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from guestio.testing.simulation.workload import InvariantError
from guestio.vhost_user.messages import (
    HEADER_SIZE,
    Header,
    Payload,
    encode_message,
    request_name,
)

_ROOM: Final = 1 << 16


@dataclass(eq=False)
class Answer:
    """An answer that is to come.

    Attributes:
        request: What it answers.
        payload: It, once it is there.
        fds: What came with it; the caller that takes them closes them.
    """

    request: int
    payload: bytes | None = None
    fds: list[int] = field(default_factory=list)


@dataclass
class _Outgoing:
    data: bytes
    fds: list[int]
    request: int
    sent: int = 0


class Wire:
    """Both sockets of a connection, on the front-end's side.

    Attributes:
        theirs: The back-end's end, for it to take.
        requests: What the back-end has asked on its own channel: header and payload.
    """

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._back: socket.socket | None = None
        self._outgoing: deque[_Outgoing] = deque()
        self._answers: list[Answer] = []
        self._read = bytearray()
        self._back_read = bytearray()
        self._fds: list[int] = []
        self.requests: deque[tuple[Header, bytes]] = deque()

    def send(
        self,
        request: int,
        payload: Payload | bytes = b"",
        fds: Sequence[int] = (),
        *,
        answered: bool,
        need_reply: bool = False,
    ) -> Answer:
        """Have a message delivered, some time; duplicates of the fds go with it.

        Args:
            request: What it is.
            payload: Its payload.
            fds: What goes with it.
            answered: Whether there is an answer to it.
            need_reply: Whether to ask for one.
        """
        data = encode_message(request, payload, need_reply=need_reply)
        self._outgoing.append(_Outgoing(data, [os.dup(fd) for fd in fds], request))
        answer = Answer(request)
        if answered:
            self._answers.append(answer)
        else:
            answer.payload = b""
        return answer

    @property
    def waiting(self) -> bool:
        """Whether something is to be delivered."""
        return bool(self._outgoing)

    @property
    def half(self) -> bool:
        """Whether a message was delivered in part."""
        return bool(self._outgoing) and self._outgoing[0].sent > 0

    def deliver(self, part: float = 1.0) -> str:
        """Deliver the next message, or some of it; what it is."""
        out = self._outgoing[0]
        left = len(out.data) - out.sent
        size = left if part >= 1 else max(1, min(left - 1, int(left * part)))
        ancillary = []
        if out.fds:
            passed = array.array("i", out.fds)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)]
        try:
            sent = self._ours.sendmsg([out.data[out.sent : out.sent + size]], ancillary)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            # The back-end does not read, or has gone.
            return "nothing"
        self._close(out.fds)
        out.sent += sent
        if out.sent == len(out.data):
            self._outgoing.popleft()
        return request_name(out.request)

    @staticmethod
    def _close(fds: list[int]) -> None:
        while fds:
            os.close(fds.pop())

    def back_channel(self) -> int:
        """Make the back-end's own channel; the descriptor to send, which is the caller's."""
        if self._back is not None:
            self._back.close()
        self._back, theirs = socket.socketpair()
        self._back.setblocking(False)
        self._back_read.clear()
        return theirs.detach()

    def reply(self, request: int, value: int) -> None:
        """Answer what the back-end asked for on its channel."""
        if self._back is not None:
            data = Header(request, 5, 8).encode() + value.to_bytes(8, "little")
            self._back.send(data)

    def receive(self) -> bool:
        """Read all that the back-end has sent; whether its end is closed.

        Raises:
            InvariantError: It is not what the protocol lets it send.
        """
        gone = self._fill(self._ours, self._read)
        for header, payload in _messages(self._read):
            self._take(header, payload)
        if self._back is not None:
            self._fill(self._back, self._back_read)
            self.requests += _messages(self._back_read)
        return gone

    def _fill(self, sock: socket.socket, read: bytearray) -> bool:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(sock, _ROOM, 8)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True
            self._fds += fds
            if not data:
                return True
            read += data

    def _take(self, header: Header, payload: bytes) -> None:
        for answer in self._answers:
            if answer.request == header.request and header.is_reply:
                self._answers.remove(answer)
                answer.payload = payload
                answer.fds, self._fds = self._fds, []
                return
        raise InvariantError(
            "L10", f"the back-end sent {request_name(header.request)}, which nothing waits for"
        )

    def close(self) -> None:
        """Hang up. May be called again."""
        for out in self._outgoing:
            self._close(out.fds)
        self._outgoing.clear()
        self._close(self._fds)
        for answer in self._answers:
            self._close(answer.fds)
        self._answers.clear()
        self._ours.close()
        if self._back is not None:
            self._back.close()


def _messages(read: bytearray) -> list[tuple[Header, bytes]]:
    found = []
    while len(read) >= HEADER_SIZE:
        header = Header.decode(bytes(read[:HEADER_SIZE]))
        end = HEADER_SIZE + header.size
        if len(read) < end:
            break
        found.append((header, bytes(read[HEADER_SIZE:end])))
        del read[:end]
    return found
