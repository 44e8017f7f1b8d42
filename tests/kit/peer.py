"""The back-end's end of a connection, played by hand or by the real session."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from guestio.errors import GuestioError
from guestio.vhost_user.channel import Channel, Message, PeerGoneError
from guestio.vhost_user.messages import (
    BackendRequest,
    FrontendRequest,
    IotlbMessage,
    Payload,
    encode_ack,
    encode_iotlb,
    encode_message,
)
from guestio.vhost_user.session import Session
from tests.kit.closing import settled_closes
from tests.kit.recording import RecordingHandler

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT = 30.0


def open_fds() -> list[str]:
    """What every open fd refers to, without the one that lists them."""
    settled_closes()
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(f"{fd.name} {fd.readlink()}")
    return sorted(entry for entry in found if "/proc/" not in entry)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Check that neither fds nor threads are left behind, not by a back-end in a thread either."""
    gc.collect()  # what others left in cycles may go at any moment
    fds, threads = set(open_fds()), threading.active_count()
    yield
    deadline = time.monotonic() + WAIT
    # What there was before may end meanwhile.
    while (left := set(open_fds()) - fds) or threading.active_count() > threads:
        assert time.monotonic() < deadline, f"left behind: {left} {threading.enumerate()}"
        time.sleep(0.01)


class Hand:
    """A back-end played by the test: it receives, looks, and answers what it likes."""

    def __init__(self, sock: socket.socket) -> None:
        self.main = Channel(sock)
        self.back_channel: Channel | None = None

    def expect(self, request: int) -> Message:
        """The next message, which must be this request."""
        message = self.main.recv(WAIT)
        assert message is not None, f"request {request} did not come"
        assert message.request == request
        assert not message.header.is_reply
        return message

    def silent(self, seconds: float = 0.05) -> bool:
        """Whether nothing comes for a while."""
        return self.main.recv(seconds) is None

    def ack(self, request: int, value: int = 0) -> None:
        """Answer with one number."""
        self.main.send(encode_ack(request, value))

    def reply(self, request: int, payload: Payload) -> None:
        """Answer with a payload."""
        self.main.send(encode_message(request, payload, reply=True))

    def take_back_channel(self) -> None:
        """Receive SET_BACKEND_REQ_FD and acknowledge it."""
        message = self.expect(FrontendRequest.SET_BACKEND_REQ_FD)
        self.back_channel = Channel.from_fd(message.take_fd())
        self.ack(FrontendRequest.SET_BACKEND_REQ_FD)

    def ask(self, message: IotlbMessage, *, need_reply: bool = True) -> None:
        """Send a request on the back-end's channel."""
        assert self.back_channel is not None
        self.back_channel.send(
            encode_iotlb(BackendRequest.IOTLB_MSG, message, need_reply=need_reply)
        )

    def update(self, value: int = 0, *, answer: bool = True) -> IotlbMessage:
        """Receive an IOTLB message and acknowledge it."""
        message = IotlbMessage.decode(self.expect(FrontendRequest.IOTLB_MSG).payload)
        if answer:
            self.ack(FrontendRequest.IOTLB_MSG, value)
        return message

    def answer(self, seconds: float = WAIT) -> int | None:
        """The reply to the oldest miss; None if there is none in time."""
        assert self.back_channel is not None
        message = self.back_channel.recv(seconds)
        if message is None:
            return None
        assert message.header.is_reply
        return int.from_bytes(message.payload, "little")

    def close(self) -> None:
        """Hang up."""
        self.main.close()
        if self.back_channel is not None:
            self.back_channel.close()


class KeepingHandler(RecordingHandler):
    """Keeps the back-end's channel instead of closing it."""

    def __init__(self) -> None:
        super().__init__()
        self.channel_fd: int | None = None

    def set_backend_channel(self, fd: int) -> None:
        """Take the socket."""
        self._record("set_backend_channel", "fd")
        self.channel_fd = fd


class SessionPeer:
    """A back-end on the real session, in a thread of its own, which remembers what it was told."""

    def __init__(self, sock: socket.socket) -> None:
        self.handler = KeepingHandler()
        self._channel = Channel(sock)
        self._session = Session(self.handler)
        self._thread = threading.Thread(target=self._run)
        self.error: GuestioError | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            while (message := self._channel.recv(None)) is not None:
                reply = self._session.handle(message)
                if reply is not None:
                    self._channel.send(reply, self._session.reply_fds)
        except PeerGoneError:
            pass
        except GuestioError as error:
            self.error = error
            self._channel.close()

    def __exit__(self, *_: object) -> None:
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        self._channel.close()
        if self.handler.channel_fd is not None:
            os.close(self.handler.channel_fd)
        if self.handler.region is not None:
            self.handler.region.close()

    @property
    def names(self) -> list[str]:
        """Names of the handler's methods, in the order they were called."""
        return [call[0] for call in self.handler.calls]
