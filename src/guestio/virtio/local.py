"""A transport without a wire: the driver of a device is in the same process.

The owner says where the rings are and calls :meth:`LocalTransport.serve`, from a loop of its own
or when its driver announces something. Everything else, what becomes of a device's mistakes above
all, is as over a wire.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

from guestio._core.iommu.address_space import AddressSpace
from guestio.addr import IovaRange, check_seconds
from guestio.budgets import LONGEST_TIMEOUT, STOP_TIMEOUT
from guestio.errors import QueueError, naming
from guestio.iommu import IommuMemory, Iotlb
from guestio.memory import GuestRegionCollection
from guestio.memory.backing import close_fd
from guestio.virtio.host import DeviceHost
from guestio.virtio.loop import EventLoop
from guestio.virtio.statistics import Statistics
from guestio.virtio.translator import Miss, Page, PhysicalTranslator

if TYPE_CHECKING:
    from guestio._core.virtio.inflight import InflightQueue
    from guestio.virtio.device import Device
    from guestio.virtio.layout import RingLayout

Memory: TypeAlias = GuestRegionCollection | IommuMemory | AddressSpace
"""Guest memory, or guest memory as an IOMMU shows it; the core calls either an address space."""

PAGE: Final = 4096
"""Bytes of a page that is refused; queues compare in these, see `Page`."""

ROUNDS: Final = 64
"""Turns of the event loop in one call of :meth:`LocalTransport.serve`."""

REFUSED_AT_ONCE: Final = 64
"""Refusals that are passed on for one request of translations; the first of them decides."""


class Bell:
    """An eventfd of this process; a :class:`~guestio.virtio.queue.Doorbell`."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """See :class:`~guestio.virtio.queue.Doorbell`."""
        return self._fd

    def ring(self) -> None:
        """Make it readable. From any thread."""
        os.eventfd_write(self._fd, 1)

    def has_rung(self) -> bool:
        """Whether it has rung since the last call."""
        with contextlib.suppress(BlockingIOError):
            return bool(os.eventfd_read(self._fd))
        return False

    def close(self) -> None:
        """See :class:`~guestio.virtio.queue.Doorbell`."""
        close_fd(self._fd)


class LocalTranslator:
    """The translations of an IOMMU in this process: what it has not mapped is refused at once.

    A :class:`~guestio.virtio.translator.Translator`.

    Args:
        iotlb: Everything that is mapped.
        wake: Called with the waiters that have an answer.
        report: Called with each range that an access could not reach, and the access.
    """

    feed = None
    patience = math.inf

    def __init__(
        self,
        iotlb: Iotlb,
        wake: Callable[[Iterable[int]], None],
        report: Callable[[IovaRange, int], object],
    ) -> None:
        self.iotlb = iotlb
        self._wake = wake
        self._report = report
        self._refused: dict[int, set[Page]] = {}

    def request(self, waiter: int, missing: Iterable[Miss]) -> None:
        """Refuse what is missing; see :class:`~guestio.virtio.translator.Translator`."""
        refused = self.refused(waiter)
        for where, access in itertools.islice(missing, REFUSED_AT_ONCE):
            refused.add((where.base & -PAGE, access))
        self._wake([waiter])

    def refused(self, waiter: int) -> set[Page]:
        """See :class:`~guestio.virtio.translator.Translator`."""
        return self._refused.setdefault(waiter, set())

    def under_way(self, where: IovaRange, access: int) -> bool:
        """No answer is to come."""
        return False

    def forget(self, waiter: int) -> None:
        """See :class:`~guestio.virtio.translator.Translator`."""
        self._refused.pop(waiter, None)

    def report_failed(self, lacking: list[Miss], forbidden: list[Miss]) -> None:
        """Report each range; see :class:`~guestio.virtio.translator.Translator`."""
        for where, access in lacking:
            self._report(where, access)


def _ignore(where: IovaRange, access: int) -> None:
    pass


def _space_of(memory: Memory) -> AddressSpace:
    return memory if isinstance(memory, AddressSpace) else memory._space


class LocalTransport:
    """Serves a device whose rings and buffers are in memory of this process.

    A :class:`~guestio.virtio.host.Transport`, for one driver from the set-up of its queues to their
    stop. The device is given its host (`Device.attached`), but is not told what was negotiated and
    is not reset: its owner does both.

    Args:
        device: What to serve; it is the caller's to close.
        memory: Where the addresses of rings and buffers lead: guest memory, or guest memory as an
            IOMMU of this process shows it.
        rings: Where each ring is, by the index of its queue; the other queues do not run.
        notify: Called with the index of a queue when the driver wants to hear of used buffers.
        features: Feature bits that were negotiated, those of the rings among them.
        report: Called with each range that the IOMMU has not mapped for an access, and the access,
            when a request fails because of it.
        config_changed: Called when the configuration space has changed.
        stop_timeout: Seconds that a stop waits for requests that the device holds; then they fail.

    Attributes:
        host: Hosts the device.
        statistics: Counters.
        closed: Whether :meth:`close` was called.

    Threads: one at a time, the device's calls of its host apart.
    """

    closed = True
    tracked = False

    def __init__(
        self,
        device: Device,
        memory: Memory,
        rings: Mapping[int, RingLayout],
        notify: Callable[[int], object],
        *,
        features: int = 0,
        report: Callable[[IovaRange, int], object] | None = None,
        config_changed: Callable[[], object] | None = None,
        stop_timeout: float = STOP_TIMEOUT,
    ) -> None:
        if not callable(notify):
            raise TypeError(f"notify must be callable, not {type(notify).__name__}")
        self._rings = dict(rings)
        self._notify = notify
        self._config_changed = config_changed
        self._kicks: list[Bell] = []
        self._calls: list[tuple[int, Bell]] = []
        self.statistics = Statistics()
        space = _space_of(memory)
        with contextlib.ExitStack() as undo:
            self._loop = EventLoop()
            undo.callback(self._loop.close)
            self.host = DeviceHost(
                device,
                self._loop,
                self.statistics,
                stop_timeout=check_seconds(stop_timeout, "stop_timeout", LONGEST_TIMEOUT),
            )
            self.statistics.device_holds = lambda: self.host.outstanding
            self.host.connect(
                self,
                PhysicalTranslator()
                if space._map is None
                else LocalTranslator(Iotlb._of(space._map), self.host.wake, report or _ignore),
            )
            undo.callback(self._stop)
            self.host.features = features
            # There is no successor: the device ends with its driver.
            self.host.has_successor = False
            self.host.change_memory(space)
            for index in self._rings:
                self._set_up(index)
            with naming(device, "attached"):
                device.attached(self.host)
            undo.pop_all()
        self.closed = False
        self._run()

    def _set_up(self, index: int) -> None:
        queue = self.host.queue(index)
        kick = Bell()
        queue.set_kick(kick)
        self._kicks.append(kick)
        call = Bell()
        queue.set_call(call)
        self._calls.append((index, call))
        queue.enable(True)

    def fileno(self) -> int:
        """A descriptor that is readable when :meth:`serve` has something to do."""
        return self._loop.fileno()

    def timeout(self) -> float | None:
        """Seconds until :meth:`serve` is to be called even so, for a timer; None for no limit."""
        due = self._loop.next_timer
        return None if due == math.inf else max(due - time.monotonic(), 0.0)

    def serve(self) -> bool:
        """Serve what the driver has made available, as far as that is possible now.

        Call it when the driver has announced something on any queue, when :meth:`fileno` is
        readable, and after :meth:`timeout`. It does not wait; what the device answers later makes
        :meth:`fileno` readable.

        Returns:
            Whether to call it again once the caller's loop has served others: the driver is very
            busy. :meth:`fileno` is readable then.

        Raises:
            QueueError: The driver broke a rule of a queue; the device needs a reset. The other
                queues were served.
        """
        if self.closed:
            return False
        self._ring_all()
        more = self._run()
        for queue in self.host.queues:
            if queue.broken is not None:
                raise QueueError(queue.broken)
        return more

    def _ring_all(self) -> None:
        for kick in self._kicks:
            kick.ring()

    def _run(self) -> bool:
        """Run the loop as long as anything is due; whether something is left."""
        loop = self._loop
        try:
            for _ in range(ROUNDS):
                loop.run_once(0)
                if self._notify_driver():
                    # A driver that runs in there need not announce what it adds.
                    self._ring_all()
                if not loop.pending:
                    return False
            loop.wake()
            return True
        finally:
            loop.leave()

    def _notify_driver(self) -> bool:
        notified = False
        for index, call in self._calls:
            if call.has_rung():
                notified = True
                self._notify(index)
        return notified

    def change_memory(self, memory: Memory) -> None:
        """Go on in other memory, behind the same IOMMU if there is one.

        Requests that the device holds are finished before, or fail.
        """
        space = _space_of(memory)
        with self.host.detached():
            self.host.change_memory(space)

    def close(self) -> None:
        """Stop the queues and forget their rings; calling it again does nothing.

        What the device holds is waited for as long as a stop may take, and fails then; answers that
        come later go nowhere.
        """
        if not self.closed:
            self.closed = True
            try:
                self._stop()
            finally:
                self._loop.close()

    def _stop(self) -> None:
        self._kicks, self._calls = [], []
        # The device is not reset, which is the last step.
        with contextlib.ExitStack() as steps:
            for step in reversed(self.host.disconnect()[:-1]):
                steps.callback(step)

    def __del__(self) -> None:
        if not self.closed:
            self.host.stop_timeout = 0.0
            self.close()

    def ring_layout(self, index: int, *, event_idx: bool) -> RingLayout | None:
        """See :class:`~guestio.virtio.host.Transport`."""
        return self._rings.get(index)

    def inflight_notes(self, index: int, size: int) -> InflightQueue | None:
        """See :class:`~guestio.virtio.host.Transport`."""
        return None

    def config_changed(self) -> None:
        """See :class:`~guestio.virtio.host.Transport`."""
        if self._config_changed is not None:
            self._config_changed()
