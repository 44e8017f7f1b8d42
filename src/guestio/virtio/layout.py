"""Where a virtqueue is: the one place that computes the sizes of its parts.

Source: virtio 1.4 section 2.7 "Split Virtqueues". The arithmetic is in the compiled core, which
walks the rings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from guestio._core.virtio.split import area_bytes
from guestio.addr import check_int, check_range

MAX_QUEUE_SIZE: Final = 32768
"""Most entries of a split virtqueue (section 2.7)."""

ALIGNMENTS: Final = (16, 2, 4)
"""What the addresses of descriptor table, available ring and used ring are multiples of."""


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where the three parts of a split virtqueue are.

    Attributes:
        size: Entries, a power of two up to `MAX_QUEUE_SIZE`.
        desc: Address of the descriptor table, a multiple of 16.
        avail: Address of the available ring, a multiple of 2.
        used: Address of the used ring, a multiple of 4.

    Raises:
        ValueError: Any of that does not hold, or a part would pass ``2**64``.
    """

    size: int
    desc: int
    avail: int
    used: int

    def __post_init__(self) -> None:
        check_size(self.size)
        for name, alignment, length in (
            ("desc", 16, self.desc_bytes(self.size)),
            ("avail", 2, self.avail_bytes(self.size)),
            ("used", 4, self.used_bytes(self.size)),
        ):
            start, _ = check_range(getattr(self, name), length, name=name)
            if start % alignment:
                raise ValueError(f"{name} {start:#x} is not a multiple of {alignment}")

    @classmethod
    def contiguous(cls, base: int, size: int) -> Self:
        """A ring in one stretch of memory from ``base`` on, each part on 16 bytes."""
        avail = base + cls.desc_bytes(size)
        used = avail + _round_up(cls.avail_bytes(size))
        return cls(size, base, avail, used)

    @classmethod
    def contiguous_bytes(cls, size: int) -> int:
        """Bytes that a ring made by :meth:`contiguous` takes."""
        return cls.desc_bytes(size) + _round_up(cls.avail_bytes(size)) + cls.used_bytes(size)

    @staticmethod
    def desc_bytes(size: int) -> int:
        """Bytes of a descriptor table."""
        return area_bytes(size, True)[0]

    @staticmethod
    def avail_bytes(size: int) -> int:
        """Bytes of an available ring, ``used_event`` included."""
        return area_bytes(size, True)[1]

    @staticmethod
    def used_bytes(size: int) -> int:
        """Bytes of a used ring, ``avail_event`` included."""
        return area_bytes(size, True)[2]


def check_size(size: int) -> None:
    """Refuse a number of entries that no split virtqueue has.

    Raises:
        ValueError: It is not a power of two up to `MAX_QUEUE_SIZE`.
    """
    if not 0 < check_int(size, "size") <= MAX_QUEUE_SIZE or size & (size - 1):
        raise ValueError(
            f"a queue of {size} entries: must be a power of two up to {MAX_QUEUE_SIZE}"
        )


def _round_up(length: int) -> int:
    return -(-length // 16) * 16
