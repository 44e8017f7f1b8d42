from typing import Self

from typing_extensions import disjoint_base

@disjoint_base
class Inbox:
    """Messages that have arrived, and their descriptors.

    Args:
        most: Bytes of a message at most, its header included.

    Attributes:
        odd: What came beside bytes that no peer may send: 0 for nothing, 1 for more descriptors
            than this process may open, 2 for other data, 3 for descriptors in the middle of a
            message. The stream is of no more use then.

    For one thread.
    """
    def __new__(cls, most: int) -> Self: ...
    @property
    def odd(self) -> int: ...
    @property
    def unfinished(self) -> bool:
        """Whether something has arrived that was not taken."""
    @property
    def position(self) -> int:
        """Where in the stream the first message that was not taken begins."""
    def read(self, fd: int) -> int:
        """Read once what is there.

        Returns:
            How many bytes; 0 if the peer has closed the connection.

        Raises:
            OSError: There is nothing (BlockingIOError), or it cannot be read.
            ValueError: A message is there already, which is to be taken first.
        """
    def take(self) -> tuple[bytes, bytes, list[int]] | None:
        """Take the first message.

        Returns:
            ``(header, payload, fds)``, or None if its rest has not come. The descriptors are the
            caller's. A header whose size cannot be comes alone, and stays.
        """
    def header(self) -> bytes | None:
        """The header of the first message, whose rest may not have come; None without one."""
    def drop(self) -> list[int]:
        """Forget everything; the descriptors that were not taken, which are the caller's to close."""
