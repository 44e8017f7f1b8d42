"""A connection over a Unix socket on which anything can be sent, whatever the protocol.

It trusts nothing that it receives: every wait has a limit, and descriptors that nothing asked for
are closed.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Self

from guestio.faults.outcomes import AbsentError, FailError, HungUpError, SilentError

_PAUSE: Final = 0.005
_MAX_FDS: Final = 16
_GONE: Final = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


class RawLink(ABC):
    """One connection. For one thread.

    Args:
        sock: A connected stream socket, which belongs to the link.
        patience: Seconds that one answer may take.
    """

    def __init__(self, sock: socket.socket, patience: float) -> None:
        self._sock = sock
        self._patience = patience
        self._fds: list[int] = []
        self._came = bytearray()
        self._came_fds: list[int] = []

    @classmethod
    def connect(cls, path: str, patience: float) -> Self:
        """Connect to what listens.

        Raises:
            AbsentError: Nothing listens.
            SilentError: Too many connections wait to be accepted, for so long.
        """
        deadline = time.monotonic() + patience
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(patience)
            while True:
                try:
                    sock.connect(path)
                except BlockingIOError:
                    # As many wait already as the back-end lets wait.
                    if time.monotonic() >= deadline:
                        raise SilentError(f"accepts no connection within {patience:g} s") from None
                    time.sleep(_PAUSE)
                except OSError as error:
                    raise AbsentError(
                        f"cannot connect to {path}: {error.strerror or error}"
                    ) from None
                else:
                    return cls(sock, patience)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Hang up. May be called again."""
        self._sock.close()
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def end_sending(self) -> None:
        """Say that nothing more comes; answers can still be received."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def fileno(self) -> int:
        """The socket, to be watched."""
        return self._sock.fileno()

    @property
    def peer_pid(self) -> int:
        """Process that listens at the other end, as the kernel knows it; 0 if it cannot tell."""
        with contextlib.suppress(OSError):
            raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return int(struct.unpack("=iII", raw)[0])
        return 0

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, with descriptors, which stay the caller's.

        Raises:
            HungUpError: The back-end has closed the connection.
            SilentError: It does not read.
        """
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._sock.sendmsg([data], ancillary)
            if sent < len(data):
                self._sock.sendall(data[sent:])
        except _GONE:
            raise HungUpError("closed the connection") from None
        except TimeoutError:
            raise SilentError(f"reads nothing for {self._patience:g} s") from None

    def _fill(self, size: int, deadline: float, limit: float) -> None:
        """Read until so many bytes are there; what came is kept if that takes too long."""
        while (missing := size - len(self._came)) > 0:
            left = deadline - time.monotonic()
            if not self._readable(max(left, 0)):
                raise SilentError(f"sent no answer within {limit:g} s")
            try:
                data, ancillary, _, _ = self._sock.recvmsg(
                    missing, socket.CMSG_SPACE(4 * _MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
            except _GONE:
                data, ancillary = b"", []
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    came = array.array("i", raw[: len(raw) // 4 * 4])
                    self._fds += came
                    self._came_fds += came
            if not data:
                raise HungUpError("closed the connection")
            self._came += data

    def _readable(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        return bool(poller.poll(seconds * 1000))

    def quiet(self, seconds: float) -> bool:
        """Wait so long for anything to come; whether nothing did. A hang-up is something."""
        return not self._came and not self._readable(seconds)

    def closed(self, seconds: float) -> bool:
        """Wait so long for the back-end to close the connection; messages are thrown away."""
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or self.quiet(left):
                return False
            try:
                self.receive(max(left, 0.01))
            except HungUpError:
                return True
            except (SilentError, FailError):
                return False

    @abstractmethod
    def receive(self, timeout: float | None = None) -> object:
        """Wait for the next message, within ``timeout`` seconds or the link's patience."""
