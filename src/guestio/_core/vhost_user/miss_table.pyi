from collections.abc import Collection, Iterable

from typing_extensions import disjoint_base

from guestio._core.trace.latencies import Latencies
from guestio.addr import IovaRange

PAGE: int
MAX_OUTSTANDING: int
REPEAT_AFTER: float

@disjoint_base
class PendingMiss:
    """A page whose translation was refused, or not given in time.

    Attributes:
        iova: Its address.
        access: What was to be done with it.
        waiting: The waiters that need it, as numbers.
    """
    @property
    def iova(self) -> int: ...
    @property
    def access(self) -> int: ...
    @property
    def waiting(self) -> list[int]: ...

@disjoint_base
class MissTable:
    """Misses in flight, at most one for a page and access, and their waiters.

    What is needed for reading and for writing at the same time is requested once, for both. A
    waiter is a number below 256, such as that of a queue.

    Every method may be called from any thread. Messages of several threads must be sent in the
    order in which the messages were made, because acknowledgements come in that order.

    Args:
        time_limit: Seconds after which an unanswered miss counts as refused.

    Attributes:
        requested: Messages sent so far; a miss may take two.
        refused: Misses refused or not answered in time so far.
        timeouts: Those of them that were not answered in time.
        latencies: How long answers took, while that is measured.
        origin: The server's number, for records of tracepoints.
    """
    def __init__(self, time_limit: float) -> None: ...
    def __len__(self) -> int: ...
    @property
    def requested(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def timeouts(self) -> int: ...
    @property
    def latencies(self) -> Latencies: ...
    origin: int
    def request(
        self,
        waiter: int,
        missing: Iterable[tuple[IovaRange, int]],
        now: float,
        *,
        acknowledged: bool,
        skip: Collection[tuple[int, int]] = (),
    ) -> bytes:
        """Note that ``waiter`` needs ranges.

        Args:
            waiter: The number of the waiter.
            missing: ``(IovaRange, access)`` each.
            now: The time.
            acknowledged: Whether the front-end acknowledges misses, in order, on request.
            skip: Pages ``(iova, access)`` that are not to be requested.

        Returns:
            The messages to send, for what is not requested yet, as bytes. If too much is in flight
            already the rest is left out; the waiter is woken to request it again when there is room.

        Raises:
            ValueError: ``waiter`` is not below 256.

        Cost: O(1) a page.
        """
    def answered(self, iova: int, size: int, perm: int) -> list[int]:
        """A translation of a range arrived.

        Args:
            iova, size: The range.
            perm: What it allows. A waiter that needs more goes on waiting.

        Returns:
            The waiters that miss nothing any more.

        Cost: O(1) for a page; O(misses) for more.
        """
    def receive(self, fd: int) -> tuple[bool, list[PendingMiss], list[int]]:
        """Take the front-end's acknowledgements from a socket, oldest miss first.

        An acknowledgement should not be taken before the UPDATE messages that arrived earlier were
        applied, or else what they answer may count as refused.

        Args:
            fd: The back-end channel's socket; no message on it may be taken in part, and one thread
                at a time may receive.

        Returns:
            ``(all, refused, ready)``: whether there was something and all of it was whole
            acknowledgements, the misses that were refused, and the waiters that miss nothing
            any more. What follows stays in the socket.

        Cost: O(1) an acknowledgement.
        """
    def acknowledge(self, value: int) -> tuple[list[PendingMiss], list[int]]:
        """Take one acknowledgement; returns ``(refused, ready)`` as :meth:`receive` does."""
    def repeat(self, now: float) -> tuple[bytes, list[int]]:
        """Send again, to be acknowledged, what should have been answered by now.

        Only of front-ends that acknowledge. A miss waits for `REPEAT_AFTER`, and while others
        are answered until one is that was sent after it.

        Args:
            now: The time.

        Returns:
            ``(messages, ready)``: what to send, as bytes, and the waiters that could not send for
            want of room and may try again.

        Cost: O(misses).
        """
    def expired(self, now: float) -> list[PendingMiss]:
        """Give up the misses whose time is over; they are refused.

        Returns:
            Those misses, oldest first.

        Cost: O(misses).
        """
    def starved(self, now: float) -> list[int]:
        """Waiters that could not send for want of room, if there is room now."""
    def deadline(self) -> float | None:
        """When to call :meth:`expired`, :meth:`repeat` and :meth:`starved`; None if never.

        Cost: O(misses).
        """
    def kept_waiting(self, now: float) -> list[int]:
        """The waiters of answers that are overdue.

        Cost: O(misses).
        """
    def awaited(self, waiter: int) -> int:
        """How many misses of a waiter are not answered."""
    def is_open(self, iova: int, access: int) -> bool:
        """Whether an answer about the page of an address and an access is still to come."""
    def reset(self) -> list[int]:
        """Forget all misses, because no answer to them can be told from others any more.

        Returns:
            Every waiter, each of which must request again.
        """
    def forget(self, waiter: int) -> list[int]:
        """End the waiting of one waiter; what only that one waited for is requested anew next time.

        An answer that comes later may say what was true when the miss was sent.

        Returns:
            Others that could not send for want of room and may try again.
        """
