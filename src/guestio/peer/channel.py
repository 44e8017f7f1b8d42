"""Messages and their file descriptors over a connected Unix stream socket.

A `Channel` turns the byte stream into `Message` objects and back; it knows framing and fds, not
what requests mean. A protocol derives its own from it, which decodes its headers.

Ownership: every fd that arrives belongs to its `Message` and is closed with it, unless the
receiver takes it. Every received fd is close-on-exec. Whatever the peer does (stops in the middle,
sends fds where none belong, floods, never reads) ends in an exception in bounded time and memory,
with no fd left behind.

Source: unix(7).
"""

from __future__ import annotations

import array
import errno
import select
import socket
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final, Generic, NoReturn, Protocol, Self, TypeVar

from guestio.budgets import SEND_TIMEOUT
from guestio.errors import GuestioError, ProtocolError, again
from guestio.peer.foreign import (
    CONTROL_SPACE,
    check_channel,
    close_foreign,
    close_socket,
    received_fds,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_READ_AHEAD: Final = 16384
# Non-blocking per call: the peer may share the file description and could clear O_NONBLOCK.
_RECV_FLAGS: Final = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_SEND_FLAGS: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})


class PeerGoneError(GuestioError):
    """The other end closed the connection between two messages, or was gone when we sent."""


class ConnectionLostError(PeerGoneError):
    """The operating system failed to send or receive, for want of memory say; the peer may live."""


class Header(Protocol):
    """What a channel has to know of a decoded header."""

    @property
    def name(self) -> str:
        """What the message is called, for errors."""
        ...

    @property
    def request(self) -> int:
        """Code of the request."""
        ...

    @property
    def flags(self) -> int:
        """Flags of the message."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the payload that follows."""
        ...


H = TypeVar("H", bound=Header)


class Message(Generic[H]):
    """A received message and the fds that came with it.

    Use it as a context manager, or call `close()`: fds that were not taken are closed then.

    Attributes:
        header: Request, flags and size.
        payload: The payload's bytes, `header.size` of them.
    """

    __slots__ = ("_fds", "header", "payload")

    def __init__(self, header: H, payload: bytes = b"", fds: Iterable[int] = ()) -> None:
        self._fds = list(fds)
        self.header = header
        self.payload = payload

    @property
    def request(self) -> int:
        """Code of the request."""
        return self.header.request

    @property
    def fd_count(self) -> int:
        """How many fds are not taken yet."""
        return len(self._fds)

    @property
    def fds(self) -> tuple[int, ...]:
        """The fds that are not taken; they stay the message's to close."""
        return tuple(self._fds)

    def take_fd(self) -> int:
        """Return the first fd left; it is the caller's to close from now on.

        Raises:
            IndexError: None is left.
        """
        return self._fds.pop(0)

    def take_fds(self) -> list[int]:
        """Return all fds left, in the order they were sent; they are the caller's to close."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        """Close the fds that were not taken. May be called again."""
        close_foreign(self.take_fds())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fds:
            self.close()

    def __del__(self) -> None:
        if self._fds:
            self.close()

    def __repr__(self) -> str:
        return (
            f"<Message {self.header.name} flags={self.header.flags:#x} "
            f"payload={len(self.payload)} bytes, {self.fd_count} fds>"
        )


class Channel(ABC, Generic[H]):
    """One end of a connection.

    Receiving and sending may happen in two threads, each of them in one thread at a time.

    Args:
        sock: A connected AF_UNIX SOCK_STREAM socket; the channel owns it from here on.
        with_fds: Whether the peer may send fds. Without, whatever is there is read in one go,
            which makes floods of small messages (IOTLB misses, acknowledgements) cheap, and an fd
            is a violation of the protocol. May be changed while no thread receives.
        send_timeout: Seconds one `send` may take in all, however slowly the peer reads.
    """

    header_size: ClassVar[int]
    """Bytes of a header."""
    max_fds: ClassVar[int]
    """Fds of one message at most."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        with_fds: bool = True,
        send_timeout: float = SEND_TIMEOUT,
    ) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.with_fds = with_fds
        self._send_timeout = send_timeout
        self._buffer = b""
        self._start = 0
        self._header: H | None = None
        self._fds: list[int] = []
        self._failure: GuestioError | None = None
        self._unsent = b""
        self._unsent_fds: tuple[int, ...] = ()
        self._stuck_since = 0.0

    @classmethod
    def from_fd(
        cls, fd: int, *, with_fds: bool = False, send_timeout: float = SEND_TIMEOUT
    ) -> Self:
        """Make a channel of an fd that a peer sent (SET_BACKEND_REQ_FD).

        The fd belongs to the channel, and is closed if there will be none.

        Raises:
            ProtocolError: It is not a connected Unix stream socket, or connected to a listener.
        """
        try:
            check_channel(fd)
            sock = socket.socket(fileno=fd)
        except BaseException:
            close_foreign([fd])
            raise
        return cls(sock, with_fds=with_fds, send_timeout=send_timeout)

    @abstractmethod
    def _decode_header(self, data: bytes) -> H:
        """Decode a header.

        Raises:
            ProtocolError: It is none, or announces more than a message may carry.
        """

    def fileno(self) -> int:
        """Return the socket's fd for a selector, -1 once closed."""
        return self._socket.fileno()

    def recv(self, timeout: float | None = 0) -> Message[H] | None:
        """Return the next message, or None if it has not arrived completely.

        Bytes that did arrive are kept. Several messages may be waiting inside the channel when the
        selector reports it readable once: call until None.

        Args:
            timeout: Seconds to wait for the rest; 0 does not wait, None waits for ever.

        Raises:
            PeerGoneError: The peer closed the connection between two messages.
            ProtocolError: It closed in the middle of one, or sent what no peer may send. The
                stream cannot be followed any more: every later call raises the same.
            ValueError: The channel is closed.
        """
        if self._failure is not None:
            raise again(self._failure)
        deadline = None if timeout is None else time.monotonic() + timeout
        while (message := self._next_message()) is None:
            try:
                self._fill()
            except BlockingIOError:
                if timeout == 0 or not self._wait(select.POLLIN, deadline):
                    return None
        return message

    def take_read(self) -> Message[H] | None:
        """The next message if all of it was read already, or None; raises as :meth:`recv`.

        For a reader that must come to an end although the peer goes on sending: what has not been
        read keeps the descriptor readable.
        """
        if self._failure is not None:
            raise again(self._failure)
        return self._next_message()

    @property
    def at_rest(self) -> bool:
        """Whether nothing of a message was taken from the socket that :meth:`recv` still has."""
        return not self.unfinished and self._failure is None

    @property
    def unfinished(self) -> bool:
        """Whether a part of a message was received whose rest has not come."""
        return self._start < len(self._buffer) or self._header is not None or bool(self._fds)

    def post(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send without waiting for the peer to read; :meth:`flush` sends what is left.

        Args:
            data: Whole messages.
            fds: As for :meth:`send`, and to be kept open until all is sent.

        Returns:
            Whether all of it was sent.

        Raises:
            PeerGoneError: The peer has closed the connection.
            ProtocolError: The channel is of no more use.
        """
        if self._failure is not None:
            raise self._failure
        if self._unsent:
            self._unsent += data
            return False
        self._check_open()
        sent = self._send_some(data, fds)
        if sent < len(data):
            self._unsent, self._unsent_fds = data[sent:], () if sent else tuple(fds)
            self._stuck_since = time.monotonic()
        return not self._unsent

    def flush(self) -> bool:
        """Send what :meth:`post` left; whether all of it was sent.

        Raises:
            PeerGoneError: The peer has closed the connection.
            ProtocolError: The peer has read nothing for the channel's `send_timeout`.
        """
        if self._unsent:
            if sent := self._send_some(self._unsent, self._unsent_fds):
                self._unsent, self._unsent_fds = self._unsent[sent:], ()
                self._stuck_since = time.monotonic()
            elif time.monotonic() - self._stuck_since >= self._send_timeout:
                self._fail(f"peer did not read a message for {self._send_timeout} s")
        return not self._unsent

    @property
    def backlog(self) -> int:
        """Bytes that :meth:`post` left."""
        return len(self._unsent)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a whole message, its fds with the first byte.

        Waits while the peer's buffer is full, at most the channel's `send_timeout` in all. The fds
        stay the caller's.

        Raises:
            PeerGoneError: The peer has closed the connection.
            ProtocolError: The peer did not read in time. Part of the message may be sent, so the
                channel is of no more use.
            ValueError: More than `max_fds` fds, or the channel is closed.
        """
        if self._failure is not None:
            raise again(self._failure)
        if len(fds) > self.max_fds:
            raise ValueError(f"{len(fds)} fds in one message, at most {self.max_fds}")
        self._check_open()
        if self._unsent:
            self._send_rest(memoryview(self._unsent), self._unsent_fds)
            self._unsent, self._unsent_fds = b"", ()
        sent = self._send_some(data, fds)
        if sent < len(data):
            self._send_rest(memoryview(data)[sent:], () if sent else fds)

    def _send_some(self, data: bytes | memoryview, fds: Sequence[int]) -> int:
        """Send what there is room for; the bytes sent."""
        try:
            if not fds:
                return self._socket.send(data, _SEND_FLAGS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            return self._socket.sendmsg((data,), [rights], _SEND_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._raise_gone(error)

    def _send_rest(self, rest: memoryview, fds: Sequence[int]) -> None:
        deadline = time.monotonic() + self._send_timeout
        while rest:
            if not self._wait(select.POLLOUT, deadline):
                self._fail(f"peer did not read a message for {self._send_timeout} s")
            if sent := self._send_some(rest, fds):
                rest, fds = rest[sent:], ()

    def close(self) -> None:
        """Close the socket and the fds of an unfinished message. May be called again."""
        close_socket(self._socket)
        self._drop_fds()
        self._buffer, self._start, self._header = b"", 0, None
        self._unsent, self._unsent_fds = b"", ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_message(self) -> Message[H] | None:
        """Cut a complete message off the front of what has arrived."""
        body = self._start + self.header_size
        if self._header is None:
            if len(self._buffer) < body:
                return None
            try:
                self._header = self._decode_header(self._buffer[self._start : body])
            except ProtocolError as error:
                self._fail(str(error))
        end = body + self._header.size
        if len(self._buffer) < end:
            return None
        message = Message(self._header, self._buffer[body:end], self._fds)
        self._start, self._header, self._fds = end, None, []
        return message

    def _fill(self) -> None:
        """Read once; raises `BlockingIOError` if nothing is there."""
        # Fds belong to the message whose header they came with, so where there may be some, a read
        # must not reach into the next message.
        wanted = self.header_size if self._header is None else self.header_size + self._header.size
        pending = self._buffer[self._start :]
        size = wanted - len(pending) if self.with_fds else _READ_AHEAD
        self._check_open()
        try:
            data, control, flags, _ = self._socket.recvmsg(size, CONTROL_SPACE, _RECV_FLAGS)
        except BlockingIOError:
            raise
        except OSError as error:
            self._raise_gone(error)
        if control or flags & socket.MSG_CTRUNC:
            known = len(self._fds)
            try:
                # All of them or, for want of memory, none.
                self._fds.extend(received_fds(control))
            except MemoryError:
                close_foreign(received_fds(control))
                raise
            self._judge(control, flags, len(self._fds) > known)
        if not data:
            self._end(len(pending))
        self._buffer, self._start = pending + data, 0

    def _judge(self, control: list[tuple[int, int, bytes]], flags: int, more: bool) -> None:
        """Refuse what came beside the bytes if it is anything but up to `max_fds` fds."""
        beside = not self.with_fds or self._header is not None
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS
        strange = any((level, kind) != rights for level, kind, _ in control)
        if flags & socket.MSG_CTRUNC:
            self._fail("message carries more fds than this process may open: raise ulimit -n")
        if beside and more:
            self._fail("message carries fds beside its payload or on a channel without fds")
        if strange:
            self._fail("message carries ancillary data other than fds")
        if len(self._fds) > self.max_fds:
            self._fail(f"message carries {len(self._fds)} fds, at most {self.max_fds} are allowed")

    def _end(self, received: int) -> NoReturn:
        if received or self._fds:
            what = "a header" if self._header is None else self._header.name
            self._fail(f"peer closed the connection after {received} bytes of {what}")
        raise PeerGoneError("peer closed the connection")

    def _fail(self, reason: str) -> NoReturn:
        self._drop_fds()
        self._failure = ProtocolError(reason)
        raise again(self._failure)

    def _raise_gone(self, error: OSError) -> NoReturn:
        if error.errno in _GONE:
            raise PeerGoneError(f"peer is gone: {error}") from None
        # What was sent or received of a message is unknown.
        self._drop_fds()
        self._failure = ConnectionLostError(f"the connection failed: {error}")
        raise again(self._failure) from None

    def _wait(self, event: int, deadline: float | None) -> bool:
        """Wait for the socket; False when the deadline passes first."""
        poll = select.poll()
        poll.register(self._socket, event)
        if deadline is None:
            return bool(poll.poll())
        left = deadline - time.monotonic()
        return left > 0 and bool(poll.poll(left * 1000))

    def _check_open(self) -> None:
        if self._socket.fileno() < 0:
            raise ValueError("the channel is closed")

    def _drop_fds(self) -> None:
        fds, self._fds = self._fds, []
        close_foreign(fds)
