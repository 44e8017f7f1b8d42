from typing import Self

from typing_extensions import Buffer, disjoint_base

@disjoint_base
class HostMapping(Buffer):
    def __new__(
        cls,
        fd: int = -1,
        offset: int = 0,
        size: int = 0,
        *,
        writable: bool = True,
        guard: bool = False,
        over: Buffer | None = None,
    ) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def writable(self) -> bool: ...
    @property
    def page_size(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def address(self) -> int: ...
    @property
    def vanished(self) -> int | None: ...
    def cut_off(self, offset: int, size: int) -> None: ...
    def close(self) -> None: ...
