"""What a virtio-iommu does on its two virtqueues (virtio 1.4, section 5.13.2)."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Protocol

from guestio._core.virtio.chain import Chain
from guestio.budgets import IOMMU_EVENTS_PER_TURN, IOMMU_WAITING_REQUESTS, TURN_SECONDS
from guestio.errors import DeviceError, GuestioError
from guestio.virtio.iommu import wire
from guestio.virtio.iommu.requests import Pending
from guestio.virtio.iommu.wire import FaultRecord

if TYPE_CHECKING:
    from guestio.iommu.events import Event
    from guestio.virtio.iommu.faults import FaultLog
    from guestio.virtio.queue import DeviceQueue

REQUEST_QUEUE: Final = 0
EVENT_QUEUE: Final = 1

Request = tuple[Chain, Future[int]]
"""A request whose answer comes later, and what it is completed with."""


class RequestHandler(Protocol):
    """A virtio-iommu without its queues."""

    def handle_request(self, request: bytes, writable: int) -> bytes | Pending:
        """See :meth:`VirtioIommu.handle_request`."""
        ...


class RequestServer:
    """Answers the requests of the request queue, each when its answer is there.

    Only so many requests wait for memory to be released; those behind them are begun, in their
    order, when one of these is answered. Any thread may call the methods.

    Args:
        handler: Says what the answers are.
    """

    def __init__(self, handler: RequestHandler) -> None:
        self._handler = handler
        self._schedule: Callable[[Callable[[], None]], None] = _at_once
        self._lock = threading.Lock()
        self._waiting = 0
        self._backlog: deque[Request] = deque()
        # A thread begins requests of the backlog: no other request may overtake them.
        self._beginning = False

    def use(self, schedule: Callable[[Callable[[], None]], None]) -> None:
        """Begin requests of the backlog through this, in the loop that serves the queue."""
        self._schedule = schedule

    def serve(self, chain: Chain) -> int | Future[int]:
        """Answer a request; see :meth:`Device.process`."""
        with self._lock:
            if self._backlog or self._beginning or self._waiting >= IOMMU_WAITING_REQUESTS:
                later: Future[int] = Future()
                self._backlog.append((chain, later))
                return later
            self._waiting += 1
        return self._begin(chain)

    @property
    def busy(self) -> bool:
        """Whether requests wait for their answers."""
        return bool(self._waiting)

    def _begin(self, chain: Chain, later: Future[int] | None = None) -> int | Future[int]:
        """Carry a request out; what is written, or a future if that must wait."""
        try:
            size = min(chain.readable.total, wire.LONGEST_REQUEST)
            request, room = chain.readable.read(0, size), chain.writable.total
            answer = self._handler.handle_request(request, room)
            if isinstance(answer, bytes):
                written = _write(chain, answer)
        except BaseException:
            self._end()
            raise
        if isinstance(answer, bytes):
            self._end()
            return written
        if later is None:
            later = Future()
            # It cannot be cancelled: what has begun goes on, even if its answer goes nowhere.
            later.set_running_or_notify_cancel()
        answered = functools.partial(self._answered, chain, later, answer)
        answer.add_callback(answered)
        return later

    def _end(self) -> None:
        with self._lock:
            self._waiting -= 1
            more = self._backlog and not self._beginning
        if more:
            self._schedule(self._go_on)

    def _answered(self, chain: Chain, later: Future[int], answer: Pending) -> None:
        """Give an answer that came later, in the thread that it came in."""
        try:
            later.set_result(_write(chain, answer.result(0)))
        except GuestioError as error:
            later.set_exception(error)
        finally:
            self._end()

    def _go_on(self) -> None:
        """Begin requests of the backlog, as many as may wait, in one thread at a time."""
        until = time.monotonic() + TURN_SECONDS
        with self._lock:
            if self._beginning:
                return
            self._beginning = True
        while (request := self._next(until)) is not None:
            chain, later = request
            try:
                written = self._begin(chain, later)
            except BaseException as error:
                later.set_exception(error)
                if not isinstance(error, Exception):
                    self._beginning = False
                    raise
            else:
                if isinstance(written, int):
                    later.set_result(written)

    def _next(self, until: float) -> Request | None:
        """The next request to begin; None if there is none, or if it is time for others."""
        with self._lock:
            while self._backlog and self._waiting < IOMMU_WAITING_REQUESTS:
                if time.monotonic() >= until:
                    break
                chain, later = self._backlog.popleft()
                if later.set_running_or_notify_cancel():
                    self._waiting += 1
                    return chain, later
            self._beginning = False
            more = self._backlog and self._waiting < IOMMU_WAITING_REQUESTS
        if more:
            self._schedule(self._go_on)
        return None

    def drop_backlog(self) -> None:
        """Fail the requests that have not begun."""
        with self._lock:
            dropped, self._backlog = self._backlog, deque()
        for _, later in dropped:
            if later.set_running_or_notify_cancel():
                later.set_exception(DeviceError("the request has not begun: the queue stops"))


class FaultReporter:
    """Writes fault records into the buffers of the event queue, when there are some of both.

    Args:
        faults: The records.
        queue: The event queue.
    """

    def __init__(self, faults: FaultLog, queue: DeviceQueue) -> None:
        self._faults = faults
        self._queue = queue
        self._watched: Event | None = None
        self._look()
        self._no_fault()

    def _look(self) -> None:
        """Have the loop look for buffers to fill. From any thread."""
        self._queue.on_available(self._fill)

    def _fill(self) -> None:
        for _ in range(IOMMU_EVENTS_PER_TURN):
            if self._no_fault():
                return
            chain = self._queue.take()
            if chain is None:
                return
            self._fill_one(chain)
        # A driver can give small buffers, or cause faults, as fast as this takes them.
        self._look()

    def _no_fault(self) -> bool:
        """Whether there is no fault; the next one has the loop look again."""
        arrival = self._faults.arrival
        if arrival.is_set:
            return False
        if arrival is not self._watched:
            self._watched = arrival
            arrival.add_callback(self._look)
        return True

    def _fill_one(self, chain: Chain) -> None:
        written = 0
        if chain.writable.total < FaultRecord.SIZE:
            self._faults.short_buffers += 1
        else:
            # A reset in another thread may have dropped what was there.
            records = self._faults.take(1)
            with contextlib.suppress(GuestioError):
                written = _write(chain, records[0] if records else b"")
        self._queue.complete(chain, written)


def write_failure(chain: Chain, probe_size: int) -> int:
    """Answer a request that failed with a device error, where a byte of it can be written.

    Returns:
        The bytes written, as :meth:`Device.fail`.
    """
    memory, room = chain.writable, chain.writable.total
    if chain.fault is None:
        size = min(chain.readable.total, wire.LONGEST_REQUEST)
        request = wire.parse(chain.readable.read(0, size))
        if request is not None and room >= wire.TAIL_BYTES:
            return _write(chain, wire.failure(request, room, probe_size))
    # Which request it is, or where its end is, is not known: a tail follows nothing, or the
    # properties of a PROBE, and is the end of the driver's buffer.
    tail = wire.tail(wire.Status.DEVERR)
    memory.write(tail[:room])
    if chain.tail is not None and room > len(tail):
        memory.write(tail, room - len(tail))
    return 0


def _write(chain: Chain, answer: bytes) -> int:
    chain.writable.write(answer)
    return len(answer)


def _at_once(callback: Callable[[], None]) -> None:
    callback()
