"""A server at a Unix socket that serves one peer after the other, whatever the protocol."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from typing import Any, Protocol, Self

from guestio.budgets import FIRST_MESSAGE_TIMEOUT, MAX_WAITING, WAITING_LOOK
from guestio.errors import DeviceError
from guestio.peer.endpoint import make_endpoint
from guestio.peer.foreign import close_socket, queued_fds
from guestio.ratelog import LOG
from guestio.virtio.loop import EventLoop


class ServedConnection(Protocol):
    """A peer from its connection to its disconnection.

    Attributes:
        closed: Whether the peer is gone and everything of it released.
        unclean: Whether something of it could not be released, or an error may refer to it.
        heard: Whether it has sent a whole message.
    """

    closed: bool
    unclean: bool
    heard: bool

    def close(self) -> None:
        """Give everything back. Calling it again does nothing."""
        ...

    def disconnect(self, reason: str) -> None:
        """End the connection to a peer that broke the protocol."""
        ...


class PeerServer(ABC):
    """Listens or connects, has peers wait, and serves one after the other in an event loop.

    Args:
        path: Where to listen, or a socket, as for :func:`~guestio.peer.endpoint.make_endpoint`.
        connect: Whether to connect to the path instead.
        log: Where problems are reported.

    Raises:
        DeviceError, ValueError: As from `make_endpoint`.

    Attributes:
        path: Where the socket is; empty if it has no name in the file system.
        ready_line: One line that says where peers come from.
        connects: Whether it connects to Unix sockets while it serves.
        statistics: Counters over all peers so far.

    Threads: everything happens in the thread that calls :meth:`serve`; only :meth:`stop` may be
    called from others and from signal handlers.
    """

    peer_name = "peer"
    """What the other side is called in log lines."""

    statistics: Any

    def __init__(
        self,
        path: str | os.PathLike[str] | socket.socket,
        *,
        connect: bool,
        log: logging.Logger,
    ) -> None:
        self._log = log
        self._stopping = threading.Event()
        self._connection: ServedConnection | None = None
        self._waiting: deque[socket.socket] = deque()
        self._serving = self._closed = False
        self._accepted_at = 0.0
        with contextlib.ExitStack() as undo:
            self._loop = EventLoop()
            undo.callback(self._loop.close)
            self._attach(undo)
            self._endpoint = make_endpoint(path, connect=connect)
            undo.callback(self._endpoint.close)
            self._attached()
            undo.pop_all()
        self.path, self.ready_line = self._endpoint.path, self._endpoint.ready_line
        self.connects = connect
        LOG.watch(self._lines_hidden)

    @abstractmethod
    def _attach(self, undo: contextlib.ExitStack) -> None:
        """Make what serves the device in the event loop; ``undo`` releases it if that fails."""

    @abstractmethod
    def _attached(self) -> None:
        """Tell the device, as the last step: peers can come from here on."""

    @abstractmethod
    def _close_device(self) -> None:
        """Release what :meth:`_attach` made."""

    @abstractmethod
    def _connect(self, connected: socket.socket) -> ServedConnection:
        """Begin to serve a peer. The socket is closed if that fails."""

    @abstractmethod
    def _count_protocol_error(self) -> None:
        """Count a peer that broke the protocol."""

    def serve(self, connections: int | None = None) -> None:
        """Serve peers until :meth:`stop` is called, or the only peer is gone.

        Args:
            connections: Return after so many peers; None for no limit.

        Raises:
            KeyboardInterrupt, SystemExit: The device raised it, or a signal handler. The peer
                has been released; what it waits for is not answered.
        """
        self._serving = True
        try:
            with self._loop.woken_by_signals():
                self._endpoint.start(self._loop, self._arrived)
                # Those that were left waiting by an earlier call.
                self._look_at_waiting()
                while not (self._stopping.is_set() or self._endpoint.exhausted or connections == 0):
                    self._serve_one()
                    if connections is not None and not self._stopping.is_set():
                        connections -= 1
        finally:
            self._endpoint.stop()
            self._loop.clear_timer((self, "silent"))
            self._loop.clear_timer((self, "waiting"))
            try:
                if self._connection is not None:
                    self._connection.close()
            finally:
                self._serving = False

    def _serve_one(self) -> None:
        """Accept one peer and serve it until it goes away."""
        unclean = self._connection is not None and self._connection.unclean
        self._connection = None
        if unclean:
            # What refers to itself, as an error and its frames do, may keep guest memory mapped.
            gc.collect()
        self._loop.clear_timer((self, "silent"))
        while not self._stopping.is_set():
            try:
                if self._waiting and self._connection is None and not self._endpoint.paused:
                    self._begin(self._next_waiting())
                self._loop.run_once()
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:
                # A mistake of the device or of ours: it costs this connection, not the next.
                LOG.report(self._log, logging.ERROR, "serving failed", trace=True)
                self._drop()
            if self._is_done():
                self._endpoint.gone()
                return
            if self._connection is None and self._endpoint.exhausted:
                return

    def _drop(self) -> None:
        if self._connection is None:
            self._endpoint.pause()
        else:
            self._connection.unclean = True
            self._connection.close()

    def _is_done(self) -> bool:
        """Whether there was a peer and it has gone."""
        return self._connection is not None and self._connection.closed

    def _arrived(self, connected: socket.socket) -> None:
        if self._connection is None and not self._waiting:
            self._begin(connected)
        else:
            self._have_wait(connected)

    def _have_wait(self, connected: socket.socket) -> None:
        """Have a peer wait until the one that is served goes.

        What it sends is not read. It is not left to the listener's queue, where a descriptor that
        it sends would stay open unseen: the other end of the connection that is served, say, which
        then never ends.
        """
        if len(self._waiting) >= MAX_WAITING:
            silent = next((each for each in self._waiting if not _has_spoken(each)), None)
            LOG.report(
                self._log, logging.ERROR, "%s refused: %d others wait", self.peer_name, MAX_WAITING
            )
            if silent is None:
                close_socket(connected)
                return
            # It has said nothing, although it is its turn to: one that does gets its place.
            self._waiting.remove(silent)
            close_socket(silent)
        first = not self._waiting
        LOG.report(
            self._log,
            logging.INFO,
            "a second %s has connected: it is served when the one that is there has gone",
            self.peer_name,
        )
        try:
            self._waiting.append(connected)
        except BaseException:
            close_socket(connected)
            raise
        if first:
            self._look_at_waiting()
        else:
            self._drop_waiting(connected)
        self._limit_silence()

    def _next_waiting(self) -> socket.socket:
        """Take the peer that is served next: the first that has said something, if any has.

        Both protocols have the peer speak first, so those that only connect keep no other waiting.
        """
        chosen = next((each for each in self._waiting if _has_spoken(each)), self._waiting[0])
        self._waiting.remove(chosen)
        return chosen

    def _look_at_waiting(self) -> None:
        """Let go of peers that wait no more, or should not, as long as any waits."""
        for waiting in list(self._waiting):
            self._drop_waiting(waiting)
        if self._waiting:
            when = time.monotonic() + WAITING_LOOK
            self._loop.set_timer((self, "waiting"), when, self._look_at_waiting)

    def _drop_waiting(self, waiting: socket.socket) -> None:
        """Let go of a peer if it is gone, or has passed descriptors before it was answered."""
        poll = select.poll()
        poll.register(waiting, 0)
        gone = bool(poll.poll(0))
        passed = queued_fds(waiting.fileno())
        if not gone and not passed:
            return
        if passed:
            self._count_protocol_error()
            LOG.report(
                self._log,
                logging.ERROR,
                "%s disconnected: %d descriptors came from it while it waited for another one to "
                "go",
                self.peer_name,
                passed,
            )
        self._waiting.remove(waiting)
        close_socket(waiting)

    def _begin(self, connected: socket.socket) -> None:
        """Serve a peer from now on."""
        self._connection = self._connect(connected)
        self._accepted_at = time.monotonic()
        self._limit_silence()

    def _limit_silence(self) -> None:
        """Have a peer that has said nothing yet make way for another that waits."""
        if self._waiting and self._connection is not None:
            self._loop.set_timer(
                (self, "silent"), self._accepted_at + FIRST_MESSAGE_TIMEOUT, self._make_way
            )

    def _make_way(self) -> None:
        connection = self._connection
        if not self._waiting or connection is None or connection.closed or connection.heard:
            return
        connection.disconnect(
            f"no message within {FIRST_MESSAGE_TIMEOUT} s, and another {self.peer_name} waits"
        )

    def _thread_failed(self, error: BaseException) -> None:
        """A mistake in a queue's thread is dealt with like one in ours, once for a peer."""
        # An error that its own traceback refers to would stay, and what its frames refer to.
        errors, connection = [error], self._connection

        def fail() -> None:
            if connection is not None and not connection.closed:
                raise errors.pop()

        self._loop.call_soon_threadsafe(fail)

    def _lines_hidden(self, seconds: float) -> None:
        """Have the number of hidden log lines logged when their interval is over."""

        def arm() -> None:
            when = time.monotonic() + seconds
            self._loop.set_timer((self, "log"), when, LOG.flush)

        self._loop.call_soon_threadsafe(arm)

    def stop(self) -> None:
        """Make :meth:`serve` return after what it is doing. From any thread or signal handler."""
        self._stopping.set()
        self._loop.wake()

    def close(self) -> None:
        """Remove the socket and release everything. Calling it again does nothing.

        Raises:
            DeviceError: :meth:`serve` has not returned; nothing changed.
        """
        if self._serving:
            raise DeviceError(
                f"the server ({self.ready_line}) cannot be closed while it serves: call stop(), "
                "and close() once serve() has returned"
            )
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if not self._closed:
            self._closed = True
            LOG.unwatch(self._lines_hidden)
            LOG.flush()
            # A peer that waits may have sent descriptors already.
            for waiting in self._waiting:
                close_socket(waiting)
            self._waiting.clear()
            self._close_device()
            self._endpoint.close()
            self._loop.close()

    def remove_socket(self) -> None:
        """Remove the socket, unless another one has taken its place. From any thread."""
        self._endpoint.remove_socket()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _has_spoken(peer: socket.socket) -> bool:
    """Whether something that a peer has sent can be read."""
    poll = select.poll()
    poll.register(peer, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))
