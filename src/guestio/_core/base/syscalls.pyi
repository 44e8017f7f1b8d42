from collections.abc import Iterable

def notify_eventfd(fd: int) -> None:
    """Add one to an eventfd. Never waits, also if it is at its maximum; anything else is ignored."""

def drain_eventfd(fd: int) -> None:
    """Set an eventfd to 0. Never waits, whatever its owner made of the file description."""

def accept_stream(fd: int) -> int:
    """Take the next connection of a listening socket, which does not wait.

    Unlike :meth:`socket.socket.accept` it loses no descriptor for want of memory.

    Returns:
        A descriptor, which does not wait either.

    Raises:
        OSError: There is none, or it cannot be taken.
    """

def is_memory(fd: int) -> bool:
    """Whether the kernel itself holds a file's contents: memfd, tmpfs, POSIX shm, hugetlbfs.

    Only these know seals, and the query involves no file system. It never waits.
    """

def socket_kind(fd: int) -> tuple[int, int] | None:
    """Family and type of a socket, None if it is none. Takes no lock that a peer may hold."""

def close_aside(fds: Iterable[int], grace: float, most: int) -> int:
    """Close descriptors of any kind in threads of their own; the caller does not wait.

    Args:
        fds: Descriptors; their numbers must not be used from now on.
        grace: Seconds to wait for it, if none is being closed at the moment, so that descriptors
            that close at once are closed when this returns.
        most: Threads at most; further descriptors are queued.

    Returns:
        How many are not closed yet, those of others included.
    """
