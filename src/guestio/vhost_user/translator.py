"""What a back-end knows of the IOMMU in front of it, and how it learns more.

Translations live in an IOTLB. What is missing there is asked for on the back-end channel, a page
at a time and each page once, for all who wait for it; the answers come as UPDATE messages on the
main channel. What has no answer after some milliseconds is asked once more, to be acknowledged: so
a refusal is found out, and answers cost no acknowledgement. What is refused, or not answered in
time, is remembered for those who asked until they have drawn the conclusion.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

from guestio._core.vhost_user.iotlb_feed import IotlbFeed, IotlbUpdater
from guestio._core.vhost_user.miss_table import REPEAT_AFTER, MissTable, PendingMiss
from guestio.addr import IovaRange, Permissions
from guestio.control.explain import explain_iotlb
from guestio.control.schema import Explanation, IotlbInfo
from guestio.control.status import iotlb_status
from guestio.iommu import Iotlb
from guestio.trace import What, event
from guestio.vhost_user.backend_channel import BackendChannel
from guestio.vhost_user.channel import Channel
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import (
    BackendRequest,
    IotlbMessage,
    IotlbType,
    encode_iotlb,
)
from guestio.virtio.loop import EventLoop
from guestio.virtio.statistics import Statistics
from guestio.virtio.translator import Miss, Page

MAX_TRANSLATIONS = 1 << 20
"""IOTLB entries at most; a front-end that sends more makes the least used ones go."""

PATIENCE = 4
"""Times the limit for one answer that a request may wait for translations in all: a front-end that
answers every question, but never with what was asked for, must not keep it for ever."""

MISS_BYTES = len(
    encode_iotlb(BackendRequest.IOTLB_MSG, IotlbMessage.miss(0, 1, 1), need_reply=False)
)

MAX_REPORTS = 64
"""Forbidden accesses of one request that a front-end is told of."""


class VhostUserTranslator:
    """The IOTLB of a connection and the traffic that fills it; a :class:`Translator`.

    Any thread may call :meth:`request`, :meth:`refused`, :meth:`under_way`, :meth:`forget` and
    :meth:`report_failed`; the rest is for the loop's. The set of what a waiter was refused
    grows in the loop's thread while another one of the waiter's removes from it.

    Args:
        loop: Calls back when time is up.
        back: Where misses are requested.
        statistics: Where to count.
        wake: Called with the waiters that may go on, in the loop's thread. No lock is held then,
            so it may call anything here, but until it returns no translation is acknowledged: it
            must not wait for a thread that may be waiting for one.
        blocked: Called when the main channel takes no more acknowledgements; :meth:`receive` sends
            the rest.
        time_limit: Seconds a front-end may take to answer a miss.
        origin: The server's number in records of tracepoints.

    Attributes:
        iotlb: What is known.
        feed: Handles plain messages in the core's loop, and requests misses without the lock that
            other threads request with: where there are such threads, no queue is served there.
        patience: Seconds that a request may wait for translations in all.
    """

    def __init__(
        self,
        loop: EventLoop,
        back: BackendChannel,
        statistics: Statistics,
        wake: Callable[[Iterable[int]], None],
        blocked: Callable[[], None],
        time_limit: float,
        origin: int = 0,
    ) -> None:
        self.iotlb = Iotlb(MAX_TRANSLATIONS)
        self._known = self.iotlb._map
        self._known.origin = self._origin = origin
        self.patience = PATIENCE * time_limit
        self._loop = loop
        self._back = back
        self._stats = statistics
        self._wake = wake
        self._blocked = blocked
        self._shared = SharedMemory()
        self._time_limit = time_limit
        self._misses = MissTable(time_limit)
        self._misses.origin = origin
        self._updater = IotlbUpdater(
            self._known, self._shared.user_addresses(), self._misses, statistics.counters
        )
        self.feed = IotlbFeed(
            self._fed, self.patience, self._updater, self._misses, statistics.counters
        )
        loop.core.add_feed(self.feed)
        self._set_acknowledged(False)
        # Held also while what was refused is passed on to those who asked.
        self._lock = back.lock
        self._refused: dict[int, set[Page]] = {}
        self._main: Channel | None = None
        self._unsent = b""
        back.attach(self)

    # Private, as this and `_forget_all` do not wait for users: all queues are detached or stopped.
    def _change_memory(self, shared: SharedMemory) -> None:
        """Follow the memory table; what was known is asked for again."""
        self._shared = shared
        self._updater.user_addresses = shared.user_addresses()
        self._known.clear()

    def _set_acknowledged(self, acknowledged: bool) -> None:
        self.feed.acknowledged = acknowledged
        self.feed.look_after = REPEAT_AFTER if acknowledged else self._time_limit

    def serve(self, channel: Channel | None) -> None:
        """Deal with plain messages of the main channel while waiting; None ends that.

        A thread that takes a message from the channel calls :meth:`receive` before.
        """
        self._main = channel
        self.feed.main = -1

    def read_in_core(self) -> None:
        """Have the core's loop handle plain messages of the main channel from now on, if it can."""
        if self.feed.main < 0 and self._main is not None and self._main.at_rest:
            self.feed.main = self._main.fileno()

    def _fed(self) -> None:
        """Do what is left of what the core's loop has handled."""
        unsent, unrequested = self.feed.take_unsent()
        if ready := self.feed.take_ready():
            self._wake(ready)
        if unsent and self._main is not None:
            self._unsent += unsent
            self._blocked()
        if unrequested:
            with self._lock:
                self._send(unrequested)

    def receive(self, channel: Channel) -> bool:
        """Apply a run of plain messages from the main channel; False if none has arrived."""
        if self._unsent:
            unsent, self._unsent = self._unsent, b""
            channel.post(unsent)
        if channel.backlog:
            return True
        if not channel.at_rest:
            return False
        taken, unsent, ready = self._updater.receive(channel.fileno())
        if not taken:
            # What comes next may be taken in part.
            self.feed.main = -1
            return False
        if unsent:
            channel.post(unsent)
        if ready:
            self._wake(ready)
        return True

    def apply(self, message: IotlbMessage, seconds: float) -> bool:
        """Apply an UPDATE or INVALIDATE that the session has checked.

        Args:
            message: The message.
            seconds: How long to wait for the users of a translation that is taken away.

        Returns:
            Whether what was taken away is no longer in use.

        Raises:
            InvalidAddressError: An UPDATE leads to memory that is not shared; nothing changed.
        """
        iova, size, uaddr, perm, kind = message
        if kind == IotlbType.INVALIDATE:
            self._known.cut(iova, size)
            self._stats.counters.invalidations += 1
            event(What.INVALIDATE, origin=self._origin, address=iova, length=size)
            return self.unused(iova, size, seconds)
        at, taken = iova, False
        ranges = self._shared.guest_ranges(uaddr, size)
        self._stats.counters.updates += 1
        for guest_addr, length in ranges:
            taken |= self._known.overwrite(at, length, guest_addr, Permissions(perm))
            at += length
        event(
            What.UPDATE,
            origin=self._origin,
            address=iova,
            length=size,
            detail=ranges[0][0],
            access=int(perm),
        )
        self._wake(self._misses.answered(iova, size, perm))
        return not taken or self.unused(iova, size, seconds)

    def unused(self, iova: int, size: int, seconds: float) -> bool:
        """Wait until what the range translated to is not in use; False if that takes longer."""
        return self.iotlb.drain(iova, size, seconds)

    def request(self, waiter: int, missing: Iterable[Miss]) -> None:
        """Request ranges, except for pages that this waiter was refused."""
        refused = self.refused(waiter)
        with self._lock:
            now = time.monotonic()
            messages = self._misses.request(
                waiter, missing, now, acknowledged=self.feed.acknowledged, skip=refused
            )
            if messages:
                self._send_misses(messages)
            # An early look is cheaper than moving the alarm for each miss.
            due = now + self.feed.look_after
            if due < self.feed.alarm:
                self.feed.alarm = due
                self._loop.call_soon_threadsafe(self._arm)

    def ask_ahead(self, ranges: Iterable[Miss]) -> None:
        """Request translations that nothing waits for; what the front-end tells is remembered.

        What it refuses, or does not answer, has no effect.
        """
        messages = b"".join(
            encode_iotlb(
                BackendRequest.IOTLB_MSG,
                IotlbMessage.miss(where.base, where.length, access),
                need_reply=False,
            )
            for where, access in ranges
        )
        with self._lock:
            self._send_misses(messages)

    def refused(self, waiter: int) -> set[Page]:
        """The pages that a waiter asked for in vain; remove those that were dealt with."""
        refused = self._refused.get(waiter)
        # In one step, as two threads may be here.
        return self._refused.setdefault(waiter, set()) if refused is None else refused

    def under_way(self, where: IovaRange, access: int) -> bool:
        """Whether an answer about the last page of a range is still to come."""
        return self._misses.is_open(where.base + (where.length - 1), access)

    def forget(self, waiter: int) -> None:
        """Forget what a stopped queue waits for and what it was refused."""
        with self._lock:
            ready = self._misses.forget(waiter)
            self._refused.pop(waiter, None)
        self._wake(ready)

    def _forget_all(self) -> None:
        """Forget every translation, because no queue runs.

        QEMU forwards no invalidation from the stop of the last queue to the next start, so what is
        known may be wrong then. To be called at both: an answer that was under way when the queues
        stopped arrives afterwards.
        """
        self._known.clear()

    def report_failed(self, lacking: list[Miss], forbidden: list[Miss]) -> None:
        """Tell the front-end what was attempted and is not allowed, or some of it if it is much.

        What has no translation it knows: it refused to give one.
        """
        messages = b"".join(
            encode_iotlb(
                BackendRequest.IOTLB_MSG,
                IotlbMessage.access_fail(base, length, access),
                need_reply=False,
            )
            for (base, length), access in forbidden[:MAX_REPORTS]
        )
        with self._lock:
            self._stats.access_fails += len(forbidden)
            if messages:
                self._send(messages)

    def channel_opened(self, acknowledged: bool) -> None:
        """See :class:`~guestio.vhost_user.backend_channel.IotlbSender`."""
        self._set_acknowledged(acknowledged)
        with self._lock:
            # Acknowledgements say nothing but their order, which is another one now.
            waiters = self._misses.reset()
        self._wake(waiters)

    def may_send_directly(self, fd: int) -> None:
        """See :class:`~guestio.vhost_user.backend_channel.IotlbSender`."""
        self.feed.back = fd

    def close(self) -> None:
        """Stop asking and release everything. Calling it again does nothing."""
        self.serve(None)
        self._back.close()
        with self._lock:
            # No deadline is watched any more, even if requests still come.
            self.feed.alarm = -math.inf
        self._loop.clear_timer(self)
        self._loop.core.remove_feed(self.feed)
        self._shared = SharedMemory()
        self._refused.clear()
        # This object goes with the garbage collector, which knows nothing of how much that is.
        self._forget_all()

    def take_acknowledgements(self, fd: int) -> bool:
        """See :class:`~guestio.vhost_user.backend_channel.IotlbSender`."""
        with self._lock:
            done, refused, ready = self._misses.receive(fd)
            ready += self._pass_on(refused)
        self._wake(ready)
        return done

    def acknowledge(self, value: int) -> None:
        """See :class:`~guestio.vhost_user.backend_channel.IotlbSender`."""
        with self._lock:
            refused, ready = self._misses.acknowledge(value)
            ready += self._pass_on(refused)
        self._wake(ready)

    def _pass_on(self, refused: list[PendingMiss]) -> list[int]:
        """Remember what was refused for those who asked, and who they are.

        The lock is held since the misses were settled, so that no waiter is forgotten in between.
        """
        ready = []
        for miss in refused:
            self._stats.iotlb_refused += 1
            for waiter in miss.waiting:
                self.refused(waiter).add((miss.iova, miss.access))
                ready.append(waiter)
        return ready

    def _send_misses(self, messages: bytes) -> None:
        self._stats.counters.count_misses(len(messages) // MISS_BYTES)
        self._send(messages)

    def _send(self, messages: bytes) -> None:
        self._back.send(messages)

    def _arm(self) -> None:
        """Have a look once a miss is overdue, as long as any is pending."""
        with self._lock:
            if self.feed.alarm == -math.inf:
                return
            deadline = self._misses.deadline()
            self.feed.alarm = math.inf if deadline is None else deadline
        if deadline is not None:
            self._loop.set_timer(self, deadline, self._look)

    def _look(self) -> None:
        """Repeat misses that are overdue, and give up in the end.

        Those who wait have a look as well: their first request may lack nothing any more.
        """
        now = time.monotonic()
        with self._lock:
            late = self._misses.expired(now)
            self._stats.iotlb_timeouts += len(late)
            ready = self._pass_on(late)
            again, unasked = self._misses.repeat(now)
            if again:
                self._send_misses(again)
            ready += unasked + self._misses.starved(now) + self._misses.kept_waiting(now)
        self._wake(ready)
        self._arm()

    @property
    def pending(self) -> int:
        """Misses that have no answer yet. From any thread."""
        return len(self._misses)

    def seen(self) -> IotlbInfo:
        """What is to be seen of the IOTLB. From any thread, without waiting."""
        return iotlb_status(self.iotlb, pending=self.pending, latencies=self._misses.latencies)

    def explain(self, address: int, length: int) -> Explanation:
        """What a range of I/O virtual addresses leads to. From any thread, without waiting."""
        pending = any(
            self._misses.is_open(address, int(access))
            for access in (Permissions.READ, Permissions.WRITE)
        )
        return explain_iotlb(self.iotlb, address, length, origin=self._origin, pending=pending)
