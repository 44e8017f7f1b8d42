from contextlib import AbstractContextManager
from typing import Self

from typing_extensions import Buffer, disjoint_base

from guestio._core.memory.bitmap import AtomicBitmap
from guestio._core.memory.mapping import HostMapping
from guestio._core.memory.slices import VolatileSlice
from guestio.addr import Ordering, Permissions

@disjoint_base
class RegionTable:
    """Where guest physical addresses are in this process; never changes once made.

    Args:
        regions: ``(start, mapping, offset, size, writable, bitmap, owner)`` each, ascending and
            disjoint: ``size`` bytes of ``mapping`` from ``offset`` appear at ``start``. The owner
            is what errors name.
    """
    def __new__(
        cls, regions: list[tuple[int, HostMapping, int, int, bool, AtomicBitmap | None, object]]
    ) -> Self: ...
    @property
    def mappings(self) -> list[HostMapping]: ...
    @property
    def bitmaps(self) -> list[AtomicBitmap | None]: ...
    @property
    def owners(self) -> list[object]: ...

@disjoint_base
class IoVector:
    """The host memory behind a range of addresses, ready to be read, written or handed to a file.

    It is a context manager; until it is closed, a revocation of the translation that it came from
    waits. If memory ended or refused the access somewhere, the vector holds what comes before and
    ``stop`` says why. Offsets are bytes from the start of the range.

    What is written through the buffer of one of its slices is marked dirty when the vector is
    closed, and once more when the buffer is released.

    Threads: calls may overlap. One that is moving data when another closes the vector finishes
    with memory that is kept for it, translation included; then all of it is given back.

    Attributes:
        start: First address of the range.
        total: Bytes held.
        count: Fragments they are in.
        access: What the memory was opened for, as a number of ``Permissions``.
        stop: 0, or why it holds less than requested: 1 no memory, 2 read-only.
        stop_addr: The address that was refused.
        stop_target: The same address behind the translation.
    """
    @property
    def start(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def access(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def stop_addr(self) -> int: ...
    @property
    def stop_target(self) -> int: ...
    @property
    def stop_region(self) -> object | None:
        """The owner of the region that refused the access, or None."""
    @staticmethod
    def of_slices(slices: list[VolatileSlice], access: Permissions) -> IoVector:
        """A vector over slices, in their order. Fragments are addressed by their position."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def hold(self, guard: AbstractContextManager[object]) -> None:
        """Leave this context manager when the vector is closed or goes away.

        Raises:
            TypeError: It is none.
        """
    def close(self) -> None:
        """Give the translation and the memory back; the vector is empty afterwards.

        If another thread is moving data, that happens when it has finished; the vector shows
        itself as empty from now on.
        """
    def __len__(self) -> int: ...
    def fragments(self) -> list[tuple[int, int]]:
        """``(address, length)`` of each fragment, in order."""
    def slices(self) -> list[VolatileSlice]:
        """The fragments as :class:`VolatileSlice`; they do not hold the translation."""
    def read(self, start: int = 0, count: int | None = None) -> bytes:
        """A copy of a window as bytes; None for all that follows ``start``.

        Raises:
            MemoryVanishedError: The file behind the memory is gone.
            InvalidAddressError: The window leaves the vector.
        """
    def readinto(self, buffer: Buffer, start: int = 0) -> None:
        """Fill ``buffer`` from a window of its size."""
    def write(self, data: Buffer, start: int = 0) -> None:
        """Copy all of ``data`` to ``start`` and mark it dirty."""
    def fill(self, value: int, start: int = 0, count: int | None = None) -> None:
        """Set every byte of a window to ``value`` and mark it dirty."""
    def load(self, width: int, ordering: Ordering = ...) -> int:
        """One atomic load; the vector must be one aligned fragment of ``width`` bytes."""
    def store(self, value: int, width: int, ordering: Ordering = ...) -> None:
        """One atomic store; the vector must be one aligned fragment of ``width`` bytes."""
    def compare_exchange(self, expected: int, new: int, width: int) -> tuple[bool, int]:
        """Atomically put ``new`` where ``expected`` is, sequentially consistent.

        Returns:
            ``(done, seen)``: whether it was put there, and the value found.
        """
    def from_file(
        self,
        fd: int,
        file_offset: int | None = None,
        start: int = 0,
        count: int | None = None,
        *,
        once: bool = False,
    ) -> int:
        """Read from a file straight into a window (preadv, or readv where the offset is None).

        Args:
            fd: File descriptor.
            file_offset: Where in the file, or None for its own position (pipes, sockets).
            start: First byte of the window.
            count: Bytes at most; None for all that follows.
            once: Return after one successful call, as a stream wants it.

        Returns:
            The bytes read; fewer than ``count`` at the end of the file. They are marked dirty.

        Raises:
            MemoryVanishedError: The file behind the memory itself was truncated. It is an OSError
                (EFAULT) too.
            OSError: The call failed. Without an offset only if nothing was read before.
        """
    def to_file(
        self,
        fd: int,
        file_offset: int | None = None,
        start: int = 0,
        count: int | None = None,
        *,
        once: bool = False,
    ) -> int:
        """Write a window straight to a file (pwritev, or writev where the offset is None).

        Args, returns and raises as :meth:`from_file`.
        """

@disjoint_base
class Held:
    """Exits another context manager exactly once."""
    def close(self) -> None: ...
