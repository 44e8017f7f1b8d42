"""The two virtqueues of a virtio-iommu (virtio 1.3, section 5.13.2).

Requests come out of queue 0 and their answers go back, each when it is there and not in the order
of the requests. Fault records go into the buffers of queue 1.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

from guestio._core.virtio.chain import Chain
from guestio._core.virtio.split import SplitRing
from guestio.budgets import IOMMU_REQUESTS_PER_TURN, IOMMU_WAITING_REQUESTS
from guestio.errors import AccessError
from guestio.iommu.events import Event
from guestio.ratelog import LOG
from guestio.virtio.iommu.device import VirtioIommu
from guestio.virtio.iommu.requests import Pending
from guestio.virtio.iommu.wire import LONGEST_REQUEST, FaultRecord, Status, tail

if TYPE_CHECKING:
    from guestio.memory import GuestRegionCollection
    from guestio.virtio.layout import RingLayout

_log = logging.getLogger(__name__)

REQUEST_QUEUE: Final = 0
EVENT_QUEUE: Final = 1


class IommuQueues:
    """Carries requests and fault records between the rings and the device.

    Call :meth:`serve` when the driver has announced something on either queue, and whenever
    :meth:`fileno` is readable: then an answer or a fault record has come. It never waits. One
    thread at a time calls the methods.

    Args:
        iommu: The device.
        requests: Its request queue, in guest physical memory.
        events: Its event queue.
        notify: Called with the number of a queue when the driver wants to hear of it.

    Attributes:
        waiting: Requests whose answer is not there yet.
        short_buffers: Event buffers that were too small for a record; they went back empty.
    """

    _wake = -1

    def __init__(
        self,
        iommu: VirtioIommu,
        requests: SplitRing,
        events: SplitRing,
        notify: Callable[[int], None],
    ) -> None:
        _check(iommu, "iommu", VirtioIommu)
        _check(requests, "requests", SplitRing)
        _check(events, "events", SplitRing)
        if not callable(notify):
            raise TypeError(f"notify must be callable, not {type(notify).__name__}")
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._iommu = iommu
        self._rings = requests, events
        self._notify = notify
        self._answers: deque[tuple[Chain, Pending]] = deque()
        self._unanswered: dict[int, tuple[Chain, Pending]] = {}
        self._tickets = itertools.count()
        self._watched: Event | None = None
        self.waiting = 0
        self.short_buffers = 0
        self._watch_faults()

    @classmethod
    def in_memory(
        cls,
        iommu: VirtioIommu,
        memory: GuestRegionCollection,
        requests: RingLayout,
        events: RingLayout,
        notify: Callable[[int], None],
        *,
        event_idx: bool = False,
        indirect: bool = False,
    ) -> Self:
        """The queues whose rings are at these places of guest physical memory.

        Args:
            iommu: The device.
            memory: Guest physical memory.
            requests: Where the request queue is.
            events: Where the event queue is.
            notify: As in the constructor.
            event_idx: VIRTIO_F_EVENT_IDX was negotiated.
            indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        """
        _check(iommu, "iommu", VirtioIommu)
        rings = [
            SplitRing(
                memory._space,
                place.size,
                place.desc,
                place.avail,
                place.used,
                event_idx=event_idx,
                indirect=indirect,
            )
            for place in (requests, events)
        ]
        return cls(iommu, rings[0], rings[1], notify)

    def fileno(self) -> int:
        """A descriptor that is readable when :meth:`serve` has something to do."""
        return self._wake

    def serve(self) -> None:
        """Take requests, give answers and report faults, as far as that is possible now.

        Raises:
            QueueError: The driver broke a rule of its queues; the device needs a reset.
        """
        with contextlib.suppress(BlockingIOError):  # it may be an announcement of the driver
            os.eventfd_read(self._wake)
        self._serve_requests()
        self._serve_events()

    def close(self) -> None:
        """Forget the rings, as a reset does: answers that come later go nowhere."""
        self._unanswered.clear()
        self._answers.clear()

    def _serve_requests(self) -> None:
        ring = self._rings[REQUEST_QUEUE]
        served = 0
        while True:
            while self._answers:
                chain, pending = self._answers.popleft()
                self.waiting -= 1
                self._complete(ring, chain, pending.result())
            if self.waiting >= IOMMU_WAITING_REQUESTS:
                # An answer wakes us.
                self._publish(REQUEST_QUEUE)
                return
            chains, misses = ring.pop(min(64, IOMMU_WAITING_REQUESTS - self.waiting))
            if misses and not chains:
                # Its memory is guest physical, so what is missing now stays so.
                faulty = ring.pop_faulty()
                chains = [] if faulty is None else [faulty]
            for chain in chains:
                self._serve_request(ring, chain)
            self._publish(REQUEST_QUEUE)
            served += len(chains)
            if served >= IOMMU_REQUESTS_PER_TURN:
                self._rouse()
                return
            if not chains and not self._answers and not ring.enable_kicks():
                return

    def _serve_request(self, ring: SplitRing, chain: Chain) -> None:
        answer: bytes | Pending = b""
        if chain.fault is None:
            try:
                request = chain.readable.read(0, min(len(chain.readable), LONGEST_REQUEST))
            except AccessError:
                request = b""
            try:
                answer = self._iommu.handle_request(request, len(chain.writable))
            except Exception:
                LOG.report(
                    _log,
                    logging.ERROR,
                    "a virtio-iommu request failed; the guest is told of a device error",
                    trace=True,
                )
                answer = tail(Status.DEVERR)
        if isinstance(answer, Pending):
            self.waiting += 1
            answer.add_callback(self._waiter(chain, answer))
        else:
            self._complete(ring, chain, answer)

    def _waiter(self, chain: Chain, pending: Pending) -> Callable[[], None]:
        """What is called when a request's answer has come.

        An answer may never come. So it is only we who hold the request, whose memory would be in
        use as long, and who let go of it when we close.
        """
        ticket = next(self._tickets)
        self._unanswered[ticket] = chain, pending

        def answered() -> None:
            found = self._unanswered.pop(ticket, None)
            if found is not None:
                self._answers.append(found)
                self._rouse()

        return answered

    @staticmethod
    def _complete(ring: SplitRing, chain: Chain, answer: bytes) -> None:
        try:
            chain.writable.write(answer)
        except AccessError:
            answer = b""
        ring.complete(chain, len(answer))

    def _serve_events(self) -> None:
        starved = False
        while not starved:
            starved = self._fill_buffers()
            if self._watch_faults():
                break
        self._publish(EVENT_QUEUE)

    def _fill_buffers(self) -> bool:
        """Report faults; whether that ended for want of buffers, or of time."""
        ring = self._rings[EVENT_QUEUE]
        taken = 0
        while self._iommu.event_arrival.is_set:
            if taken >= IOMMU_REQUESTS_PER_TURN:
                # A driver can give small buffers, or cause faults, as fast as we take them.
                self._rouse()
                return True
            taken += 1
            chains, _ = ring.pop(1)
            if chains:
                self._fill_buffer(ring, chains[0])
            elif not ring.enable_kicks():
                return True
        return False

    def _watch_faults(self) -> bool:
        """Have the next fault wake us; False if there is one already."""
        arrival = self._iommu.event_arrival
        if arrival.is_set:
            return False
        if arrival is not self._watched:
            self._watched = arrival
            arrival.add_callback(self._rouse)
        return True

    def _fill_buffer(self, ring: SplitRing, chain: Chain) -> None:
        if chain.fault is not None or len(chain.writable) < FaultRecord.SIZE:
            self.short_buffers += 1
            ring.complete(chain, 0)
            return
        # A reset in another thread may have dropped what was there.
        records = self._iommu.event_records(1)
        self._complete(ring, chain, records[0] if records else b"")

    def _publish(self, queue: int) -> None:
        if self._rings[queue].publish():
            self._notify(queue)

    def _rouse(self) -> None:
        os.eventfd_write(self._wake, 1)

    def __del__(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)


def _check(value: object, name: str, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be a {wanted.__name__}, not {type(value).__name__}")
