"""The two virtqueues of a virtio-iommu whose driver is in this process' guest memory.

Requests come out of queue 0 and their answers go back, each when it is there and not in the order
of the requests. Fault records go into the buffers of queue 1 (virtio 1.4, section 5.13.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from guestio._core.virtio.split import SplitRing
from guestio.virtio.iommu.device import VirtioIommu
from guestio.virtio.iommu.endpoint_queue import ring_features
from guestio.virtio.iommu.serving import EVENT_QUEUE, REQUEST_QUEUE
from guestio.virtio.layout import RingLayout
from guestio.virtio.local import LocalTransport

if TYPE_CHECKING:
    from guestio.memory import GuestRegionCollection


class IommuQueues:
    """Serves a virtio-iommu to a driver in memory of this process.

    Call :meth:`serve` when the driver has announced something on either queue, and whenever
    :meth:`fileno` is readable: then an answer or a fault record has come. It never waits. One
    thread at a time calls the methods.

    Args:
        iommu: The device; it is the caller's to reset.
        requests: The ring of its request queue, in guest physical memory. Only where it is and
            where it continues is taken from it.
        events: The same of its event queue.
        notify: Called with the number of a queue when the driver wants to hear of it.

    Raises:
        ValueError: The rings are in different memory.
    """

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
        if requests.space.regions is not events.space.regions:
            raise ValueError("the rings of requests and events must be in the same memory")
        rings = {REQUEST_QUEUE: requests, EVENT_QUEUE: events}
        self._iommu = iommu
        self._transport = LocalTransport(
            iommu,
            requests.space,
            {
                queue: RingLayout(ring.size, ring.desc_addr, ring.avail_addr, ring.used_addr)
                for queue, ring in rings.items()
            },
            notify,
            features=ring_features(event_idx=requests.event_idx, indirect=requests.indirect),
            stop_timeout=0.0,
        )
        for queue, ring in rings.items():
            self._transport.host.queue(queue).set_base(ring.next_avail)

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

    @property
    def waiting(self) -> int:
        """Requests whose answer is not there yet."""
        return self._transport.host.queue(REQUEST_QUEUE).outstanding

    @property
    def short_buffers(self) -> int:
        """See :attr:`VirtioIommu.short_buffers`."""
        return self._iommu.short_buffers

    def fileno(self) -> int:
        """A descriptor that is readable when :meth:`serve` has something to do."""
        return self._transport.fileno()

    def serve(self) -> None:
        """Take requests, give answers and report faults, as far as that is possible now.

        Raises:
            QueueError: The driver broke a rule of its queues; the device needs a reset.
        """
        self._transport.serve()

    def close(self) -> None:
        """Forget the rings, as a reset does, and wait for nothing.

        Requests whose answer is not there yet fail; answers that come later go nowhere. Calling it
        again does nothing.
        """
        self._transport.close()


def _check(value: object, name: str, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be a {wanted.__name__}, not {type(value).__name__}")
