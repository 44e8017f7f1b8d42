"""What a virtual device is, whatever transport serves its queues."""

from __future__ import annotations

import enum
from abc import ABC
from collections.abc import Collection
from concurrent.futures import Future
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from guestio._core.virtio.chain import Chain, Server
from guestio.budgets import DEVICE_STATE
from guestio.errors import DeviceError

if TYPE_CHECKING:
    from guestio.iommu.events import Event
    from guestio.virtio.host import DeviceHost

VIRTIO_F_INDIRECT_DESC = 28
"""Feature bit: descriptors may refer to a table of descriptors (virtio 1.3, section 6)."""
VIRTIO_F_EVENT_IDX = 29
"""Feature bit: notifications are suppressed by index."""
VIRTIO_F_VERSION_1 = 32
"""Feature bit: the device follows virtio 1.0 or later."""
VIRTIO_F_ACCESS_PLATFORM = 33
"""Feature bit: the device's memory accesses are translated by the platform's IOMMU."""

VIRTIO_F_IN_ORDER = 35
"""Feature bit: the device uses buffers in the order in which they were made available."""

VIRTIO_F_RING_RESET = 40
"""Feature bit: the driver may reset a queue by itself."""


class DeviceId(enum.IntEnum):
    """Device types (virtio 1.3, section 5)."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    INPUT = 18
    IOMMU = 23


class Status(enum.IntFlag):
    """Bits of the device status field (virtio 1.3, section 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Device(ABC):
    """A virtio device: it is given requests and fills in what the driver wants to know.

    A subclass provides at least :meth:`process`, unless all its queues are in
    :attr:`device_queues`. The host that a transport drives calls the methods, one at a time for
    each queue; requests for which :meth:`process` returned a future are under way meanwhile.

    Attributes:
        device_id: What kind of device it is.
        num_queues: How many virtqueues it has.
        device_queues: Indices of those in which the device speaks first: their buffers stay in the
            ring, untranslated, until the device takes them by ``host.queue(index)``.
        features: Feature bits of its own; the transport adds its own and those of the rings.
        error_status: The value of a request's last device-writable byte that tells the driver that
            the request failed. None if the device type has no such byte.
        server: Serves the simple requests in the compiled core; :meth:`process` is given the
            rest. None if all are for :meth:`process`.
        state_version: Of what :meth:`save` returns; :meth:`restore` is given no other one.
        max_state: Bytes of state that :meth:`restore` takes at most.
    """

    device_id: ClassVar[int]
    num_queues: int = 1
    device_queues: Collection[int] = ()
    features: int = 0
    error_status: int | None = None
    server: Server | None = None
    state_version: int = 1
    max_state: int = DEVICE_STATE

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.num_queues} queues, features {self.features:#x}>"

    def process(self, queue: int, chain: Chain) -> int | Future[int]:
        """Serve one request, now or later.

        What is done quickly is done here, and the number returned. What takes time (a disk, a
        peer, a sleep) goes to a thread, and a future of the number is returned, as
        ``ThreadPoolExecutor.submit`` makes one: the host serves others meanwhile and gives the
        request back when the future is done, from whichever thread. Requests may overtake each
        other that way; a device that owes its driver an order keeps it itself.

        A future should get done by itself, in bounded time, whatever the driver does or omits:
        before a queue is stopped or reset, or memory goes away, the host calls :meth:`stopping`
        and waits for all that are under way, a second by default. Those that are still not done
        then fail and are cancelled, and their late answers go nowhere. Until the future is done, or
        the host has given it up, the memory of ``chain`` may be used; afterwards its vectors are
        empty, and an access raises :class:`InvalidAddressError`.

        What does not return at all keeps its queue from being served, and without queue threads
        everything else: a wait without a limit belongs into a thread.

        Args:
            queue: Index of its queue.
            chain: The request: what the driver gave to read and what it gave to write.

        A system call that moves the request's memory should return before the request is answered:
        it is published only then, and a stop does not wait for it without a limit.

        Returns:
            How many bytes were written from the start of ``chain.writable`` on, or a future of it.

        Raises:
            GuestioError: The request cannot be served; :meth:`fail` is called for it. The same
                with all else that is raised, and if the future ends with an exception or is
                cancelled; but SystemExit and KeyboardInterrupt that are raised here end serving.
        """
        raise DeviceError(
            f"{type(self).__name__} has no process method for the requests of queue {queue}"
        )

    def server_of(self, queue: int) -> Server | None:
        """What serves the simple requests of a queue in the compiled core: :attr:`server`."""
        return self.server

    def attached(self, host: DeviceHost) -> None:
        """Take the host, to speak first with; called once by each server of the device.

        The default does nothing. What the device starts with it (readers, timers) goes on from one
        driver to the next; queues that do not run have no buffers.
        """

    def fail(self, queue: int, chain: Chain) -> int:
        """Answer a request that failed.

        :meth:`process` raised or returned nonsense, its future did or was given up, or part of the
        request's memory cannot be reached (``chain.fault``).

        ``chain.readable`` and ``chain.writable`` hold what could be reached, ``chain.tail`` the
        last byte that the driver wanted written. The default writes :attr:`error_status` there, if
        the device type has one. For a request that :meth:`process` answered with a future, this is
        called in the thread that finished it, while other requests of the queue may be processed;
        for one that was given up, in the loop's thread. If this raises, the default is done.

        Returns:
            How many bytes were written, as from :meth:`process`; at once.
        """
        if self.error_status is None or chain.tail is None:
            return 0
        chain.tail.write(bytes([self.error_status]))
        return int(chain.fault is None and chain.writable.total == 1)

    def stopping(self, queue: int) -> None:
        """Finish or give up what :meth:`process` has not answered yet: the queue is about to stop.

        Called before the host waits for the queue's requests: when it stops, is reset, or lets
        go of its memory for a moment. It is called in the loop's thread and should return at
        once; futures may be completed or cancelled in it. The default does nothing.
        """

    def stopped(self) -> Event | None:
        """Make what was acknowledged visible to another host: no queue runs any more.

        Called after the last queue has stopped, before its front-end is told, which may have the
        guest go on elsewhere: a disk writes out what is only in its host's page cache. In the
        loop's thread. What is raised is logged, and the queue stops all the same. The default does
        nothing.

        Returns:
            None, or what is to happen before the front-end is told. That is waited for up to
            `PERSIST_TIMEOUT` of `guestio.budgets`, unless the server is stopped meanwhile. Whatever
            else a device returns is ignored.
        """
        return None

    def save(self) -> bytes:
        """What the driver told the device, and another one needs to go on in its place.

        The features that it accepted and what is in its memory are not among that: they travel
        by themselves. Called in the loop's thread while no queue runs, before a guest goes on
        elsewhere, and before a :meth:`reset` that may be a mere pause. The device stays as it is,
        because its guest may come back. The default is for devices that know nothing of a driver.

        Raises:
            GuestioError: It cannot be told now.
        """
        return b""

    def restore(self, state: bytes) -> None:
        """Go on where the device was whose :meth:`save` returned this; its driver notices nothing.

        Called in the loop's thread while no queue runs, on a device that is as after a
        :meth:`reset`, before or after :meth:`negotiated`. The state is whole and of this type and
        version, but may come from a peer that lies: check what is in it.

        Raises:
            GuestioError: It is not this device's. It is reset then.
        """
        if state:
            raise DeviceError(
                f"{type(self).__name__} keeps no state; {len(state)} bytes of it came"
            )

    def config(self) -> bytes:
        """The device's configuration space, whole."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Take over what the driver wrote to the configuration space.

        Raises:
            DeviceError: Those bytes cannot be written; nothing changed.
        """
        raise DeviceError(
            f"the driver wrote {len(data)} bytes at {offset:#x} of a read-only configuration space"
        )

    def negotiated(self, features: int) -> None:
        """Learn which feature bits the driver accepted.

        Called when they are negotiated, and after each :meth:`reset` before a queue starts, also
        if they are those of before.
        """

    @property
    def offered_features(self) -> int:
        """What a driver may accept of the device's features: :attr:`features`, by default.

        For a device whose ``features`` means something else.
        """
        return self.features

    def reset(self) -> Event | None:
        """Forget everything that the driver told the device, the accepted features among it.

        Returns:
            None, or what is to happen before the driver is told that the reset is done: what it
            gave the device is still in use elsewhere. That is waited for as long as a stop may
            take, in the loop's thread. Whatever else a device returns is ignored.
        """
        return None

    @property
    def failures(self) -> int:
        """Requests that the device answered with an error by itself, because of a disk say."""
        return 0

    def close(self) -> None:
        """Release what the device holds of the host. Calling it again does nothing."""


@runtime_checkable
class Announcing(Protocol):
    """A device that can tell its network where a hardware address is, for drivers that cannot."""

    def send_rarp(self, address: bytes) -> None:
        """Have switches learn that an address, six bytes, is reached here. In the loop's thread."""
        ...


def settled(answer: int | Future[int]) -> int:
    """What :meth:`Device.process` answered, waited for if it comes later.

    For a caller of ``process`` that has nothing else to do meanwhile.

    Raises:
        GuestioError: Whatever the future ended with.
    """
    return answer.result() if isinstance(answer, Future) else answer
