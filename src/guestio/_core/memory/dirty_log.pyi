import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from guestio._core.memory.mapping import HostMapping

@disjoint_base
class DirtyLog:
    """A dirty log, which may be switched on and off and replaced while memory is written.

    It begins without memory, and off. A bitmap made with it (``AtomicBitmap(log=...)``) marks in it.

    The other side of a log, which is told what was written, is an object of this class as well:
    :meth:`take` exchanges the bits for 0.

    Attributes:
        lost: Marks since :meth:`use` or since it was set to 0 that the log had no room for, or that
            were made while it was on without memory.

    Threads: from any.
    """
    def use(self, mapping: HostMapping, offset: int, size: int) -> None:
        """Mark in other memory from now on; once this returns the memory of before is not touched.

        Args:
            mapping: The memory, which cannot be closed until it is replaced or :meth:`clear` is
                called.
            offset: Where in the mapping the log begins, in bytes. It need not be aligned.
            size: Bytes, greater than 0; nothing is marked outside.

        Raises:
            ValueError: The log leaves the mapping, or that is closed or read-only.
        """
    def clear(self) -> None:
        """Be without memory. Logging stays on if it was."""
    @property
    def enabled(self) -> bool:
        """Whether writes are marked."""
    @enabled.setter
    def enabled(self, value: bool) -> None:
        """Whether writes are marked."""
    @property
    def size(self) -> int:
        """Bytes of the log; 0 without memory."""
    @property
    def lost(self) -> int: ...
    @lost.setter
    def lost(self, value: int) -> None: ...
    @property
    def vanished(self) -> bool:
        """Whether the memory was found to be truncated: what was marked there is lost."""
    def mark(self, start: int, length: int) -> None:
        """Mark every page that a range of addresses touches, if logging is on. O(pages / 8)."""
    def take(self) -> npt.NDArray[np.uint64]:
        """The pages that are marked, ascending, which are not marked any more.

        A page that is written meanwhile is told by this call or the next, never by none.

        Returns:
            A ``uint64`` array of page numbers.

        Cost: O(pages / 64 + pages found) at memory speed; the GIL is released.
        """
