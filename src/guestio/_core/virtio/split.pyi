from typing_extensions import disjoint_base

from guestio._core.virtio.ring import Ring

def area_bytes(size: int, event_idx: bool) -> tuple[int, int, int]:
    """Bytes of the descriptor table, the available ring and the used ring."""

@disjoint_base
class SplitRing(Ring):
    """A split virtqueue as its device sees it; see :class:`~guestio._core.virtio.ring.Ring`."""
