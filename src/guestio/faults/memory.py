"""The guest memory of a check: one file, a known content, and what has changed in it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np

from guestio.addr import Ordering
from guestio.memory import Backing, GuestRegionCollection, MmapRegion
from guestio.vhost_user.messages import MemoryRegion, MemoryTable

Bytes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""Contents of memory."""

BASE: Final = 1 << 20
"""Guest address of the first byte; address 0 is no memory, as a forgotten field would have it."""
USER: Final = 0x7F5A_0000_0000
"""The user address that the back-end is told for the guest address 0; nothing is there."""
SIZE: Final = 2 << 20
"""Bytes."""
CANARY: Final = 0xA5
"""What memory is filled with."""


class Ram:
    """Guest memory in one file, filled with :data:`CANARY`; pieces of it are handed out in order.

    Args:
        start: Guest address.
        size: bytes.
        offset: Where in the file it begins, bytes.

    Attributes:
        start: Guest address.
        size: bytes.
        offset: Where in the file it begins, bytes.
        fd: The file, to be sent.
    """

    def __init__(self, start: int = BASE, size: int = SIZE, offset: int = 0) -> None:
        self.start, self.size, self.offset = start, size, offset
        self.fd = os.memfd_create("guestio-check")
        try:
            os.ftruncate(self.fd, offset + size)
            self._backing = Backing.from_fd(self.fd, size, offset)
            self.memory = GuestRegionCollection.from_regions([MmapRegion(start, self._backing)])
        except BaseException:
            os.close(self.fd)
            raise
        self._next = start
        self.memory.fill(start, size, CANARY)

    def close(self) -> None:
        """Give the memory back."""
        # Mapped memory is not given back while a region table has it.
        del self.memory
        self._backing.close()
        os.close(self.fd)

    @property
    def end(self) -> int:
        """The first guest address behind it."""
        return self.start + self.size

    @property
    def region(self) -> MemoryRegion:
        """How a message describes it."""
        return MemoryRegion(self.start, self.size, self.user(self.start), self.offset)

    @property
    def table(self) -> MemoryTable:
        """A memory table of it alone."""
        return MemoryTable((self.region,))

    @staticmethod
    def user(address: int) -> int:
        """The user address of a guest address."""
        return USER + address

    def take(self, length: int, align: int = 16) -> int:
        """The guest address of fresh memory.

        Raises:
            ValueError: There is no more; a check that asks for so much is wrong.
        """
        address = -(-self._next // align) * align
        # A gap between pieces, in which a write past the end of one is seen.
        self._next = address + length + 64
        if self._next > self.end:
            raise ValueError(f"a check takes more memory than {self.size} bytes")
        return address

    def place(self, data: bytes, align: int = 16) -> int:
        """The guest address of fresh memory with this content."""
        address = self.take(len(data), align)
        self.memory.write(address, data)
        return address

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory."""
        self.memory.write(address, data)

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory."""
        return self.memory.read(address, length)

    def load16(self, address: int) -> int:
        """Read 16 bits, before anything that is read later."""
        return self.memory.load(address, 2, Ordering.ACQUIRE)

    def store16(self, address: int, value: int) -> None:
        """Write 16 bits, behind everything that was written before."""
        # Also before what is read next: a driver must look at flags and indices afterwards.
        self.memory.store(address, value, 2, Ordering.SEQ_CST)

    def snapshot(self) -> Bytes:
        """All of it, to be compared later."""
        return np.frombuffer(self.memory.read(self.start, self.size), np.uint8)

    def stray(
        self,
        before: Bytes,
        allowed: Iterable[tuple[int, int]],
    ) -> int | None:
        """The first address that has changed though it may not.

        Args:
            before: What it was.
            allowed: Addresses and lengths of what may change.
        """
        changed = np.flatnonzero(self.snapshot() != before)
        if not len(changed):
            return None
        mask = np.zeros(self.size, bool)
        for address, length in allowed:
            first = max(address - self.start, 0)
            mask[first : max(first, address - self.start + length)] = True
        bad = changed[~mask[changed]]
        return self.start + int(bad[0]) if len(bad) else None
