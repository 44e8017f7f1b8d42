"""Where a server's peers come from: it listens, it connects, or it is given one.

A :class:`Listener` waits for peers on a path or on a socket that another program made (systemd
for example). A :class:`Connector` connects to a peer that listens, again and again. A
:class:`HandedOver` peer was connected by another program, and is the only one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import time
import weakref
from collections.abc import Callable
from typing import Protocol

from guestio._core.base.syscalls import accept_stream, socket_kind
from guestio.budgets import CONNECT_LONGEST_PAUSE, CONNECT_PAUSE
from guestio.errors import DeviceError
from guestio.memory.backing import close_fd
from guestio.peer.foreign import close_socket
from guestio.ratelog import LOG
from guestio.virtio.loop import EventLoop

log = logging.getLogger("guestio.peer")

MAX_PATH = 107
"""Bytes of a Unix socket's path (sun_path without its terminator)."""

ACCEPT_PAUSE = 0.25
"""Seconds until the next attempt if a peer cannot be accepted, for want of fds say."""

FIRST_ACTIVATION = 3
"""The first descriptor that a service manager hands over (SD_LISTEN_FDS_START)."""

Arrived = Callable[[socket.socket], object]
"""Takes a peer's socket, which is connected."""


class Endpoint(Protocol):
    """Gives a server its peers, in the thread of its event loop.

    Attributes:
        path: Where it is in the file system; empty if it has no name there.
        ready_line: One line that says where peers come from.
        paused: Whether no peer should be begun with now.
        exhausted: Whether no further peer comes.
    """

    path: str
    ready_line: str
    paused: bool
    exhausted: bool

    def start(self, loop: EventLoop, arrived: Arrived) -> None:
        """Call back for each peer from now on."""
        ...

    def pause(self) -> None:
        """Have no peer arrive for a moment: the last one could not be served."""
        ...

    def gone(self) -> None:
        """Learn that the peer that was served is gone."""
        ...

    def stop(self) -> None:
        """Call back no more. Calling it again does nothing."""
        ...

    def close(self) -> None:
        """Stop, and release everything. Calling it again does nothing."""
        ...

    def remove_socket(self) -> None:
        """Remove what was made in the file system. From any thread."""
        ...


class Listener:
    """Accepts peers.

    Args:
        listening: A listening socket that does not wait, which it owns from here on.
        path: Where that is.
        made: Whether the path was made for it, and is to be removed at the end.
    """

    exhausted = False

    def __init__(self, listening: socket.socket, path: str, *, made: bool) -> None:
        self.path = path
        self.ready_line = f"listening on {path or f'descriptor {listening.fileno()}'}"
        self.paused = False
        self._socket = listening
        self._inode = _inode(path) if made else None
        if made:
            _made.add(self)
        self._loop: EventLoop | None = None
        self._arrived: Arrived | None = None

    @classmethod
    def at(cls, path: str, *, mode: int | None = None) -> Listener:
        """Listen on a path; a socket that nothing listens on is replaced.

        Args:
            path: Where.
            mode: Who may connect, as for `chmod`; None for what the umask says.

        Raises:
            DeviceError: There is another one, or something else.
        """
        listening = listen_on(path, mode=mode)
        try:
            return cls(listening, path, made=True)
        except BaseException:
            listening.close()
            raise

    @property
    def listening(self) -> socket.socket:
        """The listening socket, for what accepts by itself; it stays the listener's."""
        return self._socket

    def start(self, loop: EventLoop, arrived: Arrived) -> None:
        """See :class:`Endpoint`."""
        self._loop, self._arrived = loop, arrived
        self._listen_again()

    def pause(self) -> None:
        """See :class:`Endpoint`. Peers go on waiting meanwhile."""
        self.paused = True
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.set_timer(self, time.monotonic() + ACCEPT_PAUSE, self._listen_again)

    def _listen_again(self) -> None:
        if self._loop is None:
            return
        self.paused = False
        try:
            self._loop.add_reader(self._socket.fileno(), self._accept)
        except OSError as error:
            log.error("cannot wait for peers: %s", error.strerror)  # noqa: TRY400 - the cause is named
            self.pause()

    def _accept(self) -> None:
        try:
            fd = accept_stream(self._socket.fileno())
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR):
                LOG.report(log, logging.ERROR, "cannot accept a peer: %s", error.strerror)
                self.pause()
            return
        try:
            connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        except BaseException:
            close_fd(fd)
            raise
        if self._arrived is not None:
            self._arrived(connected)
        else:
            close_socket(connected)

    def gone(self) -> None:
        """See :class:`Endpoint`."""

    def stop(self) -> None:
        """See :class:`Endpoint`."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.clear_timer(self)
        self._loop = self._arrived = None

    def close(self) -> None:
        """See :class:`Endpoint`.

        A socket that was handed over is closed, not shut down: others may go on to listen on it.
        """
        self.stop()
        if self._socket.fileno() < 0:
            return
        if self._inode is not None:
            close_socket(self._socket)
            self.remove_socket()
            _made.discard(self)
        else:
            self._socket.close()

    def remove_socket(self) -> None:
        """Remove the socket, unless another one has taken its place. From any thread."""
        with contextlib.suppress(FileNotFoundError):
            if self._inode is not None and _inode(self.path) == self._inode:
                os.unlink(self.path)  # noqa: PTH108 - the path may be bytes-like


_made: weakref.WeakSet[Listener] = weakref.WeakSet()
"""Listeners whose sockets are to be removed at the end."""


def remove_sockets() -> None:
    """Remove the sockets of all listeners that are not closed. From any thread.

    For a process that is about to end although a server has not come back from its device: perhaps
    it is still being made.
    """
    for listener in list(_made):
        with contextlib.suppress(OSError):
            listener.remove_socket()


def sockets_made() -> list[str]:
    """Paths of the sockets that are to be removed at the end."""
    return [listener.path for listener in list(_made)]


class Connector:
    """Connects to a peer that listens, and again when that is gone.

    Args:
        path: Where it listens, or will.

    Raises:
        DeviceError: That is the name of no socket, or something else is there.
    """

    exhausted = False

    def __init__(self, path: str) -> None:
        _check_path(path, "connect to")
        if (obstacle := _obstacle(path)) is not None:
            raise DeviceError(f"cannot connect to {path}: {obstacle}")
        self.path = path
        self.ready_line = f"connecting to {path}"
        self.paused = False
        self._loop: EventLoop | None = None
        self._arrived: Arrived | None = None
        self._pause = CONNECT_PAUSE
        self._since = 0.0
        self._said = ""

    def start(self, loop: EventLoop, arrived: Arrived) -> None:
        """See :class:`Endpoint`."""
        self._loop, self._arrived = loop, arrived
        loop.set_timer(self, time.monotonic(), self._connect)

    def pause(self) -> None:
        """See :class:`Endpoint`."""
        self._try_later()

    def gone(self) -> None:
        """See :class:`Endpoint`. One that did not stay long is left alone for longer."""
        if time.monotonic() - self._since >= CONNECT_LONGEST_PAUSE:
            self._pause = CONNECT_PAUSE
        self._try_later()

    def _try_later(self) -> None:
        if self._loop is not None:
            self._loop.set_timer(self, time.monotonic() + self._pause, self._connect)
            self._pause = min(2 * self._pause, CONNECT_LONGEST_PAUSE)

    def _connect(self) -> None:
        if self._arrived is None:
            return
        connected = None
        try:
            if (obstacle := _obstacle(self.path)) is None:
                connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                connected.connect(self.path)
        except OSError as error:
            # EAGAIN: more wait there already than it listens for.
            busy = error.errno == errno.EAGAIN
            obstacle = "nothing accepts there" if busy else error.strerror or str(error)
        if obstacle is None and connected is not None:
            log.info("connected to %s", self.path)
            self._said, self._since = "", time.monotonic()
            self._arrived(connected)
            return
        if connected is not None:
            connected.close()
        if obstacle != self._said:
            self._said = obstacle or ""
            LOG.report(
                log,
                logging.WARNING,
                "cannot connect to %s: %s; this is tried again until it succeeds",
                self.path,
                obstacle,
            )
        self._try_later()

    def stop(self) -> None:
        """See :class:`Endpoint`."""
        if self._loop is not None:
            self._loop.clear_timer(self)
        self._loop = self._arrived = None

    def close(self) -> None:
        """See :class:`Endpoint`."""
        self.stop()

    def remove_socket(self) -> None:
        """See :class:`Endpoint`. Nothing was made."""


class HandedOver:
    """A peer that another program has connected.

    Args:
        connected: Its socket, which it owns until the peer arrives.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.path = _path_of(connected)
        self.ready_line = f"connected by descriptor {connected.fileno()}"
        self.paused = self.exhausted = False
        self._socket: socket.socket | None = connected
        self._loop: EventLoop | None = None

    def start(self, loop: EventLoop, arrived: Arrived) -> None:
        """See :class:`Endpoint`."""

        def arrive() -> None:
            connected, self._socket = self._socket, None
            if connected is not None:
                arrived(connected)

        if self._socket is None:
            self.exhausted = True
        else:
            self._loop = loop
            loop.set_timer(self, time.monotonic(), arrive)

    def pause(self) -> None:
        """See :class:`Endpoint`."""
        self.exhausted = True

    def gone(self) -> None:
        """See :class:`Endpoint`."""
        self.exhausted = True

    def stop(self) -> None:
        """See :class:`Endpoint`."""
        if self._loop is not None:
            self._loop.clear_timer(self)
            self._loop = None

    def close(self) -> None:
        """See :class:`Endpoint`."""
        self.stop()
        connected, self._socket = self._socket, None
        if connected is not None:
            close_socket(connected)

    def remove_socket(self) -> None:
        """See :class:`Endpoint`. Nothing was made."""


def make_endpoint(where: str | os.PathLike[str] | socket.socket, *, connect: bool) -> Endpoint:
    """Where peers come from.

    Args:
        where: A path, or a socket, which is the endpoint's from here on, unless it is refused.
        connect: Whether to connect to the path, instead of listening on it.

    Raises:
        DeviceError: It can be neither.
    """
    if not isinstance(where, socket.socket):
        path = os.fspath(where)
        return Connector(path) if connect else Listener.at(path)
    if connect:
        raise ValueError("connect=True needs the path of a peer, not a socket")
    what = f"descriptor {where.fileno()}"
    if where.fileno() < 0 or (where.family, where.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        raise DeviceError(f"{what} is {where!r}, not a Unix stream socket")
    if where.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        where.setblocking(False)
        return Listener(where, _path_of(where), made=False)
    try:
        where.getpeername()
    except OSError as error:
        raise DeviceError(
            f"{what} is a socket that neither listens nor is connected: {error.strerror}"
        ) from None
    return HandedOver(where)


def adopt_socket(fd: int) -> socket.socket:
    """A socket from a descriptor that another program handed over, for :class:`Backend`.

    Args:
        fd: The descriptor. It belongs to the socket from here on, and is not passed on to programs
            that this one starts.

    Raises:
        DeviceError: It is not open, or no Unix stream socket.
    """
    try:
        kind = socket_kind(fd)
        if kind == (socket.AF_UNIX, socket.SOCK_STREAM):
            os.set_inheritable(fd, False)
            return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        os.fstat(fd)
    except OSError as error:
        raise DeviceError(f"descriptor {fd} cannot be used: {error.strerror}") from error
    raise DeviceError(f"descriptor {fd} is no Unix stream socket")


def activation_sockets() -> list[socket.socket]:
    """The sockets that systemd, or another service manager, has handed to this process.

    They are described by the environment variables LISTEN_PID and LISTEN_FDS, which are removed, so
    that this works once and programs that are started do not see them; see sd_listen_fds(3).

    Returns:
        The sockets, in their order; none if the variables are missing, or are for another process.

    Raises:
        DeviceError: A variable or a descriptor is not what it should be.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count:
        return []
    if not count.isdecimal() or len(count) > 4:
        raise DeviceError(f"LISTEN_FDS is {count[:20]!r}, no number of descriptors")
    made: list[socket.socket] = []
    try:
        for fd in range(FIRST_ACTIVATION, FIRST_ACTIVATION + int(count)):
            made.append(adopt_socket(fd))  # noqa: PERF401 - closed if the next one is none
    except BaseException:
        for each in made:
            each.close()
        raise
    return made


def _path_of(sock: socket.socket) -> str:
    """The file system's name of a socket; empty if it has none."""
    name = sock.getsockname()
    return name if isinstance(name, str) else ""


def _inode(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _check_path(path: str, purpose: str) -> None:
    if not path or b"\0" in os.fsencode(path):
        raise DeviceError(f"cannot {purpose} {path!r}: it is not the name of a file")
    if len(os.fsencode(path)) > MAX_PATH:
        raise DeviceError(
            f"the socket path {path} is {len(os.fsencode(path))} bytes long; "
            f"a Unix socket's is at most {MAX_PATH}"
        )


def _obstacle(path: str) -> str | None:
    """What other than a socket is at a path; None if there is a socket, or nothing."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror
    return None if stat.S_ISSOCK(mode) else "there is a file that is not a socket"


def listen_on(path: str, *, mode: int | None = None) -> socket.socket:
    """A listening Unix socket that does not block; one that nothing listens on is replaced.

    Args:
        path: Where.
        mode: Who may connect, as for `chmod`; None for what the umask says.

    Raises:
        DeviceError: The path is too long or in use, or its directory cannot be written.
    """
    _check_path(path, "listen on")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(path)
        if mode is not None:
            # Nothing can connect before it listens.
            os.chmod(path, mode)  # noqa: PTH101 - the path may be bytes-like
        listener.listen(8)
    except OSError as error:
        listener.close()
        raise DeviceError(f"cannot listen on {path}: {error.strerror}") from error
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket that nothing listens on; refuse anything else that is in the way."""
    if (obstacle := _obstacle(path)) is not None:
        raise DeviceError(f"cannot listen on {path}: {obstacle}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)  # noqa: PTH108
            return
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise DeviceError(f"cannot listen on {path}: {error.strerror}") from error
    raise DeviceError(f"cannot listen on {path}: another process is listening there")
