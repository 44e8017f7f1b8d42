from typing import Self

from typing_extensions import disjoint_base

@disjoint_base
class IotlbFront:
    """Translations of a window of I/O virtual addresses, and the talk about them.

    Not safe for several threads at once. While it is in use no other code may use the back-end's
    channel, nor the front-end's socket unless :attr:`quiet`.

    Args:
        base: First address of the window, a multiple of 4096.
        pages: Pages of 4096 bytes in it.
        front: The front-end's socket.
        back: Our end of the back-end's channel.
        whole: Whether an answer covers as much around the address as is mapped alike and lies in
            a row in this process, rather than one page.
        room: Invalidations that may be under way at a time.
        each: Whether a message is sent only when the one before it was acknowledged, as QEMU does;
            otherwise they are sent in bulk.

    Raises:
        ValueError: The window is empty, unaligned, or passes ``2**64``.
    """
    @property
    def base(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def updates(self) -> int: ...
    @property
    def invalidations(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def access_fails(self) -> int: ...
    def __new__(
        cls,
        base: int,
        pages: int,
        front: int,
        back: int,
        *,
        whole: bool = False,
        room: int = 1024,
        each: bool = False,
    ) -> Self: ...
    def map(self, page: int, host_address: int, perm: int) -> None:
        """Let the device reach a page of this process; it is told on a miss.

        Args:
            page: Number of the page in the window.
            host_address: Where the page is in this process, a multiple of 4096.
            perm: What the device may do there.

        Raises:
            ValueError: The page is outside of the window, or the address is not a page's.
        """
    def unmap(self, page: int, count: int, tag: int = 0) -> None:
        """Take translations away, and have the back-end forget them.

        Args:
            page: Number of the first page.
            count: Pages.
            tag: What :meth:`exchange` returns once the back-end has acknowledged; 32 bits.

        Raises:
            ValueError: The pages are not all in the window, or there is no room.
        """
    def push(self, page: int) -> None:
        """Send a translation before a miss, as QEMU does for used rings.

        Raises:
            ValueError: It is not mapped, or there is no room.
        """
    def exchange(self) -> list[int]:
        """Send and take what can be, without waiting.

        Returns:
            The tags of invalidations that were acknowledged.
        """
    @property
    def quiet(self) -> bool:
        """Whether everything was sent and acknowledged."""
    @property
    def failure(self) -> tuple[int, int] | None:
        """``(kind, detail)`` of what broke the connection, or None while it lives.

        Kinds: 1 gone, 2 protocol (a request's code), 3 INVALIDATE refused, 4 errno.
        """
    def reset_counts(self) -> None:
        """Begin to count anew."""
