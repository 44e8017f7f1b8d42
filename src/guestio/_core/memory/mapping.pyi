from typing import Self

from typing_extensions import Buffer, disjoint_base

@disjoint_base
class HostMapping(Buffer):
    """A range of this process's memory, mapped from a file or anonymous.

    Args:
        fd: What to map, or -1 for anonymous memory. It is not kept.
        offset: Where in the file, in bytes; a multiple of the page size.
        size: Bytes to map; greater than 0.
        writable: Whether the memory may be written.
        guard: Keep an inaccessible page on either side.
        over: A contiguous buffer of this process to use instead; nothing is mapped then.

    Raises:
        BackingError: The memory cannot be mapped.

    The memory is unmapped when the object is closed or goes away; a buffer taken from it keeps it
    alive. Closing is refused while one exists.
    """
    def __new__(
        cls,
        fd: int = -1,
        offset: int = 0,
        size: int = 0,
        *,
        writable: bool = True,
        guard: bool = False,
        over: Buffer | None = None,
    ) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def writable(self) -> bool: ...
    @property
    def page_size(self) -> int: ...
    @property
    def closed(self) -> bool:
        """Whether the memory has been unmapped."""
    @property
    def address(self) -> int:
        """Where the memory is in this process.

        Raises:
            ValueError: It is closed.
        """
    @property
    def vanished(self) -> int | None:
        """Offset from which on the file was found to be truncated, or None."""
    def cut_off(self, offset: int, size: int) -> None:
        """Put private, zeroed pages in place of a range.

        Whatever still has its address reaches the file no more: it reads zeroes, and what it
        writes goes nowhere. A system call that has the pages already is not affected.

        Args:
            offset: Where the range begins, in bytes from the start of the mapping.
            size: Its bytes. Every page that it touches is replaced.

        Raises:
            ValueError: The range is not in a mapped file, or this is closed.
            BackingError: The kernel refuses.
        """
    def close(self) -> None:
        """Unmap now. Calling it again does nothing.

        Raises:
            BufferError: The memory is in use; the message says by what.
        """
