from typing_extensions import disjoint_base

from guestio._core.ring import Chain, Server

@disjoint_base
class BlockServer(Server):
    def __init__(self, fd: int, size: int, *, writable: bool = True) -> None: ...
    @property
    def errors(self) -> int: ...
    def process(self, chain: Chain) -> int | None: ...
