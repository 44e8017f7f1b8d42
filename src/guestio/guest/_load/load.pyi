from collections.abc import Sequence
from typing import Self

from typing_extensions import disjoint_base

from guestio.guest._load.iotlb_front import IotlbFront

@disjoint_base
class LoadDriver:
    @property
    def reads(self) -> int: ...
    @property
    def writes(self) -> int: ...
    @property
    def latency_sum(self) -> int: ...
    @property
    def latency_max(self) -> int: ...
    @property
    def interrupts(self) -> int: ...
    def __new__(
        cls,
        block: int,
        blocks: int,
        front: int,
        back: int = -1,
        *,
        iotlb: IotlbFront | None = None,
        strict: bool = False,
        stride: int = 0,
        separate: bool = False,
        indirect: bool = True,
        polling: bool = False,
        batches: bool = False,
        verify: bool = False,
        timeout: int = ...,
        seed: int = 0,
    ) -> Self: ...
    def add_queue(
        self,
        size: int,
        depth: int,
        desc: Sequence[int],
        avail: Sequence[int],
        used: Sequence[int],
        kick: int,
        call: int,
        error: int,
        *,
        event_idx: bool = True,
        message: bytes = b"",
    ) -> int: ...
    def add_slot(
        self,
        number: int,
        first: tuple[Sequence[int], Sequence[int], int],
        second: tuple[Sequence[int], Sequence[int], int],
        table: tuple[Sequence[int], Sequence[int], int],
    ) -> None: ...
    def add_stride(self, number: int, page: int) -> None: ...
    def begin(
        self, *, read_percent: int, random: bool, limit: int | None = None, first: int = 0
    ) -> None: ...
    def run(self, nanoseconds: int) -> int: ...
    @property
    def trouble(self) -> tuple[str, int, tuple[int, int, int, int]] | None: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def most_descriptors(self) -> int: ...
    @property
    def kicks(self) -> int: ...
    def reset_counts(self) -> None: ...
    def histogram(self) -> list[tuple[int, int]]: ...
