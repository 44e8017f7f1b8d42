from typing import Self

from typing_extensions import disjoint_base

@disjoint_base
class NvmeDriver:
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
    def reset_counts(self) -> None: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def trouble(self) -> tuple[str, tuple[int, int]] | None: ...
    def run(self, nanoseconds: int, *, begin: bool = True) -> bool: ...
