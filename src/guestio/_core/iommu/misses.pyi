from collections.abc import Collection, Iterable, Iterator

from typing_extensions import disjoint_base

from guestio.addr import IovaRange

@disjoint_base
class Misses:
    """A sequence of ``(IovaRange, access)``: what is not mapped, or not for this access.

    Grows only inside the core. Reading it from several threads is safe.
    """
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[IovaRange, int]: ...
    def __iter__(self) -> Iterator[tuple[IovaRange, int]]: ...

def touched(
    missing: Iterable[tuple[IovaRange, int]], known: Collection[tuple[int, int]]
) -> set[tuple[int, int]]:
    """Those of the ``known`` pages ``(iova, access)`` that ranges touch, as a set.

    Cost: for each range, O(its pages) or O(known pages), whatever is less.
    """
