"""A queue of a device in this process that sits behind an endpoint of a virtio-iommu."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from guestio.addr import IovaRange, Permissions, check_int, check_seconds
from guestio.budgets import ENDPOINT_ANSWER_TIMEOUT, LONGEST_TIMEOUT
from guestio.virtio.device import VIRTIO_F_EVENT_IDX, VIRTIO_F_INDIRECT_DESC, Device
from guestio.virtio.local import LocalTransport

if TYPE_CHECKING:
    from guestio.virtio.iommu.space import EndpointMemory
    from guestio.virtio.layout import RingLayout


class EndpointQueue:
    """Serves a queue whose ring and buffers are addressed through an endpoint.

    The driver maps the ring before it sets the queue up, like any buffer. A request whose memory
    is not mapped, or not for this access, is reported to the guest as a fault and fails; if it is
    the ring itself, the queue waits for the next announcement. What the guest unmaps, or detaches
    the endpoint from, is gone for the next request. What the device answers later is waited for;
    a request fails whose processing raises, is cancelled, returns nonsense or takes too long. One
    thread at a time.

    For a device that speaks first, or to serve several queues in one loop, see
    :class:`~guestio.virtio.local.LocalTransport`.

    Args:
        device: The device; it is the caller's to reset and to close.
        index: Number of the queue.
        memory: What the device sees, from :meth:`Endpoint.memory`.
        layout: Where the ring is, in I/O virtual addresses.
        notify: Called when the driver wants to hear of finished requests.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        answer_timeout: Seconds that the device has for a request that it answers later, at most
            3600; then the request fails.
    """

    def __init__(
        self,
        device: Device,
        index: int,
        memory: EndpointMemory,
        layout: RingLayout,
        notify: Callable[[], None],
        *,
        event_idx: bool = False,
        indirect: bool = False,
        answer_timeout: float = ENDPOINT_ANSWER_TIMEOUT,
    ) -> None:
        if not isinstance(device, Device):
            raise TypeError(f"device must be a Device, not {device!r}")
        number = check_int(index, "index")
        if not 0 <= number < device.num_queues:
            raise ValueError(f"index {number} is not in 0..{device.num_queues - 1}")
        if not callable(notify):
            raise TypeError(f"notify must be callable, not {type(notify).__name__}")
        self._answer_timeout = check_seconds(answer_timeout, "answer_timeout", LONGEST_TIMEOUT)
        endpoint = memory.endpoint

        def report(where: IovaRange, access: int) -> None:
            endpoint.report_unreachable(where, Permissions(access))

        self._transport = LocalTransport(
            device,
            memory,
            {number: layout},
            lambda _: notify(),
            features=ring_features(event_idx=event_idx, indirect=indirect),
            report=report,
        )
        self._queue = self._transport.host.queue(number)

    @property
    def failed(self) -> int:
        """Requests that failed, because of the device or of the memory they name; see the log."""
        return self._transport.statistics.failed_requests

    def serve(self) -> bool:
        """Serve what the driver has made available; call it when the driver announces something.

        It waits for the requests that the device answers later, ``answer_timeout`` seconds at most.

        Returns:
            Whether to call it again, once the caller's loop has served others: the driver is very
            busy, or a system call still moves the memory of a request.

        Raises:
            QueueError: The driver broke a rule of its queue; the device needs a reset.
        """
        more = self._transport.serve()
        if self._queue.outstanding:
            began = time.monotonic()
            more |= self._wait_for_answers(began, began + self._answer_timeout)
        return more or bool(self._queue.outstanding)

    def _wait_for_answers(self, began: float, until: float) -> bool:
        """Serve until what the device held when this began is done, or fails; as :meth:`serve`."""
        ready = select.poll()
        ready.register(self._transport, select.POLLIN)
        more = False
        while self._holds_older(began):
            left = until - time.monotonic()
            if left <= 0:
                self._queue.give_up_older(began)
                return self._transport.serve()
            timer = self._transport.timeout()
            ready.poll(1000 * (left if timer is None else min(left, timer)))
            more = self._transport.serve()
        return more

    def _holds_older(self, began: float) -> bool:
        """Whether a request that was taken by then is not completed."""
        since = self._queue.held_since
        return since <= began if since is not None else bool(self._queue.outstanding)

    def change_memory(self, memory: EndpointMemory) -> None:
        """Go on in other physical memory, or with other dirty bitmaps.

        Args:
            memory: What the device sees from now on, of the same endpoint. The physical memory of
                before may be closed afterwards.
        """
        self._transport.change_memory(memory)

    def close(self) -> None:
        """Stop the queue and forget its ring, as a reset of the device does.

        Calling it again does nothing.
        """
        self._transport.close()


def ring_features(*, event_idx: bool, indirect: bool) -> int:
    """The feature bits of rings."""
    return bool(event_idx) << VIRTIO_F_EVENT_IDX | bool(indirect) << VIRTIO_F_INDIRECT_DESC
