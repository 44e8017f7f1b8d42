from typing import Protocol, type_check_only

from typing_extensions import disjoint_base

from guestio._core.virtio.split import SplitRing

@type_check_only
class Lies(Protocol):
    def used(self, head: int, written: int) -> tuple[int, int, bool]: ...
    def ahead(self) -> int: ...
    def notified(self, wanted: bool) -> bool: ...

@disjoint_base
class MisbehavingRing(SplitRing):
    lies: Lies | None
