from typing_extensions import disjoint_base

from guestio._core.memory.vector import IoVector
from guestio.addr import IovaRange

@disjoint_base
class Chain:
    """One request of the driver: what it gave to read and what it gave to write.

    No framing may be assumed: what belongs together may be split anywhere (section 2.6.4).

    Attributes:
        head: Identifies the request in its ring.
        readable: Memory that the device reads.
        writable: Memory that the device writes, in order.
        fault: Why the request cannot be served: part of its memory cannot be reached. Then
            ``readable`` and ``writable`` hold only what could be. None if all is well.
        tail: The last device-writable byte, where many devices put a status; None if there is none
            or it cannot be reached. It lasts as long as ``writable``.
        access_fails: With a fault, the ranges whose mapping forbids the access.
    """
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    @property
    def head(self) -> int: ...
    @property
    def readable(self) -> IoVector: ...
    @property
    def writable(self) -> IoVector: ...
    @property
    def tail(self) -> IoVector | None: ...
    @property
    def fault(self) -> str | None: ...
    @property
    def access_fails(self) -> list[tuple[IovaRange, int]]: ...
    def in_use(self) -> bool:
        """Whether a call is moving its data at this moment, without the GIL."""
    def stamp(self, value: int) -> None:
        """Have ``value`` be the last writable byte once no call moves the data any more.

        For the status of a request that failed: a call that is under way may write it over. Does
        nothing if there is none.

        Raises:
            ValueError: It is no byte.
        """
    def hand_over(self) -> None:
        """Let another thread use the memory: a revocation of its translation waits for that thread.

        Without this, a revocation by the thread that took the request is a mistake: it would wait
        for itself.
        """
    def finish(self, written: int) -> None:
        """Give the memory back, with the number of bytes written to it.

        The request is complete once its ring is told so as well, by ``complete``. Any thread. The
        memory may not be touched any more. A thread that is copying at this moment nevertheless
        finishes with memory that is kept for it; revocations wait for it, and so does
        ``complete``.

        Raises:
            ValueError: It was finished before, or has less room.
        """

@disjoint_base
class Server:
    """Serves the simple requests of a device without leaving the core."""

@disjoint_base
class Quota:
    """Limits the memory of the requests that devices hold, of several rings together.

    Args:
        most: Pieces of memory that they may consist of. A ring takes no more while they do, except
            for one request if its device holds none of it, so that every ring goes on in the end.

    Attributes:
        used: Pieces of those that are held. A request counts as some even if it has none.
        most: As given.
    """
    def __init__(self, most: int) -> None: ...
    @property
    def used(self) -> int: ...
    @property
    def most(self) -> int: ...
