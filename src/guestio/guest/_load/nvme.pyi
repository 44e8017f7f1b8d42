from typing import Self

from typing_extensions import disjoint_base

@disjoint_base
class NvmeDriver:
    """Keeps a queue pair of an NVMe controller full of commands of one page each.

    Not safe for several threads at once. The memory that it is given, and the descriptors, must
    stay until it is gone.

    Args:
        submission: Where the submission queue is in this process.
        completion: Where the completion queue is, all zeroes.
        entries: Entries of each.
        depth: Commands to keep in flight, fewer than there are entries.
        data: I/O virtual address of ``depth`` pages for the data.
        blocks: Pages of the namespace to use.
        sectors: Logical blocks to a page.
        front: The socket to the server, to which doorbells are sent.
        tail: The message that rings the submission queue's doorbell; its last four bytes are the
            tail.
        head: The same of the completion queue's, with the head.
        call: Eventfd that the controller interrupts by, which does not block.
        writes: Whether to write rather than to read.
        timeout: Nanoseconds without any progress after which the controller counts as stalled.
        seed: Of the choice of blocks.

    Attributes:
        requests: Commands finished since :meth:`reset_counts`.
        doorbells: Doorbells rung.
        interrupts: Interrupts taken.
        latency_sum: Nanoseconds that the commands took together.
        latency_max: That the slowest took.

    Raises:
        ValueError: A number is out of range, or a message too long or too short.
    """
    @property
    def requests(self) -> int: ...
    @property
    def doorbells(self) -> int: ...
    @property
    def interrupts(self) -> int: ...
    @property
    def latency_sum(self) -> int: ...
    @property
    def latency_max(self) -> int: ...
    def __new__(
        cls,
        submission: int,
        completion: int,
        entries: int,
        depth: int,
        data: int,
        blocks: int,
        sectors: int,
        front: int,
        tail: bytes,
        head: bytes,
        call: int,
        *,
        writes: bool = False,
        timeout: int = ...,
        seed: int = 0,
    ) -> Self: ...
    def reset_counts(self) -> None:
        """Begin to count and to measure anew."""
    @property
    def in_flight(self) -> int:
        """Commands begun and not finished."""
    @property
    def trouble(self) -> tuple[str, tuple[int, int]] | None:
        """What was wrong: a name and two numbers that say more; None if nothing was.

        ``command`` (identifier, head), ``status`` (identifier, status), ``stalled`` (commands in
        flight, nanoseconds), ``gone``.
        """
    def run(self, nanoseconds: int, *, begin: bool = True) -> bool:
        """Work for so long, or without ``begin`` until nothing is in flight.

        Returns:
            True unless something was wrong; see :attr:`trouble`.
        """
