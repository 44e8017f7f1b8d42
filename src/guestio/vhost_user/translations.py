"""What a back-end knows of the IOMMU in front of it, and how it learns more.

Translations live in an IOTLB. What is missing there is asked for on the back-end channel, a page
at a time and each page once, for all who wait for it; the answers come as UPDATE messages on the
main channel. What has no answer after some milliseconds is asked once more, to be acknowledged: so
a refusal is found out, and answers cost no acknowledgement. What is refused, or not answered in
time, is remembered for those who asked until they have drawn the conclusion.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable

from guestio._core.chain import Chain
from guestio._core.intake import Intake
from guestio._core.iotlbwire import IotlbUpdater
from guestio._core.misses import Misses
from guestio._core.questions import REPEAT_AFTER, MissTable, Question
from guestio.addr import IovaRange, Permissions
from guestio.errors import GuestioError
from guestio.iommu import Iotlb
from guestio.vhost_user.channel import Channel, PeerGoneError
from guestio.vhost_user.memory import SharedMemory
from guestio.vhost_user.messages import (
    BackendRequest,
    IotlbMessage,
    IotlbType,
    decode_ack,
    encode_iotlb,
)
from guestio.vhost_user.poller import Poller
from guestio.vhost_user.statistics import Statistics

log = logging.getLogger("guestio.vhost_user")

MAX_TRANSLATIONS = 1 << 20
"""IOTLB entries at most; a front-end that sends more makes the least used ones go."""

PATIENCE = 4
"""Times the limit for one answer that a request may wait for translations in all: a front-end that
answers every question, but never with what was asked for, must not keep it for ever."""

MAX_REPORTS = 64
"""Forbidden accesses of one request that a front-end is told of."""

TURN = 64
"""Acknowledgements that are taken one by one before somebody else has a turn."""

Outcome = tuple[list[Chain], Misses, int, bool]
"""What a ring's ``turn`` returns."""

_QueueOutcome = tuple[int, Outcome | Exception | None]

Page = tuple[int, int]
"""Address of a page and what is to be done with it."""


class Translations:
    """The IOTLB of a connection and the traffic that fills it. For the poller's thread only.

    Args:
        poller: Calls back when acknowledgements arrive or time is up.
        statistics: Where to count.
        wake: Called with the waiters that may go on.
        time_limit: Seconds a front-end may take to answer a miss.

    Attributes:
        iotlb: What is known.
        intake: Does what is ordinary in the core.
        patience: Seconds that a request may wait for translations in all.
    """

    def __init__(
        self,
        poller: Poller,
        statistics: Statistics,
        wake: Callable[[Iterable[int]], None],
        time_limit: float,
    ) -> None:
        self.iotlb = Iotlb(MAX_TRANSLATIONS)
        self._poller = poller
        self._stats = statistics
        self._wake = wake
        self._shared = SharedMemory()
        self._time_limit = time_limit
        self.patience = PATIENCE * time_limit
        self._misses = MissTable(time_limit)
        self._updater = IotlbUpdater(
            self.iotlb, self._shared.users(), self._misses, statistics.traffic
        )
        self.intake = Intake(self._updater, self._misses, self.patience)
        self.set_acknowledged(False)
        self._refused: dict[int, set[Page]] = {}
        self._main: Channel | None = None
        self._unsent = b""
        self._channel: Channel | None = None
        self._asked = 0

    def change_memory(self, shared: SharedMemory) -> None:
        """Follow the memory table; what was known is asked for again."""
        self._shared = shared
        self._updater.users = shared.users()
        self.iotlb.invalidate_all()

    def set_acknowledged(self, acknowledged: bool) -> None:
        """Learn whether the front-end acknowledges what it is asked (REPLY_ACK)."""
        self.intake.acknowledged = acknowledged
        self.intake.look_after = REPEAT_AFTER if acknowledged else self._time_limit

    def serve(self, channel: Channel | None) -> None:
        """Deal with plain messages of the main channel while waiting; None ends that."""
        self._main = channel

    def wait(self, epoll: int, seconds: float) -> tuple[list[int], list[_QueueOutcome]]:
        """Wait for descriptors; all that is ordinary is dealt with.

        Args:
            epoll: What to wait for.
            seconds: How long at most; negative for any time.

        Returns:
            The descriptors that are left to do, and what became of attended queues that need a
            decision, as from ``Intake.wait``.
        """
        intake, main, back = self.intake, self._main, self._channel
        intake.main = main.fileno() if main is not None and main.at_rest else -1
        intake.back = back.fileno() if back is not None and back.at_rest else -1
        fds, ready, unsent, settled, unasked, outcomes = intake.wait(epoll, seconds)
        if ready:
            self._wake(ready)
        if unsent:
            self._unsent += unsent
            fds.append(intake.main)
        if unasked:
            self._send(unasked)
        if settled is not None and not self._settle(*settled):
            fds.append(intake.back)
        return fds, outcomes

    def receive(self, channel: Channel) -> bool:
        """Apply a run of plain messages from the main channel; False if none has arrived."""
        if self._unsent:
            unsent, self._unsent = self._unsent, b""
            channel.send(unsent)
        if not channel.at_rest:
            return False
        taken, unsent, ready = self._updater.receive(channel.fileno())
        if not taken:
            return False
        if unsent:
            channel.send(unsent)
        if ready:
            self._wake(ready)
        return True

    def apply(self, message: IotlbMessage) -> None:
        """Apply an UPDATE or INVALIDATE that the session has checked.

        Raises:
            InvalidAddressError: An UPDATE leads to memory that is not shared; nothing changed.
        """
        iova, size, uaddr, perm, kind = message
        if kind == IotlbType.INVALIDATE:
            self._stats.traffic.invalidations += 1
            self.iotlb.invalidate_mapping(iova, size)
            return
        self._stats.traffic.updates += 1
        at = iova
        for guest_addr, length in self._shared.guest_ranges(uaddr, size):
            self.iotlb.set_mapping(at, guest_addr, length, Permissions(perm))
            at += length
        self._wake(self._misses.answered(iova, size, perm))

    def ask(self, waiter: int, missing: Iterable[tuple[IovaRange, int]]) -> None:
        """Ask for ranges, except for pages that this waiter was refused."""
        now = time.monotonic()
        questions = self._misses.ask(
            waiter, missing, now, acknowledged=self.intake.acknowledged, skip=self.refused(waiter)
        )
        if questions:
            self._send_questions(questions)
        # An early look is cheaper than moving the alarm for each miss.
        if now + self.intake.look_after < self.intake.alarm:
            self._arm()

    def refused(self, waiter: int) -> set[Page]:
        """The pages that a waiter asked for in vain; remove those that were dealt with."""
        refused = self._refused.get(waiter)
        if refused is None:
            refused = self._refused[waiter] = set()
        return refused

    def awaited(self, waiter: int) -> int:
        """How many questions of a waiter are still open."""
        return self._misses.awaited(waiter)

    def forget(self, waiter: int) -> None:
        """Somebody does not wait any more."""
        self.intake.leave(waiter)
        self._misses.forget(waiter)
        self._refused.pop(waiter, None)

    def report_access_fails(self, fails: list[tuple[IovaRange, int]]) -> None:
        """Tell the front-end what was attempted and is not allowed, or some of it if it is much."""
        self._stats.access_fails += len(fails)
        self._send(
            b"".join(
                encode_iotlb(
                    BackendRequest.IOTLB_MSG,
                    IotlbMessage.access_fail(base, length, access),
                    need_reply=False,
                )
                for (base, length), access in fails[:MAX_REPORTS]
            )
        )

    def set_channel(self, fd: int) -> None:
        """Take the socket to ask on; it replaces an earlier one.

        Raises:
            ProtocolError: It is no such socket.
        """
        channel = Channel.from_fd(fd)
        self._close_channel()
        self._channel = channel
        self._poller.add(channel.fileno(), self._receive_replies)
        # Acknowledgements say nothing but their order, which is another one now.
        self._wake(self._misses.reset())

    def close(self) -> None:
        """Stop asking and release everything. Calling it again does nothing."""
        self._main = None
        self._close_channel()
        self._poller.clear_timer(self)
        self._shared = SharedMemory()

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._poller.remove(self._channel.fileno())
            self._channel.close()
            self._channel = None

    def _receive_replies(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            if not channel.at_rest or not self._settle(*self._misses.receive(channel.fileno())):
                # Incomplete, the end of the stream, or what no front-end may send.
                self._receive_one_by_one(channel)
        except GuestioError as error:
            self._lose_channel(error)

    def _receive_one_by_one(self, channel: Channel) -> None:
        for _ in range(TURN):
            if self._channel is not channel:
                return
            message = channel.recv()
            if message is None:
                return
            with message:
                value = decode_ack(message.header, message.payload, BackendRequest.IOTLB_MSG)
            self._settle(True, *self._misses.acknowledge(value))
        self._poller.again(self._receive_replies)

    def _settle(self, done: bool, refused: list[Question], ready: list[int]) -> bool:
        for question in refused:
            self._refuse(question)
        if ready:
            self._wake(ready)
        return done

    def _refuse(self, question: Question) -> None:
        self._stats.iotlb_refused += 1
        for waiter in question.waiting:
            self.intake.leave(waiter)
            self.refused(waiter).add((question.iova, question.access))
        # What else they asked for may still come.
        self._wake([w for w in question.waiting if not self._misses.awaited(w)])

    def _send_questions(self, questions: bytes) -> None:
        asked = self._misses.asked
        self._stats.iotlb_misses += asked - self._asked
        self._asked = asked
        self._send(questions)

    def _send(self, messages: bytes) -> None:
        """Send messages, all at once: a socket's buffer holds few small ones but one large one."""
        if self._channel is None or not messages:
            return
        try:
            self._channel.send(messages)
        except GuestioError as error:
            self._lose_channel(error)

    def _lose_channel(self, error: GuestioError) -> None:
        if not isinstance(error, PeerGoneError):
            log.error("the back-end channel is of no use any more: %s", str(error))
        self._close_channel()

    def _arm(self) -> None:
        """Have a look once a question is late, as long as any is open."""
        deadline = self._misses.deadline()
        self.intake.alarm = math.inf if deadline is None else deadline
        if deadline is not None:
            self._poller.set_timer(self, deadline, self._look)

    def _look(self) -> None:
        """Deal with questions that are late: ask again, and give up in the end."""
        now = time.monotonic()
        for question in self._misses.expired(now):
            self._stats.iotlb_timeouts += 1
            self._refuse(question)
        again, ready = self._misses.repeat(now)
        if again:
            self._send_questions(again)
        self._wake([*ready, *self._misses.starved(now)])
        self._arm()
