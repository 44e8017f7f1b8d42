"""A simulated guest's memory, of which each byte is known to be the device's to write or not."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np

from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.testing.simulation.workload import UNTOUCHED, InvariantError
from guestio.vhost_user.messages import MemoryRegion

PAGE: Final = 4096
GONE: Final = 0xDB
"""What a page is filled with that the device may not reach any more."""

USER: Final = 0x7F00_0000_0000
"""The front-end's own address of the memory's first byte, which the wire has."""

_LOW, _HIGH, _EXTRA = 24, 12, 6
_SIZE: Final = (_LOW + _HIGH + _EXTRA) * PAGE


class Place(NamedTuple):
    """A region of guest memory.

    Attributes:
        guest: Its guest physical address.
        first: Its first page in the file.
        pages: How many it has.
    """

    guest: int
    first: int
    pages: int

    @property
    def message(self) -> MemoryRegion:
        """As the front-end describes it."""
        at = self.first * PAGE
        return MemoryRegion(self.guest, self.pages * PAGE, USER + at, at)


LOW: Final = Place(0, 0, _LOW)
HIGH: Final = Place(1 << 32, _LOW, _HIGH)
EXTRA: Final = Place(1 << 40, _LOW + _HIGH, _EXTRA)
"""May be plugged and unplugged while the device works."""


class Memory:
    """Memory of a guest, in pages of a file that the back-end maps.

    Attributes:
        fd: The file.
        guest: For a driver's rings.
        bytes: All of it, by its place in the file.
        granted: Which bytes the device may write now.
        extra: Whether the extra region is plugged.
    """

    def __init__(self) -> None:
        with Backing.memfd(_SIZE, "guestio-simulation") as whole:
            assert whole.fd is not None
            self.fd = os.dup(whole.fd)
        self._backings = [
            Backing.from_fd(self.fd, place.pages * PAGE, place.first * PAGE)
            for place in (LOW, HIGH, EXTRA)
        ]
        self.guest = GuestRegionCollection.from_regions(
            [
                MmapRegion(place.guest, backing)
                for place, backing in zip((LOW, HIGH, EXTRA), self._backings, strict=True)
            ]
        )
        self._map = mmap.mmap(self.fd, _SIZE)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self.bytes[:] = GONE
        self.granted = np.zeros(_SIZE, np.bool_)
        self._before = self.bytes.copy()
        self.extra = False
        self._free = list(range(_LOW + _HIGH))
        self._free_extra = list(range(EXTRA.first, EXTRA.first + EXTRA.pages))

    @property
    def places(self) -> list[Place]:
        """The regions that there are now."""
        return [LOW, HIGH, EXTRA] if self.extra else [LOW, HIGH]

    @staticmethod
    def guest_address(page: int) -> int:
        """Guest physical address of a page of the file."""
        place = LOW if page < HIGH.first else HIGH if page < EXTRA.first else EXTRA
        return place.guest + (page - place.first) * PAGE

    @staticmethod
    def page_of(guest: int) -> int | None:
        """The page of the file at a guest physical address."""
        for place in (LOW, HIGH, EXTRA):
            if place.guest <= guest < place.guest + place.pages * PAGE:
                return place.first + (guest - place.guest) // PAGE
        return None

    def take(self, rng: random.Random, count: int) -> list[int] | None:
        """Pages from anywhere, or None if there are too few."""
        free = self._free + (self._free_extra if self.extra else [])
        if len(free) < count:
            return None
        taken = rng.sample(free, count)
        for page in taken:
            (self._free if page < EXTRA.first else self._free_extra).remove(page)
        return taken

    def give(self, pages: Iterable[int]) -> None:
        """Have pages back; the device cannot use them any more."""
        for page in pages:
            self.bytes[page * PAGE : (page + 1) * PAGE] = GONE
            self.granted[page * PAGE : (page + 1) * PAGE] = False
            (self._free if page < EXTRA.first else self._free_extra).append(page)

    @property
    def extra_is_free(self) -> bool:
        """Whether nothing is in the extra region."""
        return len(self._free_extra) == EXTRA.pages

    def begin_watching(self, *, told: bool = True) -> set[int]:
        """What changes from here on is the device's work.

        Args:
            told: Whether it matters which pages have changed before.

        Returns:
            These pages.
        """
        changed = _pages(self.bytes != self._before) if told else set()
        self._before[:] = self.bytes
        return changed

    def end_watching(self) -> set[int]:
        """The pages that the device has changed.

        Raises:
            InvariantError: It changed a byte that it may not write.
        """
        if np.array_equal(self.bytes.view(np.uint64), self._before.view(np.uint64)):
            return set()
        differ = self.bytes != self._before
        wrong = np.flatnonzero(differ & ~self.granted)
        if len(wrong):
            self._complain(int(wrong[0]), len(wrong))
        self._before[:] = self.bytes
        return _pages(differ)

    def _complain(self, at: int, count: int) -> None:
        page, was = at // PAGE, int(self._before[at])
        where = f"{self.guest_address(page) + at % PAGE:#x}"
        gone = bool((self._before[page * PAGE : (page + 1) * PAGE] == GONE).all())
        what = "which the guest has taken back" if gone else "which it was not given to write"
        raise InvariantError(
            "L1" if gone else "L10",
            f"the device wrote {count} bytes from guest address {where} on, {what} "
            f"({was:#04x} became {int(self.bytes[at]):#04x})",
        )

    def fill(self, page: int, offset: int, data: bytes) -> None:
        """Write as the driver, which knows its pages."""
        at = page * PAGE + offset
        self.bytes[at : at + len(data)] = np.frombuffer(data, np.uint8)

    def read(self, page: int, offset: int, length: int) -> bytes:
        """Read as the driver."""
        at = page * PAGE + offset
        return self.bytes[at : at + length].tobytes()

    def blank(self, page: int, offset: int, length: int) -> None:
        """Prepare bytes for the device to write."""
        at = page * PAGE + offset
        self.bytes[at : at + length] = UNTOUCHED

    def snapshot(self) -> bytes:
        """All of it."""
        return self.bytes.tobytes()

    def restore(self, content: bytes) -> None:
        """Have it as it was."""
        self.bytes[:] = np.frombuffer(content, np.uint8)

    def close(self) -> None:
        """Let it go."""
        del self.bytes, self.guest
        for backing in self._backings:
            with contextlib.suppress(BufferError):
                backing.close()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)


def _pages(differ: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> set[int]:
    """The pages of the bytes that differ."""
    return set(np.flatnonzero(differ.reshape(-1, PAGE).any(axis=1)).tolist())
