"""A back-end in a simulation: a device's host and its connection, with places where it may die."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from guestio.vhost_user.channel import Channel
from guestio.vhost_user.connection import Connection
from guestio.virtio.host import DeviceHost, statistics_of, transport_features
from guestio.virtio.loop import EventLoop

if TYPE_CHECKING:
    from guestio._core.virtio.chain import Chain
    from guestio.testing.simulation.frontend import Frontend
    from guestio.virtio import Device


class Stage(Protocol):
    """What watches a back-end from within."""

    def point(self, where: str) -> None:
        """The back-end may die here."""
        ...

    def check_locks(self, what: str) -> None:
        """No lock may be held here."""
        ...


class Killed(SystemExit):
    """The back-end dies here: nothing catches this but the world."""


class Backend:
    """A back-end: what a process has that serves a device.

    Args:
        stage: Where it is.
        device: Its device.
    """

    def __init__(self, stage: Stage, device: Device) -> None:
        self.device = device
        self.loop = EventLoop()
        self.host = DeviceHost(device, self.loop, statistics_of(device), stop_timeout=1.0)
        self.connection: Connection | None = None
        self._stage = stage
        self._process = device.process
        device.process = self._watched  # type: ignore[method-assign]
        device.attached(self.host)

    def _watched(self, queue: int, chain: Chain) -> int | Future[int]:
        self._stage.point("process")
        self._stage.check_locks(f"{type(self.device).__name__}.process")
        answer = self._process(queue, chain)
        self._stage.point("processed")
        return answer

    def connect(self, frontend: Frontend) -> None:
        """Serve a front-end."""
        offered = transport_features(
            iommu="auto" if frontend.guest.translating else "off", indirect="auto"
        )
        # The core's loop asks for translations by the real clock, so it serves no queue then.
        self.host.threaded = frontend.guest.translating
        connection = Connection(
            Channel(frontend.wire.theirs),
            self.host,
            self.loop,
            offered=offered,
            miss_timeout=5.0,
            track_dirty=False,
        )
        handle = connection._handle

        def watched(message: Any) -> Any:
            self._stage.point("message")
            answer = handle(message)
            self._stage.point("handled")
            return answer

        connection._handle = watched  # type: ignore[method-assign]
        self.connection = connection

    def close(self) -> None:
        """End it in an orderly way."""
        if self.connection is not None:
            self.connection.close()
        self.host.close()
        self.device.close()
        self.loop.close()
