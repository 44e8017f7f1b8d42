"""A queue of a device in this process that sits behind an endpoint of a virtio-iommu."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from guestio._core.chain import Chain
from guestio._core.ring import SplitRing
from guestio.addr import IovaRange, Permissions
from guestio.errors import GuestioError
from guestio.virtio.device import settled

if TYPE_CHECKING:
    from guestio.virtio.device import Device
    from guestio.virtio.driver import RingLayout
    from guestio.virtio.iommu.space import EndpointMemory

TURN: Final = 64
"""Looks at the ring before somebody else of the loop has a turn."""


class EndpointQueue:
    """Carries a queue whose ring and buffers are addressed through an endpoint.

    The driver maps the ring before it sets the queue up, like any buffer. A request whose memory
    is not mapped, or not for this access, is reported to the guest as a fault and failed; if it is
    the ring itself, the queue waits for the next announcement. What the device answers later is
    waited for. One thread at a time.

    Args:
        device: The device.
        index: Number of the queue.
        memory: What the device sees, from :meth:`Endpoint.memory`.
        layout: Where the ring is, in I/O virtual addresses.
        notify: Called when the driver wants to hear of finished requests.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
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
    ) -> None:
        self._device = device
        self._index = index
        self._endpoint = memory.endpoint
        self._notify = notify
        self._ring = SplitRing(
            memory._space,
            layout.size,
            layout.desc,
            layout.avail,
            layout.used,
            event_idx=event_idx,
            indirect=indirect,
        )

    def serve(self) -> bool:
        """Serve what the driver has made available; call it when the driver announces something.

        Returns:
            Whether to call it again, after somebody else had a turn: the driver is very busy.

        Raises:
            QueueError: The driver broke a rule of its queue; the device needs a reset.
        """
        ring = self._ring
        reported: set[tuple[IovaRange, int]] = set()
        for _ in range(TURN):
            chains, misses = ring.pop()
            for chain in chains:
                ring.complete(chain, self._process(chain))
            for miss in misses:
                if miss not in reported:
                    reported.add(miss)
                    self._endpoint.report_unreachable(miss[0], Permissions(miss[1]))
            if misses and not chains:
                faulty = ring.pop_faulty()
                if faulty is None:
                    return False
                ring.complete(faulty, self._process(faulty))
            self._publish(reported)
            if not chains and not misses and not ring.enable_kicks():
                return False
        return True

    def _process(self, chain: Chain) -> int:
        if chain.fault is None:
            try:
                return settled(self._device.process(self._index, chain))
            except GuestioError:
                pass  # its memory went away meanwhile
        return self._device.fail(self._index, chain)

    def _publish(self, reported: set[tuple[IovaRange, int]]) -> None:
        wanted = self._ring.publish()
        if wanted is None:
            for where, access in self._ring.missing():
                if (where, access) not in reported:
                    self._endpoint.report_unreachable(where, Permissions(access))
        elif wanted:
            self._notify()
