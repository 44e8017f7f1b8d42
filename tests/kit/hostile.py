"""Front-ends by hand that may send anything, and the check that none of them is the end of all."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Sequence

from guestio.vhost_user.messages import U64, FrontendRequest, ProtocolFeature, encode_message
from guestio.vhost_user.session import SUPPORTED_PROTOCOL_FEATURES
from tests.kit.serving import Serving, memfd

F = FrontendRequest


class Raw:
    """A connection that sends any bytes with any fds, all of them its own."""

    def __init__(self, serving: Serving) -> None:
        self.sock = serving.connect()
        self._fds: list[int] = []

    def memfd(self, size: int = 0x10000) -> int:
        self._fds.append(memfd(size))
        return self._fds[-1]

    def own(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendmsg(
                [data],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [],
            )

    def request(
        self, request: int, payload: object = b"", fds: Sequence[int] = (), *, ack: bool = False
    ) -> None:
        self.send(encode_message(request, payload, need_reply=ack), fds)  # type: ignore[arg-type]

    def negotiate(self, features: int = 1 << 32 | 1 << 30, *, ack: bool = False) -> None:
        protocol = int(SUPPORTED_PROTOCOL_FEATURES)
        if not ack:
            protocol &= ~ProtocolFeature.REPLY_ACK
        self.request(F.SET_PROTOCOL_FEATURES, U64(protocol))
        self.request(F.SET_FEATURES, U64(features))

    def closed(self) -> bool:
        """Wait until the back-end hangs up."""
        try:
            while self.sock.recv(4096):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.sock.close()
        for fd in self._fds:
            os.close(fd)

    def __enter__(self) -> Raw:  # noqa: PYI034 - local
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def directory(raw: Raw) -> int:
    return raw.own(os.open("/", os.O_RDONLY))


def pipe(raw: Raw) -> int:
    reader, writer = os.pipe()
    raw.own(writer)
    return raw.own(reader)


def event(raw: Raw) -> int:
    return raw.own(os.eventfd(0))


def read_only(raw: Raw) -> int:
    return raw.own(os.open("/proc/self/exe", os.O_RDONLY))


def short(raw: Raw) -> int:
    return raw.memfd(100)


def file(raw: Raw) -> int:
    return raw.memfd()


class Lingering:
    """A TCP connection whose last descriptor takes long to close: the other end does not read.

    Args:
        seconds: How long, unless :meth:`end` comes before.
    """

    def __init__(self, seconds: int = 60) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            # Little goes over, so that much is left to be sent.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.sock = socket.create_connection(listener.getsockname())
            self.other, _ = listener.accept()
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.sock.send(bytes(65536))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
        self.sock.setblocking(True)

    def give_away(self, raw: Raw, request: int, payload: object = b"") -> None:
        """Send it with a message, so that the receiver has the last descriptor of it."""
        raw.request(request, payload, [self.sock.fileno()])
        self.forget()

    def forget(self) -> None:
        """Close our own descriptor, which is not the last one."""
        self.sock.close()

    def end(self) -> None:
        """Let the thread that closes it go on."""
        # Closing with unread data resets the connection.
        self.other.close()
