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
    """A :class:`~guestio._core.virtio.split.SplitRing` that asks before it tells its driver.

    Attributes:
        lies: Asked with the GIL held, in whatever thread publishes. It has three methods:
            ``used(head, written)`` returns the two for the used entry, and whether to write that
            twice; ``ahead()`` returns how many entries too many the index is to announce;
            ``notified(wanted)`` whether the driver is to be notified. What they raise breaks the
            ring. None for an honest ring.
    """

    lies: Lies | None
