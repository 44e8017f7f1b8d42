from collections.abc import Callable
from typing import final

@final
class ImageFile:
    """A file that disks are served from, which stays open as long as a call uses it.

    Args:
        fd: The file; it stays the caller's, who must not close it before :meth:`close` says so.
        size: Its bytes.
        waits: Whether reads may wait for the disk where they are begun.

    Attributes:
        size: As given; requests that are understood later are held against what it is set to.
        waits: As given; True also once the file system turned out not to know RWF_NOWAIT, as
            tmpfs, which has nothing to wait for.

    Threads: several may use it at the same time.
    """
    def __init__(self, fd: int, size: int, *, waits: bool = True) -> None: ...
    @property
    def size(self) -> int: ...
    @size.setter
    def size(self, value: int) -> None: ...
    @property
    def waits(self) -> bool: ...
    def close(self, released: Callable[[], object] | None = None) -> None:
        """Forget the file; requests that begin now fail.

        Args:
            released: Called once no call uses the file: only then may it be closed, as its number
                may soon be another file's. Now, or by the thread whose call is the last.
        """
    def hold(self) -> int:
        """Keep the file from being closed until :meth:`let_go`; its descriptor, -1 if closed."""
    def let_go(self) -> int:
        """Undo one :meth:`hold`."""
