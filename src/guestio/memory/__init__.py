"""Guest memory: where it comes from, where it is, and how to access it.

``backing`` owns files and mappings, ``region`` places them at guest addresses, ``access`` is what
every memory can do, with ``objects`` and ``streams`` on the other side of it, ``atomic`` swaps
whole maps. Copying itself is done by the compiled core.
"""

from guestio._core.memory.bitmap import AtomicBitmap, BitmapSlice
from guestio._core.memory.dirty_log import DirtyLog
from guestio._core.memory.slices import VolatileSlice
from guestio._core.memory.vector import IoVector
from guestio.memory.access import GuestMemory, SliceMemory
from guestio.memory.atomic import GuestMemoryAtomic
from guestio.memory.backing import Backing
from guestio.memory.region import FileOffset, GuestRegionCollection, MmapRegion

__all__ = [
    "AtomicBitmap",
    "Backing",
    "BitmapSlice",
    "DirtyLog",
    "FileOffset",
    "GuestMemory",
    "GuestMemoryAtomic",
    "GuestRegionCollection",
    "IoVector",
    "MmapRegion",
    "SliceMemory",
    "VolatileSlice",
]
