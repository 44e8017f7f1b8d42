"""Requests go out and replies come back over one channel, for several threads at once.

Replies keep the order of the requests of their kind, but not across kinds: a back-end that still
works on a GET_VRING_BASE answers the IOTLB updates that it needs for that first. So a reply
matches the oldest pending request with the same code. There is no reader thread: a waiting caller
reads on behalf of all.

Source: QEMU docs/interop/vhost-user.rst, "Communication" and "VHOST_USER_PROTOCOL_F_REPLY_ACK".
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NoReturn

from guestio.errors import GuestioError, ProtocolError, again
from guestio.vhost_user.channel import Channel, Message, PeerGoneError
from guestio.vhost_user.messages import decode_ack, request_name

if TYPE_CHECKING:
    from collections.abc import Sequence


class RefusedError(GuestioError):
    """The peer answered a request with a failure; the connection lives on."""


class NoAnswerError(GuestioError, TimeoutError):
    """The peer did not answer in time; the connection is of no more use."""


class Pending:
    """A reply that is expected.

    Attributes:
        request: Code of the request that it answers.
        with_fds: Whether it may carry fds.
        message: The reply, once it is there.
    """

    __slots__ = ("message", "request", "with_fds")

    def __init__(self, request: int, with_fds: bool = False) -> None:
        self.request = request
        self.with_fds = with_fds
        self.message: Message | None = None


class RequestChannel:
    """A channel on which this side sends requests and the peer replies.

    Safe for any number of threads. Once it has failed, every call raises what broke it.

    Args:
        sock: A connected Unix stream socket; it belongs to this object from here on.
        timeout: Seconds that one wait, for a reply or for room to send, may take.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.timeout = timeout
        self._socket = sock
        # Hardly any reply carries an fd, see ask_for_fds().
        self._channel = Channel(sock, with_fds=False, send_timeout=timeout)
        self._fds_expected = 0
        self._pending: deque[Pending] = deque()
        self._reading = False
        self._failure: GuestioError | None = None
        self._state = threading.Condition()
        self._sending = threading.Lock()

    @property
    def failure(self) -> GuestioError | None:
        """What broke the connection, or None while it lives."""
        return None if self._failure is None else again(self._failure)

    def fileno(self) -> int:
        """The socket's fd, -1 once closed."""
        return self._channel.fileno()

    def send(
        self,
        request: int,
        data: bytes,
        fds: Sequence[int] = (),
        replies: int = 0,
        *,
        with_fds: bool = False,
    ) -> list[Pending]:
        """Send whole messages of one kind and return what to wait for.

        Args:
            request: Code of the messages.
            data: Their bytes.
            fds: File descriptors to send with the first byte; they stay the caller's.
            replies: How many replies there will be. Each must be waited for.
            with_fds: Whether they may carry fds; only for :meth:`ask_for_fds`.

        Raises:
            GuestioError: The connection is broken.
        """
        expected = [Pending(request, with_fds) for _ in range(replies)]
        with self._sending:
            with self._state:
                if self._failure is not None:
                    raise again(self._failure)
                self._pending.extend(expected)
            try:
                self._channel.send(data, fds)
            except GuestioError as error:
                self.fail(error)
                raise
            except OSError as error:
                self.fail(GuestioError(f"cannot send to the peer: {error}"))
                raise
        return expected

    def wait(self, pending: Pending) -> Message:
        """Wait for a reply.

        Raises:
            NoAnswerError: It did not come in time.
            GuestioError: The connection is broken.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            with self._state:
                while self._reading and pending.message is None and self._failure is None:
                    if not self._state.wait(deadline - time.monotonic()):
                        break
                if pending.message is not None:
                    return pending.message
                if self._failure is not None:
                    raise again(self._failure)
                if self._reading or time.monotonic() >= deadline:
                    self._time_out(pending.request)
                self._reading = True
                self._channel.with_fds = self._fds_expected > 0
            self._read_one(deadline)

    def ask_for_fds(self, request: int, data: bytes, fds: Sequence[int] = ()) -> Message:
        """Send one message whose reply may carry fds, and return that; the fds are its.

        Args:
            request: Code of the message.
            data: Its bytes.
            fds: File descriptors to send with it; they stay the caller's.

        Raises:
            NoAnswerError: It did not come in time.
            GuestioError: The connection is broken.
        """
        with self._state:
            self._fds_expected += 1
        try:
            with self._state:
                # A caller that goes on reading without room for fds could meet the reply.
                if not self._state.wait_for(
                    lambda: not self._reading or self._channel.with_fds, self.timeout
                ):
                    self._time_out(request)
            return self.wait(*self.send(request, data, fds, replies=1, with_fds=True))
        finally:
            with self._state:
                self._fds_expected -= 1

    def wait_ack(self, pending: Pending) -> int:
        """Wait for a reply that is one number, and return that; raises as :meth:`wait`."""
        message = self.wait(pending)
        return decode_ack(message.header, message.payload, pending.request)

    def fail(self, error: GuestioError) -> None:
        """Break the connection: every waiting call, and every later one, raises ``error``."""
        with self._state:
            if self._failure is None:
                self._failure = again(error)
            self._state.notify_all()

    def shut_down(self) -> None:
        """Wake all waiting calls; they and every later one raise PeerGoneError."""
        self.fail(PeerGoneError("the connection was closed on this side"))
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, on which no call may be waiting. May be called again."""
        self.shut_down()
        self._channel.close()

    def _read_one(self, deadline: float) -> None:
        message: Message | None = None
        failure: GuestioError | None = None
        try:
            message = self._channel.recv(max(deadline - time.monotonic(), 0))
        except GuestioError as error:
            # Not the error itself: its traceback would refer to this frame, which refers to it.
            failure = again(error)
        except OSError as error:
            failure = GuestioError(f"cannot read from the peer: {error}")
        finally:
            with self._state:
                self._reading = False
                if message is not None:
                    failure = self._deliver(message)
                if self._failure is None and failure is not None:
                    self._failure = failure
                self._state.notify_all()

    def _deliver(self, message: Message) -> GuestioError | None:
        for pending in self._pending:
            if pending.request == message.request and message.header.is_reply:
                if message.fd_count and not pending.with_fds:
                    message.close()
                    return ProtocolError(
                        f"the reply to {request_name(message.request)} came with fds"
                    )
                self._pending.remove(pending)
                pending.message = message
                return None
        message.close()
        return ProtocolError(f"{request_name(message.request)} came, but no call waits for it")

    def _time_out(self, request: int) -> NoReturn:
        self._failure = NoAnswerError(
            f"the peer did not answer {request_name(request)} for {self.timeout} s"
        )
        self._state.notify_all()
        raise again(self._failure)
