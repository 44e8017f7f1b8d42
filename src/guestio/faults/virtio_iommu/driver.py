"""The driver of a virtio-iommu, and the endpoints behind it, whatever carries the device.

The rings and all buffers are in memory that both sides see, so an :class:`IommuDriver` is the same
for a device of this process, one behind a Unix socket, and QEMU's: only registers, notifications
and what endpoints do are a :class:`Carrier`'s.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from guestio.errors import QueueError
from guestio.faults.outcomes import FailError, SilentError
from guestio.memory import GuestRegionCollection
from guestio.virtio.driver import DriverQueue
from guestio.virtio.layout import RingLayout

REQUESTS: Final = 0
EVENTS: Final = 1
QUEUE_SIZE: Final = 64
"""Entries of a queue, unless the device has fewer."""

RINGS: Final = 0x100000
"""Where the rings and buffers of the driver begin in guest physical memory."""
DATA: Final = 0x200000
"""Where memory begins that endpoints reach, through the device."""
MEMORY_BYTES: Final = 16 << 20
"""Guest physical memory that is used, at least."""
DMA_BYTES: Final = 4096
"""Bytes that an endpoint's buffer has."""

_BUFFERS: Final = RINGS + 0x10000
_EVENT_BUFFERS: Final = RINGS + 0xE0000
_EVENT_ROOM: Final = 64
_GRAIN: Final = 16
_PAUSE: Final = 0.0005


class Carrier(ABC):
    """Reaches one virtio-iommu. For one thread.

    Its methods raise the errors of :mod:`guestio.faults.outcomes`.

    Attributes:
        offered: Feature bits that the device offers.
        endpoints: Ids of endpoints that there are.
        memory: Guest physical memory, as the device sees it.
        queue_size: Entries that both queues may have.
        has_dma: Whether endpoints can be made to access memory.
    """

    offered: int
    endpoints: tuple[int, ...]
    memory: GuestRegionCollection
    queue_size: int = QUEUE_SIZE
    has_dma: bool = True

    @abstractmethod
    def reset(self) -> None:
        """Reset the device, as a driver does before it sets it up."""

    @abstractmethod
    def start(self, features: int, rings: Sequence[RingLayout]) -> None:
        """Accept features, set up the rings by their numbers, and say DRIVER_OK."""

    @abstractmethod
    def notify(self, queue: int) -> None:
        """Tell the device of buffers."""

    @abstractmethod
    def run(self) -> None:
        """Let the device work, if it does not by itself, and find out whether it is there."""

    @abstractmethod
    def needs_reset(self) -> bool:
        """Whether the device says that it cannot go on without a reset."""

    @abstractmethod
    def config(self) -> bytes:
        """The configuration space."""

    @abstractmethod
    def write_config(self, offset: int, data: bytes) -> None:
        """Write to the configuration space."""

    @abstractmethod
    def dma_read(self, endpoint: int, address: int, length: int) -> None:
        """Have an endpoint read at an I/O virtual address into its buffer, if it is allowed to."""

    @abstractmethod
    def dma_write(self, endpoint: int, address: int, length: int) -> None:
        """Have an endpoint write from its buffer to an I/O virtual address, if allowed to."""

    def release(self) -> None:
        """The check is over; what was opened for it alone is closed."""


class Answer(NamedTuple):
    """What became of a request.

    Attributes:
        written: Bytes that the device says it wrote; None if it did not give the request back,
            but said that it needs a reset.
        data: The device-writable bytes, which were 0xAA before.
    """

    written: int | None
    data: bytes

    @property
    def status(self) -> int | None:
        """The status in the last four bytes that were written; None if there are fewer."""
        written = self.written
        return self.data[written - 4] if written and 4 <= written <= len(self.data) else None

    def __str__(self) -> str:
        if self.written is None:
            return "no answer but DEVICE_NEEDS_RESET"
        if not self.written:
            return "a zero-length answer"
        names = ("OK", "IOERR", "UNSUPP", "DEVERR", "INVAL", "RANGE", "NOENT", "FAULT", "NOMEM")
        status = self.status
        if status is None:
            return f"{self.written} bytes without a status"
        return names[status] if status < len(names) else f"status {status}"


class IommuDriver:
    """The two queues of a virtio-iommu. For one thread.

    Args:
        carrier: Reaches the device.
        patience: Seconds that an answer may take.

    Attributes:
        carrier: The same.
        features: What was negotiated last.
    """

    def __init__(self, carrier: Carrier, patience: float) -> None:
        self.carrier = carrier
        self.features = 0
        self._patience = patience
        self._queues: list[DriverQueue] = []
        self._events = 0

    def start(self, features: int) -> None:
        """Reset the device and set it up with these features.

        Raises:
            FailError: It does not accept them.
        """
        self.close()
        self.carrier.reset()
        size = min(QUEUE_SIZE, self.carrier.queue_size)
        layouts = [RingLayout.contiguous(RINGS + 0x4000 * queue, size) for queue in range(2)]
        memory = self.carrier.memory
        for layout in layouts:
            self._queues.append(DriverQueue(memory, layout))
        self.features = features
        self._events = 0
        self.carrier.start(features, layouts)

    def close(self) -> None:
        """Let the rings go."""
        while self._queues:
            self._queues.pop().close()

    def ask(self, readable: Sequence[bytes], writable: Sequence[int]) -> Answer:
        """Send one request, in descriptors of these bytes and sizes, and wait for its answer."""
        return self.ask_all([(readable, writable)])[0]

    def ask_all(self, requests: Sequence[tuple[Sequence[bytes], Sequence[int]]]) -> list[Answer]:
        """Send requests together, and wait for all of their answers."""
        queue = self._queues[REQUESTS]
        at = _BUFFERS
        rooms = []
        for token, (readable, writable) in enumerate(requests):
            chain: list[tuple[int, int]] = []
            for piece in readable:
                self.carrier.memory.write(at, piece)
                chain.append((at, len(piece)))
                at += -(-len(piece) // _GRAIN) * _GRAIN
            room = []
            for size in writable:
                self.carrier.memory.write(at, b"\xaa" * size)
                room.append((at, size))
                at += -(-size // _GRAIN) * _GRAIN
            if at > _EVENT_BUFFERS:
                raise ValueError("more requests at once than there is room for")
            rooms.append(room)
            queue.add(chain, room, token)
        if queue.publish():
            self.carrier.notify(REQUESTS)
        written = self._wait(queue, len(requests))
        read = self.carrier.memory.read
        return [
            Answer(written.get(token), b"".join(read(*piece) for piece in room))
            for token, room in enumerate(rooms)
        ]

    def _wait(self, queue: DriverQueue, count: int) -> dict[int, int]:
        """Bytes written by number of request; those are missing that a broken device keeps."""
        found: dict[int, int] = {}
        deadline = time.monotonic() + self._patience
        while True:
            self.carrier.run()
            found |= {done.token: done.written for done in _collect(queue)}
            if len(found) == count or self.carrier.needs_reset():
                return found
            if time.monotonic() >= deadline:
                raise SilentError(f"no answer to a request within {self._patience:g} s")
            time.sleep(_PAUSE)

    def post(self, size: int) -> None:
        """Give the device a buffer for an event."""
        at = _EVENT_BUFFERS + _EVENT_ROOM * self._events
        self._events += 1
        self.carrier.memory.write(at, b"\xaa" * min(size, _EVENT_ROOM))
        queue = self._queues[EVENTS]
        queue.add([], [(at, size)], (at, size))
        if queue.publish():
            self.carrier.notify(EVENTS)
        self.carrier.run()

    def events(self, count: int, seconds: float) -> list[bytes]:
        """Events that came, as soon as there are so many or this time is over."""
        found: list[bytes] = []
        deadline = time.monotonic() + seconds
        while True:
            self.carrier.run()
            found += [
                self.carrier.memory.read(done.token[0], done.written)
                for done in _collect(self._queues[EVENTS])
            ]
            if len(found) >= count or time.monotonic() >= deadline:
                return found
            time.sleep(_PAUSE)


def _collect(queue: DriverQueue) -> list[Any]:
    try:
        return list(queue.collect())
    except QueueError as error:
        raise FailError(f"the device broke a queue: {error}") from None
