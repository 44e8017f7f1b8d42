"""A PCI device at the end of a Unix socket, for any vfio-user client."""

from __future__ import annotations

import contextlib
import logging
import os
import socket

from guestio.addr import check_int, check_seconds
from guestio.budgets import DMA_REVOKE_AFTER, LONGEST_TIMEOUT, MAX_WAITING
from guestio.control import schema
from guestio.control.explain import check_explained, explain_endpoint, explain_range
from guestio.control.status import FAULTS, Seen, Source, budget, host_queues, rules_of
from guestio.control.survey import check_surveyed, survey_memory
from guestio.control.watched import WatchedServer
from guestio.errors import naming
from guestio.pci.device import PciDevice, check_device
from guestio.pci.host import PciHost
from guestio.vfio_user.channel import Channel
from guestio.vfio_user.connection import Connection
from guestio.vfio_user.statistics import Statistics
from guestio.virtio.host import DeviceHost

log = logging.getLogger("guestio.vfio_user")

MAX_POLL_US = 1_000_000


class Server(WatchedServer):
    """Serves a PCI device to one vfio-user client after the other, such as QEMU 10.1 or newer.

    What the client maps for DMA is the device's memory; behind an IOMMU, what the guest's driver
    maps. An unmap is answered once no access of the device to that memory is under way.

    Args:
        device: What to serve; it is the caller's to close.
        path: Where to listen; a socket that nothing listens on is replaced. Or a socket, which is
            the server's from here on: a listening one, or one that a client is connected to, which
            is the only one then.
        connect: Whether a client listens on the path, and the server connects to it, again and
            again.
        revoke_after: Seconds that an unmap waits for accesses of the device to end, at most 3600.
            Then the memory is taken away from them: they read zeroes, and what they write is lost.
            The guest stands still meanwhile. QEMU waits for 5 s (``x-msg-timeout``), and goes on as
            if it had been answered.
        control, http, http_token: Where to be watched, as for
            :class:`~guestio.control.watched.WatchedServer`.

    Raises:
        DeviceError: The device contradicts itself; or the path is too long or in use, or its
            directory cannot be written; or the socket is no connected or listening Unix stream
            socket. A socket that is refused is still the caller's.
        TypeError, ValueError: Bad arguments, or a bad description of the device.

    Attributes:
        path: Where the socket is; empty if it has no name in the file system.
        ready_line: One line that says where clients come from: ``listening on PATH``, for example.
        device: What is served.
        statistics: Counters over all clients so far.

    Threads: everything happens in the thread that calls :meth:`serve`; only :meth:`stop` may be
    called from others and from signal handlers.
    """

    peer_name = "client"

    def __init__(
        self,
        device: PciDevice,
        path: str | os.PathLike[str] | socket.socket,
        *,
        connect: bool = False,
        revoke_after: float = DMA_REVOKE_AFTER,
        poll_us: int = 0,
        control: str | os.PathLike[str] | None = None,
        http: str | None = None,
        http_token: str | None = None,
    ) -> None:
        self.device = check_device(device)
        self.statistics = Statistics()
        virtio = self.device.virtio
        self.statistics.virtio = None if virtio is None else virtio.statistics
        if not 0 <= check_int(poll_us, "poll_us") <= MAX_POLL_US:
            raise ValueError(f"poll_us {poll_us} is not in 0..{MAX_POLL_US}")
        self._poll_us = poll_us
        self._revoke_after = check_seconds(revoke_after, "revoke_after", LONGEST_TIMEOUT)
        super().__init__(
            path, connect=connect, log=log, control=control, http=http, http_token=http_token
        )

    def __repr__(self) -> str:
        kind = type(self.device).__name__
        served = "serving" if self._serving else "not serving"
        return f"<Server of {kind}, {self.ready_line}: {served}, {self.statistics}>"

    def _attach(self, undo: contextlib.ExitStack) -> None:
        self._loop.core.watch = self._poll_us / 1e6
        self._host = PciHost(self.device, self._loop)
        virtio = self.device.virtio
        served = None if virtio is None else virtio.device
        kind = type(served or self.device).__name__
        self._source = Source(kind, "vfio-user", self._host.origin, served)
        self.statistics.device_failures = lambda: self._host.failures
        self.statistics.accesses_refused = lambda: self._host.memory.refused
        self.statistics.interrupts_sent = lambda: self._host.interrupts.delivered

    def _attached(self) -> None:
        with naming(self.device, "attached"):
            self.device.attached(self._host)

    def _close_device(self) -> None:
        """Do nothing: a host has nothing to release once no client is there."""

    def _connect(self, connected: socket.socket) -> Connection:
        self.statistics.connections += 1
        channel = Channel(connected)
        try:
            return Connection(
                channel,
                self._host,
                self._loop,
                self.statistics,
                revoke_after=self._revoke_after,
                ending=self._stopping.is_set,
            )
        except BaseException:
            channel.close()
            raise

    def _count_protocol_error(self) -> None:
        self.statistics.protocol_errors += 1

    @property
    def _virtio(self) -> DeviceHost | None:
        """The host of the virtio device, if the function is one."""
        return None if self.device.virtio is None else self.device.virtio.host

    def status(self) -> schema.Status:
        """See :class:`~guestio.control.watched.WatchedServer`."""
        connection, host = self._connection, self._virtio
        budgets = {"waiting_clients": budget(len(self._waiting), MAX_WAITING)}
        if host is not None:
            budgets["outstanding_pieces"] = budget(host.quota.used, host.quota.most)
        return self._source.status(
            self.statistics.counts(),
            FAULTS,
            path=self.path,
            queues=[] if host is None else host_queues(host),
            budgets=budgets,
            seen=connection.seen(host) if isinstance(connection, Connection) else Seen(),
            rules=rules_of(self),
        )

    def explain(
        self, address: int, length: int = 1, *, endpoint: int | None = None
    ) -> schema.Explanation:
        """See :class:`~guestio.control.watched.WatchedServer`."""
        check_explained(address, length)
        if endpoint is not None:
            device = None if self.device.virtio is None else self.device.virtio.device
            return explain_endpoint(device, endpoint, address, length)
        connection = self._connection
        if isinstance(connection, Connection) and not connection.closed:
            return connection.explain(address, length)
        return explain_range(
            address,
            length,
            [],
            origin=self._host.origin,
            translated=True,
            refused="no client is connected",
        )

    def survey(
        self, address: int, length: int, parts: int, *, memory: bool = False
    ) -> schema.Survey:
        """See :class:`~guestio.control.watched.WatchedServer`."""
        check_surveyed(address, length, parts)
        connection = self._connection
        if isinstance(connection, Connection) and not connection.closed:
            return connection.survey(address, length, parts, memory=memory)
        return survey_memory([], address, length, parts)
