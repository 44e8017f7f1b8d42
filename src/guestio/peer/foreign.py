"""Descriptors that a peer passes: which are accepted for what, and how they are closed.

A descriptor is the peer's choice, and most kinds can block a system call on them: a socket
while it is closed, a FUSE file while its size is queried, a device while it is read. So the
kind is found out without its driver or file system, only what cannot wait is accepted, and
the rest is closed in a thread.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar, Final

from guestio._core.base.syscalls import close_aside, is_memory, socket_kind
from guestio.budgets import CLOSE_GRACE, MAX_CLOSERS, MAX_PIPES, MAX_QUEUED
from guestio.errors import BackingError, ProtocolError
from guestio.memory.backing import close_fd

_ONE: Final = (1).to_bytes(8, "little")
_EVENTFD: Final = "anon_inode:[eventfd]"
_FD_SIZE: Final = array.array("i").itemsize
CONTROL_SPACE: Final = socket.CMSG_SPACE(253 * _FD_SIZE) + 256
"""Room for as many descriptors as one message may carry for the kernel (SCM_MAX_FD), and for what
else it may add: what does not fit the kernel closes in the thread that receives, and that may
wait."""
_SCM_PIDFD: Final = 4  # linux/socket.h; a socket option of the peer's can make the kernel add one
_DISK_FILE_SYSTEMS: Final = frozenset(
    {"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "ramfs", "xfs", "zfs"}
)


def is_eventfd(fd: int) -> bool:
    """Whether a descriptor is an eventfd. A file's name cannot pretend so: it begins with a /."""
    return _name(fd) == _EVENTFD


def is_pipe(fd: int) -> bool:
    """Whether a descriptor is an end of a pipe that has no name, or of a `socketpair(2)`.

    The front-end's end of its own connection is not: the path that it connected to is its peer's
    name. Held here, its hang-up would never be seen.
    """
    if _name(fd).startswith("pipe:["):
        return True
    return _stream_names(fd) == ("", "")


def _stream_names(fd: int) -> tuple[object, object] | None:
    """The names of a connected Unix stream socket and of its peer; None if it is no such."""
    if socket_kind(fd) != (socket.AF_UNIX, socket.SOCK_STREAM):
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=fd)
    try:
        return sock.getsockname(), sock.getpeername()
    except OSError:
        return None
    finally:
        sock.detach()


def check_eventfd(fd: int, what: str) -> None:
    """Refuse what is no eventfd.

    Raises:
        ProtocolError: It is something else.
    """
    if not is_eventfd(fd):
        raise ProtocolError(
            f"the {what} is {_name(fd) or 'unknown (is /proc mounted?)'}, not an eventfd"
        )


def check_memory(fd: int) -> None:
    """Refuse what cannot be mapped without the risk of waiting for its file system or driver.

    Raises:
        BackingError: It is neither memory (memfd, tmpfs, hugetlbfs) nor a file on a disk.
    """
    if is_memory(fd):
        return
    kind = _file_system(fd)
    if kind not in _DISK_FILE_SYSTEMS:
        where = f"on a file system of type {kind}" if kind else "on no file system known here"
        raise BackingError(
            f"{_name(fd) or 'a descriptor'} {where} cannot be guest memory: use a memfd, or a file "
            "in /dev/shm, on hugetlbfs or on a local disk"
        )
    # A disk's file system answers from its memory.
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise BackingError(f"{_name(fd)} cannot be guest memory: it is not a regular file")


def check_channel(fd: int) -> None:
    """Refuse what is no Unix stream socket, or has a name, as one that comes of a listener.

    Raises:
        ProtocolError: It is something else.
    """
    names = _stream_names(fd)
    if names is None:
        raise ProtocolError(
            f"the fd for a back-end channel is {_name(fd)}, not a connected Unix stream socket"
        )
    if names != ("", ""):
        # The front-end's end of its own connection is such a one, whichever side listens.
        raise ProtocolError(
            f"the socket for a back-end channel is connected to {names[1] or names[0]!r}: pass one "
            "end of a socketpair"
        )


class Eventfd:
    """An eventfd that a front-end passed.

    Args:
        fd: The descriptor; it belongs to this object, also if that cannot be made.
        what: What it is for, for messages.

    Raises:
        ProtocolError: It is no eventfd.
    """

    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        try:
            check_eventfd(fd, what)
        except BaseException:
            close_foreign([fd])
            raise

    @staticmethod
    def to_notify(fd: int, what: str) -> Eventfd | PipeNotifier:
        """An eventfd to notify; User-mode Linux passes a pipe or socket for that.

        Raises:
            ProtocolError: It is neither.
        """
        try:
            piped = is_pipe(fd)
        except BaseException:
            close_foreign([fd])
            raise
        return PipeNotifier(fd) if piped else Eventfd(fd, what)

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def close(self) -> None:
        """Close it. To be called once."""
        close_fd(self._fd)


class PipeNotifier:
    """Passes notifications on to what User-mode Linux wants instead of an eventfd.

    That is one end of a socket pair (`os_pipe` in its arch/um/os-Linux/file.c), or a pipe. A write
    may wait for the other end, whatever flags it has, so a thread does it.

    Args:
        pipe: The end; it belongs to this object, also if that cannot be made.

    Attributes:
        fd: An eventfd to notify instead, until :meth:`close`.

    Raises:
        ProtocolError: Too many pipes are in use.
    """

    _alive: ClassVar[set[PipeNotifier]] = set()

    def __init__(self, pipe: int) -> None:
        if len(self._alive) >= MAX_PIPES:
            close_foreign([pipe])
            raise ProtocolError(f"{MAX_PIPES} pipes are notified already: use an eventfd")
        self.fd = -1
        self._closing = False
        try:
            self.fd = os.eventfd(0, os.EFD_CLOEXEC)
            self._alive.add(self)
            self._thread = threading.Thread(
                target=self._run, args=(pipe,), name="guestio-pipe", daemon=True
            )
            self._thread.start()
        except BaseException:
            self._let_go()
            close_foreign([pipe])
            raise

    def _let_go(self) -> None:
        self._alive.discard(self)
        if self.fd >= 0:
            close_fd(self.fd)

    def _run(self, pipe: int) -> None:
        try:
            self._serve(pipe)
        finally:
            self._let_go()

    def _serve(self, pipe: int) -> None:
        try:
            is_socket = socket_kind(pipe) is not None
        except BaseException:
            close_foreign([pipe])
            raise
        if is_socket:
            with socket.socket(fileno=pipe) as sock:
                if not _receive_no_more(sock):
                    close_socket(sock)
                self._pass_on(lambda: sock.send(_ONE, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL))
            return
        own = -1
        try:
            # A file description of our own: the peer cannot make it one that waits for readers.
            with contextlib.suppress(OSError):
                own = os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            close_fd(pipe)
            self._pass_on(lambda: os.write(own, _ONE))
        finally:
            if own >= 0:
                close_fd(own)

    def _pass_on(self, write: Callable[[], int]) -> None:
        while os.eventfd_read(self.fd) and not self._closing:
            # A reader that is gone, or has read nothing of what was written before, needs no more.
            with contextlib.suppress(OSError):
                write()

    def fileno(self) -> int:
        """The eventfd to notify."""
        return self.fd

    def close(self) -> None:
        """Notify no more. Not waited for much: the pipe may be stuck."""
        self._closing = True
        os.eventfd_write(self.fd, 1)
        self._thread.join(CLOSE_GRACE)


def _receive_no_more(sock: socket.socket) -> bool:
    """Empty a socket's queue, and let nothing in any more; False if there is no end of it.

    A descriptor that is not received stays open: a front-end's own end of its connection, say,
    which then never ends.
    """
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)
    for _ in range(MAX_QUEUED):
        try:
            data, control, _, _ = sock.recvmsg(
                65536, CONTROL_SPACE, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return True
        close_foreign(received_fds(control))
        if not data:
            return True
    return False


def received_fds(control: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The descriptors that came beside the bytes of a message (``recvmsg``)."""
    fds = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind in (socket.SCM_RIGHTS, _SCM_PIDFD):
            fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
    return list(fds)


def queued_fds(fd: int) -> int:
    """How many descriptors wait in a Unix socket to be received; 0 before Linux 5.6."""
    try:
        about = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except OSError:
        return 0
    return next((int(line[8:]) for line in about.splitlines() if line[:8] == "scm_fds:"), 0)


def close_foreign(fds: Iterable[int]) -> None:
    """Close descriptors of any kind without waiting for their owner."""
    risky = []
    for fd in fds:
        if is_memory(fd) or is_eventfd(fd):
            close_fd(fd)
        else:
            risky.append(fd)
    if risky:
        close_aside(risky, CLOSE_GRACE, MAX_CLOSERS)


def close_socket(sock: socket.socket) -> None:
    """Hang up and close a socket; the descriptors of others that are queued in it may take time."""
    if sock.fileno() < 0:
        return
    # The peer may have been faster, or it was not connected.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    close_aside([sock.detach()], CLOSE_GRACE, MAX_CLOSERS)


def _name(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return ""


def _file_system(fd: int) -> str | None:
    """The type of the file system that a file is on, if this process can see it mounted."""
    try:
        about = Path(f"/proc/self/fdinfo/{fd}").read_text()
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return None
    mount = next((line[8:].strip() for line in about.splitlines() if line[:7] == "mnt_id:"), None)
    for line in mounts.splitlines():
        fields = line.split()
        if fields[0] == mount:
            return fields[fields.index("-") + 1]
    return None
