"""The file in which a device's state travels to a front-end or from it.

A front-end passes one end of a pipe, or of what it likes, and lets the back-end use a channel of
its own instead. A memfd is that: nothing in it can be waited for, and it has no more room than the
device's state may have. Other back-ends use the pipe, so a front-end knows both.

Source: QEMU docs/interop/vhost-user.rst, "Migrating back-end state", SET_DEVICE_STATE_FD.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, Self, TypeVar

from guestio._core.base.syscalls import is_memory, socket_kind
from guestio.errors import DeviceError, GuestioError, ProtocolError
from guestio.memory.backing import close_fd
from guestio.peer.foreign import close_foreign, is_pipe
from guestio.vhost_user.request_channel import NoAnswerError
from guestio.virtio.saved import HEAD_SIZE

_T = TypeVar("_T")

_FIXED: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class StateFile:
    """A file of this process that a front-end reads a device's state from, or writes one to.

    Attributes:
        fd: Its descriptor.
        writable: Whether the front-end writes it.

    Raises:
        DeviceError: The host has no room for it.
    """

    def __init__(self, content: bytes, size: int, seals: int, *, writable: bool) -> None:
        self.fd = -1
        self.writable = writable
        try:
            self.fd = os.memfd_create("guestio-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, size)
            at = 0
            while at < len(content):
                at += os.pwrite(self.fd, content[at:], at)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        except OSError as error:
            self.close()
            raise DeviceError(
                f"there is no file for a device's state of {size} bytes: {error.strerror}"
            ) from error

    @classmethod
    def to_read(cls, state: bytes) -> Self:
        """A file with a state, whose end is the state's."""
        return cls(state, len(state), _FIXED | fcntl.F_SEAL_WRITE, writable=False)

    @classmethod
    def to_write(cls, room: int) -> Self:
        """A file with room for so many bytes; a write beyond fails."""
        return cls(b"", room, _FIXED, writable=True)

    def content(self, size_of: Callable[[bytes], int]) -> bytes:
        """A copy of what the front-end wrote.

        Args:
            size_of: How many bytes follow those of a head; may raise.
        """
        head = os.pread(self.fd, HEAD_SIZE, 0)
        return head + os.pread(self.fd, size_of(head), HEAD_SIZE)

    def close(self) -> None:
        """Let go of it; the front-end has a descriptor of its own. May be called again."""
        if self.fd >= 0:
            close_fd(self.fd)
            self.fd = -1


_CHUNK: Final = 1 << 16


def read_state(fd: int, most: int, until: float) -> bytes:
    """Read a device's state from what a back-end writes to or has given, to its end.

    Args:
        fd: A pipe, a stream socket or memory; it stays the caller's.
        most: Bytes that it may have.
        until: When it must be there, of the monotonic clock.

    Raises:
        ProtocolError: It is something else, or longer.
        NoAnswerError: It does not come in time.
        GuestioError: It cannot be read.
    """
    parts: list[bytes] = []
    size = 0
    with _waiting_for_nothing(fd, os.O_RDONLY) as (read, _, ready):
        while data := _try(partial(read, _CHUNK), ready, until):
            size += len(data)
            if size > most:
                raise ProtocolError(f"the back-end's state has more than {most} bytes")
            parts.append(data)
    return b"".join(parts)


def write_state(fd: int, state: bytes, until: float) -> None:
    """Write a device's state to what a back-end reads from or has given; otherwise as above."""
    left = memoryview(state)
    with _waiting_for_nothing(fd, os.O_WRONLY) as (_, write, ready):
        while left:
            done = _try(partial(write, left[:_CHUNK]), ready, until)
            left = left[done:]


def _try(do: Callable[[], _T], ready: select.poll, until: float) -> _T:
    while True:
        try:
            return do()
        except (BlockingIOError, InterruptedError):
            left = until - time.monotonic()
            if left <= 0:
                raise NoAnswerError("the back-end does not go on with its state") from None
            ready.poll(left * 1000)
        except OSError as error:
            raise GuestioError(f"the back-end's state cannot be moved: {error.strerror}") from error


@contextlib.contextmanager
def _waiting_for_nothing(
    fd: int, mode: int
) -> Iterator[tuple[Callable[[int], bytes], Callable[[memoryview], int], select.poll]]:
    """What reads and writes a descriptor without ever waiting, and what tells when that helps.

    Its peer may have the same open file and make it one that waits, so no flag of it is relied on.
    """
    with contextlib.ExitStack() as undo:
        ready = select.poll()
        if socket_kind(fd) == (socket.AF_UNIX, socket.SOCK_STREAM):
            sock = undo.enter_context(socket.socket(fileno=os.dup(fd)))
            ready.register(sock, select.POLLIN if mode == os.O_RDONLY else select.POLLOUT)
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            yield (
                lambda count: sock.recv(count, flags),
                lambda data: sock.send(data, flags),
                ready,
            )
            return
        if is_memory(fd):
            own = os.dup(fd)
        elif is_pipe(fd):
            own = os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
        else:
            raise ProtocolError(
                "a device's state can be moved through a pipe, a stream socket or memory; the "
                "back-end gave something else"
            )
        undo.callback(close_fd, own)
        ready.register(own, select.POLLIN if mode == os.O_RDONLY else select.POLLOUT)
        yield lambda count: os.read(own, count), lambda data: os.write(own, data), ready


class StatePipe:
    """A pipe of a front-end's, with the end that goes to the back-end.

    Args:
        loads: Whether the back-end reads it.

    Attributes:
        ours: The end to use.
        theirs: The other one, until :meth:`passed`.
    """

    def __init__(self, *, loads: bool) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self.ours, self.theirs = (writing, reading) if loads else (reading, writing)

    def use(self, fd: int) -> None:
        """Use what the back-end gave instead; it belongs to this object."""
        close_fd(self.ours)
        self.ours = fd

    def passed(self) -> None:
        """Close the other end here: the back-end has it."""
        theirs, self.theirs = self.theirs, -1
        if theirs >= 0:
            close_fd(theirs)

    def close(self) -> None:
        """Close both. May be called again."""
        self.passed()
        ours, self.ours = self.ours, -1
        if ours >= 0:
            close_foreign([ours])
