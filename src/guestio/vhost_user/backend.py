"""A device at the end of a Unix socket, for any vhost-user front-end."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import operator
import os
import select
import socket
import threading
import time
from collections import deque
from typing import Literal, Self

from guestio.addr import check_address, check_int, check_seconds, shown
from guestio.budgets import (
    FIRST_MESSAGE_TIMEOUT,
    LONGEST_TIMEOUT,
    MAX_WAITING,
    STOP_TIMEOUT,
    WAITING_LOOK,
)
from guestio.errors import DeviceError
from guestio.ratelog import LOG
from guestio.vhost_user.channel import Channel
from guestio.vhost_user.connection import Connection
from guestio.vhost_user.endpoint import make_endpoint
from guestio.vhost_user.foreign import close_socket, queued_fds
from guestio.vhost_user.session import MAX_QUEUES
from guestio.virtio.device import (
    VIRTIO_F_ACCESS_PLATFORM,
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_IN_ORDER,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
    Device,
)
from guestio.virtio.host import DeviceHost, check_config
from guestio.virtio.loop import EventLoop
from guestio.virtio.statistics import Statistics

log = logging.getLogger("guestio.vhost_user")


class Backend:
    """Serves a virtio device to one vhost-user front-end after the other.

    Behind an IOMMU (the front-end negotiates VIRTIO_F_ACCESS_PLATFORM) every address that the
    driver uses, those of its rings included, is translated by asking the front-end.

    Args:
        device: What to serve; it is the caller's to close.
        path: Where to listen; a socket that nothing listens on is replaced. Or a socket, which is
            the back-end's from here on: a listening one, or one that a front-end is connected to,
            which is the only one then.
        connect: Whether a front-end listens on the path, and the back-end connects to it, again and
            again, also once that front-end is gone.
        iommu: ``"auto"`` lets the front-end decide whether there is an IOMMU; ``"off"`` does not
            offer it.
        indirect: Whether to offer VIRTIO_F_INDIRECT_DESC. ``"auto"`` does so without an IOMMU:
            behind one, each request's table is another page to ask for and to be forgotten, and
            what is in it can only be asked for afterwards. Without tables a request takes as many
            entries of its ring as it has pieces.
        in_order: Whether to offer VIRTIO_F_IN_ORDER (virtio 1.4, section 6). A driver that accepts
            it is given requests back in the order of its ring, and may rely on that, whatever the
            device answers first. Otherwise they are given back as they are answered where the
            front-end keeps notes of those in flight, and in the order of the ring where it does
            not.
        ring_reset: Whether to offer VIRTIO_F_RING_RESET. Only for a front-end that stops the ring
            (GET_VRING_BASE) when its driver resets a queue. QEMU up to 11.1 does not: it offers the
            feature to the driver and tells the back-end nothing, which goes on with the old ring in
            memory that the driver has taken back.
        miss_timeout: Seconds a front-end may take to answer an IOTLB miss, at most 3600; then the
            request fails.
        stop_timeout: Seconds that a stop waits for requests that the device holds, whether the
            front-end stops or resets a queue, changes its memory, or goes, at most 3600; then they
            fail.
        track_dirty: Whether to mark and count the pages of guest memory that the device writes.
        poll_us: Microseconds to look out for the next request before sleeping: faster at low
            queue depths, for a processor's time.
        queue_threads: Whether to serve each queue in a thread of its own. Python code still runs in
            one thread at a time, so this is for devices whose requests take long in system calls.

    Raises:
        DeviceError: The path is too long or in use, or its directory cannot be written; the socket
            is no connected or listening Unix stream socket; or the device's ``config()`` returned
            no bytes. A socket that is refused is still the caller's.

    Attributes:
        path: Where the socket is; empty if it has no name in the file system.
        ready_line: One line that says where front-ends come from: ``listening on PATH``,
            ``connecting to PATH``, or which descriptor it is.
        statistics: Counters over all front-ends so far.

    Threads: everything happens in the thread that calls :meth:`serve`, unless queues have their
    own; only :meth:`stop` may be called from others and from signal handlers.
    """

    def __init__(
        self,
        device: Device,
        path: str | os.PathLike[str] | socket.socket,
        *,
        connect: bool = False,
        iommu: Literal["auto", "off"] = "auto",
        indirect: Literal["auto", "on", "off"] = "auto",
        in_order: bool = False,
        ring_reset: bool = False,
        miss_timeout: float = 5.0,
        stop_timeout: float = STOP_TIMEOUT,
        track_dirty: bool = False,
        poll_us: int = 0,
        queue_threads: bool = False,
    ) -> None:
        given: object = device
        if not isinstance(given, Device):
            hint = ": make one of it" if isinstance(given, type) else ""
            raise TypeError(f"device must be a guestio Device, not {given!r}{hint}")
        if not isinstance(getattr(device, "device_id", None), int):
            raise TypeError(f"{type(device).__name__}.device_id is missing: the type of the device")
        if not 1 <= check_int(device.num_queues, "num_queues") <= MAX_QUEUES:
            raise ValueError(f"num_queues {device.num_queues} is not in 1..{MAX_QUEUES}")
        if device.error_status is not None and not (
            0 <= check_int(device.error_status, f"{type(device).__name__}.error_status") <= 255
        ):
            raise ValueError(
                f"{type(device).__name__}.error_status {shown(device.error_status)} is not in "
                "0..255, nor None"
            )
        check_address(device.offered_features, f"{type(device).__name__}.features")
        check_config(device, device.config())
        if iommu not in ("auto", "off"):
            raise ValueError(f"iommu {iommu!r} is neither 'auto' nor 'off'")
        if indirect not in ("auto", "on", "off"):
            raise ValueError(f"indirect {indirect!r} is neither 'auto' nor 'on' nor 'off'")
        if check_int(poll_us, "poll_us") < 0:
            raise ValueError(f"poll_us {poll_us} must not be negative")
        self.device = device
        self.statistics = Statistics(device_failures=functools.partial(_failures, device))
        self._offered = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_EVENT_IDX
        if iommu == "auto":
            self._offered |= 1 << VIRTIO_F_ACCESS_PLATFORM
        if indirect == "on" or (indirect == "auto" and iommu == "off"):
            self._offered |= 1 << VIRTIO_F_INDIRECT_DESC
        if in_order:
            self._offered |= 1 << VIRTIO_F_IN_ORDER
        if ring_reset:
            self._offered |= 1 << VIRTIO_F_RING_RESET
        self._miss_timeout = check_seconds(
            miss_timeout, "miss_timeout", LONGEST_TIMEOUT, zero=False
        )
        check_seconds(stop_timeout, "stop_timeout", LONGEST_TIMEOUT)
        self._track_dirty = track_dirty
        self._stopping = threading.Event()
        self._connection: Connection | None = None
        self._waiting: deque[socket.socket] = deque()
        self._serving = self._closed = False
        self._accepted_at = 0.0
        with contextlib.ExitStack() as undo:
            self._loop = EventLoop()
            undo.callback(self._loop.close)
            self._host = DeviceHost(
                device,
                self._loop,
                self.statistics,
                stop_timeout=stop_timeout,
                poll_us=poll_us,
                queue_threads=queue_threads,
                failed=self._thread_failed,
            )
            undo.callback(self._host.close)
            self.statistics.device_holds = lambda: self._host.outstanding
            self._endpoint = make_endpoint(path, connect=connect)
            undo.callback(self._endpoint.close)
            device.attached(self._host)
            undo.pop_all()
        self.path, self.ready_line = self._endpoint.path, self._endpoint.ready_line
        LOG.watch(self._lines_hidden)

    def __repr__(self) -> str:
        kind = type(self.device).__name__
        served = "serving" if self._serving else "not serving"
        return f"<Backend of {kind}, {self.ready_line}: {served}, {self.statistics}>"

    def serve(self, connections: int | None = None) -> None:
        """Serve front-ends until :meth:`stop` is called, or the only front-end is gone.

        Args:
            connections: Return after so many front-ends; None for no limit.

        Raises:
            KeyboardInterrupt, SystemExit: The device raised it, or a signal handler. The front-end
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
        """Accept one front-end and serve it until it goes away."""
        unclean = self._connection is not None and self._connection.unclean
        self._connection = None
        if unclean:
            # What refers to itself, as an error and its frames do, may keep guest memory mapped.
            gc.collect()
        self._loop.clear_timer((self, "silent"))
        while not self._stopping.is_set():
            try:
                if self._waiting and self._connection is None and not self._endpoint.paused:
                    self._begin(self._waiting.popleft())
                self._loop.run_once()
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:
                # A mistake of the device or of ours: it costs this connection, not the next.
                LOG.report(log, logging.ERROR, "serving failed", trace=True)
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
        """Whether there was a front-end and it has gone."""
        return self._connection is not None and self._connection.closed

    def _arrived(self, connected: socket.socket) -> None:
        if self._connection is None and not self._waiting:
            self._begin(connected)
        else:
            self._have_wait(connected)

    def _have_wait(self, connected: socket.socket) -> None:
        """Have a front-end wait until the one that is served goes.

        What it sends is not read. It is not left to the listener's queue, where a descriptor that
        it sends would stay open unseen: the other end of the connection that is served, say, which
        then never ends.
        """
        if len(self._waiting) >= MAX_WAITING:
            LOG.report(log, logging.ERROR, "front-end refused: %d others wait", MAX_WAITING)
            close_socket(connected)
            return
        first = not self._waiting
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

    def _look_at_waiting(self) -> None:
        """Let go of front-ends that wait no more, or should not, as long as any waits."""
        for waiting in list(self._waiting):
            self._drop_waiting(waiting)
        if self._waiting:
            when = time.monotonic() + WAITING_LOOK
            self._loop.set_timer((self, "waiting"), when, self._look_at_waiting)

    def _drop_waiting(self, waiting: socket.socket) -> None:
        """Let go of a front-end if it is gone, or has passed descriptors before it was answered."""
        poll = select.poll()
        poll.register(waiting, 0)
        gone = bool(poll.poll(0))
        passed = queued_fds(waiting.fileno())
        if not gone and not passed:
            return
        if passed:
            self.statistics.protocol_errors += 1
            LOG.report(
                log,
                logging.ERROR,
                "front-end disconnected: %d descriptors came from it while it waited for another "
                "one to go",
                passed,
            )
        self._waiting.remove(waiting)
        close_socket(waiting)

    def _begin(self, connected: socket.socket) -> None:
        """Serve a front-end from now on."""
        self.statistics.connections += 1
        channel = Channel(connected)
        try:
            self._connection = Connection(
                channel,
                self._host,
                self._loop,
                offered=self._offered,
                miss_timeout=self._miss_timeout,
                track_dirty=self._track_dirty,
            )
        except BaseException:
            channel.close()
            raise
        self._accepted_at = time.monotonic()
        self._limit_silence()

    def _limit_silence(self) -> None:
        """Have a front-end that has said nothing yet make way for another that waits."""
        if self._waiting and self._connection is not None:
            self._loop.set_timer(
                (self, "silent"), self._accepted_at + FIRST_MESSAGE_TIMEOUT, self._make_way
            )

    def _make_way(self) -> None:
        connection = self._connection
        if not self._waiting or connection is None or connection.closed or connection.heard:
            return
        connection.disconnect(
            f"no message within {FIRST_MESSAGE_TIMEOUT} s, and another front-end waits"
        )

    def _thread_failed(self, error: BaseException) -> None:
        """A mistake in a queue's thread is dealt with like one in ours, once for a front-end."""
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
                f"the back-end ({self.ready_line}) cannot be closed while it serves: call stop(), "
                "and close() once serve() has returned"
            )
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if not self._closed:
            self._closed = True
            LOG.unwatch(self._lines_hidden)
            LOG.flush()
            # A front-end that waits may have sent descriptors already.
            for waiting in self._waiting:
                close_socket(waiting)
            self._waiting.clear()
            self._host.close()
            self._endpoint.close()
            self._loop.close()

    def remove_socket(self) -> None:
        """Remove the socket, unless another one has taken its place. From any thread."""
        self._endpoint.remove_socket()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _failures(device: Device) -> int:
    """What a device counts, or 0 if it does not."""
    try:
        return operator.index(device.failures)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        name = type(device).__name__
        LOG.report(log, logging.ERROR, "%s.failures is no number", name, trace=True)
        return 0
