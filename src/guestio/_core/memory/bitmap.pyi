from typing import Self

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from guestio._core.memory.dirty_log import DirtyLog

@disjoint_base
class AtomicBitmap:
    """Dirty pages of a range of addresses that begins at 0.

    Args:
        size: Bytes that the bitmap covers; a last, partial page counts as one.
        page_size: Bytes to a bit; greater than 0, not necessarily a power of two.
        log: A dirty log that everything that is marked is marked in as well, while it is on.
        log_start: Address in the log of the bitmap's first byte.
        own: False to keep no bits here: nothing is ever dirty in this bitmap, only in the log.

    Addresses beyond the range are never dirty, and marking them does nothing. Threads: marking,
    testing and harvesting may be done from any thread at any time. A page that is written before
    or while it is harvested is reported by this harvest or the next, never by none.

    Attributes:
        pages: Number of pages, also ``len()``.
        byte_size: Bytes covered.
        page_size: Bytes to a page.
        log: The dirty log, or None.

    Raises:
        InvalidAddressError: The bitmap would end beyond ``2**64`` in the log.
    """
    def __new__(
        cls,
        size: int,
        page_size: int = 4096,
        *,
        log: DirtyLog | None = None,
        log_start: int = 0,
        own: bool = True,
    ) -> Self: ...
    @property
    def log(self) -> DirtyLog | None: ...
    @property
    def pages(self) -> int: ...
    @property
    def byte_size(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    def set_range(self, start: int, length: int) -> None:
        """Mark every page that ``[start, start + length)`` touches. O(pages / 64)."""
    def reset_range(self, start: int, length: int) -> None:
        """Clear every page that ``[start, start + length)`` touches. O(pages / 64)."""
    def is_set(self, addr: int) -> bool:
        """Whether the page that holds byte ``addr`` is dirty."""
    def set_bit(self, page: int) -> None:
        """Mark page number ``page``; beyond the end nothing happens."""
    def reset_bit(self, page: int) -> None:
        """Clear page number ``page``; beyond the end nothing happens."""
    def is_bit_set(self, page: int) -> bool:
        """Whether page number ``page`` is dirty."""
    def merge(self, start: int, words: npt.NDArray[np.uint64], page_size: int | None = None) -> int:
        """Mark what another bitmap has set, such as one that a kernel has filled.

        Args:
            start: The address that its first bit stands for.
            words: A ``uint64`` array; bit ``i`` of word ``w`` is the page at
                ``start + (64 * w + i) * page_size``. What would be beyond ``2**64`` is nothing.
            page_size: Bytes to one of its bits; by default as here.

        Returns:
            How many bits are set there.

        Cost: O(words + runs of set bits), with the GIL held.
        """
    def slice_at(self, offset: int) -> BitmapSlice:
        """The bitmap seen from byte ``offset`` on, as a :class:`BitmapSlice`."""
    def enlarge(self, extra: int) -> None:
        """Cover ``extra`` more bytes, clean ones. O(pages)."""
    def get_and_reset(self) -> npt.NDArray[np.uint64]:
        """Take all bits and leave the bitmap clean.

        Returns:
            ``uint64`` words; bit ``i`` of word ``w`` is page ``64 * w + i``.

        Cost: O(pages / 64) at memory speed; the GIL is released.
        """
    def peek(self) -> npt.NDArray[np.uint64]:
        """The words as :meth:`get_and_reset` returns them; the bitmap stays as it is."""
    def reset(self) -> None:
        """Clear all bits."""
    def dirty_pages(
        self,
        start: int = 0,
        length: int | None = None,
        *,
        clear: bool = False,
        page_size: int | None = None,
    ) -> npt.NDArray[np.uint64]:
        """The numbers of the dirty pages that a byte range touches.

        Args:
            start: First byte of the range.
            length: Bytes; None for all that follows.
            clear: Take the bits, atomically, instead of only looking at them.
            page_size: Count in pages of this size instead of the bitmap's own, which must be a
                multiple or a fraction of it.

        Returns:
            A ``uint64`` array, ascending.

        Raises:
            ValueError: Neither page size divides the other; nothing was cleared.

        Cost: O(pages / 64 + pages listed) at memory speed; the GIL is released.
        """
    def counts(self, start: int, length: int, parts: int) -> npt.NDArray[np.uint64]:
        """How many dirty pages each of equal parts of a byte range touches.

        Args:
            start: First byte of the range.
            length: Bytes, greater than 0; a multiple of ``parts``. What is beyond the bitmap is
                never dirty.
            parts: How many, 1 or more.

        Returns:
            A ``uint64`` array.

        Cost: O(pages / 64 + parts) at memory speed; the GIL is released.
        """
    def count(self) -> int:
        """How many pages are dirty."""
    def copy(self) -> AtomicBitmap:
        """A snapshot that lives on its own."""
    def __len__(self) -> int: ...

@disjoint_base
class BitmapSlice:
    """A bitmap whose first byte is somewhere inside another one.

    Addresses past the end of the other bitmap are never dirty. Sums past ``2**64`` are refused,
    so that no unrelated page is ever marked.

    Attributes:
        bitmap: The other bitmap.
        offset: Where in it this one begins, in bytes.
    """
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    @property
    def bitmap(self) -> AtomicBitmap: ...
    @property
    def offset(self) -> int: ...
    def set_range(self, start: int, length: int) -> None:
        """Mark every page that ``[start, start + length)`` touches.

        Raises:
            InvalidAddressError: The range passes ``2**64`` in the other bitmap.
        """
    def reset_range(self, start: int, length: int) -> None:
        """Clear every page that ``[start, start + length)`` touches; raises as :meth:`set_range`."""
    def is_set(self, addr: int) -> bool:
        """Whether the page that holds byte ``addr`` is dirty; raises as :meth:`set_range`."""
    def slice_at(self, offset: int) -> BitmapSlice:
        """The bitmap seen from byte ``offset`` of this one on."""
