"""A device at the end of a Unix socket, for any vhost-user front-end."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import os
import socket
from collections.abc import Collection
from typing import Any, Literal

from guestio.addr import check_address, check_int, check_seconds, shown
from guestio.budgets import (
    LONGEST_TIMEOUT,
    STOP_TIMEOUT,
)
from guestio.errors import naming
from guestio.peer.server import PeerServer
from guestio.ratelog import LOG
from guestio.vhost_user.channel import Channel
from guestio.vhost_user.connection import Connection
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
from guestio.virtio.statistics import Statistics

log = logging.getLogger("guestio.vhost_user")


class Backend(PeerServer):
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
    ) -> None:
        given: object = device
        if not isinstance(given, Device):
            hint = ": make one of it" if isinstance(given, type) else ""
            raise TypeError(f"device must be a guestio Device, not {given!r}{hint}")
        device_id: Any = getattr(device, "device_id", None)
        if device_id is None:
            raise TypeError(f"{type(device).__name__}.device_id is missing: the type of the device")
        check_int(device_id, f"{type(device).__name__}.device_id")
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
        with naming(device, "config"):
            config = device.config()
        check_config(device, config)
        if iommu not in ("auto", "off"):
            raise ValueError(f"iommu {iommu!r} is neither 'auto' nor 'off'")
        if indirect not in ("auto", "on", "off"):
            raise ValueError(f"indirect {indirect!r} is neither 'auto' nor 'on' nor 'off'")
        if check_int(poll_us, "poll_us") < 0:
            raise ValueError(f"poll_us {poll_us} must not be negative")
        _check_processes(device)
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
        self._stop_timeout = check_seconds(stop_timeout, "stop_timeout", LONGEST_TIMEOUT)
        self._poll_us, self._queue_threads = poll_us, queue_threads
        self._track_dirty = track_dirty
        super().__init__(path, connect=connect, log=log)

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
        undo.callback(self._host.close)
        self.statistics.device_holds = lambda: self._host.outstanding

    def _attached(self) -> None:
        with naming(self.device, "attached"):
            self.device.attached(self._host)

    def _close_device(self) -> None:
        self._host.close()

    def _connect(self, connected: socket.socket) -> Connection:
        self.statistics.connections += 1
        channel = Channel(connected)
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


def _check_processes(device: Device) -> None:
    """Refuse a device that has a queue for `Device.process`, and does not provide that."""
    if getattr(device.process, "__func__", None) is not Device.process:
        return
    owned = device.device_queues
    if isinstance(owned, Collection):
        for index in range(device.num_queues):
            if index not in owned:
                raise TypeError(
                    f"{type(device).__name__} has no process method for the requests of queue "
                    f"{index}, which is not in its device_queues"
                )


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
