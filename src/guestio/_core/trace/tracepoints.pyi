from collections.abc import Container
from typing import Self

from typing_extensions import Buffer, disjoint_base

VERSION: int
RECORD_BYTES: int
MOST_RINGS: int
NORMAL_CAPACITY: int
NO_QUEUE: int
NO_HEAD: int
GROUPS: dict[str, int]
CORE_WHAT: dict[str, int]

def wanted() -> int: ...
def want(groups: int) -> None: ...
def set_capacity(records: int) -> None: ...
def enlarge(records: int) -> None: ...
def unheld() -> int: ...
def told() -> int: ...
def put(
    what: int,
    *,
    origin: int = 0,
    queue: int = 0xFFFF,
    head: int = 0xFFFFFFFF,
    address: int = 0,
    length: int = 0,
    detail: int = 0,
    access: int = 0,
    result: int = 0,
    since: int = 0,
    time: int = 0,
) -> None: ...
def put_whole(
    *,
    time: int,
    since: int,
    taken: int,
    served: int,
    address: int,
    offset: int,
    readable: int,
    writable: int,
    written: int,
    position: int,
    head: int,
    origin: int,
    queue: int,
    access: int,
) -> None: ...
def spell_out(found: Buffer) -> bytes: ...
def release() -> None: ...
def rings() -> list[tuple[int, int]]: ...
def open_rings(known: Container[int] = ()) -> list[RingReader]: ...

@disjoint_base
class RingReader:
    def __new__(cls, fd: int) -> Self: ...
    @property
    def number(self) -> int: ...
    @property
    def process(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def lost(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def written(self) -> int: ...
    def skip(self) -> None: ...
    def read(self, most: int = ...) -> bytes: ...
