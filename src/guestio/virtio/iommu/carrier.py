"""A queue of a device in this process that sits behind an endpoint of a virtio-iommu."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Final

from guestio._core.virtio.chain import Chain
from guestio._core.virtio.split import SplitRing
from guestio.addr import IovaRange, Permissions, check_int, check_seconds
from guestio.budgets import ENDPOINT_ANSWER_TIMEOUT
from guestio.errors import AccessError, DeviceError, GuestioError
from guestio.ratelog import LOG
from guestio.virtio.device import Device

if TYPE_CHECKING:
    from guestio.virtio.iommu.space import EndpointMemory
    from guestio.virtio.layout import RingLayout

_log = logging.getLogger(__name__)

TURN: Final = 64
"""Looks at the ring before somebody else of the loop has a turn."""


class EndpointQueue:
    """Carries a queue whose ring and buffers are addressed through an endpoint.

    The driver maps the ring before it sets the queue up, like any buffer. A request whose memory
    is not mapped, or not for this access, is reported to the guest as a fault and failed; if it is
    the ring itself, the queue waits for the next announcement. What the device answers later is
    waited for, up to a limit. A request whose processing raises, is cancelled or returns nonsense
    is failed towards the driver. One thread at a time.

    Args:
        device: The device.
        index: Number of the queue.
        memory: What the device sees, from :meth:`Endpoint.memory`.
        layout: Where the ring is, in I/O virtual addresses.
        notify: Called when the driver wants to hear of finished requests.
        event_idx: VIRTIO_F_EVENT_IDX was negotiated.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        answer_timeout: Seconds that the device has for a request that it answers later. Its memory
            cannot be taken from it then, so the queue is of no more use.

    Attributes:
        failed: Requests that were failed towards the driver because of the device; the first is
            logged.
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
        self._answer_timeout = check_seconds(answer_timeout, "answer_timeout")
        self.failed = 0
        self._stuck: object = None
        self._device = device
        self._index = number
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
            DeviceError: The device did not answer a request in time. The queue serves no more.
        """
        if self._stuck is not None:
            raise self._no_answer()
        ring = self._ring
        reported: set[tuple[IovaRange, int]] = set()
        for _ in range(TURN):
            chains, misses = ring.pop()
            for chain in chains:
                self._complete(chain, self._process(chain))
            for miss in misses:
                if miss not in reported:
                    reported.add(miss)
                    self._endpoint.report_unreachable(miss[0], Permissions(miss[1]))
            if misses and not chains:
                faulty = ring.pop_faulty()
                if faulty is None:
                    return False
                self._complete(faulty, self._process(faulty))
            self._publish(reported)
            if not chains and not misses and not ring.enable_kicks():
                return False
        return True

    def _complete(self, chain: Chain, written: int) -> None:
        """Give a request back, once no system call moves its memory any more."""
        until = time.monotonic() + self._answer_timeout
        if self._ring.complete(chain, written):
            return
        while not self._ring.complete(chain):
            if time.monotonic() >= until:
                self._stuck = chain
                raise self._no_answer()
            time.sleep(0.001)

    def _process(self, chain: Chain) -> int:
        try:
            if chain.fault is None:
                answer = self._device.process(self._index, chain)
                return self._written("process", chain, self._await(chain, answer))
        except AccessError:
            pass  # its memory went away meanwhile
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if self._stuck is not None:
                raise
            self._note("process", error)
        return self._fail(chain)

    def _fail(self, chain: Chain) -> int:
        written = None
        try:
            written = self._written("fail", chain, self._device.fail(self._index, chain))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._note("fail", error)
        finally:
            status = self._device.error_status
            if written is None:
                # The status byte may be gone.
                with contextlib.suppress(GuestioError):
                    written = Device.fail(self._device, self._index, chain)
            if status is not None and chain.in_use():
                chain.stamp(status)
        return written or 0

    def _await(self, chain: Chain, answer: int | Future[int]) -> int:
        if not isinstance(answer, Future):
            return answer
        try:
            return answer.result(self._answer_timeout)
        except CancelledError:
            raise DeviceError("the future was cancelled") from None
        except TimeoutError:
            if answer.done():
                raise
            self._stuck = chain, answer
            raise self._no_answer() from None

    def _no_answer(self) -> DeviceError:
        return DeviceError(
            f"{type(self._device).__name__}.process returned a future for a request of queue "
            f"{self._index} that is not done after {self._answer_timeout} s"
        )

    def _written(self, method: str, chain: Chain, written: int) -> int:
        room = len(chain.writable)
        if type(written) is not int or not 0 <= written <= room:
            raise DeviceError(
                f"{type(self._device).__name__}.{method} returned {written!r}; return the number "
                f"of bytes written, here 0 to {room}"
            )
        return written

    def _note(self, method: str, error: BaseException) -> None:
        self.failed += 1
        if self.failed == 1:
            LOG.report(
                _log,
                logging.ERROR,
                "%s.%s failed for a request of queue %d, whose driver is told; more of its kind "
                "are only counted",
                type(self._device).__name__,
                method,
                self._index,
                trace=error,
            )

    def _publish(self, reported: set[tuple[IovaRange, int]]) -> None:
        wanted = self._ring.publish()
        if wanted is None:
            for where, access in self._ring.missing():
                if (where, access) not in reported:
                    self._endpoint.report_unreachable(where, Permissions(access))
        elif wanted:
            self._notify()
