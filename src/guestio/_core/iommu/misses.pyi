from collections.abc import Collection, Iterable, Iterator

from typing_extensions import disjoint_base

from guestio.addr import IovaRange

@disjoint_base
class Misses:
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[IovaRange, int]: ...
    def __iter__(self) -> Iterator[tuple[IovaRange, int]]: ...

def touched(
    missing: Iterable[tuple[IovaRange, int]], known: Collection[tuple[int, int]]
) -> set[tuple[int, int]]: ...
