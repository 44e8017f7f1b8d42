from typing import final

from typing_extensions import Buffer, disjoint_base

from guestio._core.memory.bitmap import AtomicBitmap
from guestio.addr import Ordering

@final
class Loan:
    """How many buffers that may be written are out, of the slices of one piece of memory."""

@disjoint_base
class VolatileSlice(Buffer):
    """A contiguous piece of guest memory in this process.

    It offers the buffer protocol. What is written through the methods is marked dirty at once;
    what is written through a buffer (memoryview, numpy array) is when the buffer is released: then
    all of the slice counts as written. If the slice is part of a request or of a vector, it also
    does when that is completed or closed, so that the mark is there before the request is
    published as complete. What is written later, through a buffer that is kept, the writer marks. Offsets are
    bytes from the start of the slice. A slice keeps its memory alive. Slices come from regions and
    memories, not from a constructor.

    Accesses follow the rules of :class:`~guestio.GuestMemory`: 0 bytes always succeed, an access
    that begins outside raises :class:`~guestio.InvalidAddressError`, an exact one that ends
    outside moves what it can and raises :class:`~guestio.PartialAccessError`. If the file behind
    the memory was truncated they raise :class:`~guestio.MemoryVanishedError`.

    Attributes:
        bitmap: The bitmap that writes are marked in, or None.
        second: Another bitmap that writes are marked in, or None.
    """
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    @staticmethod
    def over(buffer: Buffer) -> VolatileSlice:
        """A slice over any contiguous buffer of this process, without dirty tracking."""
    @property
    def bitmap(self) -> AtomicBitmap | None: ...
    @property
    def second(self) -> AtomicBitmap | None: ...
    @property
    def host_address(self) -> int:
        """Where the slice is in this process."""
    @property
    def readonly(self) -> bool:
        """Whether writing is refused."""
    def __len__(self) -> int: ...
    def subslice(self, offset: int, length: int) -> VolatileSlice:
        """The piece ``[offset, offset + length)``, which may be empty.

        Raises:
            InvalidAddressError: It leaves the slice.
        """
    def offset(self, count: int) -> VolatileSlice:
        """What remains after the first ``count`` bytes; raises as :meth:`subslice`."""
    def split_at(self, middle: int) -> tuple[VolatileSlice, VolatileSlice]:
        """The first ``middle`` bytes and the rest, as two slices; raises as :meth:`subslice`."""
    def with_bitmap(self, bitmap: AtomicBitmap | None, offset: int = 0) -> VolatileSlice:
        """The same memory, marked in another bitmap, the slice's first byte being ``offset``.

        Raises:
            InvalidAddressError: ``offset`` and the slice's length sum to more than ``2**64``.
        """
    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """A copy of exactly ``length`` bytes at ``offset``; None for all that follows."""
    def read_some(self, offset: int, buffer: Buffer) -> int:
        """Fill ``buffer`` from ``offset`` on as far as the slice goes; the number of bytes."""
    def readinto(self, offset: int, buffer: Buffer) -> None:
        """Fill ``buffer`` from ``offset`` on, exactly."""
    def write(self, offset: int, data: Buffer) -> None:
        """Copy all of ``data`` to ``offset``."""
    def write_some(self, offset: int, data: Buffer) -> int:
        """Copy as much of ``data`` to ``offset`` as there is room for; the number of bytes."""
    def fill(self, offset: int, length: int, value: int) -> None:
        """Set exactly ``length`` bytes to ``value``."""
    def copy_to(self, other: VolatileSlice | Buffer) -> int:
        """Copy as much as both have, from the start of this to the start of the other.

        Args:
            other: Another slice, which may overlap, or a writable buffer of elements; then whole
                elements are copied.

        Returns:
            Bytes copied to a slice, elements copied to a buffer.
        """
    def copy_from(self, source: Buffer) -> int:
        """Copy as many whole elements of a buffer as fit to the start of the slice.

        Returns:
            The number of elements.
        """
    def load(self, offset: int, width: int, ordering: Ordering = ...) -> int:
        """One atomic load of an unsigned, native-endian integer.

        Raises:
            MisalignedError: The memory is not aligned to ``width``.
            InvalidAddressError: It leaves the slice.
        """
    def store(self, offset: int, value: int, width: int, ordering: Ordering = ...) -> None:
        """One atomic store of an unsigned, native-endian integer; raises as :meth:`load`."""
    def compare_exchange(
        self, offset: int, expected: int, new: int, width: int
    ) -> tuple[bool, int]:
        """Atomically put ``new`` where ``expected`` is; ``(whether it was, what was seen)``."""
