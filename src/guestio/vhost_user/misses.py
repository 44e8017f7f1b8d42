"""Which translations have been asked for and not been answered.

Sans I/O: it is told what is missing and what arrives, and says what to ask and who may go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from guestio.addr import IovaRange
from guestio.vhost_user.messages import IotlbMessage

PAGE = 4096
"""Front-ends answer a page at a time, so that is how they are asked."""

MAX_OUTSTANDING = 512
"""Questions in flight at a time. All of them fit in a socket's buffer, so asking never waits."""


@dataclass(slots=True)
class Question:
    """One MISS in flight."""

    iova: int
    access: int
    asked: float
    waiting: set[int]


class MissTable:
    """Misses in flight, at most one for a page and access, and who waits for them.

    A waiter is a number, such as that of a queue. Not safe for several threads at once.

    Args:
        time_limit: Seconds after which an unanswered question counts as refused.

    Attributes:
        asked: Misses asked for so far.
        refused: Questions refused or not answered in time so far.
        timeouts: Those of them that were not answered in time.
    """

    def __init__(self, time_limit: float) -> None:
        self._time_limit = time_limit
        self._open: dict[tuple[int, int], Question] = {}
        self._order: deque[Question] = deque()
        self._starved: set[int] = set()
        self.asked = 0
        self.refused = 0
        self.timeouts = 0

    def __len__(self) -> int:
        return len(self._open)

    def ask(
        self,
        waiter: int,
        missing: Iterable[tuple[IovaRange, int]],
        now: float,
        *,
        acknowledged: bool,
    ) -> list[IotlbMessage]:
        """Note that ``waiter`` needs ranges.

        Args:
            waiter: Who.
            missing: Ranges and what is to be done with them.
            now: The time.
            acknowledged: Whether the front-end will acknowledge each question, in order.

        Returns:
            The messages to send, for what nobody has asked yet. If too much is in flight already
            the rest is left out; the waiter is woken to ask again when there is room.
        """
        messages = []
        for iova, access in pages(missing):
            known = self._open.get((iova, access))
            if known is None:
                if max(len(self._open), len(self._order)) >= MAX_OUTSTANDING:
                    self._starved.add(waiter)
                    break
                known = Question(iova, access, now, set())
                self._open[iova, access] = known
                if acknowledged:
                    self._order.append(known)
                self.asked += 1
                messages.append(IotlbMessage.miss(iova, min(PAGE, (1 << 64) - iova), access))
            known.waiting.add(waiter)
        return messages

    def answered(self, iova: int, size: int) -> set[int]:
        """A translation of a range arrived; the waiters that miss nothing any more."""
        if size <= PAGE:
            keys = [(iova - iova % PAGE, access) for access in (1, 2, 3)]
        else:
            keys = [k for k in self._open if k[0] + PAGE > iova and k[0] < iova + size]
        return self._settle(self._open.pop(key) for key in keys if key in self._open)

    def replied(self, refused: bool) -> tuple[Question | None, set[int]]:
        """The front-end acknowledged the oldest question that it has not acknowledged yet.

        Returns:
            The question, if it was refused, and the waiters that miss nothing any more.
        """
        if not self._order:
            return None, set()
        question = self._order.popleft()
        key = question.iova, question.access
        if self._open.get(key) is not question:
            return None, set()
        del self._open[key]
        if refused:
            self.refused += 1
            return question, question.waiting | self._relieved()
        return None, self._settle([question])

    def expired(self, now: float) -> list[Question]:
        """Give up the questions whose time is over; they are refused."""
        late = [q for q in self._open.values() if now - q.asked >= self._time_limit]
        for question in late:
            del self._open[question.iova, question.access]
        self.refused += len(late)
        self.timeouts += len(late)
        return late

    def starved(self) -> set[int]:
        """Waiters that could not ask for want of room, if there is room now."""
        return self._relieved()

    def deadline(self) -> float | None:
        """When the next question expires."""
        oldest = next(iter(self._open.values()), None)
        return None if oldest is None else oldest.asked + self._time_limit

    def forget(self, waiter: int) -> None:
        """Somebody does not wait any more."""
        self._starved.discard(waiter)
        for question in self._open.values():
            question.waiting.discard(waiter)

    def _settle(self, questions: Iterable[Question]) -> set[int]:
        waiters: set[int] = set()
        for question in questions:
            waiters |= question.waiting
        for question in self._open.values():
            if not waiters:
                break
            waiters -= question.waiting
        return waiters | self._relieved()

    def _relieved(self) -> set[int]:
        if not self._starved or len(self._open) >= MAX_OUTSTANDING // 2:
            return set()
        waiters, self._starved = self._starved, set()
        return waiters


def pages(missing: Iterable[tuple[IovaRange, int]]) -> Iterator[tuple[int, int]]:
    """The pages that ranges touch, as ``(first address, access)``."""
    for (base, length), access in missing:
        first = base - base % PAGE
        for iova in range(first, base + length, PAGE):
            yield iova, access
