"""Guest memory that changes as a whole while others use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, NoReturn, TypeVar

from guestio.memory.access import GuestMemory
from guestio.memory.followed import Followed

M = TypeVar("M", bound=GuestMemory)


class GuestMemoryAtomic(Generic[M]):
    """The current memory map, swapped atomically.

    Readers take a snapshot with :meth:`memory` and never wait; a snapshot stays usable for as long
    as it is held. Writers are serialized. Share the object itself: every holder sees every swap.
    """

    def __init__(self, memory: M) -> None:
        self._followed = Followed(_check_memory(memory))
        self._lock = threading.Lock()
        self._writer: int | None = None

    def __repr__(self) -> str:
        return f"<GuestMemoryAtomic of {self._followed.value!r}>"

    def memory(self) -> M:
        """The map as it is now. O(1); from any thread."""
        return self._followed.value

    @property
    def followed(self) -> Followed[M]:
        """For who must be ready before a map is swapped, such as DMA targets. Only follow it."""
        return self._followed

    @contextmanager
    def lock(self) -> Iterator[MapUpdate[M]]:
        """Keep other writers out while a new map is made of the current one.

        Leaving without :meth:`MapUpdate.replace` changes nothing.

        Raises:
            RuntimeError: This thread holds the lock already.
        """
        me = threading.get_ident()
        if self._writer == me:
            raise RuntimeError("this thread holds the lock of the memory map already")
        with self._lock:
            self._writer = me
            update = MapUpdate(self)
            try:
                yield update
            finally:
                update._done = True
                self._writer = None

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "share the GuestMemoryAtomic itself: a copy or pickle would miss later swaps"
        )


class MapUpdate(Generic[M]):
    """The right to replace the map, while its lock is held."""

    def __init__(self, slot: GuestMemoryAtomic[M]) -> None:
        self._slot = slot
        self._done = False

    @property
    def memory(self) -> M:
        """The map as it is now."""
        return self._slot.memory()

    def replace(self, new: M) -> None:
        """Make ``new`` the map that later snapshots show.

        DMA targets that follow the map, such as those of a virtio-iommu, are brought to the new
        map first: when this returns they hold nothing of memory that is gone, which may be closed
        then. Without followers this is O(1).

        Raises:
            RuntimeError: The lock has been left.
            TypeError: ``new`` is no memory.
            Exception: What a follower raised, such as a DmaError of a target that did not map or
                unmap something. The map, and what all targets hold, is as it was.
        """
        if self._done:
            raise RuntimeError("the lock has been left; take it again to replace the map")
        self._slot._followed.replace(_check_memory(new))


def _check_memory(memory: M) -> M:
    if not isinstance(memory, GuestMemory):
        raise TypeError(f"memory must be a GuestMemory, not {type(memory).__name__}")
    return memory
