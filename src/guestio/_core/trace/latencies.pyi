from typing_extensions import disjoint_base

@disjoint_base
class Latencies:
    """How long things took, by kind: 0 for what is neither, 1 reads, 2 writes, 3 flushes.

    One thread adds; any may read, and sees what was added up to some moment for each bucket.
    """
    def __init__(self) -> None: ...
    def note(self, kind: int, since: int, now: int) -> None:
        """Count something that took from ``since`` to ``now``, in ns.

        Raises:
            ValueError: There is no such kind.
        """
    def buckets(self, kind: int) -> list[tuple[int, int, int]]:
        """``(first, end, count)`` of each bucket that is not empty, ascending; times in ns.

        Raises:
            ValueError: There is no such kind.
        """
    def sum_ns(self, kind: int) -> int:
        """The sum of all times of a kind, in ns."""
