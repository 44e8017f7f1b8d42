"""The client's end of a connection: requests out, answers in, and what the server asks served.

A thread reads everything that comes. It hands answers to the callers that wait for them, by the
number of the message, and serves the server's DMA_READ and DMA_WRITE: a server may ask at any time,
also while it works on a request of ours, and also while no call waits.

Source: QEMU docs/interop/vfio-user.rst (vfio-user 0.1), "Command Concurrency".
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Final

from guestio.errors import DeviceError, GuestioError, ProtocolError, again
from guestio.peer.channel import PeerGoneError
from guestio.vfio_user.channel import Channel, Message
from guestio.vfio_user.messages import (
    Command,
    Header,
    HeaderFlag,
    RefusalError,
    command_name,
)

_NUMBERS: Final = 1 << 16


class ServerGoneError(DeviceError):
    """The connection to a vfio-user server has ended: it died, hung up, hangs or misbehaves.

    What was under way may have been done or not. ``str()`` says why.
    """


class _Pending:
    """An answer that is waited for; the lock is released when it is there, or will never be."""

    __slots__ = ("command", "done", "message", "with_fds")

    def __init__(self, command: int, with_fds: bool) -> None:
        self.command = command
        self.with_fds = with_fds
        self.message: Message | None = None
        self.done = threading.Lock()
        self.done.acquire()


class Exchange:
    """A connection to a server. For any number of threads.

    Args:
        sock: A connected Unix stream socket; it belongs to this object from here on.
        name: What the server is called, for messages.
        timeout: Seconds that one wait, for an answer or for room to send, may take.
        serve: Answers a DMA_READ or DMA_WRITE of the server: the payload, or a `RefusalError`.
            Called in the thread of this object.
        ended: Called there when the connection is of no more use, but not after :meth:`close`.

    Raises:
        DeviceError: The system has no thread left; the socket is closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        timeout: float,
        serve: Callable[[Message], bytes],
        ended: Callable[[], None],
    ) -> None:
        self._name = name
        self.timeout = timeout
        self._serve_request = serve
        self._ended = ended
        self._socket = sock
        self._channel = Channel(sock, send_timeout=timeout)
        self._pending: dict[int, _Pending] = {}
        self._number = 0
        self._failure: ServerGoneError | None = None
        self._closing = False
        self._state = threading.Lock()
        self._sending = threading.Lock()
        self._hung_up = threading.Event()
        # A daemon: a client that was not closed must not keep the process.
        self._thread = threading.Thread(target=self._run, name="guestio-vfio-user", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._channel.close()
            raise DeviceError(f"no thread for the messages of {name}: {error}") from error
        except BaseException:
            self._channel.close()
            raise

    @property
    def failure(self) -> ServerGoneError | None:
        """What ended the connection, or None while it lives."""
        return None if self._failure is None else again(self._failure)

    @property
    def hung_up(self) -> bool:
        """Whether the server has closed its end, as a process that ends does."""
        return self._hung_up.is_set()

    def fileno(self) -> int:
        """The socket's descriptor, -1 once closed."""
        return self._channel.fileno()

    def wait_hang_up(self, seconds: float) -> bool:
        """Wait until the server has closed its end of a connection that has failed."""
        return self._hung_up.wait(seconds)

    def request(
        self,
        command: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        with_fds: bool = False,
    ) -> Message:
        """Send a request and wait for its answer, which is the caller's to close.

        Args:
            command: What to ask.
            payload: With what.
            fds: Descriptors to send; they stay the caller's.
            with_fds: Whether the answer may carry descriptors.

        Raises:
            RefusalError: The server answered with an error.
            ServerGoneError: The connection has ended, or ends because no answer came in time.
        """
        pending = _Pending(command, with_fds)
        self._send(command, payload, fds, pending)
        if not pending.done.acquire(timeout=self.timeout):
            self.fail(f"it did not answer {command_name(command)} for {self.timeout:g} s")
        with self._state:
            message, failure = pending.message, self._failure
        if message is None:
            assert failure is not None
            raise again(failure)
        header = message.header
        if header.flags & HeaderFlag.ERROR:
            message.close()
            raise RefusalError(header.error or errno.EIO, f"the server refuses {header.name}")
        return message

    def post(self, command: int, payload: bytes) -> None:
        """Send a message that the server does not answer.

        Raises:
            ServerGoneError: The connection has ended, or the server does not read.
        """
        self._send(command, payload)

    def fail(self, reason: str) -> None:
        """End the connection: every waiting call, and every later one, raises."""
        with self._state:
            if self._failure is not None:
                return
            self._failure = ServerGoneError(f"{self._name} is gone: {reason}")
            waiting, self._pending = list(self._pending.values()), {}
        for pending in waiting:
            pending.done.release()
        # The server hears of it; its own end tells when it has let go of everything.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR if not self._closing else socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and wait for the thread. May be called again."""
        self._closing = True
        self.fail("the client was closed")
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        # Nothing sends any more: what tried has failed, or sees the failure first.
        with self._sending:
            self._channel.close()

    def _send(
        self,
        command: int,
        payload: bytes,
        fds: Sequence[int] = (),
        pending: _Pending | None = None,
    ) -> None:
        with self._sending:
            number = self._enter(pending)
            flags = 0 if pending is not None else int(HeaderFlag.NO_REPLY)
            header = Header(number, command, len(payload), flags)
            self._transmit(header.encode() + payload, fds)

    def _enter(self, pending: _Pending | None) -> int:
        """Choose the number of a message, and note what waits for its answer."""
        with self._state:
            if self._failure is not None:
                raise again(self._failure)
            if len(self._pending) >= _NUMBERS:
                raise DeviceError(f"{_NUMBERS} requests wait for {self._name} already")
            while True:
                self._number = (self._number + 1) % _NUMBERS
                if self._number not in self._pending:
                    break
            if pending is not None:
                self._pending[self._number] = pending
            return self._number

    def _transmit(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send; needs the lock for that."""
        try:
            self._channel.send(data, fds)
        except (GuestioError, OSError) as error:
            self.fail(str(error))
            failure = self._failure
            assert failure is not None
            raise again(failure) from None

    def _run(self) -> None:
        try:
            while True:
                message = self._channel.recv(None)
                if message is not None:
                    self._receive(message)
        except PeerGoneError as error:
            self.fail(str(error))
        except (GuestioError, OSError, ValueError) as error:
            self.fail(str(error))
        except MemoryError:
            self.fail("memory was lacking for its messages")
        if not self._closing:
            self._ended()
        self._await_hang_up()

    def _await_hang_up(self) -> None:
        """Wait until the server has closed its end, or this one is closed."""
        if self._closing:
            return
        poll = select.poll()
        poll.register(self._socket, 0)
        poll.poll()
        if not self._closing:
            self._hung_up.set()

    def _receive(self, message: Message) -> None:
        with message:
            if message.header.is_reply:
                self._deliver(message)
            else:
                self._serve(message)

    def _deliver(self, message: Message) -> None:
        header = message.header
        with self._state:
            pending = self._pending.get(header.number)
            if pending is None or pending.command != header.request:
                raise ProtocolError(f"an answer to {header.name} came that nothing waits for")
            if message.fd_count and not pending.with_fds:
                raise ProtocolError(f"the answer to {header.name} came with descriptors")
            del self._pending[header.number]
            # A message of its own: what is not taken from the one received is closed.
            pending.message = Message(header, message.payload, message.take_fds())
        pending.done.release()

    def _serve(self, message: Message) -> None:
        header = message.header
        try:
            if header.request not in (Command.DMA_READ, Command.DMA_WRITE):
                raise RefusalError(errno.ENOSYS, f"the server asks for {header.name}")
            if message.fd_count:
                raise RefusalError(errno.EINVAL, f"{header.name} came with descriptors")
            answer = header.reply(self._serve_request(message))
        except RefusalError as refusal:
            answer = header.refuse(refusal.number)
        if header.wants_reply:
            with self._sending:
                self._transmit(answer)
