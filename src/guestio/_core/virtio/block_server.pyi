from collections.abc import Callable
from typing import final

from typing_extensions import disjoint_base

from guestio._core.memory.image import ImageFile
from guestio._core.virtio.chain import Chain, Server

@final
class BlockServer(Server):
    """Serves VIRTIO_BLK_T_IN and VIRTIO_BLK_T_OUT; leaves all else to the device.

    Args:
        image: The file, of a multiple of 512 bytes. Unless it ``waits``, a read of what is not in
            the page cache is left to the device.
        writable: Whether writes are served.
        inline_bytes: Bytes of a request that are moved where the ring is walked; larger ones are
            left to the device.
        report: Called with an errno (0: the image ended), the offset where it happened, the bytes
            of the request and whether it was a read, for each request that failed because of the
            file or the memory.

    Attributes:
        errors: Requests that failed because of the file or the memory.
        image: The file.

    Threads: several may serve requests at the same time.
    """
    def __init__(
        self,
        image: ImageFile,
        *,
        writable: bool = True,
        inline_bytes: int = ...,
        report: Callable[[int, int, int, bool], None] | None = None,
    ) -> None: ...
    @property
    def image(self) -> ImageFile: ...
    @property
    def errors(self) -> int: ...
    def retire(self) -> None:
        """Leave all requests of rings to the device from now on."""
    def process(self, chain: Chain, *, wait: bool = True) -> int | None:
        """Serve one request.

        Args:
            chain: The request.
            wait: Whether to wait for the disk if need be.

        Returns:
            The bytes written; None if it is left to the device: it is not a read or write, or it
            would have to wait.
        """
    def transfer(self, chain: Chain) -> Transfer | None:
        """A read or write to be served in slices, whatever it waits for.

        Returns:
            A :class:`Transfer`; None if the request is left to the device.
        """
    def is_large(self, chain: Chain) -> bool:
        """Whether a request moves more bytes than are moved where the ring is walked."""

@disjoint_base
class Transfer:
    """A read or write under way; made by :meth:`BlockServer.transfer`.

    For one thread at a time.
    """
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def step(self, most: int) -> int | None:
        """Move the next bytes, waiting for the disk.

        Args:
            most: Bytes to move at most; greater than 0.

        Returns:
            None as long as there is more to move, then the bytes written for the driver.
        """
    def abandon(self) -> int:
        """Tell the driver that the request failed; the bytes written for it."""
