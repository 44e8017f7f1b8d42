"""A device at the end of a Unix socket, for any vhost-user front-end."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Literal

from guestio.addr import check_int, check_seconds
from guestio.budgets import LONGEST_TIMEOUT, MAX_WAITING, STOP_TIMEOUT
from guestio.control import schema
from guestio.control.explain import check_explained, explain_endpoint, explain_range
from guestio.control.status import FAULTS, Seen, Source, budget, host_queues, rules_of
from guestio.control.survey import check_surveyed, survey_memory
from guestio.control.watched import WatchedServer
from guestio.errors import naming
from guestio.vhost_user.channel import Channel
from guestio.vhost_user.connection import Connection
from guestio.vhost_user.session import MAX_QUEUES
from guestio.virtio.device import Device
from guestio.virtio.host import DeviceHost, check_device, statistics_of, transport_features

log = logging.getLogger("guestio.vhost_user")


class Backend(WatchedServer):
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
        control, http, http_token: Where to be watched, as for
            :class:`~guestio.control.watched.WatchedServer`.

    Raises:
        DeviceError: The path is too long or in use, or its directory cannot be written; the socket
            is no connected or listening Unix stream socket; or the device's ``config()`` returned
            no bytes. A socket that is refused is still the caller's.
        DeviceMethodError: ``config`` or ``attached`` of the device raised something that is no
            `GuestioError`.

    Attributes:
        path: Where the socket is; empty if it has no name in the file system.
        ready_line: One line that says where front-ends come from: ``listening on PATH``,
            ``connecting to PATH``, or which descriptor it is.
        statistics: Counters over all front-ends so far.

    Threads: everything happens in the thread that calls :meth:`serve`, unless queues have their
    own; only :meth:`stop` may be called from others and from signal handlers.
    """

    peer_name = "front-end"

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
        control: str | os.PathLike[str] | None = None,
        http: str | None = None,
        http_token: str | None = None,
    ) -> None:
        check_device(device, MAX_QUEUES)
        self._offered = transport_features(
            iommu=iommu, indirect=indirect, in_order=in_order, ring_reset=ring_reset
        )
        if check_int(poll_us, "poll_us") < 0:
            raise ValueError(f"poll_us {poll_us} must not be negative")
        self.device = device
        self.statistics = statistics_of(device)
        self._miss_timeout = check_seconds(
            miss_timeout, "miss_timeout", LONGEST_TIMEOUT, zero=False
        )
        self._stop_timeout = check_seconds(stop_timeout, "stop_timeout", LONGEST_TIMEOUT)
        self._poll_us, self._queue_threads = poll_us, queue_threads
        self._track_dirty = track_dirty
        super().__init__(
            path, connect=connect, log=log, control=control, http=http, http_token=http_token
        )

    def __repr__(self) -> str:
        kind = type(self.device).__name__
        served = "serving" if self._serving else "not serving"
        return f"<Backend of {kind}, {self.ready_line}: {served}, {self.statistics}>"

    def _attach(self, undo: contextlib.ExitStack) -> None:
        self._host = DeviceHost(
            self.device,
            self._loop,
            self.statistics,
            stop_timeout=self._stop_timeout,
            poll_us=self._poll_us,
            queue_threads=self._queue_threads,
            failed=self._thread_failed,
        )
        self._host.ending = self._stopping.is_set
        kind = type(self.device).__name__
        self._source = Source(kind, "vhost-user", self._host.origin, self.device)
        undo.callback(self._host.close)
        self.statistics.device_holds = lambda: self._host.outstanding

    def _attached(self) -> None:
        with naming(self.device, "attached"):
            self.device.attached(self._host)

    def _close_device(self) -> None:
        self._host.close()

    def _connect(self, connected: socket.socket) -> Connection:
        self.statistics.connections += 1
        channel: Channel = self._host.channel_class(Channel)(connected)
        try:
            return Connection(
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

    def _count_protocol_error(self) -> None:
        self.statistics.protocol_errors += 1

    def status(self) -> schema.Status:
        """See :class:`~guestio.control.watched.WatchedServer`."""
        connection = self._connection
        seen = connection.seen() if isinstance(connection, Connection) else Seen()
        return self._source.status(
            self.statistics.counts(),
            FAULTS,
            path=self.path,
            queues=host_queues(self._host),
            budgets={
                "outstanding_pieces": budget(self._host.quota.used, self._host.quota.most),
                "waiting_front_ends": budget(len(self._waiting), MAX_WAITING),
            },
            seen=seen,
            rules=rules_of(self),
        )

    def explain(
        self, address: int, length: int = 1, *, endpoint: int | None = None
    ) -> schema.Explanation:
        """See :class:`~guestio.control.watched.WatchedServer`."""
        check_explained(address, length)
        if endpoint is not None:
            return explain_endpoint(self.device, endpoint, address, length)
        connection = self._connection
        if isinstance(connection, Connection) and not connection.closed:
            return connection.explain(address, length)
        return explain_range(address, length, [], origin=self._host.origin, translated=False)

    def survey(
        self, address: int, length: int, parts: int, *, memory: bool = False
    ) -> schema.Survey:
        """See :class:`~guestio.control.watched.WatchedServer`."""
        check_surveyed(address, length, parts)
        connection = self._connection
        if isinstance(connection, Connection) and not connection.closed:
            return connection.survey(address, length, parts, memory=memory)
        return survey_memory([], address, length, parts)
