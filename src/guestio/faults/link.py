"""A vhost-user connection on which anything can be sent.

:class:`~guestio.vhost_user.frontend.Frontend` is honest and refuses to send nonsense; this is its
opposite. It still trusts nothing that it receives: sizes are bounded, every wait has a limit, and
descriptors that nothing asked for are closed.

Source: QEMU docs/interop/vhost-user.rst, "Message Specification" and "Communication".
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from guestio.faults.outcomes import FailError, HungUpError, RejectError, SilentError
from guestio.faults.raw_link import RawLink
from guestio.vhost_user.messages import (
    HEADER_SIZE,
    MAX_PAYLOAD_SIZE,
    U64,
    FrontendRequest,
    HeaderFlag,
    Payload,
    ProtocolFeature,
    encode_message,
    request_name,
)

_F = FrontendRequest
_HEADER: Final = struct.Struct("=III")
_VERSION: Final = 1
_VERSION_MASK: Final = 3


@dataclass(slots=True)
class Reply:
    """A message that the back-end sent.

    Attributes:
        request: Code that it carries.
        flags: Of its header.
        payload: What follows the header.
        fds: Descriptors that came with it; the link closes them.
    """

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def u64(self) -> int:
        """The payload as one number.

        Raises:
            FailError: It is not 8 bytes.
        """
        if len(self.payload) != 8:
            raise FailError(
                f"the reply to {request_name(self.request)} has {len(self.payload)} bytes, not 8"
            )
        return int(U64.decode(self.payload).value)


class Link(RawLink):
    """One connection to a back-end, or to a front-end's end of a back-end channel.

    For one thread.

    Args:
        sock: A connected stream socket, which belongs to the link.
        patience: Seconds that one reply may take.

    Attributes:
        protocol: Protocol features that were negotiated on it.
        features: Virtio features that were negotiated on it.
    """

    def __init__(self, sock: socket.socket, patience: float) -> None:
        super().__init__(sock, patience)
        self.protocol = 0
        self.features = 0

    # Sending

    def request(
        self,
        request: int,
        payload: Payload | bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> None:
        """Send a whole message."""
        self.send(encode_message(request, payload, need_reply=need_reply), fds)

    # Receiving

    def receive(self, timeout: float | None = None) -> Reply:
        """Wait for the next message.

        Raises:
            HungUpError: The back-end has closed the connection.
            SilentError: Nothing came in time.
            FailError: What came is no message.
        """
        limit = self._patience if timeout is None else timeout
        deadline = time.monotonic() + limit
        self._fill(HEADER_SIZE, deadline, limit)
        request, flags, size = _HEADER.unpack_from(self._came)
        if size > MAX_PAYLOAD_SIZE:
            raise FailError(f"sent a message that announces {size} bytes of payload")
        self._fill(HEADER_SIZE + size, deadline, limit)
        payload = bytes(self._came[HEADER_SIZE : HEADER_SIZE + size])
        del self._came[: HEADER_SIZE + size]
        fds, self._came_fds = self._came_fds, []
        return Reply(request, flags, payload, fds)

    # Requests with an answer

    def ask(
        self,
        request: int,
        payload: Payload | bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
    ) -> Reply:
        """Send a request and wait for its own reply, whose header is judged.

        Raises:
            FailError: The reply's header is wrong.
            HungUpError: The connection was closed instead.
            SilentError: Nothing came in time.
        """
        self.request(request, payload, fds, need_reply=need_reply)
        try:
            reply = self.receive()
        except SilentError:
            raise SilentError(
                f"{request_name(request)} was not answered within {self._patience:g} s"
            ) from None
        except HungUpError:
            raise HungUpError(f"closed the connection at {request_name(request)}") from None
        self.judge(reply, request)
        return reply

    @staticmethod
    def judge(reply: Reply, request: int) -> None:
        """Judge the header of a reply.

        Raises:
            FailError: It is of another request, is no reply, or of another version.
        """
        name = request_name(request)
        if reply.request != request:
            raise FailError(f"{name} was answered with {request_name(reply.request)}")
        if not reply.flags & HeaderFlag.REPLY:
            raise FailError(f"the answer to {name} has no reply flag (flags {reply.flags:#x})")
        if reply.flags & _VERSION_MASK != _VERSION:
            raise FailError(f"the answer to {name} is of version {reply.flags & _VERSION_MASK}")

    def u64(self, request: int, payload: Payload | bytes = b"") -> int:
        """Ask for a number."""
        return self.ask(request, payload).u64

    @property
    def acknowledges(self) -> bool:
        """Whether REPLY_ACK was negotiated."""
        return bool(self.protocol & ProtocolFeature.REPLY_ACK)

    def result(self, request: int, payload: Payload | bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send a request without a reply of its own and find out what became of it.

        With REPLY_ACK the acknowledgement says so. Without it a GET_FEATURES behind it shows that
        the connection has survived.

        Returns:
            0 for success.

        Raises:
            HungUpError: The connection was closed.
        """
        if self.acknowledges:
            return self.ask(request, payload, fds, need_reply=True).u64
        self.request(request, payload, fds)
        try:
            self.ask(_F.GET_FEATURES)
        except HungUpError:
            raise HungUpError(f"closed the connection at {request_name(request)}") from None
        return 0

    def do(self, request: int, payload: Payload | bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send an honest request, which must not fail.

        Raises:
            FailError: It was refused.
        """
        if value := self.result(request, payload, fds):
            raise FailError(f"{request_name(request)} was refused ({value})")

    def refuses(
        self, request: int, payload: Payload | bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        """Send a request that may be refused.

        Returns if it was accepted.

        Raises:
            RejectError: It was refused, by an acknowledgement or by closing the connection.
        """
        name = request_name(request)
        try:
            value = self.result(request, payload, fds)
        except HungUpError:
            raise RejectError(f"closed the connection at {name}") from None
        if value:
            raise RejectError(f"{name} was refused ({value})")
