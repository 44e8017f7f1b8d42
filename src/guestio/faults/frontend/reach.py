"""Memory as the driver's addresses have it, and what of it is not translated yet.

Nothing here asks anybody: a translation that is missing is an exception that lists what to ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from guestio.addr import ADDRESS_SPACE, Ordering, Permissions
from guestio.budgets import JUDGE_MISSES
from guestio.iommu import Iotlb
from guestio.vhost_user.memory import SharedMemory

PAGE: Final = 4096
"""Bytes that are asked for at a time."""

Piece = tuple[int, int]
"""A guest physical address and a length."""
Miss = tuple[int, Permissions]
"""An I/O virtual address, the first of its page that is needed, and what is to be done there."""


class MissingError(Exception):
    """Translations are missing.

    Attributes:
        misses: Which, one for each page.
    """

    def __init__(self, misses: list[Miss]) -> None:
        super().__init__(f"{len(misses)} translations are missing")
        self.misses = misses


class UnreachableError(Exception):
    """An address leads nowhere, or not for that purpose.

    Attributes:
        judged: Whether the front-end was blamed for that already, for an answer.
    """

    def __init__(self, reason: str, *, judged: bool = False) -> None:
        super().__init__(reason)
        self.judged = judged


class Reach:
    """What a driver's addresses lead to.

    Attributes:
        shared: The memory that the front-end shares.
        iotlb: Translations of the IOMMU in front of the device.
        translating: Whether there is one.
        denied: Misses that were refused, or not answered, until the access is given up; and
            whether that was judged.
        can_ask: Whether the front-end can be asked for what is missing.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        self.iotlb = Iotlb()
        self.translating = False
        self.denied: dict[Miss, bool] = {}
        self.can_ask = False

    def pieces(self, addr: int, length: int, access: Permissions) -> list[Piece]:
        """Where a range is in guest memory.

        Raises:
            MissingError: Some of it is not translated yet.
            UnreachableError: Some of it leads nowhere.
        """
        if addr + length > ADDRESS_SPACE:
            raise UnreachableError(f"{addr:#x}+{length:#x} passes 2**64")
        if not length:
            return []
        found = [(addr, length)]
        if self.translating:
            found = self._translate(addr, length, access)
        for gpa, size in found:
            if not self.shared.memory.check_range(gpa, size):
                raise UnreachableError(f"{gpa:#x}+{size:#x} is not in shared memory")
        return found

    def _translate(self, addr: int, length: int, access: Permissions) -> list[Piece]:
        found: list[Piece] = []
        misses: list[Miss] = []
        at, end = addr, addr + length
        for start, extent, target, perm in self.iotlb._map.overlapping(addr, length):
            misses += self._missing(at, start, access)
            first, last = max(start, at), min(start + extent, end)
            if perm.allows(access):
                found.append(((target + first - start) % ADDRESS_SPACE, last - first))
            else:
                misses += self._missing(first, last, access)
            at = last
        misses += self._missing(at, end, access)
        if misses:
            if not self.can_ask:
                raise UnreachableError(f"{addr:#x}+{length:#x} is not translated")
            if refused := next((miss for miss in misses if miss in self.denied), None):
                raise UnreachableError(
                    f"the front-end has no translation of {refused[0]:#x} to {access.name}",
                    judged=self.denied[refused],
                )
            raise MissingError(misses)
        return found

    @staticmethod
    def _missing(start: int, end: int, access: Permissions) -> Iterator[Miss]:
        for _ in range(JUDGE_MISSES):
            if start >= end:
                return
            yield start, access
            start = (start | PAGE - 1) + 1

    def covers(self, miss: Miss) -> bool:
        """Whether a miss was met."""
        address, access = miss
        return any(perm.allows(access) for *_, perm in self.iotlb._map.overlapping(address, 1))

    def read(self, addr: int, length: int) -> bytes:
        """Bytes at a driver's address; raises as :meth:`pieces`, and `MemoryVanishedError`."""
        memory = self.shared.memory
        return b"".join(
            memory.read(gpa, size) for gpa, size in self.pieces(addr, length, Permissions.READ)
        )

    def write(self, addr: int, data: bytes) -> None:
        """Write at a driver's address; raises as :meth:`read`."""
        memory, at = self.shared.memory, 0
        for gpa, size in self.pieces(addr, len(data), Permissions.WRITE):
            memory.write(gpa, data[at : at + size])
            at += size

    def load(self, addr: int) -> int:
        """An aligned number of 16 bits, in one access; raises as :meth:`read`."""
        ((gpa, _),) = self.pieces(addr, 2, Permissions.READ)
        return self.shared.memory.load(gpa, 2, Ordering.SEQ_CST)

    def store(self, addr: int, value: int) -> None:
        """Store a number of 16 bits, in one access, after all before; raises as :meth:`read`."""
        ((gpa, _),) = self.pieces(addr, 2, Permissions.WRITE)
        self.shared.memory.store(gpa, value, 2, Ordering.SEQ_CST)
