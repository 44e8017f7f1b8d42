from typing_extensions import disjoint_base

from guestio._core.virtio.ring import Ring

def area_bytes(size: int, event_idx: bool) -> tuple[int, int, int]: ...

@disjoint_base
class SplitRing(Ring): ...
