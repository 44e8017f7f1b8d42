"""The region that tracks requests in flight: shared memory that outlives the back-end.

The front-end requests it (GET_INFLIGHT_FD), keeps it, and hands it to the back-end it connects to
next (SET_INFLIGHT_FD). That one finds out from it what its predecessor had taken and not given
back, also when requests were given back out of order.

Source: QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking"; sizes and alignment of the parts
as in subprojects/libvhost-user/libvhost-user.c (`vu_inflight_queue_size`).
"""

from __future__ import annotations

import contextlib
from typing import Final, Self

from guestio._core.virtio.inflight import InflightQueue, part_size
from guestio.addr import ADDRESS_SPACE
from guestio.errors import ProtocolError
from guestio.memory import Backing
from guestio.peer.foreign import check_memory
from guestio.vhost_user.messages import Inflight

_ALIGNMENT: Final = 64


class InflightRegion:
    """The memory of a whole region; owns its fd and mapping.

    Make one with :meth:`create` or :meth:`from_fd`. Calls from one thread at a time; each queue
    may be used by another thread.

    Attributes:
        description: As the front-end is told it, or told it.
    """

    def __init__(self, description: Inflight, backing: Backing) -> None:
        self.description: Final = description
        self._backing: Backing | None = backing

    @classmethod
    def create(cls, num_queues: int, queue_size: int) -> Self:
        """Make an empty region in a file of its own that cannot be resized.

        Args:
            num_queues: 1 to 65535.
            queue_size: Entries of each, 1 to 32768.

        Raises:
            ProtocolError: A number is out of range.
            BackingError: The host cannot provide the memory.
        """
        size = _size(num_queues, queue_size)
        backing = Backing.memfd(size, "guestio-inflight", seal=True)
        return cls(Inflight(size, 0, num_queues, queue_size), backing)

    @classmethod
    def from_fd(cls, description: Inflight, fd: int) -> Self:
        """Use a region that the front-end kept, or made.

        Args:
            description: Where it is in the file and what it is for.
            fd: The file, open for reading and writing. It is duplicated and stays the caller's.

        Raises:
            ProtocolError: The description contradicts itself or is misaligned.
            BackingError: The file is too short, or cannot be mapped for writing.
        """
        size, offset = description.mmap_size, description.mmap_offset
        needed = _size(description.num_queues, description.queue_size)
        if size < needed:
            raise ProtocolError(
                f"a region of {size:#x} bytes cannot track requests of {description.num_queues} "
                f"queues of {description.queue_size} entries: that takes {needed:#x} bytes"
            )
        if offset % _ALIGNMENT:
            raise ProtocolError(
                f"the region for requests in flight at offset {offset:#x} is not aligned to "
                f"{_ALIGNMENT} bytes"
            )
        if offset + size >= ADDRESS_SPACE // 2:
            raise ProtocolError(
                f"the region for requests in flight at offset {offset:#x}+{size:#x} is beyond the "
                "end of any file"
            )
        check_memory(fd)
        return cls(description, Backing.from_fd(fd, needed, offset))

    @property
    def fd(self) -> int:
        """The file to send with the description; it stays this object's.

        Raises:
            ValueError: The region is closed.
        """
        fd = self._open().fd
        assert fd is not None  # there is no region without a file
        return fd

    def queue(self, index: int) -> InflightQueue:
        """The part of one ring. Only one user of it at a time makes sense.

        It stays usable when the region is closed, until it is dropped.

        Raises:
            ProtocolError: The region has no part for such a ring.
            ValueError: The region is closed.
        """
        backing, about = self._open(), self.description
        if not 0 <= index < about.num_queues:
            raise ProtocolError(
                f"requests of ring {index} are not tracked: the region for requests in flight is "
                f"for {about.num_queues} rings"
            )
        start = backing.host_address - backing._mapping.address
        return InflightQueue(
            backing._mapping, start + index * part_size(about.queue_size), about.queue_size
        )

    def close(self) -> None:
        """Let go of the file, and of the memory once no queue uses it. May be called again."""
        backing, self._backing = self._backing, None
        if backing is not None:
            with contextlib.suppress(BufferError):
                backing.close()

    def _open(self) -> Backing:
        if self._backing is None:
            raise ValueError("the region for requests in flight is closed")
        return self._backing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._backing is None else "open"
        return f"<InflightRegion {self.description}, {state}>"


def _size(num_queues: int, queue_size: int) -> int:
    if not 1 <= num_queues <= 0xFFFF:
        raise ProtocolError(f"a region for requests in flight of {num_queues} queues, not 1..65535")
    try:
        return num_queues * part_size(queue_size)
    except ValueError as error:
        raise ProtocolError(f"a region for requests in flight with {error}") from None
