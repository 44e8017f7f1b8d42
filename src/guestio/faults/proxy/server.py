"""A proxy between any vhost-user front-end and any back-end."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from guestio.budgets import MAX_WAITING, PROXY_LOOK
from guestio.control import schema
from guestio.control.explain import check_explained, explain_endpoint, explain_range
from guestio.control.status import Seen, Source, budget, queue_status, rules_of
from guestio.control.survey import check_surveyed, survey_memory
from guestio.control.watched import WatchedServer
from guestio.errors import DeviceError
from guestio.faults.misbehavior.force import Faults
from guestio.faults.misbehavior.rules import Level
from guestio.faults.proxy.addon import Addons, ProxyFault
from guestio.faults.proxy.connection import ProxyConnection, backend_name
from guestio.faults.proxy.queue import Completion, ProxyQueue, Request
from guestio.faults.proxy.shadow import Shadow
from guestio.peer.endpoint import MAX_PATH
from guestio.ratelog import LOG
from guestio.trace import What, event, new_origin
from guestio.vhost_user.channel import Channel
from guestio.vhost_user.messages import BackendRequest, FrontendRequest
from guestio.vhost_user.session import MAX_QUEUES
from guestio.virtio.device import DeviceId
from guestio.virtio.loop import EventLoop

log = logging.getLogger("guestio.proxy")

RULES: Final = (
    "hang-up",
    "slow",
    "bad-reply",
    "no-reply",
    "wrong-fds",
    "feature-lie",
    "status-lie",
    "config-flip",
    "skip-kick",
    "late-kick",
    "skip-interrupt",
    "late-interrupt",
    "spurious-interrupt",
)
"""What can go wrong on purpose in a proxy."""

DEVICES: Final = {
    "net": DeviceId.NET,
    "blk": DeviceId.BLOCK,
    "console": DeviceId.CONSOLE,
    "rng": DeviceId.ENTROPY,
    "input": DeviceId.INPUT,
    "fs": 26,
}
"""Types of devices that it may be told to be in front of, by name."""

FAULTS: Final = ("protocol_errors", "violations", "addon_errors")

Notifications = Literal["auto", "watch", "between", "relay"]
"""Whether kicks, calls and rings are passed on, or only looked at; see `Proxy`."""

_QUIET: Final = 10
"""How many times longer nothing is looked at while nothing happens."""


@dataclass
class ProxyStatistics:
    """What has passed, over all front-ends.

    Attributes:
        connections: Front-ends accepted.
        messages: Messages, both ways.
        iotlb_misses: Translations that the back-end asked for.
        protocol_errors: Connections that were cut because a peer could not be followed, did not
            read, or, with ``strict``, broke a rule.
        violations: Rules that were broken, of messages and of rings.
        queues, addons: Tell the other counts.
    """

    connections: int = 0
    messages: int = 0
    iotlb_misses: int = 0
    protocol_errors: int = 0
    violations: int = 0
    queues: dict[int, ProxyQueue] = field(default_factory=dict, repr=False)
    addons: Addons = field(default_factory=Addons, repr=False)
    _updates: int = field(default=0, repr=False)
    _invalidations: int = field(default=0, repr=False)
    _shadow: Shadow | None = field(default=None, repr=False)

    def came(self, shadow: Shadow) -> None:
        """Count what a connection counts, too."""
        self._shadow = shadow

    def gone(self, shadow: Shadow) -> None:
        """Keep what a connection has counted."""
        if self._shadow is shadow:
            self._shadow = None
        self._updates += shadow.updates
        self._invalidations += shadow.invalidations

    @property
    def iotlb_updates(self) -> int:
        """Translations that the front-end told."""
        return self._updates + (0 if self._shadow is None else self._shadow.updates)

    @property
    def iotlb_invalidations(self) -> int:
        """Translations that it took back."""
        return self._invalidations + (0 if self._shadow is None else self._shadow.invalidations)

    @property
    def requests(self) -> int:
        """Requests that drivers made available."""
        return sum(each.snapshot().counts.taken for each in list(self.queues.values()))

    @property
    def completed(self) -> int:
        """Those that devices gave back."""
        return sum(each.snapshot().counts.completed for each in list(self.queues.values()))

    @property
    def unseen_requests(self) -> int:
        """Requests that were seen too late to know more of them than that they were there."""
        return sum(each.unseen_requests for each in list(self.queues.values()))

    @property
    def kicks(self) -> int:
        """Notifications of devices that were seen."""
        return sum(each.notifications[0] for each in list(self.queues.values()))

    @property
    def calls(self) -> int:
        """Notifications of drivers that were seen."""
        return sum(each.notifications[1] for each in list(self.queues.values()))

    @property
    def addon_errors(self) -> int:
        """What addons have raised."""
        return self.addons.errors

    def counts(self) -> dict[str, int]:
        """All counters by name. From any thread."""
        return {
            name: getattr(self, name)
            for name in (
                "connections",
                "messages",
                "requests",
                "completed",
                "unseen_requests",
                "kicks",
                "calls",
                "iotlb_misses",
                "iotlb_updates",
                "iotlb_invalidations",
                "protocol_errors",
                "violations",
                "addon_errors",
            )
        }

    def __str__(self) -> str:
        """All counters, for people."""
        return " ".join(f"{name}={count}" for name, count in self.counts().items())


class Proxy(WatchedServer):
    """Passes on what a vhost-user front-end and a back-end say to each other, and looks at it.

    Messages and their descriptors pass in both directions, on the main channel and on the
    back-end's; rings and buffers stay where they are, and the proxy maps the same memory, read
    only. One front-end is served at a time, and gets a connection to the back-end of its own.

    Args:
        path: Where to listen, or a socket, as for `Backend`.
        backend: Where the back-end listens. A front-end waits for it as long as
            `PROXY_CONNECT_SECONDS`.
        strict: Whether the first rule of the protocol or of a ring that either side breaks cuts the
            connection; otherwise it is logged and counted.
        addons: Python files that see, and may change, what passes.
        faults: Rules by which it goes wrong on purpose; None for none, also later.
        device: What the back-end is, one of `DEVICES`; of a disk's requests the kind and the
            sector are seen then.
        notifications: ``"watch"`` waits for the same eventfds as the two sides, which takes them no
            time; a request may be over when it is looked at. ``"between"`` puts eventfds of its own
            in between, so that a request is seen before the back-end is told of it, and its
            completion before the driver is, unless one of them looks without being told.
            ``"relay"`` gives the back-end available and used rings of the proxy's as well, so that
            nothing passes unseen, which a recording of what requests carry needs. ``"auto"`` is the
            first, unless rules, addons that see requests, or ``strict`` need the second.
        control, http, http_token: Where to be watched, as for `WatchedServer`.

    Raises:
        DeviceError: As from `Backend`; or the path of the back-end is too long.
        AddonError: A file is no addon.
        ValueError: A rule cannot be obeyed here.

    Attributes:
        statistics: Counters over all front-ends so far.
        origin: Its number in records of tracepoints.

    Threads: as of `Backend`.
    """

    peer_name = "front-end"

    def __init__(
        self,
        path: str | os.PathLike[str] | socket.socket,
        backend: str | os.PathLike[str],
        *,
        strict: bool = False,
        addons: Iterable[str] = (),
        faults: Faults | None = None,
        device: str | None = None,
        notifications: Notifications = "auto",
        control: str | os.PathLike[str] | None = None,
        http: str | None = None,
        http_token: str | None = None,
    ) -> None:
        self.backend = os.fspath(backend)
        if not self.backend or len(os.fsencode(self.backend)) > MAX_PATH:
            raise DeviceError(
                f"the back-end's path {self.backend!r} is empty, or longer than {MAX_PATH} bytes"
            )
        if device is not None and device not in DEVICES:
            raise ValueError(f"device {device!r} is none of {', '.join(DEVICES)}")
        if notifications not in get_args(Notifications):
            raise ValueError(f"notifications {notifications!r}: say auto, watch, between or relay")
        self.device_id = 0 if device is None else DEVICES[device]
        self.block = device == "blk"
        self.strict = strict
        self.addons = Addons(addons)
        self.listens = self.addons.listens
        self.faults = faults
        if faults is not None:
            faults.allow(RULES, "a proxy does not make requests or rings go wrong")
            names = [each.name for each in FrontendRequest]
            names += [backend_name(each) for each in BackendRequest]
            faults.expect(Level.WIRE, names, "vhost-user")
        needed = strict or self.listens or faults is not None
        if notifications == "watch" and faults is not None:
            raise ValueError(
                "rules may be about notifications, which are not passed on with "
                "notifications='watch'"
            )
        self.relays = notifications == "relay"
        self.between = (
            self.relays or notifications == "between" or (notifications == "auto" and needed)
        )
        self.statistics = ProxyStatistics(addons=self.addons)
        self.origin = new_origin()
        self._source = Source(
            "Proxy" if device is None else device, "vhost-user", self.origin, None
        )
        self._queues = self.statistics.queues
        super().__init__(
            path, connect=False, log=log, control=control, http=http, http_token=http_token
        )
        self.connects = True  # to the back-end
        if faults is not None:
            faults.watch(self._rules_changed)

    def __repr__(self) -> str:
        served = "serving" if self._serving else "not serving"
        return f"<Proxy {self.ready_line}, to {self.backend}: {served}, {self.statistics}>"

    @property
    def loop(self) -> EventLoop:
        """What calls back."""
        return self._loop

    def queue(self, index: int) -> ProxyQueue:
        """A queue, which is made if it was not spoken of.

        Raises:
            IndexError: There are not that many.
        """
        found: ProxyQueue | None = self._queues.get(index)
        if found is None:
            if not 0 <= index < MAX_QUEUES:
                raise IndexError(index)
            found = ProxyQueue(index, self._loop, self, self.origin)
            self._queues[index] = found
        return found

    # PeerServer.

    def _attach(self, undo: contextlib.ExitStack) -> None:
        """Nothing serves a device here."""

    def _attached(self) -> None:
        self._look_soon(PROXY_LOOK)

    def _close_device(self) -> None:
        self._loop.clear_timer((self, "look"))

    def _connect(self, connected: socket.socket) -> ProxyConnection:
        self.statistics.connections += 1
        channel = Channel(connected)
        try:
            made = ProxyConnection(channel, self)
        except BaseException:
            channel.close()
            raise
        if not made.closed:
            self.statistics.came(made.shadow)
        return made

    def _count_protocol_error(self) -> None:
        self.statistics.protocol_errors += 1

    # Looking at rings.

    def _look_soon(self, seconds: float) -> None:
        self._loop.set_timer((self, "look"), time.monotonic() + seconds, self._look)

    def _look(self) -> None:
        """Look at all rings: their sides may need no notifications, or ours may be too late."""
        changed = False
        try:
            for queue in list(self._queues.values()):
                changed |= queue.look()
        finally:
            self._look_soon(PROXY_LOOK if changed else _QUIET * PROXY_LOOK)

    def _rules_changed(self) -> None:
        for queue in list(self._queues.values()):
            queue.rules_changed()

    # Watcher.

    def requested(self, request: Request) -> None:
        """See :class:`~guestio.faults.proxy.queue.Watcher`."""
        self.addons.request(request)

    def completed(self, completion: Completion) -> None:
        """See :class:`~guestio.faults.proxy.queue.Watcher`."""
        self.addons.completion(completion)

    def ring_violated(self, queue: int, who: str, what: str) -> None:
        """See :class:`~guestio.faults.proxy.queue.Watcher`."""
        event(What.QUEUE_BROKEN, origin=self.origin, queue=queue)
        connection = self._connection
        if isinstance(connection, ProxyConnection):
            self.violated(connection, who, f"queue {queue}: {what}", queue)
            if self.relays:
                # There is no passing on a ring that makes no sense.
                connection.disconnect(f"the {who} broke queue {queue}, which is relayed: {what}")

    def untranslated(self, missing: Sequence[tuple[int, int, int]]) -> None:
        """See :class:`~guestio.faults.proxy.queue.Watcher`."""
        connection = self._connection
        if isinstance(connection, ProxyConnection):
            connection.ask(missing)

    def violated(
        self, connection: ProxyConnection, who: str, what: str, queue: int | None = None
    ) -> None:
        """Report a rule that was broken; with ``strict`` the connection is closed."""
        self.statistics.violations += 1
        self.addons.fault(ProxyFault(who, what, queue))
        if self.strict:
            connection.disconnect(f"the {who} broke the protocol: {what}")
        else:
            LOG.report(log, logging.WARNING, "the %s broke the protocol: %s", who, what)

    # Being watched.

    def status(self) -> schema.Status:
        """See :class:`~guestio.control.watched.WatchedServer`."""
        connection = self._connection
        seen = connection.seen() if isinstance(connection, ProxyConnection) else Seen()
        now = time.monotonic()
        status = self._source.status(
            self.statistics.counts(),
            FAULTS,
            path=self.path,
            queues=[
                queue_status(queue.snapshot(), now) for _, queue in sorted(self._queues.items())
            ],
            budgets={"waiting_front_ends": budget(len(self._waiting), MAX_WAITING)},
            seen=seen,
            rules=rules_of(self),
        )
        status["device"]["device_id"] = self.device_id or None
        return status

    def explain(
        self, address: int, length: int = 1, *, endpoint: int | None = None
    ) -> schema.Explanation:
        """See :class:`~guestio.control.watched.WatchedServer`."""
        check_explained(address, length)
        if endpoint is not None:
            return explain_endpoint(None, endpoint, address, length)
        connection = self._connection
        if isinstance(connection, ProxyConnection) and not connection.closed:
            return connection.explain(address, length)
        return explain_range(address, length, [], origin=self.origin, translated=False)

    def survey(
        self, address: int, length: int, parts: int, *, memory: bool = False
    ) -> schema.Survey:
        """See :class:`~guestio.control.watched.WatchedServer`."""
        check_surveyed(address, length, parts)
        connection = self._connection
        if isinstance(connection, ProxyConnection) and not connection.closed:
            return connection.shadow.survey(address, length, parts, memory=memory)
        return survey_memory([], address, length, parts)
