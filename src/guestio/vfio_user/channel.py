"""vfio-user's messages over a connected socket, read many at a time."""

from __future__ import annotations

import socket
from typing import Final, TypeAlias

from guestio._core.vfio_user.inbox import Inbox
from guestio.budgets import SEND_TIMEOUT
from guestio.errors import ProtocolError
from guestio.peer import channel
from guestio.peer.foreign import close_foreign
from guestio.vfio_user.messages import HEADER_SIZE, MAX_FDS, MAX_PAYLOAD, Header

Message: TypeAlias = channel.Message[Header]
"""A received message and the fds that came with it."""

_ODD: Final = {
    1: "message carries more fds than this process may open: raise ulimit -n",
    2: "message carries ancillary data other than fds",
    3: "message carries fds beside its payload",
}
"""What an `Inbox` says that came beside bytes."""


class Channel(channel.Channel[Header]):
    """One end of a vfio-user connection; see :class:`guestio.peer.channel.Channel`.

    Whatever has arrived is read with one system call. Fds are those of the last message that begins
    in it: each message with fds is to be sent by a call of its own.

    Attributes:
        inbox: What was read and not taken yet.
    """

    header_size = HEADER_SIZE
    max_fds = MAX_FDS

    def __init__(
        self,
        sock: socket.socket,
        *,
        with_fds: bool = True,
        send_timeout: float = SEND_TIMEOUT,
    ) -> None:
        self.inbox = Inbox(HEADER_SIZE + MAX_PAYLOAD)
        super().__init__(sock, with_fds=with_fds, send_timeout=send_timeout)

    def _decode_header(self, data: bytes) -> Header:
        return Header.decode(data)

    @property
    def unfinished(self) -> bool:
        """See :class:`guestio.peer.channel.Channel`; what was read and not taken counts."""
        return self.inbox.unfinished

    def _next_message(self) -> Message | None:
        if self.inbox.odd:
            self._fail(_ODD[self.inbox.odd])
        taken = self.inbox.take()
        if taken is None:
            # A header that cannot be is refused before the rest of its message has come.
            if head := self.inbox.header():
                self._judge_header(head)
            return None
        head, payload, fds = taken
        try:
            header = self._judge_header(head)
        except BaseException:
            close_foreign(fds)
            raise
        message = Message(header, payload, fds)
        if len(fds) > self.max_fds:
            message.close()
            self._fail(f"message carries {len(fds)} fds, at most {self.max_fds} are allowed")
        return message

    def _judge_header(self, head: bytes) -> Header:
        try:
            return self._decode_header(head)
        except ProtocolError as error:
            self._fail(str(error))

    def _fill(self) -> None:
        self._check_open()
        try:
            got = self.inbox.read(self.fileno())
        except BlockingIOError:
            raise
        except OSError as error:
            self._raise_gone(error)
        if not got and not self.inbox.odd:
            if self.inbox.unfinished:
                self._fail("peer closed the connection in the middle of a message")
            self._end(0)

    def _drop_fds(self) -> None:
        close_foreign(self.inbox.drop())
