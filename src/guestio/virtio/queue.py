"""A virtqueue as its device's side serves it, whatever transport set it up.

A queue stalls while a translation is missing: it requests all that it lacks at once, and resumes
when the translations are there. A request that takes time is answered with a `Future` and
completed when that is done; a stop of the queue waits for it.

A stop or crash loses no request: the successor can reconstruct where to resume. Without notes of
the requests in flight, requests are published in the order of the ring, and the used index says
it all; with them (INFLIGHT_SHMFD) they are published as they complete.

Threads: a queue is served in the thread of its event loop, with its lock held. Changes take the
lock too, so a queue may be set up and stopped from any thread.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import reprlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, NamedTuple, Protocol

from guestio._core.base.syscalls import drain_eventfd, notify_eventfd
from guestio._core.iommu.misses import Misses, touched
from guestio._core.trace.latencies import Latencies
from guestio._core.virtio.chain import Chain
from guestio._core.virtio.frames import FrameFiller
from guestio._core.virtio.loop import ActiveQueue
from guestio._core.virtio.ring import Ring
from guestio.addr import shown
from guestio.budgets import CANCEL_SECONDS, COPY_GRACE, SLOW_ANSWER, SLOW_DEVICE, TURN_SECONDS
from guestio.errors import DeviceError, GuestioError, QueueError
from guestio.trace import What, event
from guestio.virtio.loop import EventLoop
from guestio.virtio.queue_lock import QueueLock
from guestio.virtio.snapshot import QueueCounts, QueueSnapshot
from guestio.virtio.translator import Miss

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from guestio._core.iommu.address_space import AddressSpace
    from guestio.virtio.host import DeviceHost

Outcome = tuple[list[Chain], Misses, int, bool]
"""What :meth:`Ring.run_once` returns."""

BATCH = 64
"""Requests served per queue before the other queues of the thread are served."""

POLL_INTERVAL = 0.001
"""Seconds between looks at a ring whose front-end gave no kick fd."""

SPIN = 50e-6
"""Busy-polling time per queue, in seconds, before returning to the event loop."""

MAX_REFUSED = 4096
"""Refused pages that are remembered for a queue."""

ANNOUNCE_AGAIN = 1.0
"""Seconds after which buffers that are left are announced to a callback that raised."""

COPY_LOOK = 0.01
"""Seconds between looks at requests that were answered while a system call moves their memory."""


class _InProgress(NamedTuple):
    """An answer that is to come, and since when the device has the request (monotonic time)."""

    answer: Future[int] | None
    since: float


class Doorbell(Protocol):
    """An eventfd that a queue owns: one that announces requests, or one to notify the driver."""

    def fileno(self) -> int:
        """The eventfd."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class DeviceQueue:
    """A virtqueue, from its set-up to its stop, and again.

    Where its ring is and what its features are is known to the transport and the host; the queue
    asks for it when it makes the ring.

    A queue in `Device.device_queues` belongs to the device: nothing is taken from it but by
    :meth:`take`. The device uses :meth:`take`, :meth:`complete`, :meth:`send` and
    :meth:`on_available`; all else is for the host and the transport.

    Args:
        index: Its number.
        host: The device's host.
        loop: Serves it.

    Attributes:
        base: Where to begin in the ring.
    """

    def __init__(self, index: int, host: DeviceHost, loop: EventLoop) -> None:
        self.index = index
        self._host = host
        self._loop = loop
        self._owned = index in host.device.device_queues
        self._lock = QueueLock()
        self._scheduled = False
        self._in_progress: dict[Chain, _InProgress] = {}
        self._change = threading.Condition()
        self._finished: deque[Chain] = deque()
        self._draining = False
        self._copying: list[Chain] = []
        self._copying_since: float | None = None
        self._tell_after = SLOW_ANSWER
        self._watching = False
        self._told_of: tuple[float, float] = (0.0, 0.0)
        self._available: Callable[[], object] | None = None
        self._latencies = Latencies()
        # What rings of before have counted, and the one that counts now: replaced as one, so that
        # other threads never see a ring counted twice, or not at all.
        self._counted: tuple[QueueCounts, Ring | None] = (QueueCounts(), None)
        self._clear()

    def _clear(self) -> None:
        self.base = 0
        self._enabled = False
        self._started = False
        self._polled = False
        self._stuck = False
        self._why_stuck = ""
        self._watch_until = 0.0
        self._stalled_at: float | None = None
        # Whether what it waits for is the ring itself, rather than a request.
        self._ring_lacks = False
        self._stalled_for = 0
        self._kick: Doorbell | None = None
        self._call: Doorbell | None = None
        # Notifications that the driver had wanted when it was last given, or taken, a call.
        self._heard = self.counts.notifications
        self._err: Doorbell | None = None
        self._ring: Ring | None = None
        self._active: ActiveQueue | None = None
        self._lacks: list[Miss] = []

    def __repr__(self) -> str:
        kind = type(self._host.device).__name__
        state = "stuck" if self._stuck else "running" if self._ring is not None else "stopped"
        return f"<DeviceQueue {self.index} of {kind}: {state}, {self.outstanding} outstanding>"

    @property
    def live(self) -> bool:
        """Whether the driver may announce requests: a kick is set, or polling was asked for."""
        return self._kick is not None or self._polled

    @property
    def outstanding(self) -> int:
        """Requests that the device holds, whose memory it uses, or that are to be published."""
        return len(self._in_progress) + len(self._finished) + len(self._copying)

    @property
    def broken(self) -> str | None:
        """Why the queue is not served any more until it is set up anew, or None."""
        return self._why_stuck if self._stuck else None

    @property
    def counts(self) -> QueueCounts:
        """What the queue has done so far, over all its rings. From any thread, without waiting."""
        before, ring = self._counted
        return before.with_ring(ring)

    def snapshot(self) -> QueueSnapshot:
        """The queue at this moment. From any thread, without waiting for the one that serves."""
        before, ring = self._counted
        active = self._active
        stalled = 0.0 if active is None else active.waits_since
        return QueueSnapshot(
            index=self.index,
            enabled=self._enabled,
            running=ring is not None and not self._stuck,
            size=0 if ring is None else ring.size,
            next_avail=self.base if ring is None else ring.next_avail,
            next_used=0 if ring is None else ring.next_used,
            depth=0 if ring is None else ring.outstanding + ring.unpublished,
            held=self.outstanding,
            stalled_since=stalled or self._stalled_at,
            broken=self.broken,
            counts=before.with_ring(ring),
            latencies=self._latencies,
        )

    @property
    def held_since(self) -> float | None:
        """Since when the device has the oldest request that it holds (monotonic time), or None."""
        with self._change:
            return min((held.since for held in self._in_progress.values()), default=None)

    @property
    def lock(self) -> QueueLock:
        """Held while the queue is served or changed."""
        return self._lock

    def take(self) -> Chain | None:
        """Take the next available buffer of a queue that belongs to the device.

        Until it is completed the device holds it, and may use its memory. A buffer that is not
        taken costs nothing: it is neither translated nor held against an invalidation or a stop.

        Returns:
            The buffer, or None: the queue does not run, the driver has made none available, or a
            translation is missing. The callback of :meth:`on_available` is called when that
            changes.

        Raises:
            DeviceError: The queue is not in `Device.device_queues`.

        Threads: from any. Cost: O(descriptors), and a system call now and then.
        """
        self._check_owned("take")
        if not self._enter():
            return None
        try:
            return self._take_one()
        finally:
            self._lock.release()

    def _check_owned(self, what: str) -> None:
        if not self._owned:
            raise DeviceError(
                f"{type(self._host.device).__name__} calls {what} of queue {self.index}, which is "
                "not in its device_queues"
            )

    def _enter(self) -> bool:
        """Take the lock to take buffers; False while queues of the device are stopped or changed.

        A stop holds the lock while it waits for the device. A thread of the device's that waited
        for the lock could not complete meanwhile what it holds.
        """
        if self._lock.acquire_for_device(lambda: self._host.changing):
            return True
        # What it does not take now is announced once that is over.
        self.wake()
        return False

    def _ready_ring(self) -> Ring | None:
        """The ring, made if need be; None if the queue is not to be served."""
        if self._stuck or not (self._enabled and self._started):
            return None
        if self._ring is None:
            ring = self._ring = self._host.make_ring(self)
            if ring is not None:
                ring.queue, ring.origin = self.index, self._host.origin
                ring.latencies = self._latencies
                self._counted = self._counted[0], ring
                event(
                    What.QUEUE_STARTED,
                    origin=self._host.origin,
                    queue=self.index,
                    address=ring.desc_addr,
                    length=ring.size,
                    detail=ring.next_avail,
                )
        return self._ring

    def _take_one(self) -> Chain | None:
        """Take a buffer, with the lock held."""
        try:
            ring = None if self._draining else self._ready_ring()
            return None if ring is None else self._take(ring)
        except GuestioError as error:
            self._break(error)
            return None

    def _take(self, ring: Ring) -> Chain | None:
        """Take a buffer; if there is none, kicks are enabled for the next."""
        for _ in range(BATCH):
            chains, missing = ring.pop(1)
            if chains:
                chain = chains[0]
                self._host.statistics.counters.count_requests(1)
                if chain.fault is None:
                    self._end_stall()
                    chain.hand_over()
                    self._in_progress[chain] = _InProgress(None, time.monotonic())
                    return chain
                self._begin(ring, chains)  # which fails it
                self.wake()
            elif missing:
                if not self._stall(ring, missing) or not self._started:
                    return None
            elif ring.enable_kicks() is False:
                self._end_stall()
                return None
        # The driver gave nothing but what cannot be used. Others have the lock now.
        self.wake()
        return None

    def complete(self, chain: Chain, written: int = 0) -> bool:
        """Give a taken buffer back to the driver.

        Args:
            chain: The buffer, from :meth:`take`.
            written: How many bytes were written from the start of ``chain.writable`` on.

        Returns:
            Whether the driver gets it. Otherwise the queue has stopped meanwhile, and the buffer
            was given back unused, or the device completes it a second time; that is logged.

        Raises:
            DeviceError: ``written`` is no such number, or the queue is not in
                `Device.device_queues`; the buffer is still held.

        Threads: from any, also while the queue is being stopped; it never waits. Cost: one release
        store and, if the driver wants it, a notification.
        """
        return self.complete_all([(chain, written)]) == 1

    def complete_all(self, buffers: Iterable[tuple[Chain, int]]) -> int:
        """Give several taken buffers back; the driver sees all of them at once, in this order.

        It sees them together if they are the oldest that the device holds. Requests that are
        tracked for a successor (INFLIGHT_SHMFD) may be overtaken, others not: a buffer is published
        once those that were taken before it are.

        Args:
            buffers: ``(chain, written)`` of each, as for :meth:`complete`.

        Returns:
            How many the driver gets; see :meth:`complete` for those that it does not.

        Raises:
            DeviceError: As :meth:`complete`, for the first that is wrong; nothing was given back.

        Threads and cost: as :meth:`complete`, with one notification for all.
        """
        self._check_owned("complete")
        pairs = list(buffers)
        counts = self._counts(pairs)
        with self._change:
            held = {each: count for each, count in counts.items() if each in self._in_progress}
            for chain in held:
                del self._in_progress[chain]
            self._give_back(held)
        if len(held) < len(pairs):
            self._host.log.report(
                "queue %d: %s completes a buffer that it does not hold: it was completed before, "
                "or given back when the queue stopped",
                self.index,
                type(self._host.device).__name__,
            )
        if held and self._lock.acquire(0):
            try:
                self._publish_finished()
            finally:
                self._lock.release()
        elif held:
            # The queue is being served or stopped; the thread that does it, or the loop, publishes.
            self.wake()
        return 0 if self._stuck else len(held)

    def _counts(self, pairs: list[tuple[Chain, int]]) -> dict[Chain, int]:
        """What was written to each buffer that the device holds; no lock is held."""
        name = type(self._host.device).__name__
        counts: dict[Chain, int] = {}
        for chain, written in pairs:
            if not isinstance(chain, Chain):
                raise TypeError(f"{name} completes {chain!r}, which is no buffer: pass the chain")
            try:
                count = _plausible(
                    written, chain, f"{name} completes a buffer of queue {self.index} with"
                )
            except _NonsenseError as error:
                # One that was given back meanwhile has room for nothing.
                if chain in self._in_progress and chain not in counts:
                    raise DeviceError(str(error)) from None
                continue
            counts.setdefault(chain, count)
        return counts

    def _publish_finished(self) -> None:
        """Publish what is completed, with the lock held and in whatever thread."""
        try:
            ring = self._ready_ring()
            if ring is None:
                return
            self._complete_finished(ring)
            notify = ring.publish()
            if notify:
                signal(self._call)
            if notify is None or ring.crowded:
                # A translation is requested in the loop; and there is room for more requests.
                self.wake()
        except GuestioError as error:
            self._break(error)

    def send(self, data: Buffer) -> bool:
        """Take a buffer, write data into it, and give it back.

        Args:
            data: Bytes, or any object with contiguous bytes.

        Returns:
            Whether the driver gets the data; False if :meth:`take` has no buffer.

        Raises:
            DeviceError: The data is longer than the driver's next buffer, which stays in the ring.
                How large buffers are is the driver's choice, so a device must expect this.

        Threads and cost: as :meth:`take` and :meth:`complete`, and a copy.
        """
        self._check_owned("send")
        content = memoryview(data).cast("B")
        if not self._enter():
            return False
        try:
            chain = self._take_one()
            if chain is None:
                return False
            room = chain.writable.total
            if len(content) > room:
                self._untake(chain)
                raise DeviceError(
                    f"{type(self._host.device).__name__} sends {len(content)} bytes on queue "
                    f"{self.index}, whose next buffer has room for {room}"
                )
            return self._fill(chain, content)
        finally:
            self._lock.release()

    def _untake(self, chain: Chain) -> None:
        """Put the buffer that was taken last back into the ring."""
        with self._change:
            if self._in_progress.pop(chain, None) is not None and self._ring is not None:
                self._ring.put_back([chain])

    def _fill(self, chain: Chain, content: memoryview) -> bool:
        """Write data into a buffer and give it back; whether the driver gets it."""
        lost: GuestioError | None = None
        written, given = 0, False
        try:
            chain.writable.write(content)
            written = len(content)
        except GuestioError as error:
            lost = error
        finally:
            # A revocation that waited long enough may have taken it.
            if chain in self._in_progress:
                given = self.complete(chain, written)
        if lost is None and given:
            return True
        self._host.statistics.counters.count_failed()
        self._host.log.report("queue %d: data is lost: %s", self.index, lost or "it was too late")
        return False

    def fill(self, filler: FrameFiller) -> int | None:
        """Have the core move frames into the buffers of a queue that belongs to the device.

        Args:
            filler: Has the frames, or a descriptor that they come from.

        Returns:
            Why it stopped, one of the ``FILLED`` constants of the core; None if the queue does not
            run. The callback of :meth:`on_available` is called when buffers or translations have
            arrived that it lacked.

        Threads: from any, for one filler by one at a time. Cost: see `FrameFiller.fill`.
        """
        self._check_owned("fill")
        with self._lock:
            try:
                ring = self._ready_ring()
                if ring is None:
                    return None
                call = -1 if self._call is None else self._call.fileno()
                state, missing, buffers = filler.fill(ring, call)
                self._host.statistics.counters.count_requests(buffers)
                if len(missing):
                    if ring.lacking() == [] and self._lost_behind(ring, missing):
                        filler.forget()
                        self.wake()
                    else:
                        self._stall(ring, missing)
                elif self._stalled_at is not None:
                    self._end_stall()
            except GuestioError as error:
                self._break(error)
                return None
            return state

    def _lost_behind(self, ring: Ring, missing: Iterable[Miss]) -> bool:
        """Whether a frame waits in vain for the translation of a buffer behind the next one.

        The buffer itself fails once it is the next.
        """
        translator, now = self._host.translator, time.monotonic()
        if self._stalled_at is None or self._stalled_for != ring.progress:
            self._stalled_at, self._stalled_for = now, ring.progress
        refused = translator.refused(self.index)
        lost = touched(missing, refused)
        # What else was refused concerns buffers that are not needed yet; they are asked for again.
        refused.clear()
        if not lost and now - self._stalled_at < translator.patience:
            return False
        self._stalled_at = None
        self._host.log.report(
            "queue %d: frames are lost: a buffer that they need has no translation", self.index
        )
        return True

    def on_available(self, callback: Callable[[], object] | None) -> None:
        """Have the loop call back when :meth:`take` may have a buffer.

        It is called after the driver has made buffers available, the queue has started, or a
        translation that :meth:`take` lacked has arrived. It is to call :meth:`take` until that
        returns None: only then does the driver announce more. An exception that it raises is
        logged; it is called again when the driver makes more available, or after a second if
        there are buffers left.

        Raises:
            DeviceError: The queue is not in `Device.device_queues`.

        Threads: from any; the callback is called in the thread of the queue's loop.
        """
        self._check_owned("on_available")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable, not {type(callback).__name__}")
        self._available = callback
        self.wake()

    def _announce(self) -> None:
        callback = self._available
        if callback is None:
            return
        try:
            callback()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._host.log.report(
                "queue %d: the on_available callback of %s raised %s: %s",
                self.index,
                type(self._host.device).__name__,
                type(error).__name__,
                error,
                trace=True,
            )
            self._announce_again()

    def _announce_again(self) -> None:
        """Have the callback called again after it raised: it did not take until there is nothing.

        With the driver's next announcement; or later, for buffers that it has announced already.
        """
        self._lock.acquire_to_serve()
        try:
            ring = self._ready_ring()
            more = False if ring is None else ring.enable_kicks()
        except GuestioError as error:
            self._break(error)
            return
        finally:
            self._lock.release()
        if more is None:
            # A translation is missing, which is requested in the loop.
            self.wake()
        elif more:
            self._loop.set_timer((self, "again"), time.monotonic() + ANNOUNCE_AGAIN, self.wake)

    def announce_stop(self) -> None:
        """Have the device finish what it holds, before its requests are waited for."""
        if self._ring is None:
            return
        try:
            self._host.device.stopping(self.index)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self._host.log.report(
                "queue %d: %s failed", self.index, self._method("stopping"), trace=True
            )

    def await_turn(self) -> None:
        """Wait until no thread serves the queue, and report a device that keeps one from ending.

        A stop of the queue waits for that, whatever the device does.
        """
        if self._lock.acquire(SLOW_DEVICE):
            self._lock.release()
        else:
            self._host.log.report(
                "queue %d: %s has not returned for %d s; the queue cannot be stopped until it does",
                self.index,
                self._method("process"),
                SLOW_DEVICE,
            )

    def reset(self, until: float, *, keep_base: bool = False) -> None:
        """Stop the queue and forget how it was set up.

        Args:
            until: As for :meth:`detach`.
            keep_base: Whether to remember where it stopped.
        """
        with self._lock:
            self.stop(until)
            self.set_call(None)
            self.set_err(None)
            base = self.base
            self._clear()
            if keep_base:
                self.base = base

    def set_base(self, base: int) -> None:
        """Set where to begin in the ring."""
        with self._lock:
            self.base = base

    def enable(self, enable: bool) -> None:
        """Serve the queue, or let it stand."""
        with self._lock:
            self._deactivate()
            self._enabled = enable
            self.wake()

    def detach(self, until: float) -> None:
        """Let go of the ring's memory; it is set up again, where it stopped, before its next use.

        Requests that take time are waited for, and fail if they are not done in time. Completions
        that cannot be published any more are taken back, and done again then.

        Args:
            until: When to give up the requests that the device still holds (monotonic time).
        """
        with self._lock:
            self._deactivate()
            self._drain(until)
            ring, self._ring, self._stuck = self._ring, None, False
            if ring is not None:
                with contextlib.suppress(GuestioError):
                    if ring.publish():
                        signal(self._call)
                    ring.give_back()
                self.base = ring.resume_at
                self._counted = self._counted[0].with_ring(ring), None
                event(
                    What.QUEUE_STOPPED,
                    origin=self._host.origin,
                    queue=self.index,
                    detail=self.base,
                )
            self.wake()

    def rebind(self, space: AddressSpace) -> None:
        """Go on in other memory with the same translations; what was taken keeps its memory."""
        with self._lock:
            if self._ring is not None:
                self._deactivate()
                self._ring.rebind(space)
                self.wake()

    def stop(self, until: float) -> int:
        """Stop serving, until the next kick; ``until`` as for :meth:`detach`.

        Returns:
            Where to begin in the ring when the queue is started again, by whichever device.
        """
        with self._lock:
            self._started = False
            self.detach(until)
            self._end_stall()
            self._host.translator.forget(self.index)
            self._loop.clear_timer(self)
            self._loop.clear_timer((self, "copying"))
            self._loop.clear_timer((self, "slow"))
            self._loop.clear_timer((self, "again"))
            self._watching = False
            self._replace_kick(None)
            self._polled = False
            return self.base

    def set_kick(self, kick: Doorbell | None) -> None:
        """Set what announces requests; None has the ring polled. The queue owns it.

        Raises:
            OSError: It cannot be waited for; it is closed.
        """
        with self._lock:
            self._deactivate()
            self._replace_kick(kick)
            self._polled = kick is None
            # What a back-end that is gone left in flight was announced to that one; see also
            # libvhost-user, `vu_check_queue_inflights`. Buffers for a device that speaks first stay
            # in the ring over a stop of the queue, and are not announced again either.
            if kick is None or self._owned or self._host.tracked:
                self._started = True
                self.wake()

    def _replace_kick(self, kick: Doorbell | None) -> None:
        """Replace the kick. It is noticed by its edge and never read."""
        old, self._kick = self._kick, None
        if old is not None:
            self._loop.remove_reader(old.fileno())
            drain_eventfd(old.fileno())
            old.close()
        if kick is not None:
            try:
                self._loop.add_reader(
                    kick.fileno(), functools.partial(self._kicked, kick), edge=True
                )
            except BaseException:
                kick.close()
                raise
        self._kick = kick

    def set_call(self, call: Doorbell | None) -> None:
        """Set what to notify the driver with. The queue owns it."""
        with self._lock:
            self._deactivate()
            old, self._call = self._call, call
            if old is not None:
                old.close()
            # A back-end that is gone may have published requests and not come to say so; see also
            # libvhost-user, `vu_set_vring_call_exec`. And a ring may have been served before this
            # came: QEMU gives the kick first.
            wanted = self.counts.notifications
            if self._host.tracked or (old is None and wanted != self._heard):
                signal(self._call)
            self._heard = wanted
            self.wake()

    def set_err(self, err: Doorbell | None) -> None:
        """Set what to report with that the queue is broken. The queue owns it."""
        with self._lock:
            old, self._err = self._err, err
            if old is not None:
                old.close()

    def interrupt(self) -> None:
        """Notify the driver, whether or not anything was published. From any thread.

        A driver must expect that; a device has no need of it, unless it is to test its driver.
        """
        with self._lock:
            signal(self._call)

    def wake(self) -> None:
        """Have the queue served, soon and by its own thread. From any thread."""
        if not self._scheduled:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._run)
            except BaseException:
                self._scheduled = False
                raise

    def _kicked(self, kick: Doorbell) -> None:
        # The queue may have been stopped since the loop found the descriptor readable.
        self._serve_once(kick)

    def _run(self) -> None:
        self._scheduled = False
        self._serve_once(None)

    def _serve_once(self, kick: Doorbell | None) -> None:
        self._lock.acquire_to_serve()
        try:
            if kick is not None and kick is not self._kick:
                return
            self._started = self._started or kick is not None
            available = self._serve()
        finally:
            self._lock.release()
        if available:
            self._announce()

    def _serve(self) -> bool:
        """Serve the queue once; whether the device is to be told of buffers to take."""
        try:
            ring = self._ready_ring()
            if ring is None:
                return False
            if self._owned:
                return self._serve_owned(ring)
            if self._serve_ring(ring):
                self.wake()
        except GuestioError as error:
            self._break(error)
        return False

    def _serve_owned(self, ring: Ring) -> bool:
        """Publish what is completed; whether there are buffers to take."""
        if self._finished:
            self._complete_finished(ring)
        call = -1 if self._call is None else self._call.fileno()
        _, missing, _, idle = ring.run_once(None, 0, call, True)
        if missing:
            self._stall(ring, missing)
            return False
        if self._ring_lacks:
            # A device may take the first buffer much later, and that has all of its time then.
            self._ring_lacks = False
            self._end_stall()
        if self._lacks:
            lacks, self._lacks = self._lacks, []
            self._stall(ring, lacks)
            return False
        if self._polled:
            self._loop.set_timer(self, time.monotonic() + POLL_INTERVAL, self._run)
        return not idle

    def _break(self, error: GuestioError) -> None:
        self._stuck, self._why_stuck = True, str(error)
        event(What.QUEUE_BROKEN, origin=self._host.origin, queue=self.index)
        self._host.broken(self, error)
        # Last: the log says why by then.
        signal(self._err)

    def _serve_ring(self, ring: Ring) -> bool:
        """Serve a ring until there is nothing to do, or until other queues must be served.

        Returns:
            Whether there is more to do.
        """
        host = self._host
        call = -1 if self._call is None else self._call.fileno()
        until = time.monotonic() + TURN_SECONDS
        for _ in range(BATCH):
            if self._finished:
                self._complete_finished(ring)
            watching = host.poll_seconds and time.monotonic() < self._watch_until
            outcome = ring.run_once(host.device.server_of(self.index), BATCH, call, not watching)
            taken = self._conclude(ring, outcome)
            if taken is None:
                return False
            if taken >= BATCH or time.monotonic() >= until:
                return True
            # Other queues of the thread are watched as well.
            if (
                watching
                and not taken
                and (self._loop.busy or not ring.spin(SPIN, self._loop.fileno()))
            ):
                return True
        return True

    def _conclude(self, ring: Ring, outcome: Outcome) -> int | None:
        """Do what is left to do after a batch of requests.

        Returns:
            How many requests were taken; None if there is nothing more to do now.
        """
        chains, missing, served, idle = outcome
        host = self._host
        given = len(chains)
        if served or given:
            try:
                if chains:
                    self._begin(ring, chains)
            finally:
                host.statistics.counters.count_requests(served + len(chains))
            if len(chains) < given:
                # Also if others wait for translations.
                self.wake()
            if host.poll_seconds:
                self._watch_until = time.monotonic() + host.poll_seconds
        if missing:
            self._stall(ring, missing)
            return None
        self._end_stall()
        if not idle:
            return served + len(chains)
        if self._polled:
            self._loop.set_timer(self, time.monotonic() + POLL_INTERVAL, self._run)
        elif self._kick is not None and not host.poll_seconds:
            self._activate(ring, self._kick)
        return None

    def _activate(self, ring: Ring, kick: Doorbell) -> None:
        """Have the core's loop serve the queue until something is to be decided."""
        if self._host.threaded:
            # The loop requests translations without the lock that other threads request with.
            return
        host = self._host
        self._active = ActiveQueue(
            ring,
            host.device.server_of(self.index),
            kick.fileno(),
            -1 if self._call is None else self._call.fileno(),
            feed=host.translator.feed,
            waiter=self.index,
            counters=host.statistics.counters,
            callback=self._go_on,
        )
        self._loop.core.add(self._active)

    def resume(self) -> None:
        """Serve the queue in Python once more: what it lacked has come, or is refused."""
        self._deactivate()
        self.wake()

    def _deactivate(self) -> None:
        active, self._active = self._active, None
        if active is not None:
            self._loop.core.remove(active)

    def _go_on(self, outcome: Outcome | GuestioError | None) -> None:
        """Take over from the core's loop, with what is to be decided."""
        with self._lock:
            self._active = None
            ring = self._ring
            try:
                if isinstance(outcome, GuestioError):
                    self._break(outcome)
                elif outcome is None or ring is None or self._conclude(ring, outcome) is not None:
                    self.wake()
            except GuestioError as error:
                self._break(error)

    def _begin(self, ring: Ring, chains: list[Chain]) -> None:
        """Have requests processed; those that take time are completed later.

        Args:
            ring: Where they come from.
            chains: All that were taken. After TURN_SECONDS the rest of them is removed and put back
                into the ring: a device that takes its time for each of them delays neither the
                front-end nor other queues for long.

        Raises:
            QueueError: One failed and its driver cannot be told.
        """
        untold = None
        began = now = time.monotonic()
        at, taken = 0, len(chains)
        try:
            while at < len(chains):
                if now - began >= TURN_SECONDS and at and taken == len(chains):
                    rest = chains[at:]
                    ring.put_back(rest)
                    chains[at:] = rest
                    if not rest:
                        break
                chain = chains[at]
                at += 1
                answer = self._process(chain)
                if isinstance(answer, Future):
                    self._await(chain, answer, began)
                elif (
                    chain.fault is None or chain.tail is not None or self._host.error_status is None
                ):
                    if not self._complete(ring, chain, answer):
                        self._withhold(chain)
                else:
                    with contextlib.suppress(ValueError):  # the device may have done it
                        chain.finish(0)
                    untold = chain
                now = time.monotonic()
        except BaseException:
            # Serving ends. What was not answered is not published, and must not keep memory in use.
            for chain in chains:
                if chain not in self._in_progress:
                    with contextlib.suppress(ValueError):
                        chain.finish(0)
            raise
        if (took := now - began) >= SLOW_DEVICE:
            self._host.log.report(
                "queue %d: %s took %d s for %d requests, and nothing else was served meanwhile; "
                "have it return a future of what takes long",
                self.index,
                self._method("process"),
                took,
                len(chains),
            )
        if untold is not None:
            # A status of before would tell the driver that all went well.
            raise QueueError(
                f"request {untold.head} failed and the byte for its status cannot be reached: "
                f"{untold.fault}"
            )

    def _complete(self, ring: Ring, chain: Chain, written: int) -> bool:
        """As ``ring.complete``, also for a request that its device has finished by itself."""
        try:
            return ring.complete(chain, written)
        except ValueError:
            self._host.statistics.counters.count_failed()
            self._host.log.report(
                "queue %d: %s called Chain.finish; return the number of bytes written instead",
                self.index,
                self._method("process"),
            )
            return ring.complete(chain)

    def _method(self, name: str) -> str:
        """A method of the device, for people."""
        return f"{type(self._host.device).__name__}.{name}"

    def _await(self, chain: Chain, answer: Future[int], since: float) -> None:
        """Have a request completed once its future is done."""
        chain.hand_over()
        self._in_progress[chain] = _InProgress(answer, since)
        if not self._watching:
            self._watching = True
            self._loop.set_timer((self, "slow"), since + SLOW_ANSWER, self._look_for_slow)
        try:
            answer.add_done_callback(functools.partial(self._finish, chain))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self._host.log.report(
                "queue %d: request failed: the future of %s takes no callback",
                self.index,
                self._method("process"),
                trace=True,
            )
            self._take_back(chain)

    def _look_for_slow(self) -> None:
        """Name a device that has not answered for long; again each time it took twice as long."""
        with self._change:
            oldest = next((one for one in self._in_progress.values() if one.answer), None)
        if oldest is None:
            self._watching = False
            return
        now, since = time.monotonic(), oldest.since
        age = now - since
        told_of, told_at = self._told_of
        if age >= SLOW_ANSWER and (since != told_of or age >= 2 * told_at):
            self._told_of = since, age
            self._host.log.report(
                "queue %d: %s has not answered a request for %d s; it holds %d, and their driver "
                "waits until it completes their futures",
                self.index,
                self._method("process"),
                age,
                len(self._in_progress),
            )
        when = now + SLOW_ANSWER - age % SLOW_ANSWER
        self._loop.set_timer((self, "slow"), when, self._look_for_slow)

    def _complete_finished(self, ring: Ring) -> None:
        """Complete requests that were answered, once no system call moves their memory."""
        for _ in range(len(self._finished)):
            chain = self._finished.popleft()
            if not ring.complete(chain):
                self._withhold(chain)

    def _withhold(self, chain: Chain) -> None:
        """Complete a request later: its driver must not get memory back that is still written."""
        # The thread that took it may have to wait for it.
        chain.hand_over()
        if not self._copying:
            self._loop.set_timer(
                (self, "copying"), time.monotonic() + COPY_LOOK, self._look_at_copying
            )
        self._copying.append(chain)
        if self._copying_since is None:
            self._copying_since, self._tell_after = time.monotonic(), SLOW_ANSWER

    def _look_at_copying(self) -> None:
        with self._lock:
            self._finished.extend(self._copying)
            self._copying.clear()
            available = self._serve()
            self._report_copying()
        if available:
            self._announce()

    def _report_copying(self) -> None:
        """Watch the requests that still wait for system calls, and name what keeps them."""
        if not self._copying or self._copying_since is None:
            self._copying_since = None
            return
        if (age := time.monotonic() - self._copying_since) >= self._tell_after:
            self._tell_after = 2 * age
            self._host.log.report(
                "queue %d: %d requests that %s has answered wait for its system calls, which "
                "still move their memory after %d s",
                self.index,
                len(self._copying),
                self._method("process"),
                age,
            )

    def _process(self, chain: Chain) -> int | Future[int]:
        """What the device says to a request; where it failed, what it says to that."""
        bursts, method = self._host.log, self._method("process")
        try:
            if chain.fault is None:
                answer = self._host.device.process(self.index, chain)
                if isinstance(answer, Future):
                    return answer
                return _plausible(answer, chain, f"{method} returned")
            bursts.report("queue %d: request refused: %s", self.index, chain.fault)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._report_failure(error, f"{method} raised")
        return self._fail(chain)

    def _report_failure(self, error: BaseException, what: str) -> None:
        """Log why a request failed; with the traceback, if that is not an error of guestio's."""
        if isinstance(error, _NonsenseError):
            self._host.log.report("queue %d: request failed: %s", self.index, error)
            return
        self._host.log.report(
            "queue %d: request failed: %s %s: %s",
            self.index,
            what,
            type(error).__name__,
            error,
            trace=not isinstance(error, GuestioError) and error,
        )

    def _fail(self, chain: Chain, *, late: bool = False) -> int:
        """Tell the driver that a request failed, as its device does it or else as its type does.

        Args:
            chain: The request.
            late: Whether this is called in a thread of the device's, in which nothing ends that
                the device wants to end.
        """
        device, method = self._host.device, self._method("fail")
        event(What.FAILED, origin=self._host.origin, queue=self.index, head=chain.head)
        self._host.statistics.counters.count_failed()
        written = None
        try:
            written = _plausible(device.fail(self.index, chain), chain, f"{method} returned")
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)) and not late:
                raise
            self._report_failure(error, f"{method} raised")
        finally:
            if written is None:
                written = self._fail_as_type(chain)
            elif self._host.error_status is not None and chain.in_use():
                chain.stamp(self._host.error_status)
        return written

    def _fail_as_type(self, chain: Chain) -> int:
        """As `Device.fail`, whatever the device makes of it."""
        status, tail = self._host.error_status, chain.tail
        if status is None or tail is None:
            return 0
        try:
            tail.write(bytes([status]))
        except GuestioError:
            # The byte may be gone with its file, or have been given up already.
            return 0
        if chain.in_use():
            chain.stamp(status)
        return int(chain.fault is None and chain.writable.total == 1)

    def _finish(self, chain: Chain, answer: Future[int]) -> None:
        """Take a late answer, in whatever thread it was found.

        The memory is given back here: a revocation of its translation may be waiting for it in the
        very thread that serves the queue. If the request was given up, its answer goes nowhere.
        """
        if chain not in self._in_progress:
            return
        written = None
        try:
            written = self._answer_of(chain, answer)
        finally:
            if written is None:
                # A signal came in between: even so its driver must not see it succeed.
                written = self._fail_as_type(chain)
            with self._change:
                if self._in_progress.pop(chain, None) is not None:
                    self._give_back({chain: written})
                    self.wake()

    def _give_back(self, requests: dict[Chain, int]) -> None:
        """Let go of requests' memory and have them completed. Needs the lock of late requests."""
        for chain, written in requests.items():
            # Whatever a device did to its request, a stop does not wait for it without a limit.
            with contextlib.suppress(ValueError):
                chain.finish(written)
        # In one step, for the thread that publishes.
        self._finished.extend(requests)
        self._change.notify_all()

    def _answer_of(self, chain: Chain, answer: Future[int]) -> int:
        whose = f"the future of {self._method('process')} ended with"
        late = threading.current_thread() is not threading.main_thread()
        try:
            # One that only pretends to be done must not be waited for.
            return _plausible(answer.result(0), chain, whose)
        except CancelledError:
            self._host.log.report(
                "queue %d: request failed: the future of %s was cancelled",
                self.index,
                self._method("process"),
            )
        except BaseException as error:
            # In the main thread these may come of a signal instead.
            if (
                isinstance(error, (KeyboardInterrupt, SystemExit))
                and not late
                and answer.exception(0) is not error
            ):
                raise
            self._report_failure(error, whose)
        return self._fail(chain, late=late)

    def give_up(self, iova: int, size: int) -> None:
        """Fail the requests that the device holds and that use a range of addresses.

        For a revocation that has waited for them long enough. From any thread.
        """
        with self._change:
            held = [chain for chain in list(self._in_progress) if _uses(chain, iova, iova + size)]
        self._disown(held, "their memory is taken away")

    def give_up_older(self, since: float) -> None:
        """Fail the requests that the device has held since before a time (monotonic)."""
        with self._change:
            held = [chain for chain, late in self._in_progress.items() if late.since <= since]
        self._disown(held, "its time is up")

    def _disown(self, held: list[Chain], why: str) -> None:
        """Fail requests that the device still holds; what it says of them later goes nowhere."""
        if not held:
            return
        self._host.log.report(
            "queue %d: %d requests fail that %s has not answered in time: %s",
            self.index,
            len(held),
            type(self._host.device).__name__ if self._owned else self._method("process"),
            why,
        )
        spent = 0.0
        for chain in held:
            spent += self._take_back(chain, cancel=spent < CANCEL_SECONDS)

    def _take_back(self, chain: Chain, *, cancel: bool = True) -> float:
        """Fail a request that the device still holds; the seconds that its future's cancel took."""
        late = self._in_progress.get(chain)
        if late is None:
            return 0.0
        written = self._fail(chain)
        with self._change:
            if self._in_progress.pop(chain, None) is None:
                return 0.0
            self._give_back({chain: written})
            self.wake()
        if not cancel or late.answer is None:
            return 0.0
        began = time.monotonic()
        # What has not begun need not begin any more.
        try:
            late.answer.cancel()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self._host.log.report(
                "queue %d: the future of %s cannot be cancelled",
                self.index,
                self._method("process"),
                trace=True,
            )
        return time.monotonic() - began

    def _drain(self, until: float) -> None:
        """Wait for the requests that take time, and complete them; fail them when time is up.

        Those whose memory is still moved by a system call then are not published: the
        next back-end begins with them.
        """
        with self._host.changing_queues():
            self._draining = True
            try:
                self._drain_until(until)
            finally:
                self._draining = False

    def _drain_until(self, until: float) -> None:
        with self._change:
            while self._in_progress and (left := until - time.monotonic()) > 0:
                self._change.wait(left)
            held = list(self._in_progress)
        if held:
            self._disown(held, "the queue stops")
            self._host.given_up()
        self._finished.extend(self._copying)
        self._copying.clear()
        self._copying_since = None
        self._wait_for_copies(until + COPY_GRACE)
        while self._finished:
            chain = self._finished.popleft()
            if self._ring is not None:
                self._ring.complete(chain)

    def _wait_for_copies(self, until: float) -> None:
        """Wait for system calls that move the memory of requests which were answered or given up.

        The memory is kept for a call that does not return; its kernel may still write to it.
        """
        while (
            moving := sum(c.in_use() for c in list(self._finished))
        ) and time.monotonic() < until:
            time.sleep(0.001)
        if moving:
            self._host.given_up()
            self._host.log.report(
                "queue %d: %d requests are not given back to their driver: system calls of %s "
                "still move their memory, and write to it until they return",
                self.index,
                moving,
                self._method("process"),
            )

    def _stall(self, ring: Ring, missing: Iterable[Miss]) -> bool:
        """Request what the queue lacks; a request that lacks what was refused fails instead.

        Returns:
            Whether there was nothing to request.
        """
        if self._owned and not self._loop.is_current:
            # Misses are requested in the loop's thread alone, in the order of their messages.
            self._lacks = list(missing)
            self.wake()
            return False
        self._deactivate()
        now = time.monotonic()
        if self._stalled_at is None or self._stalled_for != ring.progress:
            self._stalled_at, self._stalled_for = now, ring.progress
        self._ring_lacks = bool(ring.missing())
        if self._give_up(ring, late=now - self._stalled_at >= self._host.translator.patience):
            return True
        self._host.translator.request(self.index, missing)
        return False

    def _end_stall(self) -> None:
        self._stalled_at = None
        self._host.translator.refused(self.index).clear()

    def _give_up(self, ring: Ring, *, late: bool) -> bool:
        """Deal with a refusal that concerns the ring itself or a request that waits.

        Args:
            ring: The queue's ring.
            late: Whether the oldest has waited long enough for whatever it lacks.

        Returns:
            Whether there is nothing to ask for now.
        """
        refused = self._host.translator.refused(self.index)
        if not refused and not late:
            return False
        if len(refused) > MAX_REFUSED:
            refused.clear()
        lacking = ring.missing()
        if lacking and (late or touched(lacking, refused)):
            self._host.log.report("queue %d: its ring has no translation", self.index)
            self._host.translator.report_failed(lacking, [])
            refused.clear()
            self._started, self._stalled_at = False, None
            return True
        lacks = ring.lacking()
        if lacks is None:
            return False
        lost = touched(lacks, refused)
        # The end of a request is the place of a block request's status: that may still come.
        hopeless = lost and not self._host.translator.under_way(*lacks[-1])
        if lacks and not hopeless and not late:
            return False
        refused -= lost
        if late and not hopeless:
            self._host.log.report(
                "queue %d: a request fails for want of time: its translations were not complete "
                "after %g s",
                self.index,
                self._host.translator.patience,
            )
        self._fail_lacking(ring, lacks)
        return True

    def _fail_lacking(self, ring: Ring, lacks: list[Miss]) -> None:
        """Fail a request that waits for what will not come."""
        host = self._host
        chain = ring.pop_faulty()
        if chain is not None and chain.fault is None and self._owned:
            # Its translation has come after all: the device takes it.
            ring.put_back([chain])
        elif chain is not None:
            host.statistics.counters.count_requests(1)
            if chain.fault is not None:
                host.translator.report_failed(lacks, chain.access_fails)
            self._begin(ring, [chain])
        self.wake()


class _NonsenseError(Exception):
    """A device's answer is no number of bytes; the message names its method."""


def _plausible(written: object, chain: Chain, whose: str) -> int:
    """What a device says that it wrote, if that is possible.

    Raises:
        _NonsenseError: It is not.
    """
    if type(written) is int:
        count = written
    else:
        try:
            if isinstance(written, bool):
                raise TypeError
            # An integer of a class of its own may compare as it likes.
            count = int.__index__(operator.index(written))  # type: ignore[arg-type]
        except TypeError:
            raise _NonsenseError(
                f"{whose} {reprlib.repr(written)}; return the number of bytes written"
            ) from None
    if not 0 <= count <= chain.writable.total:
        raise _NonsenseError(
            f"{whose} {shown(count)}, but the request has room for {chain.writable.total} "
            "bytes; return the number of bytes written"
        )
    return count


def _uses(chain: Chain, first: int, end: int) -> bool:
    """Whether a request has memory at the addresses from ``first`` to ``end``."""
    return any(
        addr < end and first < addr + length
        for memory in (chain.readable, chain.writable)
        for addr, length in memory.fragments()
    )


def signal(bell: Doorbell | None) -> None:
    """Notify an eventfd, if there is one."""
    if bell is not None:
        notify_eventfd(bell.fileno())
