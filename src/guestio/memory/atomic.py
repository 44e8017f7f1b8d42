"""Guest memory that changes as a whole while others use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, NoReturn, TypeVar

from guestio.memory.access import GuestMemory

M = TypeVar("M", bound=GuestMemory)


class GuestMemoryAtomic(Generic[M]):
    """The current memory map, swapped atomically.

    Readers take a snapshot with :meth:`memory` and never wait; a snapshot stays usable for as long
    as it is held. Writers are serialized. Share the object itself: every holder sees every swap.
    """

    def __init__(self, memory: M) -> None:
        self._memory = _check_memory(memory)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<GuestMemoryAtomic of {self._memory!r}>"

    def memory(self) -> M:
        """The map as it is now. O(1); from any thread."""
        return self._memory

    @contextmanager
    def lock(self) -> Iterator[MapUpdate[M]]:
        """Keep other writers out while a new map is made of the current one.

        Leaving without :meth:`MapUpdate.replace` changes nothing.
        """
        with self._lock:
            update = MapUpdate(self)
            try:
                yield update
            finally:
                update._done = True

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

        Raises:
            RuntimeError: The lock has been left.
            TypeError: ``new`` is no memory.
        """
        if self._done:
            raise RuntimeError("the lock has been left; take it again to replace the map")
        self._slot._memory = _check_memory(new)


def _check_memory(memory: M) -> M:
    if not isinstance(memory, GuestMemory):
        raise TypeError(f"memory must be a GuestMemory, not {type(memory).__name__}")
    return memory
